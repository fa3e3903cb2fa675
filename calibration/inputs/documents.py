"""The rows of a data set as a table, and the column of it that holds the documents."""

import glob
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.packaged_modules.json.json import JsonConfig

from vllm_smoothquant.format.errors import SmoothQuantError

from .chat import MESSAGE_KEYS
from .data_files import files_of, has_pictures, plain_file, reader_of
from .faults import explain

DEFAULT_COLUMN = "text"
# Columns that hold chats in most data sets; one of them is used if there is no column "text".
CHAT_COLUMNS = ("messages", "conversations")
OPTIONS: dict[str, dict[str, Any]] = {
    # A plain text file is one document. utf-8-sig takes a BOM away.
    "text": {"sample_by": "document", "encoding": "utf-8-sig"},
    # Otherwise chats with some sets of columns need another package, which rewrites them.
    "json": {"parse_agent_traces": False} if hasattr(JsonConfig, "parse_agent_traces") else {},
}


def read_table(dataset: str) -> Dataset:
    """All rows of `dataset`, which stay on disk. SmoothQuantError: it cannot be read, or has no row."""
    pictures = has_pictures(dataset)
    files = None if pictures else files_of(dataset)
    try:
        if pictures:
            table = load_dataset("imagefolder", data_dir=dataset, split="train", drop_labels=True)
        else:
            table = _read_hub(dataset) if files is None else _read_files(files)
    except SmoothQuantError:
        raise
    except Exception as error:  # of any kind, because the readers pass on what other libraries raise
        raise explain(dataset, error) from error
    if len(table) == 0:
        raise SmoothQuantError(dataset, "at least one document", "an empty data set", "give some text")
    return table


def column_of_texts(table: Dataset, dataset: str, name: str) -> Dataset:
    """The column `name` alone, if its rows are texts. SmoothQuantError: another type, or text that is not UTF-8."""
    if not is_text(table.features.get(name)):
        raise _no_column(table, dataset, f"a text column {name!r}")
    try:
        table.data.column(name).validate(full=True)
    except pyarrow.ArrowInvalid as error:
        raise explain(dataset, error) from error
    return table.select_columns([name])


def document_column(table: Dataset, dataset: str, name: str, *, quiet: bool = False) -> str:
    """`name`, or the chat column that stands for the default name; said on stderr unless `quiet`.

    Errors (SmoothQuantError): no such column, or one whose rows are neither texts nor chats.
    """
    chats = [c for c in CHAT_COLUMNS if c in table.column_names and _may_be_chat(table.features[c])]
    if name == DEFAULT_COLUMN and name not in table.column_names and len(chats) == 1:
        if not quiet:
            print(f"{dataset}: no column {name!r}, so the chats of {chats[0]!r} are used", file=sys.stderr)
        return chats[0]
    if name not in table.column_names:
        raise _no_column(table, dataset, f"a text column {name!r}")
    feature = table.features[name]
    # A column without any value has a type that says nothing.
    if not (is_text(feature) or _may_be_chat(feature) or table.data.column(name).null_count == len(table)):
        raise _no_column(table, dataset, f"texts, or lists of messages, in the column {name!r}")
    return name


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def type_name(feature: Any) -> str:
    """The type of a column in words, such as "list of {role: string, content: string}"."""
    if isinstance(feature, Value):
        return str(feature.dtype).removeprefix("large_")
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{key}: {type_name(value)}" for key, value in feature.items()) + "}"
    if (inner := getattr(feature, "feature", None)) is not None:
        return f"list of {type_name(inner)}"
    return "any JSON" if type(feature).__name__ == "Json" else type(feature).__name__


def _may_be_chat(feature: Any) -> bool:
    """Whether the rows are lists of messages, or of values whose type only each row tells."""
    if type(feature).__name__ == "Json":
        return True
    inner = getattr(feature, "feature", None)
    if isinstance(inner, dict):
        return any(keys <= inner.keys() for keys in MESSAGE_KEYS)
    return type(inner).__name__ == "Json" or (isinstance(inner, Value) and inner.dtype == "null")


def _no_column(table: Dataset, dataset: str, expected: str) -> SmoothQuantError:
    columns = ", ".join(f"{name} ({type_name(feature)})" for name, feature in table.features.items())
    return SmoothQuantError(dataset, expected, f"columns {columns or 'none'}", "name one with --text-column")


def _read_files(files: list[Path]) -> Dataset:
    reader = reader_of(files[0]) or ""
    paths = [glob.escape(str(plain_file(file))) for file in files]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `explain` says what it logs about a damaged file
    try:
        # "train" is what `datasets` calls the only split of files.
        table = load_dataset(reader, data_files=paths, split="train", **OPTIONS.get(reader, {}))
    finally:
        datasets.logging.set_verbosity(verbosity)
    # UTF-16 without a byte order mark is UTF-8 with a NUL after each letter.
    if "\0" in "".join(table.column_names) or (reader == "text" and _has_nul(table)):
        raise ValueError("NUL characters")
    return table


def _has_nul(table: Dataset) -> bool:
    return bool(pyarrow.compute.any(pyarrow.compute.match_substring(table.data.column("text"), "\0")).as_py())


def _read_hub(dataset: str) -> Dataset:
    name, _, split = dataset.partition("@")
    name, _, config = name.partition(":")
    table = load_dataset(name, config or None, split=split or None)
    if isinstance(table, DatasetDict):
        return table["validation"] if "validation" in table else next(iter(table.values()))
    return table
