"""Passages whose last word a model shall guess, cut from any text, in the manner of LAMBADA.

    accuracy = share of passages of whose last word every token is the likeliest one, given all tokens before it

A passage is a run of whole sentences of one document, of at least WORDS words, and ends with its last sentence's last
word; the punctuation after it is cut off. LAMBADA's were picked so that people need the whole passage to guess; these
are not, so the figure compares models on one text and nothing else.

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
    """ids: tokens of the whole passage, with those the tokenizer puts first; the last `target` are the last word."""

    ids: list[int]
    target: int


def load_passages(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str, passages: int, max_tokens: int, seed: int
) -> list[Passage]:
    """`passages` passages of at most `max_tokens` tokens, drawn by `seed`. SmoothQuantError where the text is short."""
    found = [passage for text in read_texts(dataset, text_column)["text"] for passage in passages_of(text or "")]
    random.Random(seed).shuffle(found)
    chosen: list[Passage] = []
    for text in found:
        passage = tokenize(text, tokenizer)
        if passage is not None and len(passage["ids"]) <= max_tokens:
            chosen.append(passage)
        if len(chosen) == passages:
            return chosen
    raise SmoothQuantError(
        dataset,
        f"text for {passages} passages that end with a word",
        f"enough for {len(chosen)}",
        "give more text, or fewer --passages (0 for none)",
    )


def passages_of(document: str) -> Iterator[str]:
    """Passages of one document, one after the other, without the punctuation after their last word."""
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
    """None where the tokens of the last word cannot be told from those before it."""
    ids = tokenizer(text)["input_ids"]
    before = tokenizer(text.rpartition(" ")[0])["input_ids"]
    if len(before) >= len(ids) or ids[: len(before)] != before:
        return None
    return {"ids": ids, "target": len(ids) - len(before)}
