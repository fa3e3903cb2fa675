"""The table people choose a model by: quality, memory and speed of a model and its INT8 checkpoints, in one run.

`smoothquant evaluate ... --baseline MODEL --table DIR` writes DIR/table.md, DIR/table.json and DIR/table.png.
"""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError

from ..doctor import machine

# Heading -> key of a row of evaluate.run, how it is written, whether more of it is better.
COLUMNS: dict[str, tuple[str, Callable[[float], str], bool]] = {
    "perplexity": ("perplexity", "{:.3f}".format, False),
    "change": ("perplexity_change", "{:+.2%}".format, False),
    "last word": ("last_word_accuracy", "{:.1%}".format, True),
    "weights in memory": ("memory_bytes", lambda x: f"{x / 2**20:.0f} MiB", False),
    "peak memory": ("peak_memory_bytes", lambda x: f"{x / 2**20:.0f} MiB", False),
    "first token": ("first_token_seconds", lambda x: f"{x * 1000:.0f} ms", False),
    "batch 1": ("tokens_per_second_batch_1", lambda x: f"{x:.1f} tok/s", True),
    "batch 16": ("tokens_per_second_batch_16", lambda x: f"{x:.1f} tok/s", True),
}


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
            f"--table {directory}", expected="matplotlib, and a folder that can be written", got=str(error),
            do="pip install 'vllm-smoothquant[report]', or choose another folder",
        ) from error  # fmt: skip


def write(result: Mapping[str, Any], directory: str, command: str) -> str:
    """Write the three files of `result`, what evaluate.run returned; returns the Markdown."""
    folder = Path(directory)
    text = markdown(result, command)
    (folder / "table.md").write_text(text, encoding="utf-8")
    said = json.dumps({"command": command, "machine": machine(), **result}, indent=2, ensure_ascii=False)
    (folder / "table.json").write_text(said + "\n", encoding="utf-8")
    (folder / "table.png").write_bytes(picture(result))
    return text


def markdown(result: Mapping[str, Any], command: str) -> str:
    rows, text, serve, engine = result["models"], result["text"], result["serve"], result["engine"]
    used = {head: column for head, column in COLUMNS.items() if any(column[0] in row for row in rows)}
    lines = ["| | " + " | ".join(used) + " |", "|---" * (len(used) + 1) + "|"]
    for row in rows:
        cells = [write_as(row[key]) if key in row else "" for key, write_as, _ in used.values()]
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


def name_of(row: Mapping[str, Any]) -> str:
    return Path(str(row["model"])).name.replace("|", " ")


def picture(result: Mapping[str, Any]) -> bytes:
    """Bars, a panel for each column; the baseline in grey."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .figures import GREY, LINES, STYLE

    rows = result["models"]
    used = [(head, *column) for head, column in COLUMNS.items() if head != "change" and column[0] in rows[0]]
    with mpl.rc_context(STYLE):
        across = min(4, len(used))
        down = -(-len(used) // across)
        figure = Figure(figsize=(3.3 * across, (0.7 + 0.45 * len(rows)) * down + 0.4), dpi=120)
        panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
        for axes, (head, key, write_as, more) in zip(panels, used, strict=False):
            values = [row.get(key, 0.0) for row in rows]
            colours = [GREY if row["baseline"] else LINES[i % len(LINES)] for i, row in enumerate(rows)]
            bars = axes.barh([name_of(row)[:32] for row in rows], values, color=colours)
            axes.bar_label(bars, [write_as(v) for v in values], padding=3)
            axes.set_title(f"{head} ({'more' if more else 'less'} is better)")
            axes.set_xlim(0, max(values) * 1.45 or 1)
            axes.set_xticks([])
        panels_left = list(figure.axes)[len(used) :]
        for axes in panels_left:
            axes.set_visible(False)
        figure.axes[0].invert_yaxis()
        figure.set_layout_engine("constrained")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()
