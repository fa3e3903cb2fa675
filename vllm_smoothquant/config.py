"""vLLM's side of `quantization_config`: the method of each layer, and the checks that run before a worker starts.

format/config.py reads the format. vLLM builds one SmoothQuantVllmConfig in the parent process and pickles it to the
workers, where it calls get_quant_method once per layer. Written for vLLM 0.26 to 0.33, whose QuantizationConfig has the
same abstract methods; 0.32 adds hooks that are not needed here.
"""

import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as VllmQuantizationConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from . import adapters
from .bloom import RepeatingMapper, repeating_mapper
from .format.config import ABSORBED, QUANT_METHOD, STREAM, CheckpointConfig, Scheme
from .format.errors import SmoothQuantError
from .format.files import PACKED, header_faults, quantised_layers, read_headers, read_json, size_faults
from .hidden_states import check_readers
from .linear import SmoothQuantLinearMethod
from .loading import CheckedLoading

# What vLLM fuses in towers, whose models often do not say so.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_BLOCK = re.compile(r".*?\.(\d+)\.")  # of a decoder block, in the name of a layer
# vLLM's class for routed experts, now and before 0.32.
_EXPERTS = {"RoutedExperts", "FusedMoE"}


class SmoothQuantVllmConfig(VllmQuantizationConfig):
    """config: the checkpoint's `quantization_config`; None if --quantization smoothquant names a model without one.

    tensors: all names in the checkpoint's files; None if they are not on this machine when the engine is configured.
    quantised: those of them whose layers are INT8, without ".weight". checkpoint: its folder or hub id.
    """

    def __init__(self, config: CheckpointConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.tensors: frozenset[str] | None = None
        self.quantised: frozenset[str] = frozenset()
        self.repeating: RepeatingMapper | None = None
        self.checkpoint = "CHECKPOINT"
        self.headless = False  # config.json names a class without an output head; vLLM builds one, and does not need it
        self._seen_layers: set[str] = set()
        self._checked = False
        self._complete = False  # the model is built and loaded; vLLM asks on with the layers of a draft

    def __repr__(self) -> str:
        return f"SmoothQuantVllmConfig({self.config})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        # float32 is for comparisons with the reference; CUDA's INT8 GEMMs write 16 bits only.
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
        """vLLM calls this in the parent process when it knows the model: refuse a faulty checkpoint here."""
        if self.config is None:
            raise _not_quantised(model_name)
        self.repeating, self.checkpoint = repeating_mapper(hf_config), model_name
        # A repository on the hub is not downloaded yet, and weights in object storage never are: such a folder has only
        # config.json. The checks at loading apply to both.
        if any(Path(model_name).glob("model-rank-*.safetensors")):
            fix = "serve the checkpoint itself: vLLM splits its tensors over the ranks while it loads them"
            raise SmoothQuantError(model_name, "a checkpoint", "files of --load-format sharded_state", fix)
        headers = read_headers(model_name) if os.path.isdir(model_name) else {}
        if headers:
            sizes = size_faults(read_json(Path(model_name, "config.json")), headers)
            for fault in (*sizes, *header_faults(self.config, headers)):
                raise fault
            self.tensors = frozenset(headers)
            self.quantised = frozenset(quantised_layers(headers))
        # A model without a head, as for embeddings: vLLM puts it below "model", and loads files that do not say so.
        architecture = (getattr(hf_config, "architectures", None) or [""])[0]
        self.headless = architecture.endswith("Model") and "LMHead" not in architecture
        if self.headless and not any(name.startswith("model.") for name in self.tensors or ()):
            self.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"": "model."}))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """vLLM calls this from 0.32 on, and BLOOM's loader reorders scales from the same version on."""
        mapper = super().get_checkpoint_weight_mapper()
        return mapper if self.repeating is None else mapper | self.repeating

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Apply the renaming that a model applies to the checkpoint's names."""

        def renamed(names: frozenset[str]) -> frozenset[str]:
            return frozenset(hf_to_vllm_mapper.apply_list(sorted(names)))

        def layer(name: str) -> str:
            # A mapper may ask for the dot behind a name, as in "lm_head.".
            new = hf_to_vllm_mapper.apply_list([name])
            if not new or new == [name]:
                new = hf_to_vllm_mapper.apply_list([f"{name}.weight"]) or [name]
            return new[0].removesuffix(".weight")

        def layers(names: frozenset[str]) -> frozenset[str]:
            return frozenset(map(layer, names))

        if self.config is not None:
            self.config = dataclasses.replace(
                self.config,
                overrides={layer(n): o for n, o in self.config.overrides.items()},
                smoothed=layers(self.config.smoothed),
                # Under both names: vLLM may put the head below a part of the model, or not.
                ignore=renamed(self.config.ignore) | layers(self.config.ignore),
            )
        if self.tensors is not None:
            self.tensors, self.quantised = renamed(self.tensors), layers(self.quantised)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for linear layers and an untied output head, unless `ignore` has them.

        None means vLLM's floating-point method: embeddings, attention (no scaled KV cache), routed experts.
        """
        if _EXPERTS & {cls.__name__ for cls in type(layer).__mro__}:
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        if self.config is None:
            raise _not_quantised(prefix)
        if self.headless and isinstance(layer, ParallelLMHead):
            return None
        if self._complete:  # a checkpoint carries the source's draft (MTP) as it is, under names that vLLM changes
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        names, last = self._checkpoint_names(self.config, prefix), prefix.rpartition(".")[2]
        self._seen_layers.update(names)
        if torch.empty(0).is_meta:  # vLLM loads nothing into this layer: a tower or a head that it does not need
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        scheme, smoothed = _shared_scheme(self.config, prefix, self._stored(names))
        if isinstance(layer, ParallelLMHead) and last in self.config.ignore:
            scheme = None  # vLLM may put the head below a part of the model, and its mapper renames only what is inside
        if scheme is None:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if last == ABSORBED:
            raise SmoothQuantError(
                prefix, "a layer in floating point, because vLLM's attention reads its weight as such", "INT8",
                f"calibrate the model again, with --ignore '*.{last}'",
            )  # fmt: skip
        loading = CheckedLoading(prefix, names, self.tensors, self.repeating, scheme.weights)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None:
            if self.config.transforms is not None and STREAM in self.config.transforms.rotation and not self._checked:
                check_readers(vllm_config, self.checkpoint)
                self._checked = True  # it is the same for all layers
            loading.dummy = vllm_config.load_config.load_format == "dummy"
            if self.config.transforms is not None and vllm_config.lora_config is not None:
                adapters.watch(layer, self.config.transforms.smoothing, self.checkpoint)
        return SmoothQuantLinearMethod(loading, scheme, smoothed, self.check_all_names_seen)

    def _experts_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of the routed experts of a block, all or none of which are integers; None: in floating point."""
        if self.config is None or self.config.experts is None or self._complete or torch.empty(0).is_meta:
            return None
        block = prefix.removesuffix(".routed_experts") + "."
        names = {name for name in self.quantised if name.startswith(block)}
        self._seen_layers |= names
        ignored = sorted(name for name in self.config.ignore if name.startswith(block))
        if ignored and names:
            expected = f"all experts of {prefix} in integers or none, because vLLM computes them at once"
            raise SmoothQuantError(
                "quantization_config.ignore", expected, f"{ignored[0]} and {len(ignored) - 1} more", "calibrate again"
            )
        if ignored or (self.tensors is not None and not names):
            return None
        try:
            # Here, because releases before 0.32 have no such class, and serve other checkpoints.
            from .experts.four_bits import four_bit_experts
            from .experts.int8 import SmoothQuantExpertsMethod
        except ImportError as error:
            fix = "upgrade vLLM, or calibrate the model again with --ignore '*.experts.*'"
            raise SmoothQuantError(prefix, "vLLM 0.32 or newer for experts in integers", error, fix) from error
        scheme = self.config.expert_scheme
        assert scheme is not None
        if scheme.weights.num_bits == 4:
            return four_bit_experts(prefix, scheme, layer, self.check_all_names_seen)
        per_channel = scheme.weights.strategy == "channel"
        return SmoothQuantExpertsMethod(prefix, per_channel, layer, self.check_all_names_seen)

    def check_all_names_seen(self) -> None:
        """Check, after the model is built, that each name in the configuration is a layer: others have no effect.

        vLLM builds some layers without asking for their method. It would load their integers as floating point.
        """
        self._complete = True
        if self.config is None or get_pp_group().world_size > 1:
            return  # a pipeline stage builds only its own layers
        for name in sorted((self.config.smoothed | set(self.config.overrides) | self.quantised) - self._seen_layers):
            raise SmoothQuantError(
                f"quantization_config: {name}",
                "the name of a linear layer that vLLM quantises in this model",
                "a layer that vLLM computes in floating point, or does not have",
                f"calibrate the model again with --ignore {name}, and report this architecture",
            )

    def _stored(self, names: list[str]) -> list[str]:
        """Those of `names` that have a weight in the files: a layer may compute two outputs of one matrix."""
        stored = [name for name in names if self.tensors is None or self._in_files(name)]
        return stored or names

    def _in_files(self, name: str) -> bool:
        tensors = self.tensors or frozenset()
        return f"{name}.weight" in tensors or f"{name}.{PACKED}" in tensors

    def _checkpoint_names(self, config: CheckpointConfig, prefix: str) -> list[str]:
        """The checkpoint's names of the layer that vLLM calls `prefix`: q_proj, k_proj and v_proj for qkv_proj."""
        parent, _, last = prefix.rpartition(".")
        named = config.ignore | config.smoothed | set(config.overrides)
        if prefix in named or self._in_files(prefix):
            return [prefix]  # the checkpoint stores the fused layer
        names = [f"{parent}.{shard}" if parent else shard for shard in self.packed_modules_mapping.get(last, [last])]
        fused = [f"{parent}.{shard}" for shard in _FUSED.get(last, [])]
        if fused and last not in self.packed_modules_mapping and named.issuperset(fused):
            return fused
        return self._elsewhere_in_block(prefix, names, named) or names

    def _elsewhere_in_block(self, prefix: str, names: list[str], named: Collection[str]) -> list[str]:
        """The checkpoint's names of `names` if vLLM calls a part of a decoder block by another name than the files do.

        Empty if some of `names` is known, or if not exactly one layer of the block has each last part.
        """
        if any(map(self._in_files, names)):
            return []
        stored = (name.rpartition(".")[0] for name in self.tensors or () if name.endswith((".weight", f".{PACKED}")))
        known, match = set(stored) or set(named), _BLOCK.match(prefix)
        blocks = {int(found[1]): found[0] for name in known if (found := _BLOCK.match(name))}
        if match is None or not blocks or known.intersection(names):
            return []
        # A model may number the second parts of its blocks on from the last block.
        number = int(match[1])
        block = blocks.get(number, blocks.get(number % len(blocks), prefix))
        inside = [name for name in known if name.startswith(block)]
        alike = [[name for name in inside if name.endswith(f".{last.rpartition('.')[2]}")] for last in names]
        return [layers[0] for layers in alike] if all(len(layers) == 1 for layers in alike) else []


def _shared_scheme(config: CheckpointConfig, prefix: str, names: list[str]) -> tuple[Scheme | None, bool]:
    """The one (scheme, smoothed) of all `names`, because a fused layer has one input and one multiplication."""
    schemes = {name: (config.scheme(name), name in config.smoothed) for name in names}
    if len(set(schemes.values())) > 1:
        raise SmoothQuantError(
            f"quantization_config: {prefix}",
            f"one scheme for {', '.join(names)}, because vLLM computes them as one layer",
            "; ".join(f"{name.rpartition('.')[2]} {_describe(*scheme)}" for name, scheme in schemes.items()),
            "calibrate the model again so that these layers are ignored, overridden and smoothed alike",
        )
    return schemes[names[0]]


def _describe(scheme: Scheme | None, smoothed: bool) -> str:
    if scheme is None:
        return "ignored"
    activations, bits = scheme.input_activations, scheme.weights.num_bits
    dynamic = "dynamic" if activations.dynamic else "static"
    rounded = f"{dynamic} per_{activations.strategy}" if activations.rounded else "activations of 16 bits"
    return f"{rounded}{'' if bits == 8 else f', {bits}-bit weights'}{', smoothed' if smoothed else ''}"


def _not_quantised(model: str) -> SmoothQuantError:
    fix = f"run `smoothquant calibrate {model} -o OUT` first, then serve OUT"
    return SmoothQuantError(model, "a SmoothQuant checkpoint", "a model without quantization_config", fix)
