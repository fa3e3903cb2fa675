"""How many bytes weights take, and the budget for them (--budget-size).

    bytes of a layer    its weight and its weight_scale in the checkpoint
    budget              a share of two bytes for each weight of the linear layers that calibrate chose

A scale counts, because 4 bits have many. A factor that divides the input, and a bias, do not, because no number of bits
changes them.
"""

import math
from collections.abc import Iterable

from torch import nn

from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError

from ..rounding.groups import schemes_of
from ..running.modules import weight_shape


def weight_bytes(linear: nn.Module, scheme: Scheme | None) -> int:
    """The bytes of a linear layer under `scheme`; None: in floating point, in the dtype that it has."""
    shape = weight_shape(linear)
    if scheme is None:
        return math.prod(shape) * linear.get_parameter("weight").element_size()
    tensors = scheme.tensors(*shape)
    return sum(dtype.itemsize * math.prod(size) for name, (dtype, size) in tensors.items() if name.startswith("weight"))


def in_16_bits(model: nn.Module, layers: Iterable[str]) -> int:
    """The bytes of the weights of `layers` in 16 bits."""
    return sum(2 * math.prod(weight_shape(model.get_submodule(name))) for name in layers)


def part(share: float, count: int) -> int:
    """`share` of `count`, rounded down, as exactly as `share` was typed: 0.29 * 100 is 28.999999999999996."""
    return int(round(share * count, 6))


def budget(model: nn.Module, layers: Iterable[str], share: float) -> int:
    """The bytes that the weights of `layers` may take."""
    return part(share, in_16_bits(model, layers))


def check_budget(model: nn.Module, layers: Iterable[str], scheme: Scheme, share: float | None) -> None:
    """SmoothQuantError: `layers` take more than `share` of 16 bits where all of them have as few bits as they can."""
    if share is None:
        return
    layers = list(layers)
    schemes = schemes_of(model, layers, scheme)
    least = sum(weight_bytes(model.get_submodule(name), smallest) for name, (smallest, _) in schemes.items())
    if least > budget(model, layers, share):
        whole = in_16_bits(model, layers)
        smallest = math.ceil(1e4 * least / whole) / 1e2
        expected = f"at least {smallest:.2f}%, which the linear layers take without fallbacks"
        raise SmoothQuantError("--budget-size", expected, f"{share:.2%}", "raise it, or use a larger --group-size")
