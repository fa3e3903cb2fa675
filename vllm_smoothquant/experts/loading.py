"""What is checked while vLLM loads routed experts: each matrix of each expert of a rank, and its scales."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts

from ..format.errors import SmoothQuantError
from ..format.files import PACKED, bad_scales
from ..loading import fill

_FIX = "calibrate the model again"


class ExpertLoading:
    """The experts of one block. prefix: vLLM's name of it. stored: "weight" (INT8) or "weight_packed" (4 bits)."""

    def __init__(self, prefix: str, stored: str) -> None:
        self.prefix, self.stored = prefix, stored
        self.loaded: dict[str, set[tuple[int, str]]] = {}
        vllm_config = get_current_vllm_config_or_none()  # --load-format dummy: vLLM loads no files
        self.dummy = vllm_config is not None and vllm_config.load_config.load_format == "dummy"

    def checked(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """`loader` of the parameter `name`, with checks before it; it records which experts were loaded."""
        loaded, four_bits = self.loaded.setdefault(name, set()), self.stored == PACKED
        integers = torch.int32 if four_bits else torch.int8
        dtype = integers if name.endswith(self.stored) else torch.float32 if name.endswith("scale") else None

        def load(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int,
            return_success: bool = False,
        ) -> bool | None:  # fmt: skip
            where = f"{self.prefix}: {weight_name} of expert {expert_id}, {shard_id}"
            if dtype is not None and loaded_weight.dtype != dtype:
                raise SmoothQuantError(where, str(dtype), str(loaded_weight.dtype), _FIX)
            if dtype is torch.float32:
                bad, expected = bad_scales(loaded_weight, signed=four_bits)
                if bad.any():
                    raise SmoothQuantError(where, expected, "others", _FIX)
            loaded.add((expert_id, shard_id))
            return loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success=return_success)

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def check_complete(self, layer: RoutedExperts) -> None:
        """Every scale of every expert of this rank was loaded, and each matrix that has a scale."""
        if self.dummy:
            fill(layer, (name for name in self.loaded if not name.endswith("bias")))
            return
        for name in ("w13", "w2"):
            scale, matrices = getattr(layer, f"{name}_weight_scale").data, self.loaded[f"{name}_{self.stored}"]
            missing = self.loaded[f"{name}_weight_scale"] ^ matrices
            if not bool(torch.isfinite(scale).all()) or missing:
                expert = min(missing)[0] if missing else int((~torch.isfinite(scale)).nonzero()[0, 0])
                got, fix = f"none for expert {expert} of this rank", "copy or export the checkpoint again"
                raise SmoothQuantError(f"{self.prefix}.{name}", "a matrix and a scale for each expert", got, fix)
