"""Passages whose last word a model has to predict, cut from any text, in the manner of LAMBADA.

    accuracy = share of the passages in which every token of the last word is the likeliest one, given all tokens before

A passage consists of consecutive whole sentences of one paragraph, with at least WORDS words; the punctuation after its
last word is removed. LAMBADA's passages were selected so that people need the whole passage to predict the word. These
passages are not selected, so the figure only compares models on one text.

Source: Paperno et al., The LAMBADA dataset (arXiv 1606.06031); scored as in lm-eval.
"""

import random
import re
from collections.abc import Iterator
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

from ..inputs.text import read_texts

WORDS = 40  # LAMBADA's passages have 75 words on average


class Passage(TypedDict):
    """ids: all tokens of the passage, with those that the tokenizer adds first; the last `target` are the last word."""

    ids: list[int]
    target: int


def load_passages(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str, passages: int, max_tokens: int, seed: int
) -> list[Passage]:
    """`passages` passages of at most `max_tokens` tokens, chosen by `seed`. SmoothQuantError: too little text."""
    texts = [passage for text in read_texts(dataset, text_column)["text"] for passage in passages_of(text or "")]
    random.Random(seed).shuffle(texts)
    chosen: list[Passage] = []
    for text in texts:
        passage = tokenize(text, tokenizer)
        if passage is not None and len(passage["ids"]) <= max_tokens:
            chosen.append(passage)
        if len(chosen) == passages:
            return chosen
    expected = f"text for {passages} passages that end with a word"
    fix = "give more text, or fewer --passages (0 for none)"
    raise SmoothQuantError(dataset, expected, f"enough for {len(chosen)}", fix)


def passages_of(document: str) -> Iterator[str]:
    """The passages of one document in its order, without the punctuation after their last word."""
    words: list[str] = []
    for paragraph in document.split("\n"):
        for sentence in re.split(r"(?<=[.!?])\s+", paragraph.strip()):
            words += sentence.split()
            passage = " ".join(words).rstrip(".!?\"')”’")
            if sentence.endswith((".", "!", "?")) and len(words) >= WORDS:
                words = []
                if passage.rpartition(" ")[2].isalpha():
                    yield passage
        words = []  # a passage stays within its paragraph


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Passage | None:
    """None if the text without its last word has other tokens, so that the last word has none of its own."""
    ids = tokenizer(text)["input_ids"]
    context = tokenizer(text.rpartition(" ")[0])["input_ids"]
    if len(context) >= len(ids) or ids[: len(context)] != context:
        return None
    return {"ids": ids, "target": len(ids) - len(context)}
