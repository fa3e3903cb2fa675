"""What one module computes, tested by running it. Class names do not matter.

Two questions. Each is answered by an experiment whose arithmetic is exact, so that "equal" means bit for bit:

    Is it a linear layer, and is its weight [out, in] or [in, out]?
        Small integers for input, weight and bias: every partial sum is a small integer, exact in float32 in any order.
    How do a norm's parameters enter its output?
        Fold s (powers of two, a different one for each channel) into the parameters under a hypothesis and compare
        output * s with the unfolded output. Multiplying by a power of two commutes with rounding.

The module's own parameters are never changed: both experiments run the module through torch.func.functional_call, with
stand-ins in their place.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..running.modules import own_parameters

# A module that raises one of these for the probe's input is no linear layer and no norm.
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)

# forward -> whether the weight is [in, out]. Every other module with the same parameters is run to find out.
_KNOWN_FORWARDS: dict[Callable, bool] = {nn.Linear.forward: False, Conv1D.forward: True}

# How a parameter p of a norm changes when the output is divided by s. p and s in float32, shape [channels].
NORM_RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "p": lambda p, s: p / s,  # output = normalised * p, or output = ... + p
    "1+p": lambda p, s: (1 + p) / s - 1,  # output = normalised * (1 + p)
    "fixed": lambda p, s: p,  # the output's scale does not depend on p
}


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def linear_transposed(module: nn.Module) -> bool | None:
    """Whether the linear layer `module` keeps its weight as [in, out]; None if it is not y = x W^T + b at all."""
    params = own_parameters(module)
    weight, bias = params.get("weight"), params.get("bias")
    if not _is_leaf(module) or weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    if set(params) - {"weight", "bias"} or not weight.is_floating_point():
        return None
    if type(module).forward in _KNOWN_FORWARDS:
        return _KNOWN_FORWARDS[type(module).forward]
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(weight.device, torch.float32)

    for transposed in (False, True):
        stand_ins = {"weight": integers(*weight.shape)}
        w = stand_ins["weight"].t() if transposed else stand_ins["weight"]
        if bias is not None:
            if bias.shape != (w.shape[0],):
                continue
            stand_ins["bias"] = integers(w.shape[0])
        x = integers(1, 2, w.shape[1])
        y = _run(module, stand_ins, x)
        if y is not None and torch.equal(y, x @ w.t() + stand_ins.get("bias", 0)):
            return transposed
    return None


def norm_channels(module: nn.Module) -> int | None:
    """Channels of a candidate norm, a leaf module whose largest parameter is a vector; None for any other module."""
    params = own_parameters(module)
    if not _is_leaf(module) or any(p.dim() > 1 or not p.is_floating_point() for p in params.values()):
        return None
    return max((p.numel() for p in params.values() if p.dim() == 1), default=None)


def norm_rules(module: nn.Module, shape: torch.Size) -> dict[str, str] | None:
    """Which of NORM_RULES each parameter follows, for an input of `shape` [..., channels]; None if none is proved.

    The result has the order of the module's parameters.
    """
    params = own_parameters(module)
    channels = shape[-1]
    device = next(iter(params.values())).device
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator).to(device, torch.float32)

    x = integers(-1024, 1025, *shape) / 128
    s = 2.0 ** integers(-2, 3, channels)
    # Eighths: 1 + p, (1 + p) / s and back are exact in float32.
    stand_ins = {name: integers(-6, 17, *p.shape) / 8 for name, p in params.items()}
    unfolded = _run(module, stand_ins, x)
    if unfolded is None or not torch.isfinite(unfolded).all():
        return None
    per_channel = [name for name, p in params.items() if p.shape == (channels,)]
    # "fixed" for all parameters fails like any wrong hypothesis, because the output is then not divided by s.
    for hypothesis in itertools.product(NORM_RULES, repeat=len(per_channel)):
        rules = dict.fromkeys(params, "fixed") | dict(zip(per_channel, hypothesis, strict=True))
        folded = {name: NORM_RULES[rules[name]](p, s) for name, p in stand_ins.items()}
        y = _run(module, folded, x)
        if y is not None and torch.equal(y * s, unfolded):
            return rules
    return None


@dataclass(frozen=True)
class NormForm:
    """A norm that computes n(x) * scale + shift, where n commutes with rotations.

    scale, shift: names of parameters, "" if there is none. rule: that of `scale` in NORM_RULES ("1+p": n(x) * (1 +
    scale)). centred: n subtracts the mean, so that only a rotation that leaves (1, ..., 1) where it is commutes.
    """

    scale: str
    rule: str
    shift: str
    centred: bool


def norm_form(module: nn.Module, shape: torch.Size) -> NormForm | None:
    """What a norm computes of an input of `shape` [..., channels]; None if that is not proved."""
    rules = norm_rules(module, shape)
    if rules is None:
        return None
    params, channels = own_parameters(module), shape[-1]
    device = next(iter(params.values())).device
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    x, scale, shift = normal(*shape), 1 + normal(channels) / 4, normal(channels)
    scaled = [name for name, rule in rules.items() if rule != "fixed"]
    fixed = {name: p.detach().float() for name, p in params.items() if rules[name] == "fixed"}
    for name in scaled:
        others = [other for other in scaled if other != name]
        if len(others) > 1:
            continue
        offset = 1 if rules[name] == "1+p" else 0
        plain = fixed | dict.fromkeys(others, torch.zeros_like(shift)) | {name: torch.ones_like(scale) - offset}
        n = _run(module, plain, x)
        y = _run(module, fixed | dict.fromkeys(others, shift) | {name: scale - offset}, x)
        if n is None or y is None or not _close(y, n * scale + (shift if others else 0)):
            continue
        for centred in (False, True):
            rotated = _run(module, plain, _reflected(x, centred))
            if rotated is not None and _close(rotated, _reflected(n, centred)):
                return NormForm(name, rules[name], "".join(others), centred)
    return None


def embedding_is_linear(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a rotation of the rows of an embedding's table rotates its output for the arguments of a call."""
    weight = own_parameters(module)["weight"]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(weight.shape, generator=generator).to(weight.device)
    try:
        with torch.no_grad():
            y, rotated = (functional_call(module, {"weight": t}, args, kwargs) for t in (table, _reflected(table)))
    except _MISFITS:
        return False
    return _close(rotated.float(), _reflected(y.float()))


def _reflected(x: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """x times a random reflection, which is orthogonal and cheap; with `centred` (1, ..., 1) stays where it is."""
    u = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1)).to(x.device)
    u = u - u.mean() if centred else u
    u = u / u.norm()
    return x - 2 * (x @ u)[..., None] * u


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of float32: sums over the channels, a few operations each."""
    return a.shape == b.shape and bool(((a - b).abs().max() <= 2e-5 * b.abs().max()).item())


def _run(module: nn.Module, stand_ins: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """Output of `module` with other parameters; None unless it is one tensor that keeps x's leading shape."""
    try:
        with torch.no_grad():
            y = functional_call(module, stand_ins, (x,))
    except _MISFITS:
        return None
    if not isinstance(y, torch.Tensor) or y.shape[:-1] != x.shape[:-1] or y.numel() == 0:
        return None
    return y.to(torch.float32)
