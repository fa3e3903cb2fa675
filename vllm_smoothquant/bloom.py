"""Scales that must pass through a weight loader which reorders all tensors named query_key_value (BLOOM, vLLM 0.32 on).

    checkpoint [1]  --repeat-->  [3 * heads]  --vLLM: view(heads, 3, -1), transpose-->  [3 * heads]  --collapse-->  [1]

BLOOM's fused rows have the order (heads, 3, head size), and vLLM needs (3, heads, head size). Its loader applies the
view to every tensor with that name, and a per-tensor scale of one element cannot be viewed so. The scale is therefore
repeated for every row group, because reordering equal numbers changes nothing, and loading.py collapses it again.

vLLM applies the mapper that a QuantizationConfig returns from get_checkpoint_weight_mapper.
Source: vllm/model_executor/models/bloom.py, BloomModel._repack_qkv.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

from .format.config import REORDERED


@dataclass
class RepeatingMapper(WeightsMapper):
    """Repeats one-element tensors of layers called `layer` `times` times, and renames nothing.

    vLLM joins mappers with `|`. Either operand may be a RepeatingMapper, and the result must be one.
    """

    layer: str = ""
    times: int = 1

    def _with(self, joined: WeightsMapper) -> "RepeatingMapper":
        return replace(self, **{f.name: getattr(joined, f.name) for f in fields(WeightsMapper)})

    def __or__(self, other: WeightsMapper) -> "RepeatingMapper":
        return self._with(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> "RepeatingMapper":
        return self._with(WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in super().apply(weights):
            single = tensor.shape == (1,) and name.rpartition(".")[0].endswith(self.layer)
            yield name, tensor.repeat(self.times) if single else tensor


def repeating_mapper(hf_config: Any) -> RepeatingMapper | None:
    """The mapper for `hf_config`'s architecture; None if vLLM's loader of that architecture reorders no scales."""
    layer = REORDERED.get(getattr(hf_config, "model_type", ""))
    return RepeatingMapper(layer=layer, times=3 * hf_config.num_attention_heads) if layer else None


def collapse(value: torch.Tensor, mapper: RepeatingMapper | None) -> torch.Tensor:
    """The one element that `mapper` repeated, [1]; `value` itself if the mapper did not repeat it."""
    if mapper is None or value.shape != (mapper.times,) or not bool((value == value[0]).all()):
        return value
    return value[:1]
