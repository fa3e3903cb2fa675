"""Two kernels timed on this machine, where which of them is faster depends on it.

Each multiplies the same random layers, more of them than caches hold, in turn; the medians of the rounds count. It
takes about a second of an engine's start and is done once for each scheme and dtype.
"""

import dataclasses
import functools
import time
from typing import Any

import torch

from .base import Kernel, Request

FEATURES = 2048  # in and out
LAYERS = 16  # 64 MiB of weights
ROUNDS = 7
# Tokens at once -> layers a round: one request, a batch, a prompt, whose weights are read once for many tokens.
TOKENS = {1: LAYERS, 16: LAYERS, 256: 4}
# A rival ten times as slow is not waited for: oneDNN has plain loops for what it knows no instructions for.
GIVE_UP_RATIO = 0.1


def slower_than(kernel: type[Kernel], rival: type[Kernel], request: Request) -> str | None:
    """Why `kernel` stands back behind `rival`: at some number of tokens it was slower here. None where at none."""
    # One race for all layers of a scheme.
    ratios = _ratios(kernel, rival, dataclasses.replace(request, layer="race", channelwise=True, aligned=True))
    tokens = max(ratios, key=ratios.__getitem__)
    if ratios[tokens] < 1:
        return None
    return f"measured here: {ratios[tokens]:.2f} of the time of {rival.name!r} at {tokens} tokens"


@functools.cache
def _ratios(kernel: type[Kernel], rival: type[Kernel], request: Request) -> dict[int, float]:
    """Tokens at once -> the time of `kernel` over that of `rival`."""
    dynamic = request.scheme.input_activations.dynamic
    arms = [
        (k, [random_layer(k, seed, FEATURES, FEATURES, dynamic) for seed in range(LAYERS)])
        for k in (kernel(request), rival(request))
    ]
    ratios = {}
    for tokens, count in TOKENS.items():
        x = torch.ones(tokens, FEATURES, dtype=request.dtype, device="cpu")
        found = []
        for turn in range(ROUNDS):
            seconds = {}
            for k, layers in arms if turn % 2 else arms[::-1]:
                clock = time.perf_counter()
                for one in layers[:count]:
                    k.apply(one, x, None)
                seconds[k] = time.perf_counter() - clock
            found.append(seconds[arms[0][0]] / seconds[arms[1][0]])
            if found[-1] < GIVE_UP_RATIO:
                break
        ratios[tokens] = sorted(found)[len(found) // 2]
        if ratios[tokens] < GIVE_UP_RATIO:
            break
    return ratios


def random_layer(kernel: Kernel, seed: int, out_features: int, in_features: int, dynamic: bool) -> Any:
    """What linear.py hands to `kernel.prepare`, with weights of chance, prepared."""
    made: Any = torch.nn.Module()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (out_features, in_features)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8, device="cpu")
    scale = torch.ones(out_features, 1, dtype=torch.float32, device="cpu")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    made.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    made.input_scale = None if dynamic else torch.nn.Parameter(scale[0].clone(), requires_grad=False)
    made.input_zero_point, made.azp_adj, made.logical_widths = None, None, [out_features]
    kernel.prepare(made)
    return made
