"""The table for the choice of a model: quality, memory and speed of a model and its INT8 checkpoints, from one run.

`smoothquant evaluate ... --baseline MODEL --table DIR` writes DIR/table.md, DIR/table.json and DIR/table.png.
"""

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError

from ..doctor import machine
from ..evaluation.columns import COLUMNS, cells

KEYS = (
    "perplexity", "perplexity_change", "last_word_accuracy", "memory_bytes", "peak_memory_bytes", "first_token_seconds",
    "tokens_per_second_batch_1", "tokens_per_second_batch_16",
)  # fmt: skip
SHOWN = tuple(column for column in COLUMNS if column.key in KEYS)


def check(directory: str) -> None:
    """SmoothQuantError if the table could not be drawn or written. Called before the measurements, which take long."""
    try:
        import matplotlib  # noqa: F401

        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (ImportError, OSError) as error:
        expected = "matplotlib, and a folder that can be written"
        fix = "pip install 'vllm-smoothquant[report]', or choose another folder"
        raise SmoothQuantError(f"--table {directory}", expected, error, fix) from error


def write(result: Mapping[str, Any], directory: str, command: str) -> str:
    """Write the three files of `result`, which evaluate() returned, and return the Markdown."""
    folder = Path(directory)
    text = markdown(result, command)
    (folder / "table.md").write_text(text, encoding="utf-8")
    record = json.dumps({"command": command, "machine": machine(), **result}, indent=2, ensure_ascii=False)
    (folder / "table.json").write_text(record + "\n", encoding="utf-8")
    (folder / "table.png").write_bytes(picture(result))
    return text


def markdown(result: Mapping[str, Any], command: str) -> str:
    """The table, and below it how it was measured, on which machine, with which command."""
    rows, text, serve, engine = result["models"], result["text"], result["serve"], result["engine"]
    columns = cells(rows, SHOWN)
    lines = zip(map(name_of, rows), *columns.values(), strict=True)
    passages = rows[0].get("passages")
    return "\n".join([
        "| | " + " | ".join(column.long for column in columns) + " |", "|---" * (1 + len(columns)) + "|",
        *("| " + " | ".join(line) + " |" for line in lines), "",
        f"Perplexity of {text['windows']} windows of {text['seq_len']} tokens of {Path(text['source']).name}, dtype "
        f"{engine['score_dtype']}" + (f"; last words of {passages} of its passages." if passages else "."),
        f"Memory and speed: prompts of {serve['prompt_tokens']} tokens, {serve['new_tokens']} new ones each, medians "
        f"of {serve['repeats']}, dtype {engine['dtype']}, asked of vLLM {engine['vllm']}'s engine, without HTTP.",
        f"{machine()}. `{command}`", "",
    ])  # fmt: skip


def name_of(row: Mapping[str, Any]) -> str:
    return Path(str(row["model"])).name.replace("|", " ")


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG: bars, a panel for each column, the baseline in grey."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .figures import GREY, LINES, STYLE

    rows = result["models"]
    columns = {c: texts for c, texts in cells(rows, SHOWN).items() if c.key != "perplexity_change"}
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    size = (3.3 * across, (0.7 + 0.45 * len(rows)) * down + 0.4)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
        for axes, (column, texts) in zip(panels, columns.items(), strict=False):
            values = [row.get(column.key, 0.0) for row in rows]
            colours = [GREY if row["baseline"] else LINES[i % len(LINES)] for i, row in enumerate(rows)]
            axes.bar_label(axes.barh([name_of(row)[:32] for row in rows], values, color=colours), texts, padding=3)
            axes.set(
                title=f"{column.long} ({'more' if column.more_is_better else 'less'} is better)",
                xlim=(0, max(values) * 1.45 or 1), xticks=[],
            )  # fmt: skip
        for axes in list(figure.axes)[len(columns) :]:
            axes.set_visible(False)
        figure.axes[0].invert_yaxis()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()
