"""An observation in a file, with the key of its inputs.

The file is safetensors: the absmax of each layer under the layer's name, float32 [in]. Its metadata holds the key and
the findings (sinks, passes, batch size) as JSON. It contains no text and no token.

The key names everything that the observation depends on: source weights, config.json, calibration tokens, arithmetic.
Another alpha or scheme has the same key, therefore it needs no new forward pass.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_smoothquant.format.errors import SmoothQuantError

FORMAT = 4
KEY = "smoothquant_observation"
START_OVER = "remove the state folder to start over"

Absmax = dict[str, torch.Tensor]


def save_observation(path: Path, absmax: Mapping[str, torch.Tensor], key: Mapping[str, Any], findings: Any) -> None:
    """Write `absmax`. Errors (SmoothQuantError): the file cannot be written."""
    record = {"format": FORMAT, "key": key, "findings": findings}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, absmax, {KEY: json.dumps(record, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(str(path), "a file that can be written", error, "free some space") from error


def load_observation(path: Path, key: Mapping[str, Any], where: str, fix: str) -> tuple[Absmax, dict[str, Any]]:
    """(absmax, findings) of the file `path`. where, fix: for the error text.

    Errors (SmoothQuantError): no such file, not an observation, or an observation with another key.
    """
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
            stored, findings = {"format": record["format"], "key": record["key"]}, record["findings"]
            absmax = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SmoothQuantError(where, "an observation that calibrate wrote", error, fix) from error
    changes = differences(stored, {"format": FORMAT, "key": json.loads(json.dumps(key))})
    if changes:
        raise SmoothQuantError(where, "an observation of this model on these samples", "; ".join(changes[:4]), fix)
    return absmax, findings


def load_state(path: Path, metadata: Mapping[str, str]) -> Absmax | None:
    """The tensors of a file in the state folder; None if it is missing or has other `metadata`, as that of another run.

    Errors (SmoothQuantError): it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != metadata:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(str(path), "a file that the interrupted run wrote", error, START_OVER) from error


def check_writable(path: Path) -> None:
    """Refuse a path that cannot become a file, before the long work. Only its parent folder is created."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(str(path))
        _partial(path).touch()  # it may exist, because a killed run leaves it
        _partial(path).unlink()
    except OSError as error:
        raise SmoothQuantError(
            f"--save-stats {path}", "a file that can be written", error, "choose another file"
        ) from error


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Each leaf in which two JSON values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [f"{where} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " ..."


def save_atomically(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; `path` is either as before or complete, also after SIGKILL."""
    partial = _partial(path)
    try:
        # Clones, because layers that read one tensor share its absmax, and safetensors refuses shared memory.
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
