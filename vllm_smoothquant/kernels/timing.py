"""Timing of two kernels on this machine, for the case that the machine decides which one is faster.

Both kernels multiply the same random layers in turn, more layers than the caches hold; the median of the rounds counts.
This takes about a second when an engine starts, once for each scheme and dtype.
"""

import dataclasses
import time
from typing import Any

import torch

from .base import Kernel, Request, frozen, measured

FEATURES = 2048  # in and out
LAYERS = 16  # 64 MiB of weights
ROUNDS = 7
# Tokens per call -> layers per round: one request, a batch, a prompt. A prompt reads weights once for many tokens.
TOKENS = {1: LAYERS, 16: LAYERS, 256: 4}
# Timing stops if the rival is ten times as slow: oneDNN has plain loops where it does not support the instruction set.
GIVE_UP_RATIO = 0.1


def slower_than(kernel: type[Kernel], rival: type[Kernel], request: Request) -> str | None:
    """Reason to prefer `rival`: it was faster at some number of tokens. None if `kernel` was faster at each."""
    # The replaced fields differ between layers, but all layers of a scheme share one timing.
    shared = dataclasses.replace(request, layer="timing", channelwise=True, out_features=FEATURES, in_features=FEATURES)
    ratios = _ratios(kernel, rival, shared)
    tokens = max(ratios, key=ratios.__getitem__)
    if ratios[tokens] < 1:
        return None
    return f"measured here: {ratios[tokens]:.2f} of the time of {rival.name!r} at {tokens} tokens"


@measured
def _ratios(kernel: type[Kernel], rival: type[Kernel], request: Request) -> dict[int, float]:
    """Tokens per call -> the time of `kernel` over the time of `rival`."""
    kernels = [kernel(request), rival(request)]
    layers = {
        k: [random_layer(k, seed, FEATURES, FEATURES, request.dynamic) for seed in range(LAYERS)] for k in kernels
    }
    ratios = {}
    for tokens, count in TOKENS.items():
        x = torch.ones(tokens, FEATURES, dtype=request.dtype, device="cpu")
        rounds: list[float] = []
        while len(rounds) < ROUNDS and min(rounds, default=1) >= GIVE_UP_RATIO:
            seconds = {}
            for k in kernels if len(rounds) % 2 else kernels[::-1]:
                start = time.perf_counter()
                for layer in layers[k][:count]:
                    k.apply(layer, x, None)
                seconds[k] = time.perf_counter() - start
            rounds.append(seconds[kernels[0]] / seconds[kernels[1]])
        ratios[tokens] = sorted(rounds)[len(rounds) // 2]
        if ratios[tokens] < GIVE_UP_RATIO:
            break
    return ratios


def random_layer(kernel: Kernel, seed: int, out_features: int, in_features: int, dynamic: bool) -> Any:
    """A layer with random weights, as linear.py passes it to `kernel.prepare`, and prepared."""
    layer: Any = torch.nn.Module()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (out_features, in_features)
    layer.weight = frozen(torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8, device="cpu"))
    scale = torch.ones(out_features, 1, dtype=torch.float32, device="cpu")
    layer.weight_scale = frozen(scale)
    layer.input_scale = None if dynamic else frozen(scale[0].clone())
    layer.input_zero_point, layer.azp_adj, layer.logical_widths, layer.bias = None, None, [out_features], None
    kernel.prepare(layer)
    return layer
