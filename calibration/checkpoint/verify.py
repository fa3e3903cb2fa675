"""`smoothquant verify`: list everything that is wrong with a checkpoint, without running it.

Checked, each only if the files that it needs can be read: config.json and its quantization_config; the manifest; the
sha256 of every file against the manifest; every tensor's name, dtype and shape against the format and against the
architecture, built without memory; every value: scales finite and above zero, integers as rounding produces them, the
rest finite; layers that read one tensor share its input_scale and smoothing_factor; a size budget is kept.

Integers. `calibrate` gives each row its largest weight at 127 or -127, never -128, and a row of zeros the scale 1
(int8.py): other rows are damaged. Other tools round in other ways: compressed-tensors' scale is absmax / 127.5, so that
rows end at 127 or -128, and GPTQ moves weights after the scale is fixed. `converted_from` in the manifest shows whose
integers they are (convert.py). Of other tools' integers, only zeros under the scale of an ordinary row are a fault.
How many weights are at the end of the range shows nothing: in a ternary model most are.

Hashes detect damage; value checks also detect edits after which the manifest was regenerated.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import QUANT_METHOD, TRANSFORMERS_WEIGHTS, TRANSFORMS_FILE, CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import (
    FLOATS,
    MANIFEST,
    PACKED,
    SCALES,
    Headers,
    bad_scales,
    header_faults,
    read_headers,
    read_json,
    read_tensors,
    size_faults,
)

from ..inputs.model import empty_model, sha256
from ..running.modules import LINEAR_TYPES
from ..running.products import stored_experts
from . import export, transforms
from .architecture import Faults, architecture_faults, fault, missing_from_ignore
from .sizes import budget_faults, stored_sizes
from .verify_source import compare_with_source

# Scales that tools give to a row of zeros: 1 (int8.py), the dtype's epsilon (compressed-tensors), or that of a lower
# bound of ranges, such as 1e-5 (SmoothQuant's own code), under which a row has nothing to lose.
SCALES_OF_ZEROS = [1.0, *(torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16))]
LOWER_BOUND = 1e-5
# The report marks layers with a row of which more than this share is at the end of its range. That is no fault: in
# ternary weights most are. Of normally distributed rows of 16, one of a hundred has two weights there, none a quarter.
SATURATED = 0.25
# Files that torch.load would unpickle. Nothing here ever reads one, and a checkpoint has none.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass
class Verdict:
    """faults: all of them. checked: the checks that passed, in words, for the summary.

    layers: with a source, each quantised layer's `error` and `steps` (verify_source.compare_with_source).
    """

    faults: list[SmoothQuantError] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"faults": [f.to_dict() for f in self.faults], "checked": self.checked, "layers": self.layers}


@dataclass
class _Files:
    """What could be read of `folder`, for the checks that need it; empty where it could not be read."""

    folder: Path
    config: CheckpointConfig | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)


def verify(checkpoint: str | Path, source: str | None = None) -> Verdict:
    """Check the folder `checkpoint`. Nothing in it is executed, and no file outside it is read.

    source: the model that it was made from, a folder or a hub id, to compare with.
    """
    verdict, files = Verdict(), _Files(Path(checkpoint))

    def attempt(what: str, faults: Faults) -> None:
        count = len(verdict.faults)
        try:
            verdict.faults += faults
        except SmoothQuantError as error:
            verdict.faults.append(error)
        if len(verdict.faults) == count:
            verdict.checked.append(what)

    attempt("files stay within the folder", link_faults(files.folder))
    if verdict.faults:
        return verdict
    attempt("quantization_config", _config_faults(files))
    attempt("sha256 of every file", _manifest_faults(files))
    attempt("safetensors headers", _missing_headers(files))
    if files.config is not None and files.headers:
        attempt("names, dtypes and shapes by the format", header_faults(files.config, files.headers))
        attempt("names and shapes by the architecture", _architecture_faults(files, files.config))
        if not verdict.faults:
            attempt("every value", _value_faults(files))
            if "size" in files.manifest:
                attempt("the weights keep the size budget", _size_faults(files))
            attempt("layers that read one tensor agree", _shared_input_faults(files))
        if source is not None and files.manifest and not verdict.faults:
            comparison = compare_with_source(files.folder, source, files.manifest, verdict.layers)
            attempt(f"every weight against {source}", comparison)
    return verdict


def _entries(folder: Path) -> dict[str, Path]:
    """Name relative to `folder` -> each file and folder in it, but not what is in .git and other hidden folders."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts[:-1])
    }


def link_faults(folder: Path) -> Faults:
    """Files that are none, that lie outside `folder`, or that can run code."""
    if not folder.is_dir():
        yield fault(str(folder), "a checkpoint folder", "none", "check the path")
        return
    home = folder.resolve()
    # A snapshot in the hub's cache links to the cache's blobs, and to nothing else.
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in _entries(folder).values():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
            yield fault(str(path), "a file", error)
            continue
        if not any(target.is_relative_to(where) for where in homes):
            yield fault(str(path), "a file in this folder", f"a link to {target}", "copy the file itself")
        elif not (target.is_file() or target.is_dir()):
            yield fault(str(path), "a file", "a pipe or a device", "remove it")
        elif target.suffix in PICKLES:
            yield fault(str(path), "safetensors", "a file of a format that can run code", "remove it")


def _config_faults(files: _Files) -> Faults:
    where, config = f"{files.folder}/config.json", read_json(files.folder / "config.json")
    if "quantization_config" not in config:
        yield fault(where, "quantization_config", "none: a floating-point model", "calibrate it first")
        return
    files.config = CheckpointConfig.from_dict(config["quantization_config"])
    if (text := config.get("transformers_weights")) != TRANSFORMERS_WEIGHTS:
        fix = "set it, because without it transformers loads wrong weights and reports no error"
        yield fault(f"{where}: transformers_weights", repr(TRANSFORMERS_WEIGHTS), repr(text), fix)
    if "auto_map" in config:
        yield fault(f"{where}: auto_map", "none: a checkpoint needs no code", repr(config["auto_map"]))


def _manifest_faults(files: _Files) -> Faults:
    files.manifest = read_json(files.folder / MANIFEST)
    yield from hash_faults(files.folder, files.manifest)
    if (config := files.config) is None:
        return
    if (
        CheckpointConfig.from_dict(files.manifest.get("quantization_config"), f"{MANIFEST}: quantization_config")
        != config
    ):
        yield fault(f"{files.folder}/config.json: quantization_config", "the manifest's", "something else")
    path = files.folder / TRANSFORMS_FILE
    expected = config.transforms.smoothing if config.transforms else ""
    got = sha256(path) if path.is_file() else ""
    if got != expected:
        texts = [f"sha256 {value[:16]}..." if value else "no such file" for value in (expected, got)]
        yield fault(str(path), f"{texts[0]}, by quantization_config", texts[1])
    transforms.read(files.folder)


def hash_faults(folder: Path, manifest: dict[str, Any]) -> Faults:
    """Files of `folder` that are not those of which `manifest` has the sha256."""
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise fault(f"{folder}/{MANIFEST}: files", "the sha256 of every file", repr(hashes)[:80])
    paths = {name: path for name, path in _entries(folder).items() if path.is_file()}
    for name in sorted(hashes.keys() | paths.keys()):
        where = f"{folder}/{name}"
        if name not in paths:
            yield fault(where, "a file, by the manifest", "none")
        elif name in hashes:
            if (got := sha256(paths[name])) != hashes[name]:
                yield fault(where, f"sha256 {hashes[name][:16]}...", f"{got[:16]}...")
        elif name.endswith(".safetensors"):  # other files may have been added later: a README, a licence
            yield fault(where, "an entry in the manifest", "none", "remove the file that does not belong")


def _missing_headers(files: _Files) -> Faults:
    files.headers = read_headers(files.folder)
    if not files.headers:
        yield fault(str(files.folder), "safetensors files", "none")


def _architecture_faults(files: _Files, config: CheckpointConfig) -> Faults:
    for too_large in size_faults(read_json(files.folder / "config.json"), files.headers):
        raise too_large
    model = empty_model(files.folder)
    yield from architecture_faults(model, files.headers)
    yield from missing_from_ignore(model, files.headers, config.ignore)
    yield from _dtype_faults(model, files.headers)


def _dtype_faults(model: PreTrainedModel, headers: Headers) -> Faults:
    """Tensors in integers (or FP8) whose parameter is in floating point: int8 is for weights of linear layers only."""
    linears = {
        key
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES)
        for key in export.file_names(model, f"{name}.weight")
    }
    linears |= {f"{name}.weight" for name in stored_experts(model)}
    integers = {name for name, (dtype, _) in headers.items() if dtype not in FLOATS}
    integers -= {name for name in integers & linears if headers[name][0] == "I8"}
    integers -= {name for name in integers if name.endswith(f".{PACKED}")}  # header_faults checks these
    if not integers:
        return
    for block in export.source_tensors(model):
        for name, tensor in export.hub_names(model, block).items():
            if name in integers and tensor.is_floating_point():
                yield fault(name, f"{' or '.join(FLOATS)}, because it is no weight of a linear layer", headers[name][0])


def _size_faults(files: _Files) -> Faults:
    fallen_back = files.manifest.get("fallen_back")
    if not isinstance(fallen_back, dict):
        raise fault(f"{MANIFEST}: fallen_back", "an object", repr(fallen_back)[:80])
    stored = stored_sizes(empty_model(files.folder), files.headers, fallen_back)
    yield from budget_faults(files.manifest["size"], stored)


def _value_faults(files: _Files) -> Faults:
    own = files.manifest.get("converted_from", QUANT_METHOD) == QUANT_METHOD
    scales = dict(read_tensors(files.folder, ".weight_scale"))
    for name, tensor in read_tensors(files.folder):
        if tensor.is_floating_point():
            owner, _, suffix = name.rpartition(".")
            bad, expected = ~torch.isfinite(tensor), "finite values"
            if suffix in SCALES:
                four_bits = suffix == "weight_scale" and f"{owner}.{PACKED}" in files.headers
                bad, expected = bad_scales(tensor, signed=four_bits)
            if bad.any():
                yield fault(name, expected, f"{int(bad.sum())} others, the first {tensor[bad][0].item()}")
        elif name.endswith(f".{PACKED}"):
            yield from _four_bit_faults(name, int4.unpack(tensor), scales[name.removesuffix(PACKED) + "weight_scale"])
        elif tensor.dtype == torch.int8:
            yield from _integer_faults(name, tensor, scales[f"{name}_scale"].flatten(), own)


def _integer_faults(name: str, tensor: torch.Tensor, scale: torch.Tensor, own: bool) -> Faults:
    """Whether int8 `tensor` was rounded by the range of each of its channels, or by that of all its values.

    scale: one for each channel, or one for all. own: `calibrate` rounded it. A weight is [out, in] or, as in a Conv1D,
    [in, out]; the number of scales shows which, except for a square one.
    """
    if own and (tensor == int8.QMIN).any():
        yield fault(name, "integers from -127 to 127", "-128, which rounding does not produce")
    layouts = [tensor, tensor.t()] if len(scale) > 1 else [tensor.reshape(1, -1)]
    sound = [_sound_channels(rows, scale, own) for rows in layouts if len(rows) == len(scale)]
    if not any(bool(channels.all()) for channels in sound):
        count = min(int((~channels).sum()) for channels in sound)
        if own:
            got = f"{count} that are not rounded by their own range"
            yield fault(name, "every channel's largest weight at 127, or only zeros and the scale 1", got)
        else:
            yield fault(name, "a weight other than zero in every channel whose scale is not that of zeros", f"{count}")


def _four_bit_faults(name: str, integers: torch.Tensor, scale: torch.Tensor) -> Faults:
    """Groups of zeros among 4-bit `integers` [out, in] under the scale of an ordinary group.

    More cannot be said: scales are chosen so that they clip, and GPTQ moves weights.
    """
    groups = integers.unflatten(1, (scale.shape[1], -1))
    lost = (groups == 0).all(-1) & (scale.float() != 1)
    if lost.any():
        expected = "a weight other than zero in every group whose scale is not that of zeros"
        yield fault(name, expected, f"{int(lost.sum())} groups of zeros")


def _sound_channels(rows: torch.Tensor, scale: torch.Tensor, own: bool) -> torch.Tensor:
    """bool [channels]: whether rounding can have produced the int8 `rows` [channels, n] with `scale` [channels]."""
    zeros = (rows == 0).all(1)
    if own:
        return (rows.to(torch.int16).abs() == int8.QMAX).any(1) | (zeros & (scale == 1))
    return ~zeros | torch.isin(scale, torch.tensor(SCALES_OF_ZEROS)) | (scale <= LOWER_BOUND)


def _shared_input_faults(files: _Files) -> Faults:
    """vLLM fuses layers that read one tensor: they must share what belongs to that tensor."""
    values = dict(read_tensors(files.folder, (".input_scale", ".smoothing_factor")))
    for layers in files.manifest.get("inputs", []):
        for name in layers[1:]:
            for suffix in ("input_scale", "smoothing_factor"):
                a, b = values.get(f"{layers[0]}.{suffix}"), values.get(f"{name}.{suffix}")
                if not (a is b if a is None or b is None else torch.equal(a, b)):
                    yield fault(f"{name}.{suffix}", f"that of {layers[0]}, which reads the same tensor", "another")
