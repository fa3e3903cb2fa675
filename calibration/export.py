"""Write the checkpoint: safetensors shards with an index, config, tokenizer, manifest; beside it, then renamed.

Layout and names: vllm_smoothquant/checkpoint.py. Tensors are handed over one at a time and written shard by shard, so
that no second copy of the model is held.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from vllm_smoothquant.checkpoint import MANIFEST, TRANSFORMERS_WEIGHTS, SmoothQuantError

from .load import sha256

MAX_SHARD_BYTES = 4 * 10**9


def check_output(output: Path) -> None:
    """Refuse an output that exists, or whose parent cannot be written, before any work is done."""
    if output.exists():
        raise SmoothQuantError(str(output), expected="a new folder", got="one that exists", do="choose another -o")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".smoothquant-"):
            pass
    except OSError as error:
        raise SmoothQuantError(
            str(parent), expected="a folder that can be written", got=str(error), do="choose another -o"
        ) from error


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes `output` when the block ends well, and vanishes when it does not."""
    check_output(output)
    parent = output.absolute().parent
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{output.name}.partial-"))
    folder.chmod(0o755)  # mkdtemp's 0700 would keep a serving user out
    try:
        yield folder
        os.rename(folder, output)
    except OSError as error:
        raise SmoothQuantError(
            str(output),
            expected="room and permission to write the checkpoint",
            got=str(error),
            do="mend it and run again",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def source_tensors(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The state of `model` as references, block by block, without tied duplicates and what is never saved."""
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)

    def block(key: str) -> str:
        match = re.match(r".*?\.\d+\.", key)
        return match.group(0) if match else ""

    for _, keys in groupby(state, key=block):
        yield {key: state[key] for key in keys}


def hub_names(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` under the names, and in the pieces, that the hub (and so vLLM) knows; transformers keeps that map."""
    return revert_weight_conversion(model, dict(tensors))


def hub_module_name(model: PreTrainedModel, name: str) -> str:
    """The name of the linear layer `name` in checkpoint files.

    Errors (SmoothQuantError): the files split or join this layer, so that its INT8 tensors have no place.
    """
    names = list(hub_names(model, {f"{name}.weight": torch.empty(16, 16)}))
    if len(names) != 1 or not names[0].endswith(".weight"):
        raise SmoothQuantError(
            name, expected="one tensor in checkpoint files", got=", ".join(names) or "none", do=f"add --ignore {name}"
        )
    return names[0].removesuffix(".weight")


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write (name, tensor) pairs as model.safetensors, or as numbered shards with an index once one is full."""
    shards: list[list[str]] = []
    seen: set[str] = set()
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        file = folder / f"shard-{len(shards)}"
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it 0600, which would keep a serving user out
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        if name in seen:
            raise SmoothQuantError(name, expected="each tensor once", got="it twice", do="report this model to us")
        seen.add(name)
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > max_shard_bytes:
            flush()
        # safetensors writes a tensor's memory as it lies, and refuses two that share it.
        pending[name] = tensor.detach().to("cpu").contiguous().clone()
        size += nbytes
        total += nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_config(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quantization_config: dict[str, Any]
) -> None:
    """config.json with `quantization_config`, generation config, tokenizer and chat template."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("auto_map", None)  # it names code of the source's folder, which is not copied
    config["transformers_weights"] = TRANSFORMERS_WEIGHTS
    config["quantization_config"] = quantization_config
    write_json(path, config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file but the manifest, which holds them."""
    return {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file() and f.name != MANIFEST}
