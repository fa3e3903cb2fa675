"""docs/zero_points.md: what zero points would gain for static scales, and for 4-bit weights.

`python -m benchmarks.zero_points [--part static|weights] [MODEL ...]`. With a zero point, real = scale * (int -
zero_point): an input whose range is not symmetric, such as the output of a ReLU, gets all 256 integers instead of half.

Each model is planned as calibrate does it under three static schemes. Then each static layer is computed with the
scale and the zero point of the range of its own input, instead of with the symmetric scale. KL from floating point on
articles that calibration did not see, simulated, with the integers that vLLM serves.

The weights of four_bits.py's models (in floating point again, nobody's grid) are rounded to 4 bits in groups of two
sizes by three rules, without smoothing and with activations as they are. Scales have the same search: one range factor
for each group. GPTQ's sums are those of the floating-point model. The last line printed is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from benchmarks import four_bits
from benchmarks.accuracy import MODELS, calibration_options
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import token_windows
from calibration.inputs.model import load
from calibration.inputs.text import load_samples
from calibration.observation.observation import Observation
from calibration.pipeline import observe_model
from calibration.rounding import gptq, nearest
from calibration.running.hooks import hooked
from calibration.running.modules import decoder_blocks
from calibration.running.precision import fast_arithmetic
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets
from vllm_smoothquant.format import int4, int8

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "zero_points.json"
OUTPUT = ROOT / "docs" / "zero_points.md"
WINDOWS = 8
SCHEMES: dict[str, dict[str, Any]] = {
    "static (--activations static)": {"activations": "static"},
    "static everywhere": {"level": "O3", "weights": "channel"},
    "O3": {"level": "O3"},
}
HEADER = """# Zero points for static scales

Written by `python -m benchmarks.zero_points`; not by hand. {machine}

Each model calibrated on Wikipedia articles as by default (rotated where that pays), KL from floating point on
{windows} windows of others, simulated. *Difference*: of zero points to symmetric, over the same windows, ± its standard
error. *Range*: by how much a symmetric scale is coarser, twice the absmax over the range of an input: the median and
the largest of the static layers; 2 is an input that is never negative.

| model | scheme | symmetric | zero points | difference | range |
|---|---|---|---|---|---|
"""
Range = tuple[float, float]
Grid = tuple[torch.Tensor, torch.Tensor]
WEIGHTS = ROOT / "benchmarks" / "results" / "zero_points_weights.json"
# Models of four_bits.MODELS -> tokens of a text: of WINDOWS texts that are scored and of CALIBRATION others.
FOUR_BIT_MODELS = {"SmolLM2-135M-Instruct": 128, "a Qwen3 trained here": 128}
CALIBRATION = 32
WEIGHTS_HEADER = """
# Zero points for 4-bit weights

As AWQ stores them: unsigned integers, a zero point of 4 bits for each group. Weights only, no smoothing, all with the
same search for the scale, on {windows} windows of {tokens} tokens, GPTQ on {samples}. KL as above; in brackets the
difference to symmetric, over the same windows, ± its standard error, and the change of the output error: the sum over
all layers of a layer's squared error over its squared output. *Symmetric*: scales above zero. *Signed scale*, what
`calibrate` writes: the scale of a group whose largest weight is positive is negative, so that the integer -8 always
serves the largest weight. It takes no memory.

| model | groups | rounding | symmetric | signed scale | zero points |
|---|---|---|---|---|---|
"""


def input_ranges(observation: Observation, layers: dict[str, LayerScheme]) -> dict[str, Range]:
    """Static layer -> (smallest, largest) value of its divided input over the calibration samples, 0 included."""
    ranges: dict[str, Range] = {}

    def watch(name: str, layer: LayerScheme, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, (low, high) = simulate.divided_input(args[0], layer), ranges.get(name, (0.0, 0.0))
        ranges[name] = (min(low, float(x.min())), max(high, float(x.max())))

    def handles() -> Iterator[RemovableHandle]:
        for name, layer in layers.items():
            yield observation.model.get_submodule(name).register_forward_pre_hook(partial(watch, name, layer))

    with torch.no_grad(), fast_arithmetic(observation.model), hooked(handles()):
        for batch in observation.samples.input_ids.split(2):
            observation.model(input_ids=batch, use_cache=False)
    return ranges


def with_zero_point(layer: LayerScheme, bounds: Range, module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
    """A forward hook: what the layer returns with the scale and the zero point of `bounds`."""
    low, high = bounds
    scale = (high - low) / 255
    zero_point = round(-128 - low / scale)
    x = simulate.divided_input(args[0], layer)
    q = (torch.round(x / scale) + zero_point).clamp(int8.QMIN, int8.QMAX) - zero_point
    weight, weight_scale = int8.quantize_weight(simulate.weight_matrix(module, layer), layer.scheme.weights.strategy)
    out = q @ weight.float().t() * scale * weight_scale.reshape(-1)
    out = out if layer.output_factor is None else out * layer.output_factor
    return (out if module.bias is None else out + module.bias.float()).to(y.dtype)


def measure(name: str) -> dict[str, list[float]]:
    """Scheme -> [KL symmetric, KL with zero points, their difference, its error, median range, largest range]."""
    model, figures = MODELS[name], {}
    options = calibration_options(model)
    observation = observe_model(options)
    windows, _ = token_windows(
        [str(model.folder())], str(assets.evaluation_text()), text_column="text", samples=WINDOWS,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    ids = torch.tensor(windows)
    exact = simulate.log_probabilities(observation.model, ids, {})
    for scheme, changes in SCHEMES.items():
        layers = make_plan(observation, replace(options, **changes)).layers()
        static = {name: layer for name, layer in layers.items() if not layer.scheme.input_activations.dynamic}
        others = {name: layer for name, layer in layers.items() if name not in static}
        ranges = input_ranges(observation, static)
        symmetric = simulate.divergences(exact, simulate.log_probabilities(observation.model, ids, layers))
        hooks = {name: partial(with_zero_point, static[name], ranges[name]) for name in static}
        with hooked(observation.model.get_submodule(n).register_forward_hook(hook) for n, hook in hooks.items()):
            shifted = simulate.divergences(exact, simulate.log_probabilities(observation.model, ids, others))
        difference = [a - b for a, b in zip(shifted, symmetric, strict=True)]
        coarser = [2 * max(-low, high) / (high - low) for low, high in ranges.values()]
        figures[scheme] = [
            statistics.fmean(symmetric), statistics.fmean(shifted), statistics.fmean(difference),
            standard_error(difference), statistics.median(coarser), max(coarser),
        ]  # fmt: skip
        print(name, scheme, figures[scheme], file=sys.stderr, flush=True)
    return figures


def scales(weight: torch.Tensor, group_size: int, importance: torch.Tensor | None, *, signed: bool) -> Grid:
    scale = nearest.best_scale(weight, group_size, importance, signed=signed)
    return scale, torch.full_like(scale, -int4.QMIN)


# What the columns compare -> (scale, zero point) of each group of a weight under an importance.
KINDS: dict[str, Callable[[torch.Tensor, int, torch.Tensor | None], Grid]] = {
    "symmetric": partial(scales, signed=False), "signed scale": partial(scales, signed=True),
    "zero points": nearest.best_zero_points,
}  # fmt: skip


def measure_weights(name: str, tokens: int) -> list[dict[str, Any]]:
    """One row for each group size and way of rounding."""
    folder = four_bits.without_grid(name, four_bits.MODELS[name])
    source = load(str(folder))
    model = source.model.float()
    size = {"text_column": "text", "seq_len": tokens, "seed": 0}
    windows, _ = token_windows([str(folder)], str(assets.evaluation_text()), samples=WINDOWS, **size)
    text = load_samples(str(assets.calibration_text()), source.tokenizer, samples=CALIBRATION, **size).input_ids
    ids = torch.tensor(windows)
    blocks = tuple(decoder_blocks(model))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)}
    sums = input_sums(model, layers, text)
    original = {n: m.weight.detach().clone() for n, m in layers.items()}
    exact = simulate.log_probabilities(model, ids, {})
    rows = []
    for group, rounding in ((group, rounding) for group in (128, 32) for rounding in ("nearest", "gptq")):
        kl, output = dict[str, list[float]](), dict[str, float]()
        for kind in KINDS:
            output[kind] = 0.0
            for layer, module in layers.items():
                w, h = original[layer], sums[layer]
                group_size = next(s for s in int4.GROUP_SIZES if s <= group and w.shape[1] % s == 0)
                importance = None if rounding == "nearest" else h.diagonal()
                scale, zero_point = KINDS[kind](w, group_size, importance)
                if rounding == "nearest":
                    integers = nearest.quantize(w, scale, zero_point)
                else:
                    integers = gptq.round_gptq(w, h, scale, zero_point)
                module.weight.data = int4.dequantize(integers, scale)
                error = module.weight.data - w
                output[kind] += float((error @ h * error).sum() / (w @ h * w).sum())
            kl[kind] = simulate.divergences(exact, simulate.log_probabilities(model, ids, {}))
        row: dict[str, Any] = {"group": group, "rounding": rounding}
        for kind in KINDS:
            difference = [a - b for a, b in zip(kl[kind], kl["symmetric"], strict=True)]
            row[kind] = {
                "kl": statistics.fmean(kl[kind]), "difference": statistics.fmean(difference),
                "standard_error": standard_error(difference), "output": output[kind] / output["symmetric"] - 1,
            }  # fmt: skip
        rows.append(row)
        print(name, rows[-1], file=sys.stderr, flush=True)
    return rows


def input_sums(model: nn.Module, layers: dict[str, nn.Linear], text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer -> x^T x of its inputs over `text`; layers whose inputs are one tensor have one."""
    sums, seen = dict[str, torch.Tensor](), dict[int, tuple[torch.Tensor, str]]()

    def add(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        _, owner = seen.setdefault(id(args[0]), (args[0], name))
        if owner == name:
            x = args[0].flatten(0, -2)
            sums[name] = sums[name].addmm_(x.t(), x) if name in sums else x.t() @ x
        else:
            sums[name] = sums[owner]

    def handles() -> Iterator[RemovableHandle]:
        for name, module in layers.items():
            yield module.register_forward_pre_hook(partial(add, name))

    with torch.no_grad(), hooked(handles()):
        for batch in text.split(4):
            model(input_ids=batch, use_cache=False)
            seen.clear()
    return sums


def main() -> None:
    """Measure the models named on the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = dict.fromkeys((*MODELS, *FOUR_BIT_MODELS))
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--part", choices=("static", "weights"), help="only static scales, or only weights")
    args = parser.parse_args()
    parts = {"static": (FIGURES, MODELS), "weights": (WEIGHTS, FOUR_BIT_MODELS)}
    found = {part: json.loads(path.read_text()) if path.exists() else {} for part, (path, _) in parts.items()}
    for part, (path, models) in parts.items():
        for name in (name for name in args.models or names if name in models and args.part in (None, part)):
            found[part][name] = measure(name) if part == "static" else measure_weights(name, FOUR_BIT_MODELS[name])
            OUTPUT.write_text(page(found["static"]) + weights_section(found["weights"]))
            path.write_text(json.dumps(found[part], indent=1) + "\n")
    print(json.dumps(found))


def weights_section(figures: dict[str, list[dict[str, Any]]]) -> str:
    tokens = " and ".join(map(str, sorted(set(FOUR_BIT_MODELS.values()))))
    text = WEIGHTS_HEADER.format(windows=WINDOWS, tokens=tokens, samples=CALIBRATION)
    for model, rows in figures.items():
        for row in rows:
            plain = row["symmetric"]["kl"]
            cells = [f"{plain:.3g}"]
            for kind in ("signed scale", "zero points"):
                f = row[kind]
                change = f"{f['difference'] / plain:+.1%} ± {f['standard_error'] / plain:.1%}"
                cells.append(f"{f['kl']:.3g} ({change}; output {f['output']:+.1%})")
            text += f"| {model} | {row['group']} | {row['rounding']} | {' | '.join(cells)} |\n"
    return text


def page(figures: dict[str, dict[str, list[float]]]) -> str:
    text = HEADER.format(machine=describe(), windows=WINDOWS)
    for model, schemes in figures.items():
        for scheme, (a, b, change, error, median, largest) in schemes.items():
            cells = f"{a:.3g} | {b:.3g} | {change / a:+.1%} ± {error / a:.1%} | {median:.2f}, {largest:.2f}"
            text += f"| {model} | {scheme} | {cells} |\n"
    return text


if __name__ == "__main__":
    main()
