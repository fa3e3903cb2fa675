"""Random damage to a checkpoint, drawn by hypothesis, and the meaning of a folder to a reader of the format.

    damage(folder, draw)      damage the folder's files; returns descriptions of the changes
    meaning(folder)           the configuration and tensors that a reader gets; None if the folder cannot be read
    structure(meaning)        names, shapes and kinds of the tensors

The checkpoint has two shards and an index (`shard`), so that the index can be damaged, too.
"""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calibration.checkpoint import export
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.files import MANIFEST, read_tensors

State = dict[str, torch.Tensor]

Draw = Callable[[st.SearchStrategy], Any]

INDEX = "model.safetensors.index.json"
REGENERATED = "manifest regenerated"


def shard(folder: Path) -> None:
    """Rewrite a checkpoint of one file as two files with an index, and its manifest."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    size = sum(t.numel() * t.element_size() for t in state.values())
    export.write_tensors(folder, state.items(), max_shard_bytes=size * 6 // 10)
    rehash(folder)


def rehash(folder: Path) -> None:
    """Regenerate the manifest, as a deliberate attacker would, if the damaged files allow it."""
    if any(path.is_fifo() for path in folder.iterdir()):
        return  # reading a pipe would block
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        tiny_checkpoints.rehash(folder)


Meaning = tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]


def meaning(folder: Path) -> Meaning | None:
    """(config.json with its quantization_config resolved layer by layer, name -> (dtype, shape, bytes) of tensors)."""
    if any(path.is_fifo() for path in folder.iterdir()):
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        quantization = CheckpointConfig.from_dict(config.pop("quantization_config"))
        config.pop("transformers_version", None)  # the writer's version, which has no effect
        tensors = {}
        for name, tensor in read_tensors(folder):
            raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) if tensor.numel() else b""
            tensors[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
        layers = [name.removesuffix(".weight") for name, entry in tensors.items() if entry[0] == "torch.int8"]
        config["layers"] = {name: (str(quantization.scheme(name)), name in quantization.smoothed) for name in layers}
        return config, tensors
    except Exception:  # any library may raise any exception for a damaged folder
        return None


def structure(meaning: Meaning) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Tensor -> (whether it is in floating point, shape)."""
    return {name: ("float" in dtype, shape) for name, (dtype, shape, _) in meaning[1].items()}


# --- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(change: Callable[[State, Draw], str]) -> Callable[[Path, Draw], str]:
    """A function that applies `change` to the tensors of one shard."""

    def apply(folder: Path, draw: Draw) -> str:
        path = draw(st.sampled_from(sorted(folder.glob("model-*.safetensors"))))
        state = load_file(path)
        description = change(state, draw)
        save_file({k: v.clone().contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
        return description

    return apply


def _pick(state: State, draw: Draw) -> str:
    return draw(st.sampled_from(sorted(state)))


def _drop(state: State, draw: Draw) -> str:
    name = _pick(state, draw)
    del state[name]
    return f"{name} dropped"


def _add(state: State, draw: Draw) -> str:
    name = _pick(state, draw)
    suffixes = [".weight_scale", ".input_scale", ".smoothing_factor", ".bias", ".weight_zero_point", ".k_scale", ""]
    suffix = draw(st.sampled_from(suffixes))
    new = f"{name.rpartition('.')[0]}{suffix}" or "x"
    state[new] = torch.ones(draw(st.sampled_from([(1,), (128,), (128, 1), ()])))
    return f"{new} added"


def _rename(state: State, draw: Draw) -> str:
    name = _pick(state, draw)
    new = draw(
        st.sampled_from([name.upper(), name + "\n\x1b[2J", name.replace("layers.1", "layers.9"), f"model.{name}"])
    )
    state[new] = state.pop(name)
    return f"{name} renamed {new!r}"


def _retype(state: State, draw: Draw) -> str:
    name = _pick(state, draw)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32]))
    state[name] = state[name].float().clamp(-100, 100).to(dtype)
    return f"{name} as {dtype}"


def _reshape(state: State, draw: Draw) -> str:
    name = _pick(state, draw)
    way = draw(st.sampled_from(["cut", "flat", "transposed", "doubled", "empty", "extra dimension"]))
    tensor = state[name]
    state[name] = {
        "cut": lambda: tensor[: max(1, len(tensor) // 2)], "flat": tensor.flatten, "transposed": tensor.t,
        "doubled": lambda: torch.cat([tensor, tensor]), "empty": lambda: tensor[:0],
        "extra dimension": lambda: tensor[None],
    }[way if tensor.dim() in (1, 2) else "extra dimension"]()  # fmt: skip
    return f"{name} {way}"


def _values(state: State, draw: Draw) -> str:
    name = _pick(state, draw)
    tensor = state[name].clone()
    flat = tensor.view(-1)
    if tensor.is_floating_point():
        value = draw(st.sampled_from([float("nan"), float("inf"), 0.0, -1.0, 3e38, 1e-45]))
    else:
        value = draw(st.sampled_from([0, 1, 127, -128]))
    if draw(st.booleans()):
        flat[draw(st.integers(0, len(flat) - 1))] = value
    else:
        flat.fill_(value)
    state[name] = tensor
    return f"{name} set to {value}"


def _swap(state: State, draw: Draw) -> str:
    a = _pick(state, draw)
    b = draw(st.sampled_from([n for n in sorted(state) if state[n].shape == state[a].shape]))
    state[a], state[b] = state[b], state[a]
    return f"{a} and {b} swapped"


# --- raw bytes of a shard --------------------------------------------------------------------------------------------


def _header(folder: Path, draw: Draw) -> str:
    """Change the JSON header before the tensors, or its length, in ways that no library would write."""
    path = draw(st.sampled_from(sorted(folder.glob("model-*.safetensors"))))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    name = draw(st.sampled_from(names))
    way = draw(
        st.sampled_from(
            ["long", "short", "deep", "twice", "twice, different", "moved", "overlap", "dtype", "shape", "negative",
             "metadata", "no object", "key missing", "trailing bytes"]
        )
    )  # fmt: skip
    text = json.dumps(header)
    entry = header[name]
    if way == "long":
        path.write_bytes(struct.pack("<Q", draw(st.sampled_from([2**63, 2**40, len(data), length + 1]))) + data[8:])
        return "header: length too long"
    if way == "short":
        path.write_bytes(struct.pack("<Q", draw(st.integers(0, length - 1))) + data[8:])
        return "header: length too short"
    if way == "deep":
        text = '{"a":' + "[" * draw(st.sampled_from([1000, 200_000])) + "}"
    elif way == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    elif way == "twice, different":
        entry2 = header[draw(st.sampled_from(names))]
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry2)}}}"
    elif way == "no object":
        text = draw(st.sampled_from(["[]", "null", "{}", "1e999", '{"__metadata__": {}}']))
    elif way == "trailing bytes":
        body += b"\0" * draw(st.integers(1, 64))
    else:
        begin, end = entry["data_offsets"]
        change = {
            "moved": {"data_offsets": [begin + 1, end + 1]}, "overlap": {"data_offsets": [0, end - begin]},
            "dtype": {"dtype": draw(st.sampled_from(["F32", "I8", "F99", "", 7, None]))},
            "shape": {"shape": draw(st.sampled_from([[2**62, 2**62], [10**30], [1.5], "x", [], [[1]]]))},
            "negative": {"shape": [-1]},
        }  # fmt: skip
        if way in change:
            header[name] = entry | change[way]
        elif way == "metadata":
            header["__metadata__"] = draw(st.sampled_from([{"format": 1}, [], "x", {"format": "pt", "a": None}]))
        else:
            del entry[draw(st.sampled_from(sorted(entry)))]
        text = json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)
    return f"header: {name}: {way}"


def _flip(folder: Path, draw: Draw) -> str:
    """Flip one to eight bits of one file."""
    path = draw(st.sampled_from([*sorted(folder.glob("model-*.safetensors")), folder / "config.json", folder / INDEX]))
    data = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 8))):
        # Half of the flips are in the first bytes, because these hold the file's structure.
        limit = draw(st.sampled_from([min(len(data), 4096), len(data)]))
        data[draw(st.integers(0, limit - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(bytes(data))
    return f"{path.name}: bits flipped"


# --- JSON files ------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20), st.just([]),
    st.just({}), st.sampled_from([0, -1, 10**9, 2**31, 2**63, 10**18, "1000000000", 1e9, [[[]]], "../../etc/passwd"]),
)  # fmt: skip


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*prefix, key), *_paths(item, (*prefix, key)))]


def _config(folder: Path, draw: Draw) -> str:
    """Drop, add or replace a key of config.json, at any depth."""
    config = json.loads((folder / "config.json").read_text())
    path = draw(st.sampled_from(_paths(config)))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    way = draw(st.sampled_from(["drop", "add", "set"]))
    if way == "drop":
        del parent[path[-1]]
    elif way == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=12))] = draw(ODD)
    else:
        parent[path[-1]] = draw(ODD)
    (folder / "config.json").write_text(json.dumps(config))
    return f"config.json: {'.'.join(map(str, path))}: {way}"


def _absurd(folder: Path, draw: Draw) -> str:
    """Set a size in config.json for which a library would build a gigantic model."""
    config = json.loads((folder / "config.json").read_text())
    key = draw(st.sampled_from(sorted(k for k, v in config.items() if type(v) is int and v > 1)))
    config[key] = draw(st.sampled_from([10**6, 10**9, 2**31 - 1, 2**40, 10**18, 10**25]))
    (folder / "config.json").write_text(json.dumps(config))
    return f"config.json: {key} = {config[key]}"


def _other_config(folder: Path, draw: Draw) -> str:
    """Change config.json to another model with our quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    changes = draw(
        st.sampled_from(
            [{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2},
             {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
             {"model_type": "bert", "architectures": ["BertModel"]}, {"model_type": "nothing"},
             {"architectures": ["Nothing"]}, {"architectures": ["../../x"]}, {"model_type": "qwen2"},
             {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}]
        )
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return f"config.json: {changes}"


def _no_json(folder: Path, draw: Draw) -> str:
    name = draw(st.sampled_from(["config.json", INDEX, MANIFEST]))
    text = draw(
        st.sampled_from(["", "{", "[]", "null", "NaN", "[" * 200_000, '{"a":' * 50_000, "\x00", '{"a": 1, "a": 2}',
                         '"' + "9" * 5000 + '"', "9" * 5000])
    )  # fmt: skip
    (folder / name).write_text(text)
    return f"{name}: {text[:10]!r}"


def _index(folder: Path, draw: Draw) -> str:
    """Make the index point outside the folder, or contradict the files."""
    index = json.loads((folder / INDEX).read_text())
    names = sorted(index["weight_map"])
    name, name2 = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    way = draw(st.sampled_from(["outside", "absolute", "none", "swapped", "dropped", "added", "no map", "odd", "gone"]))
    outside = folder.parent / "outside.safetensors"
    if way in ("outside", "absolute"):
        shutil.copy(folder / index["weight_map"][name], outside)
        index["weight_map"][name] = "../outside.safetensors" if way == "outside" else str(outside)
    elif way == "none":
        index["weight_map"][name] = "model-00009-of-00009.safetensors"
    elif way == "swapped":
        index["weight_map"][name], index["weight_map"][name2] = index["weight_map"][name2], index["weight_map"][name]
    elif way == "dropped":
        del index["weight_map"][name]
    elif way == "added":
        index["weight_map"]["x.weight"] = index["weight_map"][name]
    elif way == "no map":
        index["weight_map"] = draw(ODD)
    elif way == "odd":
        index["weight_map"][name] = draw(ODD)
    (folder / INDEX).write_text(json.dumps(index))
    if way == "gone":
        (folder / INDEX).unlink()
    return f"index: {way}"


# --- files -----------------------------------------------------------------------------------------------------------


def _files(folder: Path, draw: Draw) -> str:
    """Remove, truncate or copy a file, replace it by a link, pipe or folder, or add a pickle."""
    path = draw(st.sampled_from([*sorted(folder.glob("model-*.safetensors")), folder / "config.json", folder / INDEX]))
    ways = ["gone", "cut", "empty", "twice", "link outside", "loop", "dangling", "pipe", "folder", "pickle", "odd name"]
    way = draw(st.sampled_from(ways))
    if way == "cut":
        os.truncate(path, draw(st.integers(0, path.stat().st_size - 1)))
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "twice":
        shutil.copy(
            draw(st.sampled_from(sorted(folder.glob("model-*.safetensors")))), folder / "model-extra.safetensors"
        )
    elif way == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/never'\ntR.")
    elif way == "odd name":
        (folder / "\x1b[2J\n.safetensors").write_bytes(b"")
    else:
        outside = folder.parent / path.name
        path.rename(outside)
        if way in ("link outside", "dangling"):
            path.symlink_to(outside if way == "link outside" else "nowhere")
        elif way == "loop":
            path.symlink_to(path.name)
        elif way == "pipe":
            os.mkfifo(path)
        elif way == "folder":
            path.mkdir()
    return f"{path.name}: {way}"


WAYS: tuple[Callable[[Path, Draw], str], ...] = (
    *map(_tensors, (_drop, _add, _rename, _retype, _reshape, _values, _swap)),
    _header, _header, _flip, _flip, _config, _config, _config, _absurd, _other_config, _no_json, _index, _files,
)  # fmt: skip


def damage(folder: Path, draw: Draw) -> list[str]:
    """Apply one change, sometimes two, and sometimes regenerate the manifest; returns descriptions of the changes."""
    changes = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        if any(path.is_fifo() for path in folder.iterdir()):
            break
        way = draw(st.sampled_from(WAYS))
        try:
            changes.append(way(folder, draw))
        except Exception:  # after a first change, libraries may raise any exception; one change is enough
            if not changes:
                raise
            break
    if draw(st.booleans()):
        rehash(folder)
        changes.append(REGENERATED)
    return changes
