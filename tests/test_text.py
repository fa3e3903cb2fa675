"""Calibration samples: full windows, from many documents first, and the same for the same seed."""

import json

import pytest

from calibration.inputs import text
from tests.helpers.tiny_checkpoints import save_text, tokenizer
from vllm_smoothquant.format.errors import SmoothQuantError


def load(path, **options):
    options = {"text_column": "text", "samples": 4, "seq_len": 16, "seed": 0} | options
    return text.load_samples(str(path), tokenizer(), **options)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def test_every_window_is_full_and_from_the_text(tmp_path):
    texts = ["a" * 40, "b" * 40, "c" * 7, "d" * 7, "e" * 7]
    ids = load(write(tmp_path / "t.jsonl", texts), samples=5).input_ids
    assert ids.shape == (5, 16)
    decoded = [tokenizer().decode(row) for row in ids]
    assert sum(set(d) in ({"a"}, {"b"}) for d in decoded) == 4  # two from each long document
    assert any(set(d) <= set("cde") for d in decoded)  # short documents, joined


def test_each_long_document_is_seen_before_any_is_seen_twice(tmp_path):
    texts = [letter * 160 for letter in "abcdefgh"]
    ids = load(write(tmp_path / "t.jsonl", texts), samples=8).input_ids
    assert sorted(tokenizer().decode(row)[0] for row in ids) == list("abcdefgh")


def test_the_seed_decides_which_samples(tmp_path):
    path = save_text(tmp_path / "t.jsonl")
    assert load(path).sha256 == load(path).sha256
    assert load(path).sha256 != load(path, seed=1).sha256


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".csv"])
def test_other_files_hold_the_same_text(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    text = "x" * 100
    if suffix == ".txt":
        path.write_text(text)
    else:
        from datasets import Dataset

        table = Dataset.from_dict({"text": [text]})
        (table.to_parquet if suffix == ".parquet" else table.to_csv)(str(path))
    assert set(tokenizer().decode(load(path).input_ids[0])) == {"x"}


def test_another_text_column(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"id": 1, "note": "y" * 200}) + "\n")
    assert set(tokenizer().decode(load(path, text_column="note").input_ids[0])) == {"y"}


FAULTS = {
    "no such file": (None, {}, "no such file"),
    "empty file": ("", {}, "an empty file"),
    "not json": ("{broken", {}, "a data set"),
    "no such column": ('{"note": "abc"}\n', {}, "columns note"),
    "blank texts": ('{"text": " "}\n' * 9, {}, "enough for 0"),
    "too little": ('{"text": "abcdefghijklmnopqrst"}\n', {}, "enough for 1"),
    "no samples": ('{"text": "abc"}\n', {"samples": 0}, "at least 1"),
    "no length": ('{"text": "abc"}\n', {"seq_len": 0}, "at least 1"),
}


@pytest.mark.parametrize(("content", "options", "message"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_an_error_in_one_line(tmp_path, content, options, message):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SmoothQuantError, match=message) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
