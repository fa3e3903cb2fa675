"""Scales that must pass through a loader which reorders everything called query_key_value (BLOOM, vLLM 0.32 on).

    checkpoint [1]  --repeat-->  [3 * heads]  --vLLM: view(heads, 3, -1), transpose-->  [3 * heads]  --collapse-->  [1]

BLOOM's fused rows are ordered (heads, 3, head size) and vLLM wants (3, heads, head size). Its loader views every tensor
of that name so, which a per-tensor scale of one element does not survive. Repeated for every row group it does, since
reordering equal numbers changes nothing; `collapse` takes them back in linear.py.

The way in is the mapper QuantizationConfig may contribute to vLLM's weight loading (get_checkpoint_weight_mapper).
Source: vllm/model_executor/models/bloom.py, BloomModel._repack_qkv.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

from .format.config import REORDERED


@dataclass
class RepeatingMapper(WeightsMapper):
    """A mapper that renames nothing and repeats one-element tensors of layers called `layer` `times` times.

    vLLM joins mappers with `|`; either operand may be ours and the result must stay ours.
    """

    layer: str = ""
    times: int = 1

    def _joined(self, both: WeightsMapper) -> "RepeatingMapper":
        return RepeatingMapper(
            **{f.name: getattr(both, f.name) for f in fields(WeightsMapper)}, layer=self.layer, times=self.times
        )

    def __or__(self, other: WeightsMapper) -> "RepeatingMapper":
        return self._joined(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> "RepeatingMapper":
        return self._joined(WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in super().apply(weights):
            single = tensor.shape == (1,) and name.rpartition(".")[0].endswith(self.layer)
            yield name, tensor.repeat(self.times) if single else tensor


def repeating_mapper(hf_config: Any) -> RepeatingMapper | None:
    """The mapper for `hf_config`'s architecture; None for all whose loaders leave scales alone."""
    layer = REORDERED.get(getattr(hf_config, "model_type", ""))
    return RepeatingMapper(layer=layer, times=3 * hf_config.num_attention_heads) if layer else None


def collapse(value: torch.Tensor, mapper: RepeatingMapper | None) -> torch.Tensor:
    """The one element `mapper` repeated, [1]; `value` itself where it did not."""
    if mapper is None or value.shape != (mapper.times,) or not bool((value == value[0]).all()):
        return value
    return value[:1]
