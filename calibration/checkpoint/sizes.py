"""The manifest's `size`: what the weights of the linear layers take under a size budget, counted in the files.

{"weights": 26880, "in_16_bits": 81920, "budget": 28672}        bytes, as smoothing/size.py defines them
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from vllm_smoothquant.format import int4
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import BYTES, MANIFEST, PACKED, Headers, quantised_layers

from ..smoothing.fallback import FLOAT
from .architecture import fault
from .export import file_names


def stored_sizes(model: PreTrainedModel, headers: Headers, fallen_back: Mapping[str, str]) -> dict[str, int]:
    """`weights` and `in_16_bits` of a checkpoint of `model` with the tensors `headers`.

    fallen_back: layer of `model` -> what it fell back to.
    """
    in_float = (file for name, to in fallen_back.items() if to == FLOAT for file in file_names(model, f"{name}.weight"))
    layers = quantised_layers(headers)
    names = {*in_float, *(f"{layer}.{part}" for layer in layers for part in ("weight", PACKED, "weight_scale"))}
    found = {name: headers[name] for name in names & headers.keys()}
    return {
        "weights": sum(BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in found.values()),
        "in_16_bits": sum(
            2 * math.prod(shape) * (int4.IN_WORD if name.endswith(f".{PACKED}") else 1)
            for name, (_, shape) in found.items()
            if not name.endswith(".weight_scale")
        ),
    }


def budget_faults(size: Any, stored: Mapping[str, int]) -> Iterator[SmoothQuantError]:
    """What is wrong with the manifest's `size` of a checkpoint that has the sizes `stored`."""
    where = f"{MANIFEST}: size"
    if not isinstance(size, dict) or size.keys() != {*stored, "budget"} or type(size["budget"]) is not int:
        yield fault(where, f"the bytes of {', '.join(stored)} and budget", repr(size)[:80])
        return
    for key, count in stored.items():
        if size[key] != count:
            yield fault(f"{where}.{key}", f"{count} bytes, as the files have", repr(size[key])[:80])
    if not stored["weights"] <= size["budget"] <= stored["in_16_bits"]:
        expected = f"from {stored['weights']} bytes, which the weights take, to {stored['in_16_bits']}"
        yield fault(f"{where}.budget", expected, repr(size["budget"])[:80])
