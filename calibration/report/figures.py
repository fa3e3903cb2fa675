"""The pictures of report.py: what every channel's largest magnitude was, before smoothing and after.

Figure 4 of SmoothQuant (arXiv 2211.10438) shows one layer, tokens by channels. Here are all layers: a heat map for
every kind of input, blocks by channels. Transparent, with grey letters: readable on a light page and on a dark one.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
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
# Wider than this, neighbouring channels are joined, the largest of them shown.
COLUMNS = 1024
# A layer whose largest channel is so many times its median one is named in the overview.
STANDS_OUT = 100


def kind_of(layers: Sequence[str]) -> str:
    """What layers of all blocks have in common: "self_attn.q_proj, k_proj, v_proj"."""
    inside = [name.removeprefix(f"{block_of(name)}.") for name in layers]
    first, *others = inside
    parent = first.rpartition(".")[0]
    return ", ".join([first, *(name.removeprefix(f"{parent}.") if parent else name for name in others)])


def block_label(layers: Sequence[str]) -> str:
    """The number of the block, or the name of a layer outside all blocks."""
    return block_of(layers[0]).rpartition(".")[2] or layers[0]


def by_kind(channels: Sequence[Channels]) -> dict[str, list[Channels]]:
    """Kind -> what was seen in every block, of one width each: others have no place in the same picture."""
    kinds: dict[str, list[Channels]] = {}
    for c in channels:
        name = kind_of(c.layers)
        if name in kinds and len(kinds[name][0].activations) != len(c.activations):
            name = f"{name} ({len(c.activations)} channels)"
        kinds.setdefault(name, []).append(c)
    return kinds


def joined(values: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """[..., channels] -> [..., at most `columns`]: the largest of every run of neighbours."""
    step = -(-values.shape[-1] // columns)
    starts = np.arange(0, values.shape[-1], step)
    return np.maximum.reduceat(values, starts, axis=-1)


def outlier_ratio(values: np.ndarray) -> float:
    """Largest channel over the median one; of those that are not silent."""
    alive = values[values > 0]
    return float(alive.max() / np.median(alive)) if len(alive) else 1.0


def overview(channels: Sequence[Channels]) -> bytes:
    """How far the largest channel of every input stands out, before and after: where the trouble is, at a glance."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6.6), dpi=DPI)
        before, after = figure.subplots(2, 1, sharex=True, sharey=True)
        for colour, (kind, members) in zip(_cycle(), by_kind(channels).items(), strict=False):
            for axes, pick in ((before, "activations"), (after, "smoothed_activations")):
                ratios = [outlier_ratio(getattr(c, pick)) for c in members]
                # A layer outside the blocks comes after them.
                numbers = [block_label(c.layers) for c in members]
                places = [int(n) if n.isdecimal() else len(channels) for n in numbers]
                axes.plot(places, ratios, "o-", markersize=3.5, linewidth=1, color=colour, label=kind)
                for place, number, ratio in zip(places, numbers, ratios, strict=True):
                    if ratio >= STANDS_OUT:
                        axes.plot([place], [ratio], "o", markersize=11, markerfacecolor="none", color=colour)
                        late = place > 0.6 * max(places)
                        axes.annotate(
                            f"block {number[:20]}: {ratio:.0f}x", (place, ratio), xytext=(-9 if late else 9, 3),
                            textcoords="offset points", color=colour, weight="bold", ha="right" if late else "left",
                        )  # fmt: skip
        for axes, title in ((before, "activations as they are"), (after, "after smoothing")):
            axes.set(yscale="log", ylabel="largest / median channel", title=title)
            axes.margins(x=0.08, y=0.12)
            axes.yaxis.set_major_formatter("{x:g}x")
            axes.yaxis.set_minor_formatter("")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", alpha=0.25)
        after.set_xlabel("block")
        handles, labels = before.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)), frameon=False)
        figure.set_layout_engine("constrained")
        return _png(figure)


def heat_maps(kind: str, members: Sequence[Channels]) -> bytes:
    """Blocks by channels: activations and weights of `kind`, before and after, one colour scale for each pair."""
    panels = (
        ("max|X|, activations", [[c.activations for c in members], [c.smoothed_activations for c in members]]),
        ("max|W|, weights", [[c.weights for c in members], [c.smoothed for c in members]]),
    )
    height = min(0.06 * len(members), 4.0) + 0.75
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4 * height + 0.7), dpi=DPI)
        figure.suptitle(kind, weight="bold")
        axes = figure.subplots(4, 1, sharex=True, sharey=True)
        channels = len(members[0].activations)
        for row, (title, pair) in zip((axes[:2], axes[2:]), panels, strict=True):
            maps = [joined(np.stack(values)) for values in pair]
            alive = np.concatenate([m[m > 0] for m in maps])
            # What is smaller than all but a few is black: silent channels would take half of the colours.
            low, high = (float(np.quantile(alive, 0.005)), float(alive.max())) if len(alive) else (1.0, 1.0)
            norm = LogNorm(low, max(high, low * 1.001))
            for ax, values, when in zip(row, maps, ("before", "after"), strict=True):
                image = ax.imshow(
                    np.maximum(values, low), norm=norm, cmap=COLOURS, aspect="auto", interpolation="nearest",
                    extent=(0, channels, len(members) - 0.5, -0.5),
                )  # fmt: skip
                ax.set_title(f"{title}, {when}")
                # One bright point in a thousand is not seen: a ring around it is.
                loud = [i for i, row_values in enumerate(values) if outlier_ratio(row_values) >= STANDS_OUT]
                where = [(int(values[i].argmax()) + 0.5) * channels / values.shape[1] for i in loud]
                (rings,) = ax.plot(where, loud, "o", markersize=9, markerfacecolor="none", color="#4dd2ff")
                rings.set_clip_on(False)
                rings.set_in_layout(False)  # they may reach over the edge; the layout would make room
                ax.set_ylabel("block")
            bar = figure.colorbar(image, ax=list(row), pad=0.02, fraction=0.05)
            bar.locator = LogLocator(numticks=5)
            bar.formatter = FuncFormatter(lambda x, _: f"{x:g}")
            bar.minorticks_off()
        numbers = [block_label(c.layers) for c in members]
        ticks = range(0, len(numbers), max(1, -(-len(numbers) // 6)))
        axes[0].set_yticks(list(ticks), [numbers[i][:20] for i in ticks])
        axes[3].set_xlabel("channel")
        figure.set_layout_engine("constrained")
        return _png(figure)


def by_block(title: str, values: Mapping[str, float], *, log: bool) -> bytes:
    """One number for every layer or group, by block, a line for each kind. values: its name -> the number."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, value in values.items():
        block = block_of(name).rpartition(".")[2]
        if block:
            kinds.setdefault(kind_of([name]), []).append((int(block), value))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI)
        axes = figure.subplots()
        for i, (kind, points) in enumerate(kinds.items()):
            style: dict[str, Any] = {"color": LINES[i % len(LINES)], "linestyle": ("-", "--", ":")[i // len(LINES) % 3]}
            line: list[tuple[float, float]] = []
            for number, value in sorted(points):
                if line and number > line[-1][0] + 1:
                    line.append((number - 1, np.nan))  # no line over blocks that have none
                line.append((number, value))
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, linewidth=1, label=kind, **style)
        axes.set(xlabel="block", title=title, yscale="log" if log else "linear")
        axes.grid(axis="y", alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        if kinds:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.set_layout_engine("constrained")
        return _png(figure)


def _cycle() -> list[str]:
    return list(LINES) * 100


def _png(figure: Figure) -> bytes:
    """256 colours are enough for these pictures, and a third of the bytes."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    image = Image.open(buffer).convert("RGBA")
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(small, format="png", optimize=True)
    return small.getvalue()
