"""docs/architectures.md: what smoothing and rotation do to every architecture of tests/helpers/tiny_architectures.py.

`python -m benchmarks.architectures`. For each tiny model: discover, smooth with alpha 0.5, pass the gate, write the
smoothed parameters, and compare the logits of other tokens in float32; the same with a rotation. Whether vLLM serves
the INT8 checkpoint is read from SERVED (JSON: {model: what to print}) if that file exists. The last line printed is
JSON.
"""

import json
import re
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from calibration.discovery.discover import discover
from calibration.discovery.graph import Graph
from calibration.discovery.linears import NO_TEXT, choose_layers
from calibration.discovery.rotations import find_rotations
from calibration.inputs.model import untie_head
from calibration.observation.absmax import needed_absmax, observe_absmax
from calibration.pipeline import calibrate, smooth
from calibration.running.modules import LINEAR_TYPES, output_head
from calibration.running.products import make_linear
from calibration.smoothing.choose_rotation import rotation_of
from calibration.smoothing.factors import smooth_groups
from calibration.smoothing.gate import check_equivalence
from calibration.smoothing.rotation_gate import check_rotation
from tests.helpers import tiny_architectures, tiny_vision, vision_engine
from vllm_smoothquant.format.config import STREAM
from vllm_smoothquant.format.errors import SmoothQuantError

ROOT = Path(__file__).parent.parent
SERVED = Path(__file__).parent / "results" / "served.json"
OUTPUT = ROOT / "docs" / "architectures.md"
BOUND = 1e-4

HEADER = """# Architectures

Written by `python -m benchmarks.architectures`; not by hand. Models are tiny and random, with outlier channels in every
norm (tests/helpers/tiny_architectures.py). *Groups*: sources with a foldable scale, over both layers. *Folds*: source →
the linear layers that take its scale; [64/256] where only that many channels of a fused projection can. *Change*:
largest change of a logit, relative to the largest logit, when the smoothed model is written and run in float32; at most
1e-4 is asked for. *INT8*: share of the weights of linear layers, without the output head, that become integers.
*Rotated*: whether hidden states and heads are, with the change of the logits, or what stands in the way. *Not folded*:
linear layers whose input keeps its scale, and the norms among the reasons.

| model | groups | folds | change | INT8 | rotated | not folded, and why | INT8 served by vLLM |
|---|---|---|---|---|---|---|---|
"""


VISION_HEADER = """
## Models that read images

Calibrated with images (tests/helpers/tiny_vision.py). *Change* of the logits of a prompt with an image, when the
smoothed model is written and read again. *INT8*: share of the weights of linear layers that become integers, in the
language part and in all.

| family | change | INT8, language part | INT8, all | served by vLLM with an image |
|---|---|---|---|---|
"""


def short(name: str) -> str:
    """The name of module `name` within its block: at most two parts, no layer number."""
    inside = re.split(r"\.\d+(?:\.|$)", name)[-1]
    return ".".join(inside.split(".")[-2:]) or "block"


def folds(graph: Graph) -> str:
    lines: dict[str, None] = {}
    for group in graph.groups:
        part = "" if group.foldable.all() else f" [{int(group.foldable.sum())}/{group.channels}]"
        readers = ", ".join(dict.fromkeys(short(reader.name).rpartition(".")[2] for reader in group.readers))
        lines[f"{short(group.source)}{part} → {readers}"] = None
    return "<br>".join(lines)


def not_folded(graph: Graph) -> str:
    # A source that is not a linear layer is a norm.
    linears = {linear.name for linear in graph.linears}
    unsmoothed = dict.fromkeys(short(linear.name) for linear in graph.linears if linear.uncovered)
    norms: dict[str, str] = {}
    for refusal in graph.refusals:
        if refusal.source not in linears:
            where, _, operation = refusal.reader.partition(" ")
            norms.setdefault(short(refusal.source), f"{short(where)} {operation}: {refusal.reason}".replace(" :", ":"))
    reasons = [f"{source} ({why})" for source, why in norms.items()]
    return "<br>".join(([f"inputs of {', '.join(unsmoothed)}"] if unsmoothed else []) + reasons) or "nothing"


def rotated(name: str) -> dict[str, Any]:
    """`hidden`, `heads`: whether these are rotated; `change` of the logits; `why`: what forbids the hidden states."""
    model, other = tiny_architectures.build(name), tiny_architectures.tokens(2)
    make_linear(model)
    graph = find_rotations(model, tiny_architectures.tokens(1))
    why = next((f"{short(refusal.reader)}: {refusal.reason}" for refusal in graph.refusals), "")
    row = {"hidden": STREAM in graph.sizes, "heads": bool(graph.sizes.keys() - {STREAM}), "why": why}
    if not graph.sizes:
        return row | {"change": 0.0}
    with torch.no_grad():
        before = model(input_ids=other, use_cache=False).logits
        untie_head(name, model)
        rotation = rotation_of(graph, model)
        check_rotation(rotation, [tiny_architectures.tokens(3)])
        rotation.apply_()
        after = model(input_ids=other, use_cache=False).logits
    return row | {"change": float((after - before).abs().max() / before.abs().max())}


def rotation_text(row: dict[str, Any]) -> str:
    parts = [part for part, name in (("hidden states", "hidden"), ("heads", "heads")) if row[name]]
    done = f"{', '.join(parts)}: {row['change']:.1e}" if parts else "no"
    return done if row["hidden"] else f"{done}<br>hidden states not: {row['why']}"


def share(model: PreTrainedModel, layers: Collection[str], without: Collection[str] = ()) -> float:
    """Of the weights of linear layers and of stacked experts, without the output head, those of `layers`.

    without: layers that do not count.
    """
    head = output_head(model)
    sizes = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, LINEAR_TYPES) and m is not head}
    sizes = {name: size for name, size in sizes.items() if name not in without}
    stacks = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n)
    return sum(sizes.get(name, 0) for name in layers) / (sum(sizes.values()) + stacks)


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    model, sample, other = tiny_architectures.build(name), tiny_architectures.tokens(1), tiny_architectures.tokens(2)
    make_linear(model)
    with torch.no_grad():
        before = model(input_ids=other, use_cache=False).logits
        start = time.perf_counter()
        model(input_ids=sample, use_cache=False)
        seconds = {"forward": time.perf_counter() - start}
    start = time.perf_counter()
    discovered = discover(model, sample)
    layers, in_float = choose_layers(model, discovered, frozenset())
    graph = discovered.keeping(in_float)
    seconds["discover"] = time.perf_counter() - start
    row: dict[str, Any] = {
        "rotated": rotated(name), "int8": share(model, layers), "groups": len(graph.groups), "folds": folds(graph),
        "not_folded": not_folded(graph), "seconds": seconds,
    }  # fmt: skip
    absmax = observe_absmax(model, needed_absmax(graph, (linear.name for linear in graph.linears)), sample)
    smoothing = smooth_groups(model, graph, absmax, {group.source: 0.5 for group in graph.groups}, layers)
    start = time.perf_counter()
    try:
        check_equivalence(smoothing, [tiny_architectures.tokens(3)])
    except SmoothQuantError as error:
        return row | {"refused": str(error)}
    seconds["gate"] = time.perf_counter() - start
    smoothing.apply_()
    with torch.no_grad():
        after = model(input_ids=other, use_cache=False).logits
    return row | {"change": float((after - before).abs().max() / before.abs().max())}


def vision_row(name: str, served: str) -> str:
    """A row of the second table: the whole way through `smooth` and `calibrate`, with images."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source, pictures = tiny_vision.save(name, root / "model"), tiny_vision.save_pictures(root / "pictures")
        options: dict[str, Any] = {"dataset": str(pictures), "samples": 8, "seq_len": 32, "quiet": True}
        smooth(str(source), root / "smoothed", alpha=0.5, **options)
        record = calibrate(str(source), root / "int8", rotation="none", **options)
        model, smoothed = (AutoModelForImageTextToText.from_pretrained(f).eval() for f in (source, root / "smoothed"))
        inputs = vision_engine.inputs(source, 0)
        with torch.no_grad():
            before, after = (network(**inputs).logits for network in (model, smoothed))
    change = float((after - before).abs().max() / before.abs().max())
    towers = [layer for layer, why in record["kept"].items() if why == NO_TEXT]
    language, part = (share(model, record["quantized"], without) for without in (towers, ()))
    return f"| {name} | {change:.1e} | {language:.1%} | {part:.1%} | {served} |\n"


def main() -> None:
    """Measure every model, write OUTPUT and print a summary."""
    torch.set_num_threads(1)
    served = json.loads(SERVED.read_text()) if SERVED.exists() else {}
    rows = {name: measure(name) for name in tiny_architectures.ZOO}
    table = "".join(
        f"| {name} | {row['groups']} | {row['folds']} | "
        + (f"{row['change']:.1e}" if "change" in row else f"refused: {row['refused']}")
        + f" | {row['int8']:.1%} | {rotation_text(row['rotated'])} | {row['not_folded']} | {served.get(name, '')} |\n"
        for name, row in rows.items()
    )
    vision = "".join(vision_row(name, served.get(name, "")) for name in tiny_vision.FAMILIES)
    OUTPUT.write_text(HEADER + table + VISION_HEADER + vision)
    for name, row in rows.items():
        print(f"{name:20} {row['groups']:3} groups  {row.get('change', row.get('refused'))}")
    changes = [row["change"] for row in rows.values() if "change" in row]
    ratios = {
        stage: sorted(
            row["seconds"][stage] / row["seconds"]["forward"] for row in rows.values() if "gate" in row["seconds"]
        )
        for stage in ("discover", "gate")
    }
    summary = {
        "models": len(rows),
        "exact": sum(change <= BOUND for change in changes),
        "refused": [name for name, row in rows.items() if "refused" in row],
        "worst_change": max(changes),
        "rotated": sum(row["rotated"]["hidden"] for row in rows.values()),
        "worst_rotation": max(row["rotated"]["change"] for row in rows.values()),
        "median_times_forward": {stage: round(values[len(values) // 2], 1) for stage, values in ratios.items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
