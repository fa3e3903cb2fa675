"""Calibration samples: windows of `seq_len` tokens, chosen at random from a data set by a seed.

Documents come in shuffled order. A document of at least `seq_len` tokens gives its first window at once; its other
windows come after all documents, so that many documents are seen before any is seen twice. Shorter documents are joined
until they fill a window. Every window is full, because padding would enter the statistics.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

from ..options import check_positive

FILE_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Samples:
    """input_ids int64 [samples, seq_len]; the other fields record their origin for the manifest."""

    input_ids: torch.Tensor
    dataset: str
    sha256: str
    seed: int


def load_samples(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str, samples: int, seq_len: int, seed: int
) -> Samples:
    """`samples` windows of `seq_len` tokens from `dataset`.

    dataset: a file (.txt, .jsonl, .parquet, .csv) or a hub data set `NAME[:CONFIG][@SPLIT]`.
    Errors (SmoothQuantError): unreadable or empty data, no such text column, too little text for these samples.
    """
    check_positive(samples=samples, seq_len=seq_len)
    texts = _shuffled(read_texts(dataset, text_column), seed)
    windows = list(islice(_windows(texts, tokenizer, seq_len, seed), samples))
    if len(windows) < samples:
        fix = "give more text, or fewer --samples or a shorter --seq-len"
        raise SmoothQuantError(
            dataset, f"text for {samples} samples of {seq_len} tokens", f"enough for {len(windows)}", fix
        )
    input_ids = torch.tensor(windows, dtype=torch.int64)
    return Samples(input_ids, dataset, hashlib.sha256(input_ids.numpy().tobytes()).hexdigest(), seed)


def read_texts(dataset: str, text_column: str) -> Dataset:
    """The column of texts, named "text": one document in each row."""
    table = _load(dataset)
    if text_column not in table.column_names:
        columns = f"columns {', '.join(table.column_names) or 'none'}"
        raise SmoothQuantError(dataset, f"a text column {text_column!r}", columns, "name one with --text-column")
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
            # A plain text file is one document. "train" is what `datasets` calls the only split of a file.
            options = {"sample_by": "document"} if reader == "text" else {}
            return load_dataset(reader, data_files=str(path), split="train", **options)
        name, _, split = dataset.partition("@")
        name, _, config = name.partition(":")
        table = load_dataset(name, config or None, split=split or None)
    except SmoothQuantError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        expected = f"a data set: a file ending in {', '.join(FILE_READERS)} or a hub name"
        fix = "check the path or the name, and that the hub can be reached"
        raise SmoothQuantError(dataset, expected, error.__cause__ or error, fix) from error
    if isinstance(table, DatasetDict):
        return table["validation"] if "validation" in table else next(iter(table.values()))
    return table


def _shuffled(texts: Dataset, seed: int) -> Iterator[str]:
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    for index in order:
        text = texts[index]["text"]
        if isinstance(text, str) and text.strip():
            yield text


def _windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> Iterator[list[int]]:
    later: list[list[int]] = []
    joined: list[int] = []
    for text in texts:
        # verbose=False: the warning about documents longer than the model's positions is wrong, they are cut here.
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < seq_len:
            joined += ids
            if len(joined) >= seq_len:
                yield joined[:seq_len]
                joined = joined[seq_len:]
            continue
        yield ids[:seq_len]
        later += [ids[i : i + seq_len] for i in range(seq_len, len(ids) - seq_len + 1, seq_len)]
    random.Random(seed).shuffle(later)
    yield from later
