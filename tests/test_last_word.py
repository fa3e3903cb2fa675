"""Passages for last words: their limits, and the tokens of the last word."""

import json

import pytest

from calibration.evaluation import last_word
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError

SENTENCE = "One two three four five six seven eight nine ten."


def test_passages_are_whole_sentences_and_end_with_a_word():
    document = " ".join([SENTENCE] * 9)
    passages = list(last_word.passages_of(document))
    assert [len(p.split()) for p in passages] == [40, 40]
    assert all(p.endswith("nine ten") for p in passages)


def test_a_passage_stays_within_its_paragraph():
    assert not list(last_word.passages_of("\n".join([SENTENCE] * 9)))


def test_a_number_is_not_a_word():
    assert not list(last_word.passages_of(" ".join([SENTENCE] * 3) + " And all of them are more than the number 12."))


def test_all_tokens_of_the_last_word_are_the_target():
    passage = last_word.tokenize("The capital of France is Paris", tiny_checkpoints.tokenizer())
    assert passage is not None
    assert tiny_checkpoints.tokenizer().decode(passage["ids"][-passage["target"] :]) == " Paris"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    documents = [" ".join([SENTENCE.replace("ten", word)] * 4) for word in ("ten", "eleven", "twelve")]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def load(text, passages, **options):
    options = {"text_column": "text", "max_tokens": 500, "seed": 0} | options
    return last_word.load_passages(text, tiny_checkpoints.tokenizer(), passages=passages, **options)


def test_the_seed_chooses_the_passages(text):
    assert load(text, 3) == load(text, 3)
    orders = {tuple(len(p["ids"]) for p in load(text, 3, seed=seed)) for seed in range(8)}
    assert len(orders) > 1


def test_too_little_text_is_an_error(text):
    with pytest.raises(SmoothQuantError, match="expected text for 4 passages that end with a word, got enough for 3"):
        load(text, 4)


def test_longer_passages_are_left_out(text):
    with pytest.raises(SmoothQuantError, match="got enough for 0"):
        load(text, 1, max_tokens=50)
