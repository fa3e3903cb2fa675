"""docs/zero_points.md: what zero points would gain for static scales.

`python -m benchmarks.zero_points [MODEL ...]`. With a zero point, real = scale * (int - zero_point): an input whose
range is not symmetric, such as the output of a ReLU, gets all 256 integers instead of half of them.

Each model is planned as calibrate does it under three static schemes. Then each static layer is computed with the
scale and the zero point of the range of its own input, instead of with the symmetric scale. KL from floating point on
articles that calibration did not see, simulated, with the integers that vLLM serves. The last line printed is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from benchmarks.accuracy import MODELS, calibration_options
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import token_windows
from calibration.observation.observation import Observation
from calibration.pipeline import observe_model
from calibration.running.hooks import hooked
from calibration.running.precision import fast_arithmetic
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets
from vllm_smoothquant.format import int8

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


def main() -> None:
    """Measure the models named on the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in args.models or MODELS:
        figures[name] = measure(name)
        OUTPUT.write_text(page(figures))
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def page(figures: dict[str, dict[str, list[float]]]) -> str:
    text = HEADER.format(machine=describe(), windows=WINDOWS)
    for model, schemes in figures.items():
        for scheme, (a, b, change, error, median, largest) in schemes.items():
            cells = f"{a:.3g} | {b:.3g} | {change / a:+.1%} ± {error / a:.1%} | {median:.2f}, {largest:.2f}"
            text += f"| {model} | {scheme} | {cells} |\n"
    return text


if __name__ == "__main__":
    main()
