"""Reading checkpoint files: safetensors headers, tensors, JSON, and the faults that headers alone show."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .config import CheckpointConfig
from .errors import SmoothQuantError

MANIFEST = "smoothquant.json"

Headers = dict[str, tuple[str, tuple[int, ...]]]
_SUFFIXES = ("weight", "weight_scale", "input_scale", "smoothing_factor", "bias")
_SAFETENSORS_NAME = {torch.int8: "I8", torch.float32: "F32"}


def read_headers(folder: str | Path) -> Headers:
    """Tensor name -> (safetensors' name of the dtype, shape) of every tensor in `folder`; reads no tensor.

    Raises SmoothQuantError where a file cannot be read, a name comes twice, or the index and the files disagree.
    """
    folder = Path(folder)
    found: Headers = {}
    home: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _read_header(path).items():
            if name in home:
                raise SmoothQuantError(
                    str(path),
                    f"{name} in one file",
                    f"a second copy, after {home[name]}",
                    "remove the file that does not belong to this checkpoint",
                )
            found[name], home[name] = entry, path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name, file_name in _weight_map(index).items():
            if home.pop(name, None) != file_name:
                raise SmoothQuantError(str(index), f"{name} in {file_name}", "nothing there", "copy the missing file")
        for name, file_name in home.items():
            raise SmoothQuantError(
                str(index), f"an entry for {name}", f"it only in {file_name}", "export the checkpoint again"
            )
    return found


def _read_header(path: Path) -> Headers:
    """The header of one file, as the library says that will read the tensors: it checks offsets and sizes."""
    if not path.is_file():
        raise _unreadable(path, "a safetensors file", ValueError("neither a file nor a link to one"))
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, "a safetensors file", error) from error


def read_tensors(folder: str | Path, suffix: str | tuple[str, ...] = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor), one at a time, of each whose name ends with `suffix`. `read_headers` has found no fault here."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if name.endswith(suffix):
                    yield name, file.get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise _unreadable(index, "an object with a weight_map of file names", ValueError(repr(weight_map)[:80]))
    return weight_map


MAX_JSON_BYTES = 64 * 2**20  # the largest index we know of has 15 MB


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; SmoothQuantError where there is none, or where it says one thing twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError(f"a key twice, among {', '.join(sorted(value))}")
        return value

    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"no file, or one of more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes(), object_pairs_hook=once)
        if not isinstance(value, dict):
            raise ValueError(type(value).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, "a JSON object", error) from error
    return value


def _unreadable(path: Path, expected: str, error: BaseException) -> SmoothQuantError:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return SmoothQuantError(str(path), expected, got, "copy or export the checkpoint again")


def header_faults(config: "CheckpointConfig", tensors: Headers) -> Iterator[SmoothQuantError]:
    """Everything `tensors` alone shows to be wrong under `config`: missing, superfluous or misshapen tensors.

    Whether a linear layer was left out altogether needs the model, and whether a scale is finite needs its value.
    """

    def fault(tensor: str, expected: str, got: str) -> SmoothQuantError:
        return SmoothQuantError(tensor, expected, got, "export the checkpoint again")

    quantised = {name.removesuffix(".weight") for name, (dtype, _) in tensors.items() if dtype == "I8"}
    for name in sorted((config.smoothed | set(config.overrides)) - quantised):
        yield fault(
            f"{name}.weight", "int8, since quantization_config names the layer", _describe(tensors, f"{name}.weight")
        )
    scaled = {
        name.removesuffix(suffix)
        for suffix in (".weight_scale", ".input_scale", ".smoothing_factor")
        for name in tensors
        if name.endswith(suffix)
    }
    others: dict[str, list[str]] = {}
    for tensor in tensors:
        name, _, suffix = tensor.rpartition(".")
        if name in quantised and suffix not in _SUFFIXES:
            others.setdefault(name, []).append(tensor)
    for name in sorted(quantised | scaled):
        scheme = config.scheme(name)
        if scheme is None:
            yield fault(f"{name}.weight", "floating point, since quantization_config ignores it", "a quantised layer")
            continue
        dtype, shape = tensors.get(f"{name}.weight", ("", ()))
        if dtype != "I8" or len(shape) != 2:
            yield fault(f"{name}.weight", "int8 [out, in]", _describe(tensors, f"{name}.weight"))
            continue
        rows, columns = shape
        # GPT-2's Conv1D keeps [in, out], which shows in whatever has one entry for each of either.
        shapes = [tensors.get(f"{name}.{suffix}", ("", ()))[1] for suffix in ("weight_scale", "smoothing_factor")]
        if shapes[0] == (columns, 1) or (shapes[0] == (1,) and shapes[1] == (rows,)):
            rows, columns = columns, rows
        specs = scheme.tensors(rows, columns)
        if name in config.smoothed:
            specs["smoothing_factor"] = (torch.float32, (columns,))
        for tensor in others.get(name, ()):
            yield fault(tensor, "nothing: no tensor of this format", _describe(tensors, tensor))
        for suffix in ("weight_scale", "input_scale", "smoothing_factor"):
            tensor = f"{name}.{suffix}"
            if suffix not in specs:
                if tensor in tensors:
                    yield fault(tensor, "nothing, by quantization_config", _describe(tensors, tensor))
                continue
            dtype_wanted, shape_wanted = specs[suffix]
            if tensors.get(tensor) != (_SAFETENSORS_NAME[dtype_wanted], shape_wanted):
                wanted = _describe({tensor: (_SAFETENSORS_NAME[dtype_wanted], shape_wanted)}, tensor)
                yield fault(tensor, wanted, _describe(tensors, tensor))


def size_faults(config: Mapping[str, Any], tensors: Headers) -> Iterator[SmoothQuantError]:
    """Numbers of layers, heads, experts in config.json beyond what `tensors` can be: a library would try to build them.

    Every layer has a tensor of its own, and everything else that is counted is a tensor or part of a dimension. Counts
    are told by their names, as transformers' configurations choose them; positions are often counted without a tensor.
    """
    most = max((n for _, shape in tensors.values() for n in shape), default=0)
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from size_faults(value, tensors)
        elif type(value) is int and _COUNT.search(key) and not _NO_COUNT.search(key):
            bound = len(tensors) if "layer" in key else max(most, len(tensors))
            if value > bound:
                yield SmoothQuantError(
                    f"config.json: {key}",
                    f"at most {bound}, by the checkpoint's tensors",
                    str(value),
                    "check that config.json belongs to this checkpoint",
                )


_COUNT = re.compile(r"(^|_)(num|n)_|layers$")
_NO_COUNT = re.compile(r"position|ctx|^max_")


def _describe(tensors: Headers, name: str) -> str:
    if name not in tensors:
        return "no such tensor"
    dtype, shape = tensors[name]
    return f"{dtype} {list(shape)}"
