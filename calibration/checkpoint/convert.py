"""`smoothquant convert`: the same integers and scales under another `quantization_config`.

    smoothquant         ours: vLLM with this plugin                                  vllm_smoothquant/format
    compressed-tensors  format "int-quantized": stock vLLM, SGLang and transformers, without this plugin

Both store `weight` int8 [out, in], `weight_scale` [out, 1] or [1] and `input_scale` [1], real = int * scale, so that
only config.json differs. What the other format has no words for is refused, never dropped: it would be served wrong.

Source: compressed-tensors 0.17, quantization/quant_config.py and quant_args.py; how vLLM 0.32 reads it:
model_executor/layers/quantization/compressed_tensors/compressed_tensors.py.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.config import (
    QUANT_METHOD,
    REORDERED,
    TRANSFORMERS_WEIGHTS,
    CheckpointConfig,
    InputActivations,
    Weights,
)
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, Headers, header_faults, read_headers, read_json, read_tensors

from ..running.modules import LINEAR_TYPES, block_of
from . import export, model_card
from .architecture import build_empty
from .verify import verify

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = (COMPRESSED_TENSORS, QUANT_METHOD)
# Keys of a compressed-tensors configuration that change what is computed and that we have no word for.
FOREIGN = ("kv_cache_scheme", "transform_config", "sparsity_config")


def convert(checkpoint: str | Path, output: str | Path, to: str) -> dict[str, Any]:
    """Write `checkpoint` in the format `to` (one of FORMATS) into the new folder `output`; returns its manifest.

    Errors (SmoothQuantError): a faulty checkpoint, one that is in that format already, or one it cannot express.
    """
    folder, output = Path(checkpoint), Path(output)
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in FORMATS or method == to:
        raise SmoothQuantError(
            f"{folder}/config.json: quant_method",
            " or ".join(f for f in FORMATS if f != to),
            repr(method),
            "give a checkpoint of the other format",
        )
    export.check_output(output)
    return (_to_compressed if to == COMPRESSED_TENSORS else _from_compressed)(folder, output, config)


def _to_compressed(folder: Path, output: Path, config: dict[str, Any]) -> dict[str, Any]:
    for fault in verify(folder).faults:
        raise fault
    headers = read_headers(folder)
    ours = CheckpointConfig.from_dict(config["quantization_config"])
    check_expressible(folder, ours, headers, config)
    config["quantization_config"] = compressed_config(ours, headers)
    config.pop("transformers_weights", None)  # transformers reads this format by itself
    with export.staging(output) as beside:
        for path in folder.iterdir():
            if path.is_file() and path.name != model_card.CARD:
                shutil.copyfile(path, beside / path.name)
        return _finish(beside, folder, config, [])


def check_expressible(folder: Path, ours: CheckpointConfig, headers: Headers, config: dict[str, Any]) -> None:
    """SmoothQuantError where compressed-tensors, or stock vLLM reading it, has no way to compute `ours`."""

    def refuse(where: str, got: str, fix: str) -> SmoothQuantError:
        return SmoothQuantError(where, "what compressed-tensors can express", got, fix)

    for activations in (ours.input_activations, *ours.overrides.values()):
        if activations.strategy == "tensor" and activations.dynamic:
            raise refuse(
                "input_activations", "dynamic per_tensor (O2), which stock vLLM has no kernel for",
                "calibrate with --activations token or static",
            )  # fmt: skip
    if ours.smoothed:
        raise refuse(
            min(ours.smoothed), f"smoothing at run time in {len(ours.smoothed)} layers",
            "calibrate with a fixed --alpha, which folds all of it away",
        )  # fmt: skip
    # Stock vLLM's loader views these scales as [heads, 3, ...], which one element does not survive.
    layer = REORDERED.get(str(config.get("model_type")))
    for name, (_, shape) in headers.items():
        if layer and shape == (1,) and name.rpartition(".")[0].endswith(layer):
            raise refuse(
                name, "one scale for a layer whose rows stock vLLM reorders", "calibrate with --weights channel and "
                "--activations token",
            )  # fmt: skip
    for name, module in _built(folder).items():
        if isinstance(module, Conv1D) and headers.get(f"{name}.weight", ("",))[0] == "I8":
            raise refuse(f"{name}.weight", "a Conv1D weight, [in, out]", "serve it with this plugin")


def compressed_config(ours: CheckpointConfig, headers: Headers) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors for a checkpoint of ours with the tensors `headers`.

    One group for every way to scale activations that an override asks for, by full names; one for all other layers, by
    their class. Readers try names before classes. A head is a Linear in transformers but not in vLLM: it is named, too.
    """
    heads = [name for name in _quantised(headers) if not block_of(name) and name not in ours.overrides]
    groups = [
        ([name for name in sorted(ours.overrides) if ours.overrides[name] == activations], activations)
        for activations in sorted(set(ours.overrides.values()), key=str)
    ]
    groups.append(([*heads, "Linear"], ours.input_activations))
    experts = any(_expert(name) for name in headers)
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                "weights": _arguments(ours.weights.strategy, dynamic=False),
                "input_activations": _arguments(activations.strategy, dynamic=activations.dynamic),
                "output_activations": None,
            }
            for i, (targets, activations) in enumerate(groups)
        },
        # vLLM takes routed experts for Linear layers; ours are in floating point, whatever they are called.
        "ignore": sorted(ours.ignore) + [r"re:.*\.experts\..*"] * experts,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _arguments(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def _quantised(headers: Headers) -> list[str]:
    return sorted(name.removesuffix(".weight") for name, (dtype, _) in headers.items() if dtype == "I8")


def _expert(name: str) -> bool:
    return ".experts." in name


def _from_compressed(folder: Path, output: Path, config: dict[str, Any]) -> dict[str, Any]:
    weights, allowed = _read_groups(config["quantization_config"])
    headers = read_headers(folder)
    # A static scale is in the file or it is not; dynamic ones are per token, as _read_groups has seen to.
    schemes = {
        name: InputActivations("tensor", dynamic=False)
        if f"{name}.input_scale" in headers
        else InputActivations("token", dynamic=True)
        for name in _quantised(headers)
    }
    for name, scheme in schemes.items():
        if scheme not in allowed:
            raise SmoothQuantError(
                name,
                " or ".join(map(_describe, allowed)) + " activations, by config_groups",
                _describe(scheme) + ", by its tensors",
                "export the checkpoint again",
            )
    if not schemes:
        raise SmoothQuantError(str(folder), "int8 weights", "none", "give an int-quantized checkpoint")
    most = max(sorted(set(schemes.values()), key=str), key=list(schemes.values()).count)
    kept = [name for name in _built(folder) if name not in schemes]
    ours = CheckpointConfig(
        weights, most, overrides={name: s for name, s in schemes.items() if s != most}, ignore=frozenset(kept)
    )
    config |= {"quantization_config": ours.to_dict(), "transformers_weights": TRANSFORMERS_WEIGHTS}
    with export.staging(output) as beside:
        for path in folder.iterdir():
            if path.is_file() and path.name != model_card.CARD and ".safetensors" not in path.name:
                shutil.copyfile(path, beside / path.name)
        export.write_tensors(beside, _our_tensors(folder, ours))
        for fault in header_faults(ours, read_headers(beside)):
            raise fault
        return _finish(beside, folder, config, kept)


def _read_groups(quantization: dict[str, Any]) -> tuple[Weights, tuple[InputActivations, ...]]:
    """What `config_groups` says of weights and of activations, if it is something we can hold."""
    where = "quantization_config"
    for key in FOREIGN:
        if quantization.get(key):
            raise SmoothQuantError(f"{where}.{key}", "none", "one", "serve it with stock vLLM")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise SmoothQuantError(f"{where}.config_groups", "groups", repr(groups), "mend config.json")
    weights: set[str] = set()
    activations: list[InputActivations] = []
    for key, group in groups.items():
        at = f"{where}.config_groups.{key}"
        if not isinstance(group, dict) or group.get("output_activations"):
            raise SmoothQuantError(at, "weights and input_activations", "others", "serve it with stock vLLM")
        weights.add(_strategy(group.get("weights"), f"{at}.weights", {("tensor", False), ("channel", False)}))
        strategy = _strategy(
            group.get("input_activations"), f"{at}.input_activations", {("tensor", False), ("token", True)}
        )
        activations.append(InputActivations(strategy, dynamic=strategy == "token"))
    if len(weights) > 1:
        raise SmoothQuantError(
            f"{where}.config_groups", "one strategy for all weights", "tensor and channel", "serve it with stock vLLM"
        )
    return Weights(weights.pop()), tuple(dict.fromkeys(activations))


def _strategy(said: Any, where: str, known: set[tuple[str, bool]]) -> str:
    """The strategy of one set of quantisation arguments: symmetric int8, (strategy, dynamic) being one of `known`."""
    said = said if isinstance(said, dict) else {}
    facts = {"num_bits": 8, "type": "int", "symmetric": True}  # all of them are the format's own defaults
    strategy, dynamic = said.get("strategy", "tensor"), said.get("dynamic", False)
    right = said and all(said.get(key, value) == value for key, value in facts.items())
    grouped = said.get("actorder") or said.get("group_size") not in (None, -1)
    if not right or grouped or (strategy, dynamic) not in known:
        ways = " or ".join(f"{'dynamic' if d else 'static'} per_{s}" for s, d in sorted(known))
        raise SmoothQuantError(
            where,
            f"symmetric 8-bit integers, {ways}",
            json.dumps(said)[:200] if said else "nothing",
            "serve it with stock vLLM",
        )
    return str(strategy)


def _our_tensors(folder: Path, ours: CheckpointConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `folder` as our format stores them: float32 scales of one shape, and no zero points."""
    for name, tensor in read_tensors(folder):
        suffix = name.rpartition(".")[2]
        if suffix.endswith("_zero_point"):
            if tensor.any():
                raise SmoothQuantError(name, "zeros: symmetric integers", "others", "serve it with stock vLLM")
            continue
        if suffix in ("weight_scale", "input_scale"):
            per_channel = suffix == "weight_scale" and ours.weights.strategy == "channel"
            tensor = tensor.float().reshape((-1, 1) if per_channel else (1,))
            if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise SmoothQuantError(name, "finite scales above zero", "others", "quantise the model again")
        yield name, tensor


def _finish(beside: Path, folder: Path, config: dict[str, Any], kept: list[str]) -> dict[str, Any]:
    """config.json and a manifest that knows it; what made the checkpoint stays told, where it was."""
    export.write_json(beside / "config.json", config)
    path = folder / MANIFEST
    before = read_json(path) if path.exists() else {"kept": dict.fromkeys(kept, "floating point in the source")}
    manifest = before | {
        "format_version": 1,
        "converted_from": read_json(folder / "config.json")["quantization_config"]["quant_method"],
        "quantized": _quantised(read_headers(beside)),
        "quantization_config": config["quantization_config"],
        "files": export.file_hashes(beside),
    }  # fmt: skip
    export.write_json(beside / MANIFEST, manifest)
    if "source" in manifest:
        model_card.write(beside, manifest)  # how it is served has changed
    elif (folder / model_card.CARD).exists():
        shutil.copyfile(folder / model_card.CARD, beside / model_card.CARD)
    return manifest


def _built(folder: Path) -> dict[str, torch.nn.Module]:
    """Name in files -> linear layer of the architecture, built without memory."""
    model = build_empty(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}
    return {export.hub_module_name(model, name): module for name, module in linears.items() if not _expert(name)}


def _describe(activations: InputActivations) -> str:
    return f"{'dynamic' if activations.dynamic else 'static'} per_{activations.strategy}"
