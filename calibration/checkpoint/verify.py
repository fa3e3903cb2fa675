"""`smoothquant verify`: everything that can be wrong with a checkpoint, listed, without running it.

Checked, each only if what it needs can be read: config.json and its quantization_config; the manifest; the sha256 of
every file against the manifest; every tensor's name, dtype and shape against the format and against the architecture,
built without memory; every value: scales finite and above zero, integers as rounding leaves them, the rest finite;
layers that read one tensor sharing their input_scale.

A rounded row has its largest weight at 127 or -127, and -128 nowhere (int8.py): what differs was not rounded so, or was
damaged. Hashes tell damage from change of mind; values tell what a manifest made anew would hide.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import TRANSFORMERS_WEIGHTS, CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, header_faults, read_headers, read_json, read_tensors, size_faults

from ..inputs.model import sha256
from .architecture import SCALES, architecture_faults, build_empty, missing_from_ignore
from .verify_source import compare_with_source

# A row with more than this share of its weights at the end of the range was clipped: of normally distributed weights
# one in a hundred rows of 16 has two there, and none a quarter.
SATURATED = 0.25
# What torch.load would unpickle. Nothing here ever reads one, and a checkpoint has none.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass
class Verdict:
    """faults: every one found. checked: what was looked at, in words, for the summary.

    layers: with a source, each quantised layer's `error` and `steps` (against_source.compare).
    """

    faults: list[SmoothQuantError] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"faults": [f.to_dict() for f in self.faults], "checked": self.checked, "layers": self.layers}


def verify(checkpoint: str | Path, source: str | None = None) -> Verdict:
    """Look at the folder `checkpoint`. Nothing in it is executed, and no file outside it is read.

    source: the model it was made of, a folder or a hub id, to compare with.
    """
    folder, verdict = Path(checkpoint), Verdict()

    def attempt(what: str, check: Callable[[], Iterator[SmoothQuantError]]) -> None:
        before = len(verdict.faults)
        try:
            verdict.faults += check()
        except SmoothQuantError as error:
            verdict.faults.append(error)
        if len(verdict.faults) == before:
            verdict.checked.append(what)

    found: dict[str, Any] = {}
    attempt("files stay within the folder", lambda: _outside(folder))
    if verdict.faults:
        return verdict
    attempt("quantization_config", lambda: _read_config(folder, found))
    attempt("sha256 of every file", lambda: _hashes(folder, found))
    attempt("safetensors headers", lambda: _read_tensors(folder, found))
    if {"config", "headers"} <= found.keys():
        attempt("names, dtypes and shapes by the format", lambda: header_faults(found["config"], found["headers"]))
        attempt("names and shapes by the architecture", lambda: _architecture(folder, found))
        if not verdict.faults:
            attempt("every value", lambda: _values(folder, found))
            attempt("layers that read one tensor agree", lambda: _together(folder, found))
        if source is not None and "manifest" in found and not verdict.faults:
            manifest = found["manifest"]
            attempt(
                f"every weight against {source}", lambda: compare_with_source(folder, source, manifest, verdict.layers)
            )
    return verdict


def _fault(
    where: str, expected: str, got: str | BaseException, fix: str = "copy or export the checkpoint again"
) -> SmoothQuantError:
    return SmoothQuantError(where, expected, got, fix)


def _outside(folder: Path) -> Iterator[SmoothQuantError]:
    if not folder.is_dir():
        yield _fault(str(folder), "a checkpoint folder", "none", "check the path")
        return
    home = folder.resolve()
    # A snapshot in the hub's cache links to its blobs, and nowhere else.
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in sorted(folder.iterdir()):
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
            yield _fault(str(path), "a file", error)
            continue
        if not any(target.is_relative_to(where) for where in homes):
            yield _fault(str(path), "a file in this folder", f"a link to {target}", "copy the file itself")
        elif not (target.is_file() or target.is_dir()):
            yield _fault(str(path), "a file", "a pipe or a device", "remove it")
        elif target.suffix in PICKLES:
            yield _fault(str(path), "safetensors", "a file of a format that can run code", "remove it")


def _read_config(folder: Path, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    config = read_json(folder / "config.json")
    if "quantization_config" not in config:
        yield _fault(
            f"{folder}/config.json", "quantization_config", "none: a floating-point model", "calibrate it first"
        )
        return
    found["config"] = CheckpointConfig.from_dict(config["quantization_config"])
    if config.get("transformers_weights") != TRANSFORMERS_WEIGHTS:
        yield _fault(
            f"{folder}/config.json: transformers_weights", repr(TRANSFORMERS_WEIGHTS),
            repr(config.get("transformers_weights")), "put it there: without it transformers loads this silently wrong",
        )  # fmt: skip
    if "auto_map" in config:
        yield _fault(f"{folder}/config.json: auto_map", "none: a checkpoint needs no code", repr(config["auto_map"]))


def _hashes(folder: Path, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    manifest = found["manifest"] = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(f, str) for item in files.items() for f in item):
        raise _fault(f"{folder}/{MANIFEST}: files", "the sha256 of every file", repr(files)[:80])
    here = {path.name: path for path in folder.iterdir() if path.is_file()}
    for name in sorted(files.keys() | here.keys()):
        if name not in here:
            yield _fault(f"{folder}/{name}", "a file, by the manifest", "none")
        elif name in files:
            if (got := sha256(here[name])) != files[name]:
                yield _fault(f"{folder}/{name}", f"sha256 {files[name][:16]}...", f"{got[:16]}...")
        elif name.endswith(".safetensors"):
            # Anything else may have been added since: a README, a licence.
            yield _fault(f"{folder}/{name}", "an entry in the manifest", "none", "remove the file that does not belong")
    said = manifest.get("quantization_config")
    if "config" in found and said != found["config"].to_dict():
        yield _fault(f"{folder}/config.json: quantization_config", "what the manifest says", "something else")


def _read_tensors(folder: Path, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    headers = read_headers(folder)
    if not headers:
        yield _fault(str(folder), "safetensors files", "none")
        return
    found["headers"] = headers


def _architecture(folder: Path, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    for fault in size_faults(read_json(folder / "config.json"), found["headers"]):
        raise fault
    model = build_empty(folder)
    yield from architecture_faults(model, found["headers"])
    yield from missing_from_ignore(model, found["headers"], found["config"].ignore)


def _values(folder: Path, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    for name, tensor in read_tensors(folder):
        yield from _value(name, tensor, found)


def _value(name: str, tensor: torch.Tensor, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    suffix = name.rpartition(".")[2]
    if tensor.is_floating_point():
        good = torch.isfinite(tensor)
        if suffix in SCALES:
            good &= tensor > 0
        if not good.all():
            expected = "finite values" + (" above zero" if suffix in SCALES else "")
            yield _fault(name, expected, f"{int((~good).sum())} others, the first {tensor[~good].flatten()[0].item()}")
        return
    if tensor.dtype != torch.int8:
        return
    if (tensor == int8.QMIN).any():
        yield _fault(name, "integers from -127 to 127", "-128, which rounding does not give")
    rows = tensor.to(torch.int16).abs()
    ends = rows == int8.QMAX
    if found["config"].weights.strategy == "tensor":
        if not ends.any():
            yield _fault(name, "its largest weight at 127", f"{int(rows.max())}: not rounded by its own range")
        return
    # A Conv1D keeps [in, out]. Where the number of scales does not tell it (a square), either way may be meant.
    channels = found["headers"].get(f"{name}_scale", ("", tensor.shape[:1]))[1][0]
    ways = [way for way in (ends, ends.t()) if len(way) == channels]
    filled = [way.any(1) | (rows if way is ends else rows.t()).eq(0).all(1) for way in ways]
    if not any(bool(each.all()) for each in filled):
        short = min(int((~each).sum()) for each in filled) if filled else len(tensor)
        yield _fault(name, "every channel's largest weight at 127", f"{short} that are not rounded by their own range")
    full = min((float(way.float().mean(1).max()) for way in ways), default=0.0)
    if min(tensor.shape) >= 16 and full > SATURATED:
        yield _fault(name, f"at most {SATURATED:.0%} of a channel at the end of its range", f"{full:.0%}")


def _together(folder: Path, found: dict[str, Any]) -> Iterator[SmoothQuantError]:
    """vLLM fuses layers that read one tensor: they must share what belongs to that tensor."""
    values = dict(read_tensors(folder, (".input_scale", ".smoothing_factor")))
    for reading in found.get("manifest", {}).get("inputs", []):
        for suffix in ("input_scale", "smoothing_factor"):
            have = {name: values.get(f"{name}.{suffix}") for name in reading}
            first, *others = have
            for name in others:
                a, b = have[first], have[name]
                if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
                    yield _fault(f"{name}.{suffix}", f"that of {first}, which reads the same tensor", "another")
