"""The pictures of page.py: the largest magnitude of every channel, before and after smoothing.

Figure 4 of SmoothQuant (arXiv 2211.10438) shows one layer, tokens by channels. These pictures show all layers: a heat
map for every kind of input, blocks by channels. They are transparent with grey letters, so that they can be read on a
light page and on a dark one.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image

from ..checkpoint.channel_statistics import Channels
from ..running.modules import block_of

GREY = "#808890"
STYLE: Any = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "font.size": 12, "axes.titlesize": 12, "legend.fontsize": 10, "text.parse_math": False, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
COLOURS = "magma"
LINES = ("#2f80ed", "#e8590c", "#12a150", "#b14aed", "#d6a100", "#e64980")
# Narrow enough to be read on a phone without zooming, fine enough to show every channel when zoomed.
WIDTH, DPI = 6.6, 190
# Wider inputs have neighbouring channels joined into one column, which shows the largest of them.
COLUMNS = 1024
# Layers whose largest channel is at least this many times the median channel are marked.
STANDS_OUT = 100


def kind_of(layers: Sequence[str]) -> str:
    """The names of `layers` within their block, without the number of an expert: "self_attn.q_proj, k_proj, v_proj"."""
    first, *others = [_NUMBER.sub(".*.", name.removeprefix(f"{block_of(name)}.")) for name in layers]
    parent = first.rpartition(".")[0]
    return ", ".join([first, *(name.removeprefix(f"{parent}.") if parent else name for name in others)])


def block_label(layers: Sequence[str]) -> str:
    """The number of the block, or the name of a layer outside all blocks."""
    return block_of(layers[0]).rpartition(".")[2] or layers[0]


_NUMBER = re.compile(r"\.\d+\.")


@mpl.rc_context(STYLE)
def experts(blocks: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Blocks by experts, one picture for each quantity. blocks: label -> quantity -> one number for each expert."""
    quantities = list(next(iter(blocks.values())))
    figure = Figure(
        figsize=(WIDTH, len(quantities) * (min(0.12 * len(blocks), 4.0) + 1.1)), dpi=DPI, layout="constrained"
    )
    figure.suptitle("routed experts", weight="bold")
    widest = max(len(values) for found in blocks.values() for values in found.values())
    for axes, quantity in zip(np.atleast_1d(figure.subplots(len(quantities), 1, sharex=True)), quantities, strict=True):
        rows = np.full((len(blocks), widest), np.nan)
        for row, found in zip(rows, blocks.values(), strict=True):
            row[: len(found[quantity])] = found[quantity]
        image = axes.imshow(rows, cmap=COLOURS, aspect="auto", interpolation="nearest")
        axes.set(title=quantity, ylabel="block", yticks=range(len(blocks)), yticklabels=list(blocks))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    axes.set_xlabel("expert")
    return _png(figure)


def by_kind(channels: Sequence[Channels]) -> dict[str, list[Channels]]:
    """Kind -> its inputs in every block, all of one width, because they share a picture."""
    kinds: dict[str, list[Channels]] = {}
    for c in channels:
        name = kind_of(c.layers)
        if name in kinds and len(kinds[name][0].activations) != len(c.activations):
            name = f"{name} ({len(c.activations)} channels)"
        kinds.setdefault(name, []).append(c)
    return kinds


def joined(values: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """[..., channels] -> [..., at most `columns`]: the largest of each run of neighbours."""
    step = -(-values.shape[-1] // columns)
    return np.maximum.reduceat(values, np.arange(0, values.shape[-1], step), axis=-1)


def outlier_ratio(values: np.ndarray) -> float:
    """Largest channel / median channel, among the channels above zero."""
    alive = values[values > 0]
    return float(alive.max() / np.median(alive)) if len(alive) else 1.0


@mpl.rc_context(STYLE)
def overview(channels: Sequence[Channels]) -> bytes:
    """outlier_ratio of every input by block, before and after smoothing; inputs that stand out are named."""
    figure = Figure(figsize=(WIDTH, 6.6), dpi=DPI, layout="constrained")
    before, after = figure.subplots(2, 1, sharex=True, sharey=True)
    for colour, (kind, members) in zip(cycle(LINES), by_kind(channels).items(), strict=False):
        labels = [block_label(c.layers) for c in members]
        # Layers outside the blocks come last.
        places = [int(label) if label.isdecimal() else len(channels) for label in labels]
        for axes, key in ((before, "activations"), (after, "smoothed_activations")):
            ratios = [outlier_ratio(getattr(c, key)) for c in members]
            axes.plot(places, ratios, "o-", markersize=3.5, linewidth=1, color=colour, label=kind)
            for place, label, ratio in zip(places, labels, ratios, strict=True):
                if ratio >= STANDS_OUT:
                    axes.plot([place], [ratio], "o", markersize=11, markerfacecolor="none", color=colour)
                    right = place > 0.6 * max(places)  # at the right edge, the text is left of its point
                    axes.annotate(
                        f"block {label[:20]}: {ratio:.0f}x", (place, ratio), xytext=(-9 if right else 9, 3),
                        textcoords="offset points", color=colour, weight="bold", ha="right" if right else "left",
                    )  # fmt: skip
    for axes, title in ((before, "activations as they are"), (after, "after smoothing")):
        axes.set(yscale="log", ylabel="largest / median channel", title=title)
        axes.margins(x=0.08, y=0.12)
        _format_axes(axes, "{x:g}x")
    after.set_xlabel("block")
    handles, kinds = before.get_legend_handles_labels()
    figure.legend(handles, kinds, loc="outside lower center", ncols=min(2, len(kinds)), frameon=False)
    return _png(figure)


@mpl.rc_context(STYLE)
def heat_maps(kind: str, members: Sequence[Channels]) -> bytes:
    """Blocks by channels: activations and weights of `kind`, before and after, one colour scale for each pair."""
    panels = (
        ("max|X|, activations", [[c.activations for c in members], [c.smoothed_activations for c in members]]),
        ("max|W|, weights", [[c.weights for c in members], [c.smoothed for c in members]]),
    )
    height = min(0.06 * len(members), 4.0) + 0.75
    figure = Figure(figsize=(WIDTH, 4 * height + 0.7), dpi=DPI, layout="constrained")
    figure.suptitle(kind, weight="bold")
    axes = figure.subplots(4, 1, sharex=True, sharey=True)
    channels = len(members[0].activations)
    for pair, (title, values) in zip((axes[:2], axes[2:]), panels, strict=True):
        maps = [joined(np.stack(rows)) for rows in values]
        alive = np.concatenate([m[m > 0] for m in maps])
        # Clip the colour scale at the 0.5th percentile: silent channels would take half of the colours.
        low, high = (float(np.quantile(alive, 0.005)), float(alive.max())) if len(alive) else (1.0, 1.0)
        norm = LogNorm(low, max(high, low * 1.001))
        for ax, rows, when in zip(pair, maps, ("before", "after"), strict=True):
            image = ax.imshow(
                np.maximum(rows, low), norm=norm, cmap=COLOURS, aspect="auto", interpolation="nearest",
                extent=(0, channels, len(members) - 0.5, -0.5),
            )  # fmt: skip
            ax.set(title=f"{title}, {when}", ylabel="block")
            # Circle outliers: a single bright pixel is easy to miss.
            marked = [i for i, row in enumerate(rows) if outlier_ratio(row) >= STANDS_OUT]
            columns = [(int(rows[i].argmax()) + 0.5) * channels / rows.shape[1] for i in marked]
            (rings,) = ax.plot(columns, marked, "o", markersize=9, markerfacecolor="none", color="#4dd2ff")
            rings.set_clip_on(False)
            rings.set_in_layout(False)  # they may cross the edge; the layout would reserve space for them
        bar = figure.colorbar(image, ax=list(pair), pad=0.02, fraction=0.05)
        bar.locator = LogLocator(numticks=5)
        bar.formatter = FuncFormatter(lambda x, _: f"{x:g}")
        bar.minorticks_off()
    ticks = range(0, len(members), max(1, -(-len(members) // 6)))
    axes[0].set_yticks(list(ticks), [block_label(members[i].layers)[:20] for i in ticks])
    axes[3].set_xlabel("channel")
    return _png(figure)


@mpl.rc_context(STYLE)
def by_block(title: str, values: Mapping[str, float], *, log: bool) -> bytes:
    """One number for every layer or group, by block, with a line for each kind. values: name -> number."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        if block := block_of(name):
            found.setdefault(kind_of([name]), {}).setdefault(int(block.rpartition(".")[2]), []).append(value)
    # Of experts, the mean over those of a block.
    kinds = {kind: [(block, float(np.mean(each))) for block, each in blocks.items()] for kind, blocks in found.items()}
    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for i, (kind, points) in enumerate(kinds.items()):
        line: list[tuple[float, float]] = []
        for number, value in sorted(points):
            if line and number > line[-1][0] + 1:
                line.append((number - 1, np.nan))  # a gap over blocks without a value
            line.append((number, value))
        style: Any = {"color": LINES[i % len(LINES)], "linestyle": ("-", "--", ":")[i // len(LINES) % 3]}
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, linewidth=1, label=kind, **style)
    axes.set(xlabel="block", title=title, yscale="log" if log else "linear")
    _format_axes(axes, "{x:g}")
    if kinds:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _png(figure)


def _format_axes(axes: Axes, numbers: str) -> None:
    """Grid, whole block numbers, and the format of the values."""
    axes.grid(axis="y", alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(numbers)
    axes.yaxis.set_minor_formatter("")


def _png(figure: Figure) -> bytes:
    """PNG in 256 colours, which are enough for these pictures and take a third of the bytes."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    image = Image.open(buffer).convert("RGBA")
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(small, format="png", optimize=True)
    return small.getvalue()
