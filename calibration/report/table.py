"""The table people choose a model by: quality, memory and speed of a model and its INT8 checkpoints, in one run.

`smoothquant evaluate ... --baseline MODEL --table DIR` writes DIR/table.md, DIR/table.json and DIR/table.png.
"""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError

from ..doctor import machine
from ..evaluation.columns import COLUMNS, Column

KEYS = (
    "perplexity", "perplexity_change", "last_word_accuracy", "memory_bytes", "peak_memory_bytes", "first_token_seconds",
    "tokens_per_second_batch_1", "tokens_per_second_batch_16",
)  # fmt: skip


def check(directory: str) -> None:
    """Before the work is done: that there can be a table, and a place for it."""
    try:
        import matplotlib  # noqa: F401

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (ImportError, OSError) as error:
        raise SmoothQuantError(
            f"--table {directory}",
            "matplotlib, and a folder that can be written",
            error,
            "pip install 'vllm-smoothquant[report]', or choose another folder",
        ) from error


def write(result: Mapping[str, Any], directory: str, command: str) -> str:
    """Write the three files of `result`, what evaluate() returned; returns the Markdown."""
    folder = Path(directory)
    text = markdown(result, command)
    (folder / "table.md").write_text(text, encoding="utf-8")
    record = json.dumps({"command": command, "machine": machine(), **result}, indent=2, ensure_ascii=False)
    (folder / "table.json").write_text(record + "\n", encoding="utf-8")
    (folder / "table.png").write_bytes(picture(result))
    return text


def markdown(result: Mapping[str, Any], command: str) -> str:
    rows, text, serve, engine = result["models"], result["text"], result["serve"], result["engine"]
    columns = _columns(rows)
    lines = ["| | " + " | ".join(column.long for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [column.format(row[column.key]) if column.key in row else "" for column in columns]
        lines.append(f"| {name_of(row)} | " + " | ".join(cells) + " |")
    passages = rows[0].get("passages")
    return "\n".join([
        *lines, "",
        f"Perplexity of {text['windows']} windows of {text['seq_len']} tokens of {Path(text['source']).name}, dtype "
        f"{engine['score_dtype']}" + (f"; last words of {passages} of its passages." if passages else "."),
        f"Memory and speed: prompts of {serve['prompt_tokens']} tokens, {serve['new_tokens']} new ones each, medians "
        f"of {serve['repeats']}, dtype {engine['dtype']}, asked of vLLM {engine['vllm']}'s engine, without HTTP.",
        f"{machine()}. `{command}`", "",
    ])  # fmt: skip


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    return [column for column in COLUMNS if column.key in KEYS and any(column.key in row for row in rows)]


def name_of(row: Mapping[str, Any]) -> str:
    return Path(str(row["model"])).name.replace("|", " ")


def picture(result: Mapping[str, Any]) -> bytes:
    """Bars, a panel for each column; the baseline in grey."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .figures import GREY, LINES, STYLE

    rows = result["models"]
    columns = [column for column in _columns(rows) if column.key != "perplexity_change"]
    with mpl.rc_context(STYLE):
        across = min(4, len(columns))
        down = -(-len(columns) // across)
        figure = Figure(figsize=(3.3 * across, (0.7 + 0.45 * len(rows)) * down + 0.4), dpi=120)
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
        for axes, column in zip(panels, columns, strict=False):
            values = [row.get(column.key, 0.0) for row in rows]
            colours = [GREY if row["baseline"] else LINES[i % len(LINES)] for i, row in enumerate(rows)]
            bars = axes.barh([name_of(row)[:32] for row in rows], values, color=colours)
            axes.bar_label(bars, [column.format(v) for v in values], padding=3)
            axes.set_title(f"{column.long} ({'more' if column.more_is_better else 'less'} is better)")
            axes.set_xlim(0, max(values) * 1.45 or 1)
            axes.set_xticks([])
        for axes in list(figure.axes)[len(columns) :]:
            axes.set_visible(False)
        figure.axes[0].invert_yaxis()
        figure.set_layout_engine("constrained")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()
