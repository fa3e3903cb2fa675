"""docs/plots/: the pictures of the README, drawn from the figures of other benchmarks.

`python -m benchmarks.plots`. Nothing is measured here: accuracy.json has KL by scheme, llama_cpp.json the speed beside
llama.cpp, of the same machine and text as their pages say.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = ROOT / "docs" / "plots"
# Row of accuracy.json -> its name in the picture, and whether it is what the product offers.
SCHEMES = {
    "per token: naive": ("no smoothing, per token", False),
    "smoothing 0.5, norms only (the paper)": ("the paper's smoothing, per token", False),
    "per token (default)": ("default", True),
    "static (--activations static)": ("--activations static", True),
    "O1": ("--level O1", True),
    "O3": ("--level O3", True),
}
OURS, OTHERS = "#1b6ca8", "#b8b8b8"
ERRORS = 2  # standard errors, drawn as bars


def kl_by_scheme(figures: Mapping[str, Any]) -> plt.Figure:
    """One panel for each model that has all rows; KL ± two standard errors."""
    models = {name: rows for name, rows in figures["models"].items() if rows.keys() >= SCHEMES.keys()}
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 2.8), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], models.items(), strict=True):
        labels = [label for label, _ in SCHEMES.values()]
        values = [rows[row]["kl_divergence"] for row in SCHEMES]
        errors = [ERRORS * rows[row]["kl_standard_error"] for row in SCHEMES]
        colours = [OURS if ours else OTHERS for _, ours in SCHEMES.values()]
        axis.barh(labels, values, xerr=errors, color=colours, error_kw={"elinewidth": 1})
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("KL from floating point, nats per token", fontsize=8)
    return _tidied(figure)


def speed(figures: Mapping[str, Any]) -> plt.Figure:
    """One panel for each case of the first section: tokens a second of each arm, with the rounds' quartiles."""
    section, part = next(iter(figures["cores"].items()))
    cases = part["rates"]
    figure, axes = plt.subplots(1, len(cases), figsize=(3.4 * len(cases), 2.4), sharey=True, squeeze=False)
    for axis, (case, rates) in zip(axes[0], cases.items(), strict=True):
        medians = [statistics.median(values) for values in rates.values()]
        bars = [spread(values, median) for values, median in zip(rates.values(), medians, strict=True)]
        colours = [OTHERS if name.startswith("llama") or name == "floating point" else OURS for name in rates]
        axis.barh(list(rates), medians, xerr=list(zip(*bars, strict=True)), color=colours, error_kw={"elinewidth": 1})
        axis.set_title(case, fontsize=10)
        axis.set_xlabel(f"tokens a second, {section}", fontsize=7)
    return _tidied(figure)


def _tidied(figure: plt.Figure) -> plt.Figure:
    """What all pictures have: panels that share the rows, the first on top, and no frame."""
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def spread(values: Sequence[float], median: float) -> tuple[float, float]:
    """Distances of the quartiles from the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return median - low, high - median


PLOTS = {"kl_by_scheme": ("accuracy", kl_by_scheme), "speed": ("llama_cpp", speed)}


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    for name, (source, draw) in PLOTS.items():
        figure = draw(json.loads((RESULTS / f"{source}.json").read_text()))
        figure.savefig(OUTPUT / f"{name}.png", dpi=130)
        print(OUTPUT / f"{name}.png")


if __name__ == "__main__":
    main()
