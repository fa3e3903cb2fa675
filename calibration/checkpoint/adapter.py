"""`smoothquant adapter`: a LoRA adapter of the source model, made to fit a checkpoint with folded factors.

    source       y += B A x               x the layer's input, y its output
    checkpoint   x' = S x, y' = R y       S, R: what was folded into the layer's columns and rows (transforms.py)
                 y' += (R B) (A S^-1) x'

So A changes as the layer's columns, and B as its rows; alpha, rank and rank-stabilised scaling do not change. Both are
float32, because in 16 bits A would be rounded again. What this cannot express is refused: DoRA, whose
magnitudes are norms over the input channels; trained biases and whole modules; initialisations that change the base.

Source: Hu et al., LoRA (arXiv 2106.09685), eq. 3; PEFT's names of files and tensors.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_smoothquant.format.config import ADAPTER_CONFIG, QUANT_METHOD, TRANSFORMS_FILE
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, read_json

from ..inputs.model import sha256
from ..inputs.side_files import copy_side_files
from . import transforms
from .export import check_output, save_tensors, staging, write_json
from .transforms import Folded

WEIGHTS = "adapter_model.safetensors"
# Largest relative error of the adapted layer's output, in float32: sums over thousands of channels, each 2**-24.
PROVED = 1e-4
# Key of adapter_config.json -> why an adapter with it cannot be expressed on a checkpoint.
REFUSED = {
    "use_dora": "DoRA scales rows by norms over the input channels, which smoothing changes",
    "use_qalora": "QALoRA pools the input channels",
    "use_bdlora": "block-diagonal LoRA has other tensors",
    "modules_to_save": "whole modules were trained",
    "layer_replication": "its layers are not those of the checkpoint",
    "trainable_token_indices": "embeddings were trained",
    "target_parameters": "it adapts stacked parameters, such as experts",
}
# Values of init_lora_weights that leave the base model as it is; others subtract the initial adapter from it.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
                     r"(?:\.default)?(?P<part>\.weight|\.bias)?")  # fmt: skip


def adapt(adapter: str | Path, checkpoint: str | Path, output: str | Path) -> dict[str, Any]:
    """Write `adapter` (a folder or hub id in PEFT's format) into the new folder `output`, for `checkpoint`.

    Returns {"output", "layers": adapted, "unchanged": layers without factors, "error": largest of the proof}.
    Errors (SmoothQuantError): no LoRA adapter, one that cannot be expressed, one of another model, a failed proof.
    """
    folder, output = Path(checkpoint), Path(output)
    folded = transforms.read(folder)
    if not folded.modules:
        fix = "serve the checkpoint with the adapter as it is"
        raise SmoothQuantError(str(folder), f"folded factors in {TRANSFORMS_FILE}", "none", fix)
    source = _adapter_folder(str(adapter))
    config = read_json(source / ADAPTER_CONFIG)
    _check_expressible(source, config)
    check_output(output)
    tensors = _tensors(source)
    layers = _layers(read_json(folder / MANIFEST))
    adapted = {name: _adapted(source, name, tensor, folded, layers) for name, tensor in tensors.items()}
    touched = {layer for layer in map(_layer, tensors) if layer in folded.modules}
    error = max((_error(layer, tensors, adapted, folded) for layer in touched), default=0.0)
    if not error <= PROVED:
        fix = "nothing was written; check the adapter's values"
        raise SmoothQuantError(str(source), f"the same outputs within {PROVED:.0e}", f"{error:.1e}", fix)
    with staging(output) as staged:
        save_tensors(staged / WEIGHTS, adapted)
        # vllm_smoothquant/adapters.py reads this mark.
        write_json(staged / ADAPTER_CONFIG, config | {QUANT_METHOD: {"smoothing": sha256(folder / TRANSFORMS_FILE)}})
        copy_side_files(source, staged)
    unchanged = set(map(_layer, tensors)) - touched
    return {"output": str(output), "layers": sorted(touched), "unchanged": sorted(unchanged), "error": error}


def _adapter_folder(adapter: str) -> Path:
    if Path(adapter).is_dir() or "/" not in adapter:
        return Path(adapter)
    try:
        return Path(snapshot_download(adapter))
    except (OSError, ValueError) as error:
        raise SmoothQuantError(adapter, "a folder or a hub id", error, "check the name and the network") from error


def _check_expressible(source: Path, config: Mapping[str, Any]) -> None:
    def refuse(key: str, expected: str, fix: str) -> SmoothQuantError:
        return SmoothQuantError(f"{source / ADAPTER_CONFIG}: {key}", expected, json.dumps(config.get(key)), fix)

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", '"LORA"', "only LoRA adapters can be adapted; merge others before calibration")
    if QUANT_METHOD in config:
        raise refuse(QUANT_METHOD, "an adapter of the source model", "give the original adapter")
    merge = "merge the adapter into the source model and calibrate that"
    for key, why in REFUSED.items():
        if config.get(key):
            raise refuse(key, f"none, because {why}", merge)
    if config.get("bias", "none") != "none":
        raise refuse("bias", '"none", because trained biases belong to the base model', merge)
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        fix = "convert it to a plain adapter with PEFT's path_initial_model_for_weight_conversion"
        raise refuse("init_lora_weights", "one that does not change the base model", fix)


def _tensors(source: Path) -> dict[str, torch.Tensor]:
    path, pickled = source / WEIGHTS, source / "adapter_model.bin"
    fix = "give a folder that PEFT's save_pretrained wrote"
    try:
        if path.is_file() or not pickled.is_file():
            tensors = load_file(path)
        else:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SmoothQuantError(str(path), "the adapter's tensors", error, fix) from error
    if not tensors:
        raise SmoothQuantError(str(path), "the adapter's tensors", "none", fix)
    for name, tensor in tensors.items():
        if not _TENSOR.fullmatch(name) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            merge = "merge the adapter into the source model and calibrate that"
            raise SmoothQuantError(f"{path}: {name}", "matrices lora_A and lora_B", "another tensor", merge)
        if not torch.isfinite(tensor).all():
            raise SmoothQuantError(f"{path}: {name}", "finite values", "NaN or infinity", "train the adapter again")
    kinds: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        if match is not None and match["part"] != ".bias":
            kinds[match["layer"]].add(match["kind"][-1])
    for layer, found in kinds.items():
        if found != {"A", "B"}:
            raise SmoothQuantError(f"{path}: {layer}", "matrices A and B", f"only {', '.join(sorted(found))}", fix)
    return tensors


def _layer(tensor: str) -> str:
    match = _TENSOR.fullmatch(tensor)
    assert match is not None  # _tensors has checked each name
    return match["layer"]


def _layers(manifest: Mapping[str, Any]) -> set[str]:
    """Every linear layer of the checkpoint's model, in INT8 or not."""
    return {*map(str, manifest.get("quantized", ())), *map(str, manifest.get("kept", ()))}


def _adapted(source: Path, name: str, tensor: torch.Tensor, folded: Folded, layers: set[str]) -> torch.Tensor:
    match = _TENSOR.fullmatch(name)
    assert match is not None
    layer, kind = match["layer"], match["kind"]
    if layer not in layers and layer not in folded.modules and not kind.startswith("lora_embedding"):
        fix = "give the checkpoint of the model that the adapter was trained on"
        raise SmoothQuantError(f"{source}: {name}", "a linear layer of the checkpoint", "no such layer", fix)
    if kind == "lora_embedding_A":  # an index chooses a column of it
        return tensor.float().contiguous()
    columns, dim = kind == "lora_A", 1 if kind == "lora_A" else 0
    features = folded.features(layer)[0 if columns else 1]
    if features is not None and tensor.shape[dim if tensor.dim() == 2 else 0] != features:
        shape, fix = str(list(tensor.shape)), "give the checkpoint of the model that the adapter was trained on"
        raise SmoothQuantError(f"{source}: {name}", f"{features} channels in dimension {dim}", shape, fix)
    changed = folded.columns(layer, tensor.float()) if columns else folded.rows(layer, tensor.float())
    return changed.contiguous()


def _error(
    layer: str, tensors: Mapping[str, torch.Tensor], adapted: Mapping[str, torch.Tensor], folded: Folded
) -> float:
    """Relative difference of the two sides of the module docstring on random x, in float32.

    x' is chosen and x = S^-1 x' computed, because a norm's weight may be 0.
    """
    a, b = (dict(_pair(layer, each)) for each in (tensors, adapted))
    if "lora_A" not in a:
        a, b = ({"lora_A": each["lora_embedding_A"].t(), "lora_B": each["lora_embedding_B"]} for each in (a, b))
    x = torch.randn(16, b["lora_A"].shape[1], generator=torch.Generator().manual_seed(0))
    # Row i of the matrix that turns A into A S^-1 is S^-1 of unit vector i.
    inverse = folded.columns(layer, torch.eye(x.shape[1]))
    expected = folded.rows(layer, (x @ inverse.t() @ a["lora_A"].t() @ a["lora_B"].t()).t()).t()
    got = x @ b["lora_A"].t() @ b["lora_B"].t()
    size = float(expected.norm())
    difference = float((got - expected).norm())
    return difference / size if size else difference


def _pair(layer: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is not None and match["layer"] == layer and match["part"] != ".bias":
            yield match["kind"], tensor.float()
