"""Calibration samples: windows of `seq_len` tokens, drawn at random from a data set and fixed by a seed.

Documents come in shuffled order. A document of at least `seq_len` tokens gives its first whole window at once and keeps
the others back, so that many documents are seen before any is seen twice; shorter documents are joined until they fill
a window. Every window is full: an attention mask, and padding that would enter the statistics, are not needed.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

# The paper's: "512 random sentences from the validation set of the Pile" (section 5.1), as its authors published it.
DEFAULT_DATASET = "mit-han-lab/pile-val-backup"
FILE_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Samples:
    """input_ids int64 [samples, seq_len]; the rest says where they came from, for the manifest."""

    input_ids: torch.Tensor
    dataset: str
    sha256: str
    seed: int


def load_samples(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str, samples: int, seq_len: int, seed: int
) -> Samples:
    """`samples` windows of `seq_len` tokens from `dataset`.

    dataset: a file (.txt, .jsonl, .parquet, .csv) or a hub data set `NAME[:CONFIG][@SPLIT]`.
    Errors (SmoothQuantError): unreadable or empty data, no such text column, too little text for what was asked.
    """
    for option, value in (("--samples", samples), ("--seq-len", seq_len)):
        if value < 1:
            raise SmoothQuantError(option, "at least 1", str(value), "give a positive number")
    texts = read_texts(dataset, text_column)
    found = []
    for window in _windows(_shuffled(texts, seed), tokenizer, seq_len, seed):
        found.append(window)
        if len(found) == samples:
            break
    if len(found) < samples:
        raise SmoothQuantError(
            dataset,
            f"text for {samples} samples of {seq_len} tokens",
            f"enough for {len(found)}",
            "give more text, or fewer --samples or a shorter --seq-len",
        )
    input_ids = torch.tensor(found, dtype=torch.int64)
    return Samples(input_ids, dataset, hashlib.sha256(input_ids.numpy().tobytes()).hexdigest(), seed)


def read_texts(dataset: str, text_column: str) -> Dataset:
    """The column of texts, one document a row."""
    table = _load(dataset)
    if text_column not in table.column_names:
        raise SmoothQuantError(
            dataset,
            f"a text column {text_column!r}",
            f"columns {', '.join(table.column_names) or 'none'}",
            "name one with --text-column",
        )
    if len(table) == 0:
        raise SmoothQuantError(dataset, "at least one document", "an empty data set", "give some text")
    return table.select_columns([text_column]).rename_column(text_column, "text") if text_column != "text" else table


def _load(dataset: str) -> Dataset:
    path = Path(dataset)
    reader = FILE_READERS.get(path.suffix.lower())
    try:
        if reader is not None:
            if not path.is_file():
                raise SmoothQuantError(dataset, "a readable file", "no such file", "check the path")
            if path.stat().st_size == 0:
                raise SmoothQuantError(dataset, "at least one document", "an empty file", "give some text")
            # A plain text file is one document; split= names the only split a file has.
            options = {"sample_by": "document"} if reader == "text" else {}
            return load_dataset(reader, data_files=str(path), split="train", **options)
        name, _, split = dataset.partition("@")
        name, _, config = name.partition(":")
        loaded = load_dataset(name, config or None, split=split or None)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, SmoothQuantError):
            raise
        raise SmoothQuantError(
            dataset,
            "a data set: a file ending in " + ", ".join(FILE_READERS) + " or a hub name",
            error.__cause__ or error,
            "check the path or the name, and that the hub can be reached",
        ) from error
    if isinstance(loaded, DatasetDict):
        return loaded["validation"] if "validation" in loaded else next(iter(loaded.values()))
    return loaded


def _shuffled(texts: Dataset, seed: int) -> Iterator[str]:
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    for index in order:
        text = texts[index]["text"]
        if isinstance(text, str) and text.strip():
            yield text


def _windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> Iterator[list[int]]:
    kept_back: list[list[int]] = []
    joined: list[int] = []
    for text in texts:
        # verbose=False: documents longer than the model's positions are cut below, the warning would mislead.
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < seq_len:
            joined += ids
            if len(joined) >= seq_len:
                yield joined[:seq_len]
                joined = joined[seq_len:]
            continue
        yield ids[:seq_len]
        kept_back += [ids[i : i + seq_len] for i in range(seq_len, len(ids) - seq_len + 1, seq_len)]
    random.Random(seed).shuffle(kept_back)
    yield from kept_back
