"""An observation in a file, and the key that says what it was observed on.

The file is safetensors: the absmax of each layer under the layer's name, float32 [in]. Its metadata holds the key and
the findings (sinks, passes, batch size) as JSON. It contains no text and no token.

The key names everything that the observation depends on: source weights, config.json, calibration tokens, arithmetic.
Another alpha or scheme has the same key, therefore it needs no new forward pass.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_smoothquant.format.errors import SmoothQuantError

FORMAT = 2
KEY = "smoothquant_observation"

Absmax = dict[str, torch.Tensor]


def save_observation(path: Path, absmax: Mapping[str, torch.Tensor], key: Mapping[str, Any], findings: Any) -> None:
    """Write `absmax`. Errors (SmoothQuantError): the file cannot be written."""
    record = {"format": FORMAT, "key": key, "findings": findings}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, absmax, {KEY: json.dumps(record, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(str(path), "a file that can be written", error, "free some space") from error


def load_observation(path: Path, layers: Iterable[str], key: Mapping[str, Any]) -> tuple[Absmax, dict[str, Any]]:
    """(absmax of `layers`, findings) of the file `path`.

    Errors (SmoothQuantError): no such file, another format, observed on something else, or a layer is missing.
    """
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
            absmax = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SmoothQuantError(
            f"--stats {path}", "a file that --save-stats wrote", error, "observe again with --save-stats"
        ) from None
    expected = {"format": FORMAT, "key": json.loads(json.dumps(key))}
    changes = differences({name: record.get(name) for name in expected}, expected)
    if changes:
        raise SmoothQuantError(
            f"--stats {path}", "an observation of this model on these samples", "; ".join(changes[:4]),
            "give the same model, data and seed, or observe again with --save-stats",
        )  # fmt: skip
    missing = [name for name in layers if name not in absmax]
    if missing:
        raise SmoothQuantError(
            f"--stats {path}", f"the absmax of {missing[0]}", f"none of {len(missing)} layers",
            "observe again with --save-stats and the same options",
        )  # fmt: skip
    return {name: absmax[name] for name in layers}, record["findings"]


def check_writable(path: Path) -> None:
    """Refuse before the long work a path that cannot become a file. Nothing stays behind."""
    probe = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(str(path))
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SmoothQuantError(
            f"--save-stats {path}", "a file that can be written", error, "choose another file"
        ) from error


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Each leaf in which two JSON values differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for k in keys for line in differences(before.get(k), now.get(k), f"{where}.{k}" if where else k)]
    return [] if before == now else [f"{where} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " ..."


def save_atomically(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; `path` is either as before or complete, also after SIGKILL."""
    partial = path.with_name(path.name + ".partial")
    try:
        # Clones, because layers that read one tensor share its absmax, and safetensors refuses shared memory.
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
