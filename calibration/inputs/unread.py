"""Tensors of a model's files that transformers does not read for this architecture, on purpose: an MTP head, above all.

from_pretrained drops them without a word, by patterns of the model's class. vLLM may read them, so that a checkpoint
carries them unchanged. Any other tensor that is not read is an error of `load`.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import read_header, read_json

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What transformers' loading passes over in every model: buffers that are computed again.
BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def is_passed_over(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers passes over the tensor `name` of a file when it loads `model`, or should.

    Some classes name the number of a draft's layer, which is that of one size of the model. The draft's layers are the
    `num_nextn_predict_layers` after the last one of the model.
    """
    config = model.config.get_text_config()
    drafts = getattr(config, "num_nextn_predict_layers", None) or 0
    if (layer := _LAYER.search(name)) and drafts and hasattr(config, "num_hidden_layers"):
        first = config.num_hidden_layers
        if first <= int(layer[1]) < first + drafts:
            return True
    return any(re.search(pattern, name) for pattern in (*BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())))


def unread_tensors(model: PreTrainedModel, folder: Path, read: Iterable[str]) -> list[str]:
    """Names of the tensors in `folder` that are passed over. read: names in files of the tensors that `model` has."""
    names = set(weight_files(folder)) - set(read)
    return sorted(name for name in names if is_passed_over(model, name))


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the tensors `names` in the weight files of `folder`."""
    files = weight_files(folder)
    for name in names:
        path = folder / files[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
        else:
            yield name, _pickled(path)[name]


def weight_files(folder: Path) -> dict[str, str]:
    """Tensor name -> the file of `folder` that transformers reads it from."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            path = folder / single
            if path.suffix == ".bin":
                return dict.fromkeys(_pickled(path), single)
            return dict.fromkeys(read_header(path), single)
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise SmoothQuantError(str(index), "a weight_map", repr(weight_map)[:80], "use a complete checkpoint")
            return {str(name): str(file) for name, file in weight_map.items()}
    return {}


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, memory-mapped; no code in it runs."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
