"""What calibration observed, in a file of its own: another alpha or scheme needs no forward pass over the samples.

A safetensors file: absmax of each layer under its name, float32 [in]; beside them what they were observed on, so that a
file of another model, data set or arithmetic is refused. No text and no token is in it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_smoothquant.format.errors import SmoothQuantError

from .resume import differences, save_atomically

FORMAT = 1
KEY = "smoothquant_statistics"


def save_statistics(
    path: Path, absmax: Mapping[str, torch.Tensor], observed_on: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """Write `absmax`. observed_on: what must be the same when it is used again; more: what else was found."""
    record = {"format_version": FORMAT, "observed_on": observed_on, "found": more}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, dict(absmax), {KEY: json.dumps(record, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(
            str(path), expected="a file that can be written", got=str(error), do="choose another --save-stats"
        ) from error


def load_statistics(
    path: Path, names: Sequence[str], observed_on: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(absmax of `names`, what else was found).

    Errors (SmoothQuantError): no such file, of another version, observed on something else, or without one of `names`.
    """
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
            absmax = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SmoothQuantError(
            f"--stats {path}", expected="a file that --save-stats wrote", got=f"{type(error).__name__}: {error}",
            do="observe again with --save-stats",
        ) from None  # fmt: skip
    now = {"format_version": FORMAT, "observed_on": json.loads(json.dumps(observed_on))}
    found = differences({key: record.get(key) for key in now}, now)
    if found:
        raise SmoothQuantError(
            f"--stats {path}", expected="statistics of this model on these samples", got="; ".join(found[:4]),
            do="give the same model, data and seed, or observe again with --save-stats",
        )  # fmt: skip
    missing = [name for name in names if name not in absmax]
    if missing:
        raise SmoothQuantError(
            f"--stats {path}", expected=f"statistics of {missing[0]}", got=f"none of {len(missing)} layers",
            do="observe again with --save-stats and the same --ignore",
        )  # fmt: skip
    return {name: absmax[name] for name in names}, record["found"]
