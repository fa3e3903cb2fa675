"""Write the checkpoint: safetensors shards with an index, config, tokenizer, manifest; beside it, then renamed.

Layout and names: vllm_smoothquant/format. Tensors are handed over one at a time and written shard by shard, so
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from vllm_smoothquant.format.config import TRANSFORMERS_WEIGHTS
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

from ..inputs.model import sha256
from ..observation.resume import State
from ..recipe import RECIPE
from .model_card import CARD

# One shard is held in memory until it is written, and is written anew by a run that was interrupted in it.
MAX_SHARD_BYTES = 10**9


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
def staging(output: Path, state: State | None = None) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes `output` when the block ends well, and vanishes when it does not.

    With `state` it is the one in there: it does not vanish, and may hold shards of an earlier run.
    """
    check_output(output)
    try:
        if state is not None:
            state.checkpoint.mkdir(parents=True, exist_ok=True)
            yield state.checkpoint
            state.publish()
            return
        folder = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}.partial-"))
        folder.chmod(0o755)  # mkdtemp's 0700 would keep a serving user out
        try:
            yield folder
            os.rename(folder, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(
            str(output),
            expected="room and permission to write the checkpoint",
            got=str(error),
            do="mend it and run again" if state is None else "mend it and run the same command again: it goes on",
        ) from error


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


def written_tensors(folder: Path) -> list[list[str]]:
    """The names in each shard that an interrupted write_tensors finished; what it left half done is removed."""
    for partial in folder.glob("*.partial"):
        partial.unlink()
    for file in folder.glob("model*.safetensors"):  # it was stopped while it named them
        number = re.fullmatch(r"model-(\d+)-of-\d+", file.stem)
        file.rename(folder / f"shard-{int(number.group(1)) - 1 if number else 0}")
    shards: list[list[str]] = []
    while (file := folder / f"shard-{len(shards)}").exists():
        with safe_open(file, "pt") as opened:
            shards.append(list(opened.keys()))
    return shards


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write (name, tensor) pairs as model.safetensors, or as numbered shards with an index once one is full.

    What written_tensors(folder) names is not written again, whether or not it comes again.
    """
    shards = written_tensors(folder)
    before = {name for names in shards for name in names}
    seen: set[str] = set()
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        file = folder / f"shard-{len(shards)}"
        partial = file.with_name(f"{file.name}.partial")
        save_file(pending, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes it 0600, which would keep a serving user out
        partial.rename(file)
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        if name in seen:
            raise SmoothQuantError(name, expected="each tensor once", got="it twice", do="report this model to us")
        seen.add(name)
        if name in before:
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > max_shard_bytes:
            flush()
        # safetensors writes a tensor's memory as it lies, and refuses two that share it.
        pending[name] = tensor.detach().to("cpu").contiguous().clone()
        size += nbytes
    if pending:
        flush()
    total = sum(_data_bytes(folder / f"shard-{i}") for i in range(len(shards)))
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


def _data_bytes(file: Path) -> int:
    """Bytes of tensors in a safetensors file: all but the header and its length."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


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
    """Name -> sha256 of every file but the manifest, which holds them, and what is told about it afterwards."""
    left_out = (MANIFEST, CARD, RECIPE)
    return {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file() and f.name not in left_out}
