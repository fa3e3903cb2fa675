"""docs/accuracy.md: what each scheme, and each way to choose alpha, costs a real model.

`python -m benchmarks.accuracy [--model NAME] [ROW ...]`. A model of MODELS, calibrated on some Wikipedia articles,
measured through vLLM on others: perplexity, KL divergence and top-1 agreement beside floating point, which is the first
row. Rows are those of ROWS; named ones are measured anew and replace theirs in the table. The error budget (weights
alone, activations alone, each kind of layer alone) is simulated, as vLLM serves whole checkpoints. Last line: JSON.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import small_opt
from benchmarks.machine import describe
from calibration.evaluation import evaluate
from calibration.pipeline import Prepared, as_scheme, prepare, prove, write_checkpoint
from calibration.running.precision import compute_dtype, fast_arithmetic
from calibration.smoothing import simulate
from calibration.smoothing.plan import Choice, Plan, make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "accuracy.json"
OUTPUT = ROOT / "docs" / "accuracy.md"
COMMAND = "python -m benchmarks.accuracy"
FALLBACK = 0.1


@dataclass(frozen=True)
class Model:
    """folder: makes it. seq_len: tokens of a text; samples of them calibrate, windows of them are scored.

    int8_head: whether vLLM's own model of it takes an output head in INT8.
    """

    folder: Callable[[], Path]
    what: str
    seq_len: int
    samples: int
    windows: int
    int8_head: bool = True


MODELS = {
    "SmolLM2-135M-Instruct": Model(assets.model_dir, "SmolLM2-135M-Instruct", 512, 16, 8),
    # It learnt from texts of this length.
    small_opt.NAME: Model(
        small_opt.model_dir, "an OPT of 2 million parameters, trained here", small_opt.LENGTH, 64, 32, int8_head=False
    ),
}
# Row -> (weights, activations, what the user asks for, what is smoothed, output head in INT8).
ROWS: dict[str, tuple[str, str, Choice, str, bool]] = {
    "per token, no smoothing": ("channel", "token", Choice(None), "all", False),
    "per token, alpha 0.5, norms only": ("channel", "token", Choice(0.5), "norms", False),
    "per token, alpha 0.5 (default)": ("channel", "token", Choice(0.5), "all", False),
    "per token, auto": ("channel", "token", Choice("auto"), "all", False),
    "per token, auto, INT8 head": ("channel", "token", Choice("auto"), "all", True),
    "per token, auto, 10 % in floating point": ("channel", "token", Choice("auto", FALLBACK), "all", False),
    "static, no smoothing": ("channel", "static", Choice(None), "all", False),
    "static, alpha 0.5": ("channel", "static", Choice(0.5), "all", False),
    "static, auto": ("channel", "static", Choice("auto"), "all", False),
    "static, auto, ranges of least error": ("channel", "static", Choice("auto", static_range="error"), "all", False),
    "static, auto, 10 % fall back": ("channel", "static", Choice("auto", FALLBACK), "all", False),
    "O1, no smoothing": ("tensor", "token", Choice(None), "all", False),
    "O1, alpha 0.5": ("tensor", "token", Choice(0.5), "all", False),
    "O1, auto": ("tensor", "token", Choice("auto"), "all", False),
    "O2, alpha 0.5": ("tensor", "tensor", Choice(0.5), "all", False),
    "O2, auto": ("tensor", "tensor", Choice("auto"), "all", False),
    "O3, alpha 0.5": ("tensor", "static", Choice(0.5), "all", False),
    "O3, auto": ("tensor", "static", Choice("auto"), "all", False),
}
HEADER = """# Accuracy

Written by `{command}`; not by hand. {machine}

Each model was calibrated on Wikipedia articles and measured through vLLM on others, with {dtype} around the integers.
Weights per channel, but for the paper's O1, O2 and O3. All four inputs of a block are smoothed where nothing else is
said. KL: nats per token from floating point's distribution; at these sizes perplexity is expected to move by about as
much, and on so few windows it does give or take chance. Top-1: the same likeliest token.
"""
SECTION = """
## {what}

Calibrated on {samples} x {seq_len} tokens, measured on {windows} x {seq_len}.

| | perplexity | change | KL | top-1 | layers fallen back |
|---|---|---|---|---|---|
"""
BUDGET = """
### Where the error comes from

Default scheme, auto, on the same text; simulated, only the part named rounded. The parts do not quite add up, because
errors meet. `smoothquant report` shows the error of every single layer of a checkpoint made with auto.

| rounded | KL |
|---|---|
"""


def watch(model: Model, lm_head: bool = False, samples: int | None = None) -> Prepared:
    return prepare(
        str(model.folder()), dataset=str(assets.calibration_text()), text_column="text",
        samples=samples or model.samples, seq_len=model.seq_len, seed=0, ignore=frozenset(), device_map="auto",
        quiet=True, quantize_lm_head=lm_head,
    )  # fmt: skip


def planned(ready: Prepared, weights: str, activations: str, choice: Choice, smoothed: str) -> Plan:
    watched = ready.watched
    if smoothed == "norms":
        groups = tuple(group for group in watched.graph.groups if group.kind == "norm")
        watched = replace(watched, graph=replace(watched.graph, groups=groups))
    return make_plan(watched, as_scheme(weights, activations), choice, quiet=True)


def checkpoint(ready: Prepared, plan: Plan, folder: Path) -> Path:
    write_checkpoint(ready, plan, prove(ready, plan.smoothing), folder)
    return folder


def measure(model: Model, names: list[str], windows: list[list[int]], figures: dict[str, Any], keep: Callable) -> None:
    """Add the figures of every row in `names` to `figures`; `keep()` after each."""
    ready = watch(model)
    with_head: Prepared | None = None
    engine = {"enforce_eager": True, "dtype": str(compute_dtype(ready.source.model)).removeprefix("torch.")}
    with tempfile.TemporaryDirectory() as folder:
        logits = str(Path(folder) / "baseline.pt")
        base = evaluate.measure(model.folder(), windows, decode=None, keep=logits, **engine)
        figures["floating point"] = {"perplexity": base["perplexity"]}
        for name in names:
            *arguments, lm_head = ROWS[name]
            if lm_head:
                with_head = with_head or watch(model, lm_head=True)
            of = with_head if lm_head and with_head else ready
            plan = planned(of, *arguments)
            output = checkpoint(of, plan, Path(folder) / name.replace(" ", "-").replace("%", "percent"))
            row = evaluate.measure(output, windows, decode=None, compare=logits, **engine)
            figures[name] = {
                "perplexity": row["perplexity"], "kl_divergence": row["kl_divergence"],
                "top1_agreement": row["top1_agreement"], "fallen_back": len(plan.fallen),
            }  # fmt: skip
            print(f"{name:44} {figures[name]}", file=sys.stderr, flush=True)
            keep()


def budget(model: Model, windows: list[list[int]]) -> dict[str, float]:
    """Part of the model that is rounded -> KL divergence; default scheme, auto; simulated."""
    ready = watch(model)
    plan = planned(ready, "channel", "token", Choice("auto"), "all")
    layers = plan.layers()
    ids = torch.tensor(windows)
    exact = _logprobs(ready, ids, {})
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    parts = {
        "everything": layers,
        "weights alone": {name: replace(served, rounds="weight") for name, served in layers.items()},
        "activations alone": {name: replace(served, rounds="input") for name, served in layers.items()},
    } | {f"{kind} alone": {n: s for n, s in layers.items() if n.endswith(kind)} for kind in kinds}
    found = {}
    for part, served in parts.items():
        other = _logprobs(ready, ids, served)
        found[part] = math.fsum(float((p.exp() * (p - q)).sum()) for p, q in zip(exact, other, strict=True)) / (
            ids[:, 1:].numel()
        )
        print(f"{part:44} KL {found[part]:.5f}", file=sys.stderr, flush=True)
    return found


def _logprobs(ready: Prepared, ids: torch.Tensor, layers: Mapping[str, LayerScheme]) -> list[torch.Tensor]:
    model = ready.source.model
    with torch.no_grad(), fast_arithmetic(model), simulate.serving(model, layers):
        return [model(input_ids=one[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for one in ids]


def table(figures: dict[str, Any]) -> str:
    text = HEADER.format(**figures["about"])
    for name, rows in figures["models"].items():
        exact = rows["floating point"]["perplexity"]
        text += SECTION.format(**vars(MODELS[name]))
        text += f"| floating point | {exact:.3f} | | | | |\n" + "".join(
            f"| {row} | {f['perplexity']:.3f} | {f['perplexity'] / exact - 1:+.2%} | {f['kl_divergence']:.3g} | "
            f"{f['top1_agreement']:.1%} | {f['fallen_back'] or ''} |\n"
            for row, f in ((row, rows[row]) for row in ROWS if row in rows)
        )
        if "budget" in rows:
            text += BUDGET + "".join(f"| {part} | {value:.3g} |\n" for part, value in rows["budget"].items())
    return text


def main() -> None:
    """Measure the rows asked for, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all of them and the budget, where none is named")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    args = parser.parse_args()
    for name in args.rows:
        if name not in (*ROWS, "budget"):
            parser.error(f"no row {name!r}; there are {', '.join(ROWS)} and budget")
    model = MODELS[args.model]
    windows, _ = evaluate.token_windows(
        [str(model.folder())], str(assets.evaluation_text()), text_column="text", samples=model.windows,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"models": {}}
    dtype = str(compute_dtype(watch(model, samples=1).source.model)).removeprefix("torch.")
    figures["about"] = {"command": COMMAND, "machine": describe(), "dtype": dtype}
    rows = figures["models"].setdefault(args.model, {})

    def keep() -> None:
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        OUTPUT.write_text(table(figures))

    possible = [name for name, (*_, lm_head) in ROWS.items() if model.int8_head or not lm_head]
    measure(model, [name for name in args.rows or possible if name in ROWS], windows, rows, keep)
    if not args.rows or "budget" in args.rows:
        rows["budget"] = budget(model, windows)
    keep()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
