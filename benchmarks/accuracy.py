"""docs/accuracy.md: what each scheme, and each way to choose alpha, costs a real model.

`python -m benchmarks.accuracy [--model NAME] [ROW ...]`. A model of MODELS is calibrated on some Wikipedia articles and
measured through vLLM on others: perplexity, KL divergence and top-1 agreement. The first row is floating point, the
others are those of ROWS. Rows named on the command line are measured again and replace theirs in the table. The error
budget (weights alone, activations alone, each kind of layer alone) is simulated, because vLLM serves whole checkpoints
only. The last line printed is JSON.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import small_opt
from benchmarks.machine import describe
from calibration.checkpoint.write import write_checkpoint
from calibration.evaluation.measure import measure
from calibration.evaluation.windows import token_windows
from calibration.inputs.model import load
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import check_gate, observe_model
from calibration.running.hooks import hooked
from calibration.running.precision import compute_dtype, fast_arithmetic
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets
from vllm_smoothquant.format import int8

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "accuracy.json"
OUTPUT = ROOT / "docs" / "accuracy.md"
COMMAND = "python -m benchmarks.accuracy"
FALLBACK = 0.1


@dataclass(frozen=True)
class Model:
    """folder: creates the model's folder. seq_len: tokens of a text. samples: texts that calibrate. windows: texts that
    are scored. int8_head: whether vLLM's own implementation of the model takes an output head in INT8.
    """

    folder: Callable[[], Path]
    what: str
    seq_len: int
    samples: int
    windows: int
    int8_head: bool = True


MODELS = {
    "SmolLM2-135M-Instruct": Model(assets.model_dir, "SmolLM2-135M-Instruct", 512, 16, 8),
    # This model was trained on texts of this length.
    small_opt.NAME: Model(
        small_opt.model_dir, "an OPT of 2 million parameters, trained here", small_opt.LENGTH, 64, 32, int8_head=False
    ),
}
NORMS_ONLY = "per token, alpha 0.5, norms only"
# Row -> the fields of Options that differ from their defaults.
ROWS: dict[str, dict[str, Any]] = {
    "per token, no smoothing": {"no_smoothing": True},
    NORMS_ONLY: {},
    "per token, alpha 0.5 (default)": {},
    "per token, auto": {"alpha": "auto"},
    "per token, auto, INT8 head": {"alpha": "auto", "quantize_lm_head": True},
    "per token, auto, 10 % in floating point": {"alpha": "auto", "max_fallback": FALLBACK},
    "static, no smoothing": {"activations": "static", "no_smoothing": True},
    "static, alpha 0.5": {"activations": "static"},
    "static, auto": {"activations": "static", "alpha": "auto"},
    "static, auto, 10 % fall back": {"activations": "static", "alpha": "auto", "max_fallback": FALLBACK},
    "O1, no smoothing": {"level": "O1", "no_smoothing": True},
    "O1, alpha 0.5": {"level": "O1"},
    "O1, auto": {"level": "O1", "alpha": "auto"},
    "O2, alpha 0.5": {"level": "O2"},
    "O2, auto": {"level": "O2", "alpha": "auto"},
    "O3, alpha 0.5": {"level": "O3"},
    "O3, auto": {"level": "O3", "alpha": "auto"},
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


def calibration_options(model: Model) -> Options:
    return Options(
        model=str(model.folder()), dataset=str(assets.calibration_text()), samples=model.samples, seq_len=model.seq_len,
        quiet=True,
    )  # fmt: skip


def norms_only(observation: Observation) -> Observation:
    """`observation` without the groups whose source is not a norm."""
    groups = tuple(group for group in observation.graph.groups if group.kind == "norm")
    return replace(observation, graph=replace(observation.graph, groups=groups))


def measure_rows(
    model: Model, names: list[str], windows: list[list[int]], figures: dict[str, Any], save: Callable[[], None]
) -> None:
    """Add the figures of every row in `names` to `figures`; call `save` after each."""
    options = calibration_options(model)

    @cache
    def observe(lm_head: bool) -> Observation:
        return observe_model(replace(options, quantize_lm_head=lm_head))

    engine = {"enforce_eager": True, "dtype": str(compute_dtype(observe(False).model)).removeprefix("torch.")}
    with tempfile.TemporaryDirectory() as folder:
        logits = str(Path(folder) / "baseline.pt")
        baseline = measure(model.folder(), windows, decode=None, keep=logits, **engine)
        figures["floating point"] = {"perplexity": baseline["perplexity"]}
        for name in names:
            output = Path(folder) / name.replace(" ", "-").replace("%", "percent")
            row_options = replace(options, output=str(output), **ROWS[name])
            observation = observe(row_options.quantize_lm_head)
            plan = make_plan(norms_only(observation) if name == NORMS_ONLY else observation, row_options)
            write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), row_options)
            row = measure(output, windows, decode=None, compare=logits, **engine)
            figures[name] = {
                "perplexity": row["perplexity"], "kl_divergence": row["kl_divergence"],
                "top1_agreement": row["top1_agreement"], "fallen_back": len(plan.fallbacks),
            }  # fmt: skip
            print(f"{name:44} {figures[name]}", file=sys.stderr, flush=True)
            save()


def budget(model: Model, windows: list[list[int]]) -> dict[str, float]:
    """Part of the model that is rounded -> KL divergence; default scheme, auto; simulated."""
    options = replace(calibration_options(model), alpha="auto")
    observation = observe_model(options)
    layers = make_plan(observation, options).layers()
    linears = {name: observation.model.get_submodule(name) for name in layers}
    ids = torch.tensor(windows)
    exact = _logprobs(observation, ids, nullcontext())

    def only(operand: str) -> AbstractContextManager[None]:
        hooks = {name: partial(_round_only, operand, layer) for name, layer in layers.items()}
        return hooked(linears[name].register_forward_hook(hook) for name, hook in hooks.items())

    parts = {
        "everything": simulate.as_served(observation.model, layers),
        "weights alone": only("weight"),
        "activations alone": only("input"),
    }
    for kind in sorted({name.rpartition(".")[2] for name in layers}):
        some = {name: layer for name, layer in layers.items() if name.endswith(kind)}
        parts[f"{kind} alone"] = simulate.as_served(observation.model, some)
    divergences = {}
    for part, rounding in parts.items():
        rounded = _logprobs(observation, ids, rounding)
        divergence = math.fsum(float((p.exp() * (p - q)).sum()) for p, q in zip(exact, rounded, strict=True))
        divergences[part] = divergence / ids[:, 1:].numel()
        print(f"{part:44} KL {divergences[part]:.5f}", file=sys.stderr, flush=True)
    return divergences


def _logprobs(
    observation: Observation, ids: torch.Tensor, rounding: AbstractContextManager[None]
) -> list[torch.Tensor]:
    model = observation.model
    with torch.no_grad(), fast_arithmetic(model), rounding:
        return [model(input_ids=one[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for one in ids]


def _round_only(operand: str, layer: LayerScheme, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    """A forward hook: what the linear layer `module` returns if only its "weight" or only its "input" is rounded."""
    x, weight = simulate.divided_input(args[0], layer), simulate.weight_matrix(module, layer)
    if operand == "weight":
        integers, scale = int8.quantize_weight(weight, layer.scheme.weights.strategy)
        weight = integers * scale
    else:
        scale = simulate.input_scale(x, layer)
        x = int8.quantize(x, scale) * scale
    rounded = x @ weight.t()
    if layer.output_factor is not None:
        rounded = rounded * layer.output_factor.to(y.device)
    return (rounded if module.bias is None else rounded + module.bias.float()).to(y.dtype)


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
    """Measure the rows named on the command line and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all of them and the budget")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    args = parser.parse_args()
    for name in args.rows:
        if name not in (*ROWS, "budget"):
            parser.error(f"no row {name!r}; there are {', '.join(ROWS)} and budget")
    model = MODELS[args.model]
    windows, _ = token_windows(
        [str(model.folder())], str(assets.evaluation_text()), text_column="text", samples=model.windows,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"models": {}}
    dtype = str(compute_dtype(load(str(model.folder())).model)).removeprefix("torch.")
    figures["about"] = {"command": COMMAND, "machine": describe(), "dtype": dtype}
    rows = figures["models"].setdefault(args.model, {})

    def save() -> None:
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        OUTPUT.write_text(table(figures))

    possible = [name for name, changes in ROWS.items() if model.int8_head or "quantize_lm_head" not in changes]
    measure_rows(model, [name for name in args.rows or possible if name in ROWS], windows, rows, save)
    if not args.rows or "budget" in args.rows:
        rows["budget"] = budget(model, windows)
    save()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
