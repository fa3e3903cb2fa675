"""`smoothquant convert`: the same integers and scales with another `quantization_config`.

    smoothquant         ours: vLLM with this plugin                                  vllm_smoothquant/format
    compressed-tensors  format "int-quantized": stock vLLM, SGLang and transformers, without this plugin

Both store `weight` int8 [out, in], `weight_scale` [out, 1] or [1] and `input_scale` [1], real = int * scale, so that
only config.json differs. A property that the other format cannot express is refused, because a checkpoint without it
would be served wrong.

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

from vllm_smoothquant.format.config import QUANT_METHOD, REORDERED, TRANSFORMERS_WEIGHTS, CheckpointConfig, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, Headers, header_faults, read_headers, read_json, read_tensors

from ..options import ACTIVATIONS
from ..running.modules import LINEAR_TYPES, block_of
from . import export, model_card
from .architecture import build_empty
from .manifest import FORMAT_VERSION
from .model_card import CARD
from .verify import verify

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = (COMPRESSED_TENSORS, QUANT_METHOD)
# Keys of a compressed-tensors configuration that change what is computed and that our format does not have.
FOREIGN = ("kv_cache_scheme", "transform_config", "sparsity_config")
STOCK = "serve it with stock vLLM"
EXPERTS = ".experts."
# The ACTIVATIONS that both formats can express.
KINDS = {"static": "static per_tensor", "token": "dynamic per_token"}


def convert(checkpoint: str | Path, output: str | Path, to: str) -> dict[str, Any]:
    """Write `checkpoint` in the format `to` (one of FORMATS) into the new folder `output`; returns its manifest.

    Errors (SmoothQuantError): a faulty checkpoint, one that has that format already, or one that it cannot express.
    """
    folder, output = Path(checkpoint), Path(output)
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in FORMATS or method == to:
        where, expected = f"{folder}/config.json: quant_method", " or ".join(f for f in FORMATS if f != to)
        raise SmoothQuantError(where, expected, repr(method), "give a checkpoint of the other format")
    export.check_output(output)
    if to_ours := to == QUANT_METHOD:
        ours, in_float = _our_config(folder, config["quantization_config"])
        config |= {"quantization_config": ours.to_dict(), "transformers_weights": TRANSFORMERS_WEIGHTS}
    else:
        for fault in verify(folder).faults:
            raise fault
        ours, headers, in_float = CheckpointConfig.from_dict(quantization), read_headers(folder), []
        _check_expressible(folder, ours, headers, config)
        config["quantization_config"] = _compressed_config(ours, headers)
        config.pop("transformers_weights", None)  # transformers reads compressed-tensors without help
    with export.staging(output) as staged:
        for path in folder.iterdir():
            if path.is_file() and path.name != CARD and not (to_ours and ".safetensors" in path.name):
                shutil.copyfile(path, staged / path.name)
        if to_ours:
            export.write_tensors(staged, _our_tensors(folder, ours.weights.strategy))
            for fault in header_faults(ours, read_headers(staged)):
                raise fault
        return _finish(staged, folder, config, in_float)


def _check_expressible(folder: Path, ours: CheckpointConfig, headers: Headers, config: dict[str, Any]) -> None:
    """SmoothQuantError if compressed-tensors, or stock vLLM as its reader, cannot compute this checkpoint."""

    def refuse(where: str, got: str, fix: str) -> SmoothQuantError:
        return SmoothQuantError(where, "what compressed-tensors can express", got, fix)

    if ACTIVATIONS["tensor"] in (ours.input_activations, *ours.overrides.values()):
        got = "dynamic per_tensor (O2), which stock vLLM has no kernel for"
        raise refuse("input_activations", got, "calibrate with --activations token or static")
    if ours.smoothed:
        fix = "calibrate with a fixed --alpha, which folds all of it away"
        raise refuse(min(ours.smoothed), f"smoothing at run time in {len(ours.smoothed)} layers", fix)
    # Stock vLLM's loader views these scales as [heads, 3, ...], which is impossible for a single element.
    reordered = REORDERED.get(str(config.get("model_type")))
    for name, (_, shape) in headers.items():
        if reordered and shape == (1,) and name.rpartition(".")[0].endswith(reordered):
            fix = "calibrate with --weights channel and --activations token"
            raise refuse(name, "one scale for a layer whose rows stock vLLM reorders", fix)
    for name, module in _linear_layers(folder).items():
        if isinstance(module, Conv1D) and headers.get(f"{name}.weight", ("",))[0] == "I8":
            raise refuse(f"{name}.weight", "a Conv1D weight, [in, out]", "serve it with this plugin")


def _compressed_config(ours: CheckpointConfig, headers: Headers) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors for a checkpoint of ours with the tensors `headers`.

    One group for each kind of activations that overrides have, by full names, and one for all other layers, by their
    class, because readers try names before classes. A head is listed by name, too: it is a Linear in transformers but
    not in vLLM.
    """
    overrides = ours.overrides
    heads = [name for name in _quantised(headers) if not block_of(name) and name not in overrides]
    groups = [
        ([name for name in sorted(overrides) if overrides[name] == activations], activations)
        for activations in sorted(set(overrides.values()), key=str)
    ]
    groups.append(([*heads, "Linear"], ours.input_activations))
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                "weights": _arguments(ours.weights.strategy, False),
                "input_activations": _arguments(activations.strategy, activations.dynamic),
                "output_activations": None,
            }
            for i, (targets, activations) in enumerate(groups)
        },
        # vLLM takes routed experts for Linear layers; ours are in floating point, whatever their names are.
        "ignore": sorted(ours.ignore) + [r"re:.*\.experts\..*"] * any(EXPERTS in name for name in headers),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _arguments(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def _our_config(folder: Path, quantization: dict[str, Any]) -> tuple[CheckpointConfig, list[str]]:
    """(our configuration of a compressed-tensors checkpoint, names of its linear layers in floating point)."""
    strategy, allowed = _read_groups(quantization)
    headers = read_headers(folder)
    # A static scale is a tensor of the file. Dynamic scales are per token, because _read_groups refuses others.
    kinds = {name: "static" if f"{name}.input_scale" in headers else "token" for name in _quantised(headers)}
    for name, kind in kinds.items():
        if kind not in allowed:
            expected = " or ".join(KINDS[each] for each in allowed) + " activations, by config_groups"
            raise SmoothQuantError(name, expected, f"{KINDS[kind]}, by its tensors", "export the checkpoint again")
    if not kinds:
        raise SmoothQuantError(str(folder), "int8 weights", "none", "give an int-quantized checkpoint")
    most = max(sorted(set(kinds.values())), key=list(kinds.values()).count)
    overrides = {name: ACTIVATIONS[kind] for name, kind in kinds.items() if kind != most}
    in_float = [name for name in _linear_layers(folder) if name not in kinds]
    return CheckpointConfig(Weights(strategy), ACTIVATIONS[most], overrides, ignore=frozenset(in_float)), in_float


def _read_groups(quantization: dict[str, Any]) -> tuple[str, list[str]]:
    """(strategy of the weights, KINDS of activations) of `config_groups`.

    Errors (SmoothQuantError): our format cannot express it.
    """
    where = "quantization_config"
    for key in FOREIGN:
        if quantization.get(key):
            raise SmoothQuantError(f"{where}.{key}", "none", "one", STOCK)
    where += ".config_groups"
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise SmoothQuantError(where, "groups", repr(groups), "correct config.json")
    weights, activations = set[str](), list[str]()
    for key, group in groups.items():
        if not isinstance(group, dict) or group.get("output_activations"):
            raise SmoothQuantError(f"{where}.{key}", "weights and input_activations", "others", STOCK)
        weights.add(_strategy(group, "weights", f"{where}.{key}", ("channel", False), ("tensor", False)))
        strategy = _strategy(group, "input_activations", f"{where}.{key}", ("tensor", False), ("token", True))
        activations.append("token" if strategy == "token" else "static")
    if len(weights) > 1:
        raise SmoothQuantError(where, "one strategy for all weights", "tensor and channel", STOCK)
    return weights.pop(), list(dict.fromkeys(activations))


def _strategy(group: dict[str, Any], key: str, where: str, *allowed: tuple[str, bool]) -> str:
    """The strategy of group[key], if it is symmetric int8 of one of the `allowed` (strategy, dynamic)."""
    arguments = group.get(key)
    if not isinstance(arguments, dict):
        arguments = {}
    with_defaults = {name: arguments.get(name, default) for name, default in _arguments("tensor", False).items()}
    grouped = arguments.get("actorder") or arguments.get("group_size") not in (None, -1)
    for strategy, dynamic in allowed if arguments and not grouped else ():
        if with_defaults == _arguments(strategy, dynamic):
            return strategy
    kinds = " or ".join(f"{'dynamic' if dynamic else 'static'} per_{strategy}" for strategy, dynamic in allowed)
    got = json.dumps(arguments)[:200] if arguments else "nothing"
    raise SmoothQuantError(f"{where}.{key}", f"symmetric 8-bit integers, {kinds}", got, STOCK)


def _our_tensors(folder: Path, strategy: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `folder` as our format stores them: float32 scales of one shape, and no zero points."""
    for name, tensor in read_tensors(folder):
        suffix = name.rpartition(".")[2]
        if suffix.endswith("_zero_point"):
            if tensor.any():
                raise SmoothQuantError(name, "zeros: symmetric integers", "others", STOCK)
            continue
        if suffix in ("weight_scale", "input_scale"):
            tensor = tensor.float().reshape((-1, 1) if (suffix, strategy) == ("weight_scale", "channel") else (1,))
            if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise SmoothQuantError(name, "finite scales above zero", "others", "quantise the model again")
        yield name, tensor


def _finish(staged: Path, folder: Path, config: dict[str, Any], in_float: list[str]) -> dict[str, Any]:
    """Write config.json, the manifest and the model card; keeps what the source's manifest, if any, records."""
    export.write_json(staged / "config.json", config)
    path, card = folder / MANIFEST, folder / CARD
    source = read_json(path) if path.exists() else {"kept": dict.fromkeys(in_float, "floating point in the source")}
    manifest = source | {
        "format_version": FORMAT_VERSION,
        "converted_from": read_json(folder / "config.json")["quantization_config"]["quant_method"],
        "quantized": _quantised(read_headers(staged)),
        "quantization_config": config["quantization_config"],
        "files": export.file_hashes(staged),
    }
    export.write_json(staged / MANIFEST, manifest)
    if "source" in manifest:
        model_card.write(staged, manifest)  # the card says how the checkpoint is served, which has changed
    elif card.exists():
        shutil.copyfile(card, staged / CARD)
    return manifest


def _quantised(headers: Headers) -> list[str]:
    weights = [name for name, (dtype, _) in headers.items() if dtype == "I8" and name.endswith(".weight")]
    return sorted(name.removesuffix(".weight") for name in weights)


def _linear_layers(folder: Path) -> dict[str, torch.nn.Module]:
    """Name in files -> linear layer of the architecture, built without memory."""
    model = build_empty(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}
    return {export.hub_module_name(model, name): module for name, module in linears.items() if EXPERTS not in name}
