"""docs/accuracy.md: what each scheme, and each way to choose alpha, costs a real model.

`python -m benchmarks.accuracy [--model NAME] [ROW ...]`. A model of MODELS is calibrated on some Wikipedia articles and
measured through vLLM on others: perplexity, KL divergence and top-1 agreement. The first row is floating point, the
others are those of ROWS. Rows named on the command line are measured again and replace theirs in the table. The error
budget (weights alone, activations alone, each kind of layer alone) is simulated, because vLLM serves whole checkpoints
only. The last line printed is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import qwen_coder, small_opt
from benchmarks.machine import describe
from calibration.checkpoint.write import write_checkpoint
from calibration.evaluation.evaluate import change
from calibration.evaluation.measure import measure
from calibration.evaluation.windows import token_windows
from calibration.inputs.model import load
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import check_gate, observe_model
from calibration.running.hooks import hooked
from calibration.running.precision import compute_dtype, fast_arithmetic
from calibration.smoothing import factors, simulate
from calibration.smoothing.learn import planned
from calibration.smoothing.plan import Plan, make_plan
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
    "SmolLM2-135M-Instruct": Model(assets.model_dir, "SmolLM2-135M-Instruct", 512, 16, 16),
    qwen_coder.NAME: Model(qwen_coder.model_dir, qwen_coder.NAME, 512, 16, 16),
    # This model was trained on texts of this length.
    small_opt.NAME: Model(
        small_opt.model_dir, "an OPT of 2 million parameters, trained here", small_opt.LENGTH, 64, 32, int8_head=False
    ),
}
PLAIN: dict[str, Any] = {"rotation": "none", "alpha": 0.5}  # smoothing alone, as the paper has it
NORMS_ONLY = "smoothing 0.5, norms only (the paper)"
# Row -> the fields of Options that differ from their defaults.
ROWS: dict[str, dict[str, Any]] = {
    "per token: naive": {"no_smoothing": True},
    NORMS_ONLY: PLAIN,
    "per token: smoothing 0.5": PLAIN,
    "per token: smoothing auto": PLAIN | {"alpha": "auto"},
    "per token (default)": {},
    "per token, INT8 head": {"quantize_lm_head": True},
    "per token, 10 % in floating point": {"max_fallback": FALLBACK},
    "static everywhere: naive": {"level": "O3", "weights": "channel", "no_smoothing": True},
    "static everywhere: smoothing 0.5": {"level": "O3", "weights": "channel"} | PLAIN,
    "static everywhere": {"level": "O3", "weights": "channel"},
    "static (--activations static)": {"activations": "static"},
    "O1: naive": {"level": "O1", "no_smoothing": True},
    "O1: smoothing 0.5": {"level": "O1"} | PLAIN,
    "O1": {"level": "O1"},
    "O2: smoothing 0.5": {"level": "O2"} | PLAIN,
    "O2": {"level": "O2"},
    "O3: smoothing 0.5": {"level": "O3"} | PLAIN,
    "O3": {"level": "O3"},
    "static, weights per tensor": {"weights": "tensor", "activations": "static"},
}
HEADER = """# Accuracy

Written by `{command}`; not by hand.

Each model was calibrated on Wikipedia articles and measured through vLLM on others.
Alphas, rotation and per-token scales were chosen on the calibration articles. Weights per channel, but for the paper's
O1, O2 and O3 and where it says so. Naive: no smoothing. Smoothing: as --rotation none gives it; the paper's row has no
bound for quiet channels. All other rows are the product's: --rotation always, alpha auto. KL:
nats per token from floating point's distribution. Top-1: the same likeliest token. ±: standard errors over the windows.
"""
SECTION = """
## {what}

Calibrated on {samples} x {seq_len} tokens, measured on {windows} x {seq_len}, with {dtype} around the integers.
{machine}

| | KL | perplexity | change | top-1 | layers that left the scheme |
|---|---|---|---|---|---|
"""
BUDGET = """
### Where the error comes from

Default scheme, on the same text; simulated in {dtype}, only the part named rounded. The parts do not add up, because
errors meet, and because in 16 bits each part has roundings that floating point has not. LLM.int8() (arXiv 2208.07339)
keeps input channels with a value above 6 in floating point, without smoothing; vLLM does not serve it.

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


def write_planned(observation: Observation, options: Options, *, paper: bool = False) -> Plan:
    """Write the checkpoint of `options`; paper: only norms are folded into, and quiet channels have no bound."""
    with patch.object(factors, "QUIET", 0) if paper else nullcontext():
        plan = planned(norms_only(observation) if paper else observation, options)
    write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), options)
    return plan


def measure_rows(
    model: Model, names: list[str], windows: list[list[int]], figures: dict[str, Any], save: Callable[[], None]
) -> None:
    """Add the figures of every row in `names` to `figures`; call `save` after each."""
    options = calibration_options(model)

    @cache
    def observe(lm_head: bool, rotation: str) -> Observation:
        return observe_model(replace(options, quantize_lm_head=lm_head, rotation=rotation))

    engine = {"enforce_eager": True, "dtype": str(compute_dtype(observe(False, "none").model)).removeprefix("torch.")}
    with tempfile.TemporaryDirectory() as folder:
        logits = str(Path(folder) / "baseline.pt")
        baseline = measure(model.folder(), windows, decode=None, keep=logits, **engine)
        figures["floating point"] = {"perplexity": baseline["perplexity"]}
        for name in names:
            output = Path(folder) / name.replace(" ", "-").replace("%", "percent")
            row_options = replace(options, output=str(output), **ROWS[name])
            plain = row_options.no_smoothing or row_options.rotation == "none"
            observation = observe(row_options.quantize_lm_head, "none" if plain else "always")
            plan = write_planned(observation, row_options, paper=name == NORMS_ONLY)
            row = measure(output, windows, decode=None, compare=logits, **engine)
            keys = ("perplexity", "kl_divergence", "kl_standard_error", "top1_agreement")
            figures[name] = {key: row[key] for key in keys} | change(row, baseline)
            figures[name]["fallen_back"] = len(plan.fallbacks)
            print(f"{name:44} {figures[name]}", file=sys.stderr, flush=True)
            save()


def budget(model: Model, windows: list[list[int]]) -> dict[str, float]:
    """Part of the model that is rounded -> KL divergence; default scheme, auto; simulated."""
    options = calibration_options(model)
    plain = observe_model(replace(options, rotation="none"))
    ids = torch.tensor(windows)
    exact = _logprobs(plain, ids, nullcontext())

    def divergence(observation: Observation, rounding: AbstractContextManager[None]) -> float:
        return statistics.fmean(simulate.divergences(exact, _logprobs(observation, ids, rounding)))

    outliers = {name: partial(llm_int8, layer) for name, layer in make_plan(plain, options).layers().items()}
    modules = {name: plain.model.get_submodule(name) for name in outliers}
    decomposed = hooked(modules[name].register_forward_hook(hook) for name, hook in outliers.items())
    divergences = {"LLM.int8(), everything": divergence(plain, decomposed)}
    observation = observe_model(options)
    layers = make_plan(observation, options).layers()
    linears = {name: observation.model.get_submodule(name) for name in layers}

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
    for part, rounding in parts.items():
        divergences[part] = divergence(observation, rounding)
        print(f"{part:44} KL {divergences[part]:.5f}", file=sys.stderr, flush=True)
    return divergences


def llm_int8(layer: LayerScheme, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    """A forward hook: LLM.int8() of a layer without factors, input channels above 6 in floating point."""
    x, weight = args[0].float(), simulate.weight_matrix(module, replace(layer, input_factor=None, output_factor=None))
    large = (x.abs() > 6).flatten(0, -2).any(0)
    rest, kept = torch.where(large, 0.0, x), torch.where(large, weight, 0.0)
    integers, weight_scale = int8.quantize_weight(torch.where(large, 0.0, weight), "channel")
    scale = int8.absmax_scale(rest.abs().amax(-1, keepdim=True))
    product = int8.quantize(rest, scale).float() @ integers.float().t() * scale * weight_scale.reshape(-1)
    out = product + x @ kept.t()
    return (out if module.bias is None else out + module.bias.float()).to(y.dtype)


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
    text = HEADER.format(command=COMMAND)
    for name, rows in figures["models"].items():
        exact = rows["floating point"]["perplexity"]
        text += SECTION.format(**vars(MODELS[name]), **rows["about"])
        text += f"| floating point | | {exact:.3f} | | | |\n" + "".join(
            f"| {row} | {f['kl_divergence']:.4f} ± {f['kl_standard_error']:.4f} | {f['perplexity']:.3f} | "
            f"{f['perplexity_change']:+.2%} ± {f['perplexity_change_standard_error']:.2%} | "
            f"{f['top1_agreement']:.1%} | {f['fallen_back'] or ''} |\n"
            for row, f in ((row, rows[row]) for row in ROWS if row in rows)
        )
        if "budget" in rows:
            text += BUDGET.format(dtype=rows["budget_dtype"]) + "".join(
                f"| {part} | {value:.3g} |\n" for part, value in rows["budget"].items()
            )
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
    rows = figures["models"].setdefault(args.model, {})
    rows["about"] = {"machine": describe(), "dtype": dtype}

    def save() -> None:
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        OUTPUT.write_text(table(figures))

    possible = [name for name, changes in ROWS.items() if model.int8_head or "quantize_lm_head" not in changes]
    measure_rows(model, [name for name in args.rows or possible if name in ROWS], windows, rows, save)
    if not args.rows or "budget" in args.rows:
        rows["budget"], rows["budget_dtype"] = budget(model, windows), dtype
    save()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
