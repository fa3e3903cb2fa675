"""Calibration samples: windows of `seq_len` tokens, chosen at random from a data set by a seed.

Documents come in shuffled order. A document of at least `seq_len` tokens gives its first window at once; its other
windows come after all documents, so that many documents are seen before any is seen twice. Shorter documents are joined
until they fill a window. Every window is full, because padding would enter the statistics.
"""

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

from ..options import check_positive
from ..running.forward import Batch
from .chat import has_text, read_messages, read_template, render
from .documents import column_of_texts, document_column, is_text, read_table
from .faults import explain
from .images import find_pictures, read_images, without_images

SHORTEST = 16  # tokens of a text that discovery follows


@dataclass(frozen=True)
class Samples:
    """input_ids int64 [samples, seq_len]; dataset, sha256 and seed record their origin for the manifest.

    skipped: empty rows among those that were read. images: samples with images (images.py); input_ids is then their
    text. image_token: what stands for an image in them.
    """

    input_ids: torch.Tensor
    dataset: str
    sha256: str
    seed: int
    skipped: int = 0
    images: tuple[Mapping[str, torch.Tensor], ...] = ()
    image_token: int | None = None

    def batches(self, size: int) -> list[Batch]:
        """All samples: first those with images, one by one, then `size` of the texts at a time."""
        return [*self.images, *self.input_ids.split(size)]


@dataclass
class _Tally:
    """What was read and left out. empty: rows, from 1. parts: parts of messages that are no text."""

    read: int = 0
    empty: list[int] = field(default_factory=list)
    parts: int = 0


def load_samples(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str, samples: int, seq_len: int, seed: int,
    chat_template: str | None = None, vocab_rows: int | None = None, quiet: bool = False, model: str = "",
    config: PreTrainedConfig | None = None,
) -> Samples:  # fmt: skip
    """`samples` windows of `seq_len` tokens from `dataset`.

    dataset: a file or a folder of files (data_files.SUFFIXES), or a hub data set `NAME[:CONFIG][@SPLIT]`. text_column:
    of texts or chats. chat_template: a Jinja file for chats, instead of the tokenizer's. vocab_rows: rows of the input
    embedding; None if they are not known. quiet: do not say on stderr what was left out. model, config: its name and
    its configuration, for a data set with images.
    Errors (SmoothQuantError): unreadable or empty data, no such column, too little text for these samples, a chat that
    the template refuses, a token without a row in the embedding.
    """
    check_positive(samples=samples, seq_len=seq_len)
    table = read_table(dataset)
    column = document_column(table, dataset, text_column, quiet=quiet)
    if chat_template is not None and is_text(table.features[column]):
        expected, fix = "a column of chats", "leave the template out, or name another column with --text-column"
        raise SmoothQuantError("--chat-template", expected, f"the texts of {column!r}", fix)
    if config is not None and (pictures := find_pictures(table, dataset, model, config, quiet=quiet)) is not None:
        if chat_template is not None:
            pictures = replace(pictures, chat_template=read_template(dataset, column, tokenizer, chat_template))
        rows = read_images(table, dataset, column, pictures, samples=samples, seed=seed)
        return _with_images(rows, dataset, tokenizer, vocab_rows, pictures.token, seq_len=seq_len, seed=seed)
    tally = _Tally()
    documents = _documents(dataset, table.select_columns([column]), tokenizer, chat_template, seed, tally)
    windows = list(islice(_windows(documents, seq_len, seed), samples))
    empty = _empty_rows(tally, column, len(table))
    if len(tally.empty) == tally.read:
        raise SmoothQuantError(dataset, "at least one row with text", empty, "give some text")
    if len(windows) < samples:
        got = f"enough for {len(windows)}" + (f" ({empty})" if tally.empty else "")
        fix = "give more text, or fewer --samples or a shorter --seq-len"
        raise SmoothQuantError(dataset, f"text for {samples} samples of {seq_len} tokens", got, fix)
    if not quiet:
        _report(dataset, empty, tally)
    input_ids = torch.tensor(windows, dtype=torch.int64)
    check_tokens(dataset, input_ids, tokenizer, vocab_rows)
    sha256 = hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()
    return Samples(input_ids, dataset, sha256, seed, len(tally.empty))


def _with_images(
    rows: Sequence[Mapping[str, torch.Tensor]], dataset: str, tokenizer: PreTrainedTokenizerBase,
    vocab_rows: int | None, token: int, *, seq_len: int, seed: int,
) -> Samples:  # fmt: skip
    text = without_images(rows, token, seq_len)
    if text.shape[1] < SHORTEST:
        expected, fix = f"rows with {2 * SHORTEST} tokens of text in all", "give more rows, or longer texts"
        raise SmoothQuantError(dataset, expected, str(text.numel()), fix)
    for row in rows:
        check_tokens(dataset, row["input_ids"], tokenizer, vocab_rows)
    digest = hashlib.sha256()
    for row in rows:
        for tensor in row.values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return Samples(text, dataset, digest.hexdigest(), seed, images=tuple(rows), image_token=token)


def read_texts(dataset: str, column: str) -> Dataset:
    """The column of texts, named "text": one document in each row. SmoothQuantError: it is none, or is not UTF-8."""
    table = column_of_texts(read_table(dataset), dataset, column)
    return table.rename_column(column, "text") if column != "text" else table


def check_tokens(
    dataset: str, input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, vocab_rows: int | None
) -> None:
    """SmoothQuantError: one of `input_ids` has no row in the input embedding."""
    if vocab_rows is None or not len(beyond := input_ids[input_ids >= vocab_rows]):
        return
    token = int(beyond[0])
    expected = f"tokens of the {vocab_rows} rows of the input embedding"
    got = f"token {token} ({tokenizer.convert_ids_to_tokens(token)})"
    fix = "take this token out of the text, or use the model's own tokenizer"
    raise SmoothQuantError(f"{dataset}: the tokens", expected, got, fix)


def _documents(
    dataset: str, table: Dataset, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, seed: int,
    tally: _Tally,
) -> Iterator[list[int]]:  # fmt: skip
    """The token ids of each document that is not empty, in shuffled order. table: one column. tally is counted up."""
    (column,) = table.column_names
    template: str | None = None
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    for index in order:
        try:
            document: Any = table[index][column]
        except UnicodeDecodeError as error:  # text of some files is decoded only here
            raise explain(dataset, error) from error
        tally.read += 1
        where = f"{dataset}: row {index + 1} of {column!r}"
        chat = not (document is None or isinstance(document, str))
        if chat:
            document, parts = read_messages(document, where)
            tally.parts += parts
        if not document or not (has_text(document) if chat else document.strip()):
            tally.empty.append(index + 1)
            continue
        if chat:
            template = template or read_template(dataset, column, tokenizer, chat_template)
            document = render(tokenizer, template, document, where)
        # A chat template writes the special tokens itself. verbose=False: the warning about documents longer than the
        # model's positions is wrong, they are cut here.
        special = {"add_special_tokens": False} if chat else {}
        yield tokenizer(document, verbose=False, **special)["input_ids"]


def _report(dataset: str, empty: str, tally: _Tally) -> None:
    """Say on stderr what of `dataset` is not in the samples."""
    if tally.empty:
        print(f"{dataset}: {empty}: skipped, the first is row {min(tally.empty)}", file=sys.stderr)
    if tally.parts:
        print(f"{dataset}: parts of messages that are no text: {tally.parts} left out", file=sys.stderr)


def _empty_rows(tally: _Tally, column: str, rows: int) -> str:
    """Such as "3 of 12 rows of text are empty"; if not all rows were read, also how many there are."""
    more = f" ({rows} in all)" if tally.read < rows else ""
    return f"{len(tally.empty)} of {tally.read} rows{more} of {column} are empty"


def _windows(documents: Iterable[list[int]], seq_len: int, seed: int) -> Iterator[list[int]]:
    later: list[list[int]] = []
    joined: list[int] = []
    for ids in documents:
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
