"""`smoothquant verify`: list everything that is wrong with a checkpoint, without running it.

Checked, each only if the files that it needs can be read: config.json and its quantization_config; the manifest; the
sha256 of every file against the manifest; every tensor's name, dtype and shape against the format and against the
architecture, built without memory; every value: scales finite and above zero, integers as rounding produces them, the
rest finite; layers that read one tensor share its input_scale and smoothing_factor.

Rounding gives each row its largest weight at 127 or -127, and never -128 (int8.py); other rows were not rounded so, or
are damaged. Hashes detect damage; value checks also detect edits after which the manifest was regenerated.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import TRANSFORMERS_WEIGHTS, CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import (
    MANIFEST,
    SCALES,
    header_faults,
    read_headers,
    read_json,
    read_tensors,
    size_faults,
)

from ..inputs.model import sha256
from .architecture import Faults, architecture_faults, build_empty, fault, missing_from_ignore
from .verify_source import compare_with_source

# A row with more than this share of its weights at the end of the range was clipped. Among normally distributed weights
# one of a hundred rows of 16 has two there, and none a quarter.
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

    attempt("files stay within the folder", _link_faults(files.folder))
    if verdict.faults:
        return verdict
    attempt("quantization_config", _config_faults(files))
    attempt("sha256 of every file", _hash_faults(files))
    attempt("safetensors headers", _missing_headers(files))
    if files.config is not None and files.headers:
        attempt("names, dtypes and shapes by the format", header_faults(files.config, files.headers))
        attempt("names and shapes by the architecture", _architecture_faults(files, files.config))
        if not verdict.faults:
            attempt("every value", _value_faults(files, files.config.weights.strategy))
            attempt("layers that read one tensor agree", _shared_input_faults(files))
        if source is not None and files.manifest and not verdict.faults:
            comparison = compare_with_source(files.folder, source, files.manifest, verdict.layers)
            attempt(f"every weight against {source}", comparison)
    return verdict


def _link_faults(folder: Path) -> Faults:
    if not folder.is_dir():
        yield fault(str(folder), "a checkpoint folder", "none", "check the path")
        return
    home = folder.resolve()
    # A snapshot in the hub's cache links to the cache's blobs, and to nothing else.
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in sorted(folder.iterdir()):
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


def _hash_faults(files: _Files) -> Faults:
    folder = files.folder
    manifest = files.manifest = read_json(folder / MANIFEST)
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise fault(f"{folder}/{MANIFEST}: files", "the sha256 of every file", repr(hashes)[:80])
    paths = {path.name: path for path in folder.iterdir() if path.is_file()}
    for name in sorted(hashes.keys() | paths.keys()):
        where = f"{folder}/{name}"
        if name not in paths:
            yield fault(where, "a file, by the manifest", "none")
        elif name in hashes:
            if (got := sha256(paths[name])) != hashes[name]:
                yield fault(where, f"sha256 {hashes[name][:16]}...", f"{got[:16]}...")
        elif name.endswith(".safetensors"):  # other files may have been added later: a README, a licence
            yield fault(where, "an entry in the manifest", "none", "remove the file that does not belong")
    if files.config is not None and manifest.get("quantization_config") != files.config.to_dict():
        yield fault(f"{folder}/config.json: quantization_config", "the manifest's", "something else")


def _missing_headers(files: _Files) -> Faults:
    files.headers = read_headers(files.folder)
    if not files.headers:
        yield fault(str(files.folder), "safetensors files", "none")


def _architecture_faults(files: _Files, config: CheckpointConfig) -> Faults:
    for too_large in size_faults(read_json(files.folder / "config.json"), files.headers):
        raise too_large
    model = build_empty(files.folder)
    yield from architecture_faults(model, files.headers)
    yield from missing_from_ignore(model, files.headers, config.ignore)


def _value_faults(files: _Files, strategy: str) -> Faults:
    for name, tensor in read_tensors(files.folder):
        if tensor.is_floating_point():
            positive = name.rpartition(".")[2] in SCALES
            good = torch.isfinite(tensor) & (tensor > 0) if positive else torch.isfinite(tensor)
            if not good.all():
                got = f"{int((~good).sum())} others, the first {tensor[~good].flatten()[0].item()}"
                yield fault(name, "finite values" + " above zero" * positive, got)
        elif tensor.dtype == torch.int8:
            # The number of scales shows whether a weight is [out, in] or, as in a Conv1D, [in, out].
            channels = files.headers.get(f"{name}_scale", ("", tensor.shape[:1]))[1][0]
            yield from _integer_faults(name, tensor, channels if strategy == "channel" else None)


def _integer_faults(name: str, tensor: torch.Tensor, channels: int | None) -> Faults:
    """Whether int8 `tensor` was rounded by the range of each of its `channels`, or (None) by that of all its values."""
    if (tensor == int8.QMIN).any():
        yield fault(name, "integers from -127 to 127", "-128, which rounding does not produce")
    sizes = tensor.to(torch.int16).abs()
    if channels is None:
        if not (sizes == int8.QMAX).any():
            yield fault(name, "its largest weight at 127", f"{int(sizes.max())}: not rounded by its own range")
        return
    layouts = [rows for rows in (sizes, sizes.t()) if len(rows) == channels]  # a square matrix may have either
    rounded = [(rows == int8.QMAX).any(1) | (rows == 0).all(1) for rows in layouts]
    if not any(bool(channel.all()) for channel in rounded):
        count = min((int((~channel).sum()) for channel in rounded), default=len(tensor))
        yield fault(name, "every channel's largest weight at 127", f"{count} that are not rounded by their own range")
    full = min((float((rows == int8.QMAX).float().mean(1).max()) for rows in layouts), default=0.0)
    if min(tensor.shape) >= 16 and full > SATURATED:
        yield fault(name, f"at most {SATURATED:.0%} of a channel at the end of its range", f"{full:.0%}")


def _shared_input_faults(files: _Files) -> Faults:
    """vLLM fuses layers that read one tensor: they must share what belongs to that tensor."""
    values = dict(read_tensors(files.folder, (".input_scale", ".smoothing_factor")))
    for layers in files.manifest.get("inputs", []):
        for name in layers[1:]:
            for suffix in ("input_scale", "smoothing_factor"):
                a, b = values.get(f"{layers[0]}.{suffix}"), values.get(f"{name}.{suffix}")
                if not (a is b if a is None or b is None else torch.equal(a, b)):
                    yield fault(f"{name}.{suffix}", f"that of {layers[0]}, which reads the same tensor", "another")
