"""Bytes of the weight files of models, read from safetensors headers."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..inputs.model import model_folder


def linear_layers(models: Sequence[str]) -> frozenset[str]:
    """Names of the layers that are INT8 in any of the checkpoints."""
    names = (name for model in models for name in _tensor_bytes(model))
    return frozenset(name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale"))


def weight_bytes(model: str, linear: frozenset[str]) -> dict[str, int]:
    """disk_bytes of all weight files, linear_bytes of the layers `linear` with their scales and factors."""
    of_linear = [size for name, size in _tensor_bytes(model).items() if name.rpartition(".")[0] in linear]
    return {"disk_bytes": sum(f.stat().st_size for f in _weight_files(model)), "linear_bytes": sum(of_linear)}


def _tensor_bytes(model: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for file in _weight_files(model):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        sizes |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    return sizes


def _weight_files(model: str) -> list[Path]:
    return sorted(model_folder(model).glob("*.safetensors"))
