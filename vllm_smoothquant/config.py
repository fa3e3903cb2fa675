"""vLLM's side of `quantization_config`: which method each layer gets, and what is refused before a worker starts.

The format itself is read in checkpoint.py. vLLM builds one SmoothQuantConfig in the parent process, pickles it to the
workers, and there asks it once for every layer it builds. Written for vLLM 0.26 to 0.33, whose abstract methods of
QuantizationConfig are the same; 0.32 adds hooks we do not need.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as VllmQuantizationConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from .bloom import RepeatingMapper, repeating_mapper
from .format.config import QUANT_METHOD, CheckpointConfig, Scheme
from .format.errors import SmoothQuantError
from .format.files import header_faults, read_headers, read_json, size_faults
from .linear import SmoothQuantLinearMethod

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class SmoothQuantVllmConfig(VllmQuantizationConfig):
    """config: what the checkpoint says; None where a model without `quantization_config` was asked to be "smoothquant".

    tensors: the names in the checkpoint's files, where they are at hand when the engine is configured; else None.
    """

    def __init__(self, config: CheckpointConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.tensors: frozenset[str] | None = None
        self.repeating: RepeatingMapper | None = None
        self._asked: set[str] = set()

    def __repr__(self) -> str:
        return f"SmoothQuantConfig({self.config})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        # float32 is for comparing with the reference; CUDA's INT8 GEMMs write 16 bits only.
        return [torch.float16, torch.bfloat16] + ([torch.float32] if current_platform.is_cpu() else [])

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # the first tensor cores with INT8

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json only: vLLM then builds `cls()` for a model that has no quantization_config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SmoothQuantVllmConfig":
        return cls(CheckpointConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls this in the parent process once the model is known: refuse here what can be refused here."""
        if self.config is None:
            raise not_quantised(model_name)
        self.repeating = repeating_mapper(hf_config)
        # A repository on the hub is not downloaded yet; then the checks at loading have to do.
        if os.path.isdir(model_name):
            headers = read_headers(model_name)
            if not headers:
                raise SmoothQuantError(model_name, "safetensors files", "none", "copy or export the checkpoint again")
            sizes = size_faults(read_json(Path(model_name, "config.json")), headers)
            for fault in (*sizes, *header_faults(self.config, headers)):
                raise fault
            self.tensors = frozenset(headers)

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """vLLM asks from 0.32 on, which is since when BLOOM's loader reorders scales, too."""
        mapper = super().get_checkpoint_weight_mapper()
        return mapper if self.repeating is None else mapper | self.repeating

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Follow the renaming a model applies to the checkpoint's names."""
        if self.config is not None:
            self.config = dataclasses.replace(
                self.config,
                overrides=hf_to_vllm_mapper.apply_dict(dict(self.config.overrides)),
                smoothed=frozenset(hf_to_vllm_mapper.apply_list(sorted(self.config.smoothed))),
                ignore=frozenset(hf_to_vllm_mapper.apply_list(sorted(self.config.ignore))),
            )
        if self.tensors is not None:
            self.tensors = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.tensors)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for linear layers and an untied output head that are not ignored.

        None means vLLM's floating-point method: embeddings, attention (no scaled KV cache), routed experts.
        """
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        if self.config is None:
            raise not_quantised(prefix)
        names = self._checkpoint_names(prefix)
        self._asked.update(names)
        scheme, smoothed = self._agreed(prefix, names)
        if scheme is not None:
            return SmoothQuantLinearMethod(
                prefix, names, scheme, smoothed, self.tensors, self.repeating, self.check_all_names_met
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def check_all_names_met(self) -> None:
        """Once the model is built: a name in the configuration that no layer has would be silently without effect."""
        if self.config is None or get_pp_group().world_size > 1:
            return  # a pipeline stage builds only its own layers
        for name in sorted((self.config.smoothed | set(self.config.overrides)) - self._asked):
            raise SmoothQuantError(
                f"quantization_config: {name}",
                "the name of a linear layer of this model in vLLM",
                "a name vLLM did not ask for",
                "report this architecture, or calibrate with the same activations for all layers",
            )

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """The checkpoint's names of what vLLM calls `prefix`: mostly q_proj, k_proj and v_proj for qkv_proj."""
        assert self.config is not None
        parent, _, last = prefix.rpartition(".")
        named = self.config.ignore | self.config.smoothed | set(self.config.overrides)
        if prefix in named or (self.tensors is not None and f"{prefix}.weight" in self.tensors):
            return [prefix]  # fused in the checkpoint already
        shards = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{shard}" if parent else shard for shard in shards]

    def _agreed(self, prefix: str, names: list[str]) -> tuple[Scheme | None, bool]:
        """The one (scheme, smoothed) of all `names`: a fused layer has one input and one multiplication."""
        assert self.config is not None
        said = {name: (self.config.scheme(name), name in self.config.smoothed) for name in names}
        if len(set(said.values())) > 1:
            raise SmoothQuantError(
                f"quantization_config: {prefix}",
                f"one scheme for {', '.join(names)}, which vLLM computes as one layer",
                "; ".join(f"{name.rpartition('.')[2]} {_describe(*value)}" for name, value in said.items()),
                "recalibrate so that these layers are ignored, overridden and smoothed alike",
            )
        return said[names[0]]


def _describe(scheme: Scheme | None, smoothed: bool) -> str:
    if scheme is None:
        return "ignored"
    activations = scheme.input_activations
    return (
        f"{'dynamic' if activations.dynamic else 'static'} per_{activations.strategy}{', smoothed' if smoothed else ''}"
    )


def not_quantised(model: str) -> SmoothQuantError:
    return SmoothQuantError(
        model,
        "a SmoothQuant checkpoint",
        "a model without quantization_config",
        f"run `smoothquant calibrate {model} -o OUT` first, then serve OUT",
    )
