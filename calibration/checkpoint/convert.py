"""`smoothquant convert`: the same integers and scales with another `quantization_config`.

    smoothquant         ours: vLLM with this plugin                                  vllm_smoothquant/format
    compressed-tensors  format "int-quantized", with 4 bits "pack-quantized": stock vLLM, SGLang and transformers

Both store `weight` int8 [out, in], `weight_scale` [out, 1] or [1] and `input_scale` [1], real = int * scale, so that
only config.json differs; with 4 bits `weight_packed` and `weight_scale` [out, groups], and theirs `weight_shape`. A
property that the other format cannot express is refused, because a checkpoint without it would be served wrong. What is
written passes `verify`, or is removed.

The manifest's `converted_from` is the method of the first checkpoint of a chain of conversions: it shows whose integers
these are, and verify.py applies our rounding rule only to ours. A manifest counts only if all its hashes are right.

compressed_tensors.py reads that format. How vLLM 0.32 reads it: model_executor/layers/quantization/compressed_tensors/
compressed_tensors.py.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.config import (
    QUANT_METHOD,
    REORDERED,
    TRANSFORMERS_WEIGHTS,
    TRANSFORMS_FILE,
    CheckpointConfig,
    Scheme,
)
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, PACKED, Headers, quantised_layers, read_headers, read_json

from ..inputs.model import empty_model
from ..inputs.side_files import side_files
from ..options import ACTIVATIONS
from ..running.modules import block_of
from . import compressed_tensors, export, model_card
from .compressed_groups import FORMAT_OF_BITS, MIXED, scheme_arguments
from .manifest import FORMAT_VERSION
from .model_card import CARD
from .verify import verify

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = (COMPRESSED_TENSORS, QUANT_METHOD)
# Layers that vLLM computes as one, with one input_scale.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EXPERTS = ".experts."


def convert(checkpoint: str | Path, output: str | Path, to: str) -> dict[str, Any]:
    """Write `checkpoint` in the format `to` (one of FORMATS) into the new folder `output`; returns its manifest.

    Errors (SmoothQuantError): a faulty checkpoint, one that has that format already, or one that it cannot express.
    """
    folder, output = Path(checkpoint), Path(output)
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is None or method not in FORMATS or method == to:
        where, expected = f"{folder}/config.json: quant_method", " or ".join(f for f in FORMATS if f != to)
        raise SmoothQuantError(where, expected, repr(method), "give a checkpoint of the other format")
    export.check_output(output)
    to_ours, packed, kept = to == QUANT_METHOD, False, dict[str, str]()
    if to_ours:
        translation = compressed_tensors.translate(folder, config)
        kept = dict.fromkeys(translation.in_float, "floating point in the source")
        del config["quantization_config"]  # both keys come last, as calibrate writes them
        config |= {"transformers_weights": TRANSFORMERS_WEIGHTS, "quantization_config": translation.config.to_dict()}
        config.pop("auto_map", None)  # names code, which transformers did not need to build the model
    else:
        for fault in verify(folder).faults:
            raise fault
        ours, headers = CheckpointConfig.from_dict(quantization), read_headers(folder)
        _check_expressible(folder, ours, headers, config)
        packed = any(name.endswith(f".{PACKED}") for name in headers)
        config["quantization_config"] = _compressed_config(ours, headers)
        config.pop("transformers_weights", None)  # transformers reads compressed-tensors without help
    with export.staging(output) as staged:
        for name in _names(folder):
            if name != CARD and not ((to_ours or packed) and ".safetensors" in name and name != TRANSFORMS_FILE):
                (staged / name).parent.mkdir(exist_ok=True, parents=True)
                shutil.copyfile(folder / name, staged / name)
        if to_ours:
            export.write_tensors(staged, compressed_tensors.our_tensors(folder, translation.headers))
        elif packed:
            export.write_tensors(staged, compressed_tensors.their_tensors(folder))
        manifest = _finish(staged, folder, method, config, kept)
        for fault in verify(staged).faults if to_ours else ():
            raise fault
    return manifest


def _names(folder: Path) -> list[str]:
    """The files of a checkpoint, relative to its `folder`, which may have more in folders of its owner."""
    beside = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted({*beside, *side_files(folder), *([TRANSFORMS_FILE] if (folder / TRANSFORMS_FILE).is_file() else [])})


def _check_expressible(folder: Path, ours: CheckpointConfig, headers: Headers, config: dict[str, Any]) -> None:
    """SmoothQuantError if compressed-tensors, or stock vLLM as its reader, cannot compute this checkpoint."""

    def refuse(where: str, got: str, fix: str) -> SmoothQuantError:
        return SmoothQuantError(where, "what compressed-tensors can express", got, fix)

    schemes = {scheme for name in quantised_layers(headers) if (scheme := ours.scheme(name)) is not None}
    if any(scheme.input_activations == ACTIVATIONS["tensor"] for scheme in schemes):
        got = "dynamic per_tensor (O2), which stock vLLM has no kernel for"
        raise refuse("input_activations", got, "calibrate with --activations token or static")
    if any(scheme.weights.num_bits == 4 and scheme.input_activations.rounded for scheme in schemes):
        got = "4-bit weights with 8-bit activations, which stock vLLM serves on Arm only, with other names"
        raise refuse("input_activations", got, "calibrate with --activations none")
    if ours.smoothed:
        fix = "calibrate with a fixed --alpha, which folds all of it away"
        raise refuse(min(ours.smoothed), f"smoothing at run time in {len(ours.smoothed)} layers", fix)
    # Stock vLLM's loader views these scales as [heads, 3, ...], which is impossible for a single element.
    reordered = REORDERED.get(str(config.get("model_type")))
    for name, (_, shape) in headers.items():
        if reordered and shape == (1,) and name.rpartition(".")[0].endswith(reordered):
            fix = "calibrate with --weights channel and --activations token"
            raise refuse(name, "one scale for a layer whose rows stock vLLM reorders", fix)
    for name, module in empty_model(folder).named_modules():
        if isinstance(module, Conv1D) and headers.get(f"{name}.weight", ("",))[0] == "I8":
            raise refuse(f"{name}.weight", "a Conv1D weight, [in, out]", "serve it with this plugin")


def _compressed_config(ours: CheckpointConfig, headers: Headers) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors for a checkpoint of ours with the tensors `headers`.

    One group for each scheme that overrides have, by full names, and one for all other layers, by their class, because
    readers try names before classes. A head is listed by name, too: it is a Linear in transformers but not in vLLM.
    """
    overrides = ours.overrides
    in_float = ours.experts is None and any(EXPERTS in name for name in headers)
    heads = [name for name in quantised_layers(headers) if not block_of(name) and name not in overrides]
    own, experts = Scheme(ours.weights, ours.input_activations), ours.expert_scheme
    schemes = {name: Scheme(each.weights or ours.weights, each.input_activations) for name, each in overrides.items()}
    groups = [
        ([name for name in sorted(schemes) if schemes[name] == scheme], scheme)
        for scheme in sorted(set(schemes.values()), key=str)
    ]
    if experts not in (None, own):
        groups.append(([r"re:.*\.experts\.\d+\..*"], experts))
    groups.append(([*heads, "Linear"], own))
    formats = {FORMAT_OF_BITS[scheme.weights.num_bits] for _, scheme in groups}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                **scheme_arguments(scheme),
                "output_activations": None,
                "format": FORMAT_OF_BITS[scheme.weights.num_bits],
            }
            for i, (targets, scheme) in enumerate(groups)
        },
        # vLLM takes routed experts for Linear layers, whatever their names are.
        "ignore": sorted(ours.ignore) + [r"re:.*\.experts\..*"] * in_float,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _finish(staged: Path, folder: Path, method: str, config: dict[str, Any], kept: dict[str, str]) -> dict[str, Any]:
    """Write config.json, the manifest and the model card. A manifest in `folder` goes on with what it records.

    method: of `folder`. kept: layers in floating point and the reason, unless the manifest has them.
    """
    export.write_json(staged / "config.json", config)
    path, card, int8 = folder / MANIFEST, folder / CARD, quantised_layers(read_headers(staged))
    manifest: dict[str, Any] = {"converted_from": method, "kept": kept, "inputs": _fused(int8)}
    manifest |= read_json(path) if path.exists() else {}
    manifest |= {
        "format_version": FORMAT_VERSION,
        "quantized": int8,
        "quantization_config": config["quantization_config"],
        "files": export.file_hashes(staged),
    }
    export.write_json(staged / MANIFEST, manifest)
    if "source" in manifest:
        model_card.write(staged, manifest, folder)  # the card says how the checkpoint is served, which has changed
    elif card.exists():
        shutil.copyfile(card, staged / CARD)
    return manifest


def _fused(names: list[str]) -> list[list[str]]:
    """The layers among `names` that vLLM computes as one."""
    blocks = dict.fromkeys((name.rpartition(".")[0], parts) for name in names for parts in FUSED)
    groups = [[name for part in parts if (name := f"{block}.{part}") in names] for block, parts in blocks]
    return [group for group in groups if group]
