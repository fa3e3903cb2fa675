"""The figures of an evaluation: key, headings, format. `evaluate`, its table and the report all use this list."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"


_speed = "{:.1f} tok/s".format


@dataclass(frozen=True)
class Column:
    """key: of a row of evaluate()'s result. short: heading on a terminal. long: heading on a page.

    error: key of the figure's standard error, if it has one.
    """

    key: str
    short: str
    long: str
    format: Callable[[float], str]
    more_is_better: bool
    error: str = ""


COLUMNS = (
    Column("perplexity", "perplexity", "perplexity", "{:.3f}".format, False),
    Column("perplexity_change", "change", "change", "{:+.2%}".format, False, "perplexity_change_standard_error"),
    Column("kl_divergence", "KL", "KL divergence", "{:.4f}".format, False, "kl_standard_error"),
    Column("top1_agreement", "top-1", "top-1 agreement", "{:.1%}".format, True),
    Column("last_word_accuracy", "last word", "last word", "{:.1%}".format, True),
    Column("disk_bytes", "on disk", "on disk", _mib, False),
    Column("linear_bytes", "linear", "linear layers", _mib, False),
    Column("memory_bytes", "in memory", "weights in memory", _mib, False),
    Column("peak_memory_bytes", "peak", "peak memory", _mib, False),
    Column("first_token_seconds", "first token", "first token", lambda x: f"{x * 1000:.0f} ms", False),
    Column("decode_tokens_per_second", "decode", "decode", _speed, True),
    Column("tokens_per_second_batch_1", "batch 1", "batch 1", _speed, True),
    Column("tokens_per_second_batch_16", "batch 16", "batch 16", _speed, True),
)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two `values`."""
    return statistics.stdev(values) / len(values) ** 0.5


def cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column] = COLUMNS) -> dict[Column, list[str]]:
    """Column -> its text (with its standard error) for every row, "" where the row lacks the figure.

    Columns without any figure are left out.
    """
    return {c: [_text(c, row) for row in rows] for c in columns if any(c.key in row for row in rows)}


def _text(column: Column, row: Mapping[str, Any]) -> str:
    if column.key not in row:
        return ""
    error = f" ± {column.format(float(row[column.error])).lstrip('+')}" if row.get(column.error) else ""
    return column.format(float(row[column.key])) + error
