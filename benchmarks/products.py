"""docs/products.md: single linear layers on this CPU: in floating point, by vLLM's oneDNN in INT8, by our kernels.

    python -m benchmarks.products                      a minute or two on one core
    python -m benchmarks.products --dtype bfloat16     if the CPU has instructions for it
    python -m benchmarks.products --target avx2        as on an older CPU, oneDNN and torch as well

W4A8: 4-bit weights with a scale for each 128 inputs (64 where 128 do not divide them), activations as in INT8.

All arms take x and return y in `dtype`: the time of INT8 includes each token's scale and the rounding. Weights come
from memory and not from caches, as in a model. The arms run in turn; a cell is the median of the rounds.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import describe
from benchmarks.serving import floors
from benchmarks.serving.run import ISAS
from vllm_smoothquant.format import int4

OUTPUT = Path(__file__).parent.parent / "docs" / "products.md"
# A layer -> its out and in.
LAYERS = {
    "SmolLM2-135M q, k, v": (960, 576),
    "SmolLM2-135M gate, up": (3072, 576),
    "SmolLM2-135M down": (576, 1536),
    "Llama 1.1B gate, up": (11264, 2048),
    "Llama 1.1B down": (2048, 5632),
}
TOKENS = (1, 16, 256)
UNCACHED = 2**27  # bytes of INT8 weights that a round reads
WORK = 2e9  # most multiplications of a round, unless one layer already has more
HEADER = """# Products on a CPU

Written by `python -m benchmarks.products`; not by hand. Medians, in microseconds; a ratio is the median of the rounds'
ratios. Floor: what the measured bandwidth and the measured rate of large INT8 products
allow; rate: of our INT8 product. W4A8: 4-bit weights in groups of 128 (64 where 128 do not divide the inputs).
"""
Product = Callable[[torch.Tensor, int], torch.Tensor]


def arms(out_features: int, in_features: int, count: int, dtype: torch.dtype) -> dict[str, Product]:
    """Arm -> a function (x, number of the layer) -> y."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_smoothquant.format.config import Scheme, Weights
    from vllm_smoothquant.kernels import base, cpu, stock
    from vllm_smoothquant.kernels.four_bits import Int4

    floats = [torch.randn(out_features, in_features).to(dtype) for _ in range(max(1, count // dtype.itemsize))]
    products: dict[str, Product] = {
        "floating point": lambda x, number: torch.nn.functional.linear(x, floats[number % len(floats)])
    }
    for name, kind in (("oneDNN", stock.VllmChoice), ("ours", cpu.Compiled)):
        request = base.Request("layer", Scheme(), True, dtype, "cpu")
        with set_current_vllm_config(VllmConfig()):
            kernel = kind(request)
        layers = [random_layer(kernel, seed, out_features, in_features) for seed in range(count)]
        products[name] = lambda x, number, kernel=kernel, layers=layers: kernel.apply(layers[number], x, None)
    group_size = next(size for size in int4.GROUP_SIZES if in_features % size == 0)
    scheme = Scheme(Weights("group", group_size, num_bits=4))
    four_bits = Int4(base.Request("layer", scheme, True, dtype, "cpu"))
    # As many bytes as INT8 reads.
    packed = [packed_layer(four_bits, seed, out_features, in_features, group_size) for seed in range(2 * count)]
    products["W4A8"] = lambda x, number: four_bits.apply(packed[number % len(packed)], x, None)
    return products


def random_layer(kernel: Any, seed: int, out_features: int, in_features: int) -> Any:
    """A layer with random weights, as linear.py passes it to `kernel.prepare`, and prepared."""
    from vllm_smoothquant.kernels.base import frozen

    layer: Any = torch.nn.Module()
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    layer.weight = frozen(torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8))
    layer.weight_scale = frozen(torch.ones(out_features, 1))
    layer.input_scale, layer.input_zero_point, layer.azp_adj, layer.bias = None, None, None, None
    layer.logical_widths = [out_features]
    kernel.prepare(layer)
    return layer


def packed_layer(kernel: Any, seed: int, out_features: int, in_features: int, group_size: int) -> Any:
    """A layer with random 4-bit weights, prepared."""
    from vllm_smoothquant.kernels.base import frozen

    layer: Any = torch.nn.Module()
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features // int4.IN_WORD)
    layer.weight_packed = frozen(torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32))
    layer.weight_scale = frozen(torch.rand(out_features, in_features // group_size, generator=generator) + 0.1)
    kernel.prepare(layer)
    return layer


def timed(products: dict[str, Product], x: torch.Tensor, count: int, rounds: int) -> dict[str, list[float]]:
    """Arm -> seconds of one call in each round."""
    seconds: dict[str, list[float]] = {arm: [] for arm in products}
    for turn in range(rounds + 1):
        for arm in products if turn % 2 else reversed(products):
            start = time.perf_counter()
            for number in range(count):
                products[arm](x, number)
            if turn:  # the first round allocates memory
                seconds[arm].append((time.perf_counter() - start) / count)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--target", help="the instruction set (default: the best of this CPU)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    emulated = ISAS.get(args.target, {})
    if emulated.items() - os.environ.items():  # torch and oneDNN read them when they are imported
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.products", *sys.argv[1:]], os.environ | emulated)
    from vllm_smoothquant.kernels import build
    from vllm_smoothquant.kernels.exact import INEXACT, onednn_is_exact

    target = args.target or build.target()
    if target not in build.TARGETS:
        parser.error(f"no target {target!r}; there are {', '.join(build.TARGETS)}")
    dtype = getattr(torch, args.dtype)
    limits = floors.measure(dtype)
    rows = []
    with patch.object(build, "target", lambda: target):  # the library is compiled at the first use
        assert build.why_not() is None, build.why_not()
    for layer, (out_features, in_features) in LAYERS.items():
        size = out_features * in_features
        products = arms(out_features, in_features, max(1, UNCACHED // size), dtype)
        for tokens in TOKENS:
            count = max(1, min(UNCACHED // size, int(WORK / size / tokens)))
            seconds = timed(products, torch.randn(tokens, in_features).to(dtype), count, args.rounds)
            ours = median(seconds["ours"])
            floor = max(size / limits["bytes_per_s"], 2 * size * tokens / limits["int8_ops_per_s"])
            pairs = (("ours", "floating point"), ("ours", "oneDNN"), ("W4A8", "ours"), ("W4A8", "oneDNN"))
            ratios = [
                f"{median(a / b for a, b in zip(seconds[first], seconds[second], strict=True)):.2f}"
                for first, second in pairs
            ]
            times = [f"{median(values) * 1e6:.0f}" for values in seconds.values()]
            rate = f"{2 * size * tokens / ours / 1e9:.0f} GOP/s, {size / ours / 1e9:.1f} GB/s"
            rows.append([layer, f"{tokens}", *times, *ratios, f"{floor * 1e6:.0f}", rate])
    header = [
        "layer",
        "tokens",
        "floating point",
        "oneDNN INT8",
        "our INT8",
        "our W4A8",
        "INT8 / float",
        "INT8 / oneDNN",
        "W4A8 / INT8",
        "W4A8 / oneDNN",
        "floor",
        "rate",
    ]
    command = shlex.join(["python", "-m", "benchmarks.products", *sys.argv[1:]])
    text = (
        f"{HEADER}\n`{command}`: {args.rounds} rounds. {describe()} {args.dtype}, {torch.get_num_threads()} threads; "
        f"instructions of {target}. "
        f"Measured limits: {limits['bytes_per_s'] / 1e9:.1f} GB/s read, {limits['dtype_ops_per_s'] / 1e9:.0f} GOP/s in "
        f"{args.dtype}, {limits['int8_ops_per_s'] / 1e9:.0f} GOP/s in INT8.\n\n"
    )
    text += "" if onednn_is_exact() else f"{INEXACT}: its column, and the rate of INT8, are those of wrong sums.\n\n"
    text += "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
