"""Write the files of a checkpoint into a hidden folder, which then becomes the output.

Layout and names: vllm_smoothquant/format. Tensors arrive one at a time and are written shard by shard, so that the
memory never holds a second copy of the model.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from vllm_smoothquant.format.config import TRANSFORMERS_WEIGHTS
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, read_json

from ..inputs.model import Source, sha256
from ..inputs.side_files import copy_side_files
from ..inputs.unread import unread_tensors
from ..recipe import RECIPE
from ..running.modules import block_of
from ..running.products import ProductLinear
from .model_card import CARD

# A shard stays in memory until it is written.
MAX_SHARD_BYTES = 10**9


def check_output(output: Path) -> None:
    """Refuse an output that exists, or whose parent folder cannot be written, before any work is done."""
    if output.exists():
        raise SmoothQuantError(str(output), "a new folder", "one that exists", "choose another -o")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".smoothquant-"):
            pass
    except OSError as error:
        raise SmoothQuantError(str(parent), "a folder that can be written", error, "choose another -o") from error


@contextmanager
def staging(output: Path, folder: Path | None = None) -> Iterator[Path]:
    """A folder that is renamed to `output` when the block succeeds, and removed when it fails.

    folder: its path; by default a hidden folder next to `output`.
    """
    check_output(output)
    try:
        if folder is None:
            folder = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}.partial-"))
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # mkdtemp's 0700 would lock out another user who serves it
        try:
            yield folder
            os.rename(folder, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        expected, fix = "room and permission to write the checkpoint", "fix that and run the command again"
        raise SmoothQuantError(str(output), expected, error, fix) from error


def source_tensors(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of `model`, not copied, block by block, without tied duplicates and tensors that are never saved."""
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    for _, keys in groupby(state, key=block_of):
        yield {key: state[key] for key in keys}


def hub_names(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` with the names and the splits that files on the hub have and vLLM reads; transformers has the map."""
    products = {key: name for key in tensors if (name := _product_name(model, key)) is not None}
    others = {key: tensor for key, tensor in tensors.items() if key not in products}
    return {name: tensors[key] for key, name in products.items()} | revert_weight_conversion(model, others)


def _product_name(model: PreTrainedModel, key: str) -> str | None:
    """The name in files of the tensor `key` of a ProductLinear, which transformers does not know; None for others."""
    owner, _, suffix = key.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    return f"{module.file_name}.{suffix}" if isinstance(module, ProductLinear) else None


def file_names(model: PreTrainedModel, name: str) -> list[str]:
    """The names that the parameter `name` has in checkpoint files: several if it is split."""
    return list(hub_names(model, {name: torch.empty(16, 16)}))


def hub_module_name(model: PreTrainedModel, name: str) -> str:
    """The name of the linear layer `name` in checkpoint files.

    Errors (SmoothQuantError): the files split or join this layer, so that its INT8 tensors cannot be stored.
    """
    names = file_names(model, f"{name}.weight")
    if len(names) != 1 or not names[0].endswith(".weight"):
        got = ", ".join(names) or "none"
        raise SmoothQuantError(name, "one tensor in checkpoint files", got, f"add --ignore {name}")
    return names[0].removesuffix(".weight")


def check_names(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """SmoothQuantError: checkpoint files cannot store the INT8 tensors of one of `layers`, or only with another's."""
    owners: dict[str, str] = {}
    for name in layers:
        other = owners.setdefault(hub_module_name(model, name), name)
        if other != name:
            got, fix = f"one tensor for it and {other}", f"add --ignore {name} and --ignore {other}"
            raise SmoothQuantError(name, "a tensor of its own in checkpoint files", got, fix)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors creates it with 0600, which would lock out another user who serves it


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write (name, tensor) pairs as model.safetensors, or as numbered shards with an index if one is not enough."""
    shard_of: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    last = size = total = 0  # number of the last shard, its bytes, all bytes

    def save() -> None:
        save_tensors(folder / f"shard-{last}", shard)
        shard.clear()

    for name, tensor in tensors:
        if name in shard_of:
            raise SmoothQuantError(name, "each tensor once", "it twice", "report this model to us")
        if shard and size + tensor.nbytes > max_shard_bytes:
            save()
            last, size = last + 1, 0
        shard_of[name] = last
        # safetensors writes a tensor's memory unchanged, and refuses two tensors that share memory.
        shard[name] = tensor.detach().to("cpu").contiguous().clone()
        size += tensor.nbytes
        total += tensor.nbytes
    save()
    if last == 0:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{last + 1:05d}.safetensors" for i in range(last + 1)]
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    weight_map = {name: files[shard_of[name]] for name in sorted(shard_of)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_config(folder: Path, source: Source, quantization_config: dict[str, Any] | None) -> None:
    """The source's config.json with `quantization_config` (None: in floating point), and its side files unchanged."""
    copy_side_files(source.folder, folder)
    config = read_json(source.folder / "config.json")
    config.pop("auto_map", None)  # names code in the source's folder, which is not copied
    config["architectures"] = [type(source.model).__name__]
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = str(source.model.dtype).removeprefix("torch.")
    if getattr(source.model.config, "tie_word_embeddings", None) is False:  # untied for an INT8 head
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    if quantization_config is not None:
        config["transformers_weights"] = TRANSFORMERS_WEIGHTS
        config["quantization_config"] = quantization_config
    write_json(folder / "config.json", config)


def unread(source: Source) -> list[str]:
    """Names of the tensors in the source's files that its model does not read; a checkpoint carries them unchanged."""
    model = source.model
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    return unread_tensors(model, source.folder, hub_names(model, shapes))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file except the manifest (it holds the hashes), the model card and the recipe.

    Names are relative to `folder`, with "/" for files in folders.
    """
    excluded = (MANIFEST, CARD, RECIPE)
    names = {path: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256(path) for path, name in names.items() if name not in excluded}
