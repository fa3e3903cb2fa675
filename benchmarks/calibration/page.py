"""docs/calibration.md and docs/calibration.png, written from the figures of run.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.calibration import synthetic
from calibration.options import Options

OUTPUT = Path(__file__).parents[2] / "docs" / "calibration.md"
TITLES = {"bare": "bare forward passes", "ours": "smoothquant calibrate", "theirs": "llm-compressor oneshot"}
STAGES = ("load", "discover", "observe", "gate", "quantize and export")
DEFAULTS = (Options.samples, Options.seq_len)  # the cost of large models is estimated for these
NOISE = 0.1  # of KL divergence: rows of the default scheme differ from their median by up to 8 %, without a trend
LARGE = ("70B", "405B")


def write(figures: Mapping[str, Any], command: str) -> None:
    """Write the page, with the parts that have been measured."""
    text = f"# What a calibration costs\n\nWritten by `{command}`; not by hand.\n"
    for part, section in (("compare", _compare), ("quality", _quality), ("growth", _growth), ("identical", _identical)):
        if part in figures:
            text += section(figures[part]["figures"]) + f"\nMeasured on {figures[part]['machine']}\n"
            if part == "compare" and "quality" in figures:
                text += _reached(figures[part]["figures"], figures["quality"])
    OUTPUT.write_text(text)
    if "growth" in figures:
        _plot(figures["growth"]["figures"]["rows"], OUTPUT.with_suffix(".png"))


def _compare(figures: Mapping[str, Any]) -> str:
    def middle(name: str, key: str) -> float:
        return median(run[key] for run in figures["runs"][name])

    rows = ""
    for name, title in TITLES.items():
        runs = [run["part"] for run in figures["runs"][name]]
        seconds = [middle(name, key) for key in ("wall", "cpu", "part")]
        memory = [middle(name, key) for key in ("anonymous", "resident")]
        rows += f"| {title} | " + " | ".join(f"{x:.1f}" for x in seconds) + f" ({min(runs):.1f} to {max(runs):.1f}) | "
        rows += f"{seconds[2] / middle('bare', 'part'):.2f} | " + " | ".join(f"{x:.2f}" for x in memory)
        rows += f" | {_score(figures['scores'][name], figures['scores']['bare'])}"
    rate = figures["flops"] / middle("bare", "part") / 1e9
    share = [middle("ours", key) / middle("theirs", key) for key in ("wall", "part")]
    return (
        f"\n## Beside llm-compressor\n\nSmolLM2-135M-Instruct, {figures['samples']} x {figures['seq_len']} tokens, the "
        f"same for all, in batches of {figures['batch_size']}; alpha 0.5, weights per channel, activations per token. "
        f"Arithmetic: {figures['dtype']} for all three. Median of {len(figures['runs']['bare'])} rounds, each run in a "
        f"process of its own; llm-compressor's has {figures['theirs']}. Ours takes {share[0]:.0%} of llm-compressor's "
        f"wall time, its observation {share[1]:.0%} of theirs. Wall and CPU are of the whole process, imports and "
        "loading included; `part` is what grows with the samples: the passes, `observe`, and `oneshot` (with the "
        "spread). Anonymous memory is what no file backs. Perplexity through vLLM on 8 x 512 tokens of other "
        "articles, of both checkpoints through this plugin.\n\n"
        "| | wall, s | CPU, s | part, s | part / bare | anonymous, GB | resident, GB | perplexity | change | KL |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
        f"{rows}\nThe bare passes reach {rate:.0f} of the {figures['gflops_peak']:.0f} GFLOPS that one square product "
        f"reaches here in {figures['dtype']} ({rate / figures['gflops_peak']:.0%}).\n"
    )


def _reached(compared: Mapping[str, Any], swept: Mapping[str, Any]) -> str:
    """The least time in which our calibration reaches llm-compressor's perplexity."""
    perplexity = compared["scores"]["theirs"]["perplexity"]
    wall = median(run["wall"] for run in compared["runs"]["theirs"])
    rows = [row for row in swept["figures"] if "wall" in row and row["perplexity"] <= perplexity]
    if not rows:
        return f"\nNo row of the sweep reaches llm-compressor's perplexity of {perplexity:.3f}.\n"
    row = min(rows, key=lambda row: row["wall"])
    return (
        f"\nOf the sweep, {row['what']} with {row['samples']} x {row['seq_len']} tokens is the first to reach "
        f"llm-compressor's perplexity of {perplexity:.3f}: in {row['wall']:.0f} s, {row['wall'] / wall:.0%} of its "
        f"time, on {swept['machine'].split(';')[0]}.\n"
    )


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    exact, *others = rows
    lines = f"| {exact['what']} | | | | {_score(exact, exact)}"
    for row in others:
        lines += f"| {row['what']} | {row['samples']} | {row['seq_len']} | {row['wall']:.0f} | {_score(row, exact)}"
    return (
        "\n## How many samples\n\nThe same model calibrated on more and fewer samples, measured through vLLM on 8 x 512"
        " tokens of other articles. Static rows take what the default ones observed, so their seconds are those of "
        f"the search. {_knee(others)}\n\n"
        "| | samples | tokens of each | wall, s | perplexity | change | KL |\n|---|---|---|---|---|---|---|\n" + lines
    )


def _knee(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each scheme, beyond how many samples (of the default number of tokens) more samples do not help."""
    fewest = {}
    for what in dict.fromkeys(row["what"] for row in rows):
        kl = {r["samples"]: r["kl_divergence"] for r in rows if r["what"] == what and r["seq_len"] == DEFAULTS[1]}
        fewest[what] = min(n for n in kl if kl[n] <= (1 + NOISE) * min(kl.values()))
    counts = ", ".join(f"{n} ({what})" for what, n in fewest.items())
    return (
        f"KL within {NOISE:.0%} of the best row of {DEFAULTS[1]} tokens is reached with this many samples: {counts}. "
        f"Unless told otherwise, `calibrate` takes {DEFAULTS[0]} x {DEFAULTS[1]}."
    )


def _score(row: Mapping[str, Any], exact: Mapping[str, Any]) -> str:
    """The last cells of a line: perplexity, its change, KL divergence."""
    if "kl_divergence" not in row:
        return f"{row['perplexity']:.3f} | | |\n"
    return (
        f"{row['perplexity']:.3f} | {row['perplexity'] / exact['perplexity'] - 1:+.2%} | {row['kl_divergence']:.4f} |\n"
    )


def _growth(figures: Mapping[str, Any]) -> str:
    rows = figures["rows"]
    text = (
        f"\n## How it grows\n\n![seconds and memory by size](calibration.png)\n\nSynthetic Llamas in BF16, "
        f"{figures['samples']} x {figures['seq_len']} tokens, weights left in memory-mapped files; one run each.\n\n"
        "| | parameters | checkpoint, GB | " + " | ".join(f"{n}, s" for n in STAGES)
        + " | all, s | anonymous, GB |\n|---|" + "---|" * (len(STAGES) + 4) + "\n"
    )  # fmt: skip
    for row in rows:
        cells = [f"{row['parameters'] / 1e9:.2f} G", f"{row['bytes'] / 1e9:.2f}"]
        cells += [f"{row['stages'].get(name, 0):.1f}" for name in STAGES]
        text += f"| {row['size']} | " + " | ".join([*cells, f"{row['wall']:.0f}", f"{row['anonymous']:.2f}"]) + " |\n"
    last = rows[-1]
    # The first batch also passes the whole model.
    tokens = (figures["samples"] + figures["batch_size"]) * figures["seq_len"]
    rate = 2 * last["matrices"] * tokens / last["stages"]["observe"]
    text += (
        f"\n## On paper\n\nFrom the rate of the {last['size']} model's observation here ({rate / 1e9:.0f} GFLOPS), for "
        f"{DEFAULTS[0]} x {DEFAULTS[1]} tokens; work is 2 operations a parameter and token. Activations: of two "
        "blocks, on disk, in float32. A block: its weights in float32.\n\n"
        "| | observe here | activations, GB | a block, GB |\n|---|---|---|---|\n"
    )
    for size in LARGE:
        hidden, _, layers, *_ = synthetic.SIZES[size]
        matrices = synthetic.parameters(size)[1]
        work = 2 * matrices * DEFAULTS[0] * DEFAULTS[1]
        text += (
            f"| {size} | {work / rate / 3600:.0f} h | "
            f"{2 * DEFAULTS[0] * DEFAULTS[1] * hidden * 4 / 1e9:.0f} | {matrices / layers * 4 / 1e9:.1f} |\n"
        )
    return text


def _identical(figures: Mapping[str, Any]) -> str:
    peaks = figures["anonymous"]
    return (
        f"\n## The same bytes\n\nThe {figures['size']} model as above, block by block with its weights in mapped files "
        f"({peaks['mapped']:.2f} GB of anonymous memory at most), and with all weights in memory and passes over the "
        f"whole model ({peaks['held']:.2f} GB): {figures['files']} weight files, "
        f"{'the same, byte for byte' if figures['same'] else '**not the same**'}.\n"
    )


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from calibration.report.figures import LINES, STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), dpi=120)
        axes = figure.subplots(1, 2)
        sizes = [row["parameters"] / 1e9 for row in rows]
        for panel, key, title in ((axes[0], "wall", "seconds"), (axes[1], "anonymous", "anonymous memory, GB")):
            panel.plot(sizes, [row[key] for row in rows], "o-", color=LINES[0])
            panel.set_xlabel("parameters, billions")
            panel.set_title(title)
            panel.set_ylim(bottom=0)
        axes[1].plot(sizes, [2 * size for size in sizes], "--", color=LINES[1], label="the BF16 weights")
        axes[1].legend(frameon=False)
        figure.set_layout_engine("constrained")
        figure.savefig(path, facecolor="white")
