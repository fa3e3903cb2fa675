"""The ranges of every channel that calibration observed, stored in the checkpoint's folder for `smoothquant report`.

    statistics.npz      "<n>.activations"  float32 [in]   max|X_j| before smoothing, of the n-th tensor that layers read
                        "<n>.weights"      float32 [in]   max|W_j| over all layers that read it, before smoothing
                        "<n>.factor"       float32 [in]   s_j: the tensor is divided by it
                        "<n>.smoothed"     float32 [in]   max|W_j| after smoothing: the weight that was rounded
                        "layers"           JSON           for each n, the layers that read the tensor

Numbers have eight bits of precision, because a picture needs no more. The file is an .npz, because no loader takes it
for weights and numpy writes no timestamps: the same calibration gives the same bytes.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vllm_smoothquant.format.errors import SmoothQuantError

from ..observation.observation import Observation
from ..running.modules import float_parameters
from ..smoothing.plan import Plan

STATISTICS = "statistics.npz"
ARRAYS = ("activations", "weights", "factor", "smoothed")
# Far more than any model has: a damaged file cannot exhaust the memory.
MAX_CHANNELS = 1 << 22


@dataclass(frozen=True)
class Channels:
    """One tensor that `layers` read; float32 [in] each. activations: max|X_j|; weights: max|W_j| over the layers."""

    layers: tuple[str, ...]
    activations: np.ndarray
    weights: np.ndarray
    factor: np.ndarray
    smoothed: np.ndarray

    @property
    def smoothed_activations(self) -> np.ndarray:
        return self.activations / self.factor


def collect(observation: Observation, plan: Plan) -> list[Channels]:
    """One entry for every tensor that INT8 layers read, in the model's order, including layers that fell back."""
    channels = []
    with torch.inference_mode():
        for names in observation.graph.shared_input_groups:
            if layers := tuple(name for name in names if name in observation.layers):
                factor, absmax = plan.smoothing.input_factor(layers[0]), observation.absmax[layers[0]]
                s = torch.ones_like(absmax) if factor is None else factor.cpu()
                weights, smoothed = (_column_absmax(plan, layers, smoothed=flag) for flag in (False, True))
                channels.append(Channels(layers, absmax.numpy(), weights, s.numpy(), smoothed))
    return channels


def _column_absmax(plan: Plan, layers: Sequence[str], *, smoothed: bool) -> np.ndarray:
    """max|W_j| over the weights of `layers`, float32 [in]."""
    smoothing, maxima = plan.smoothing, []
    for name in layers:
        parameters = smoothing.parameters(name) if smoothed else float_parameters(smoothing.model.get_submodule(name))
        maxima.append(parameters["weight"].abs().amax(dim=1 if smoothing.transposed.get(name) else 0).cpu())
    return torch.stack(maxima).amax(0).numpy()


def write(folder: Path, channels: Sequence[Channels]) -> None:
    arrays = {f"{i}.{key}": _rounded(getattr(c, key)) for i, c in enumerate(channels) for key in ARRAYS}
    names = json.dumps([c.layers for c in channels]).encode()
    np.savez_compressed(folder / STATISTICS, layers=np.frombuffer(names, dtype=np.uint8), **arrays)  # type: ignore[arg-type]


def read(folder: Path) -> list[Channels] | None:
    """The Channels that `write` stored, or None without such a file. Errors (SmoothQuantError): the file is damaged."""
    path = folder / STATISTICS
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = json.loads(file["layers"].tobytes())
            channels = [
                Channels(tuple(map(str, names)), **{key: _checked(file[f"{i}.{key}"]) for key in ARRAYS})
                for i, names in enumerate(layers)
            ]
        if any(len({getattr(c, key).shape for key in ARRAYS}) != 1 for c in channels):
            raise ValueError("arrays of different lengths")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        fix = "copy the checkpoint again, or delete the file"
        raise SmoothQuantError(str(path), "the ranges of every channel", error, fix) from error
    return channels


def _checked(values: np.ndarray) -> np.ndarray:
    good = values.ndim == 1 and values.dtype == np.float32 and 0 < len(values) <= MAX_CHANNELS
    if not good or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("expected finite float32 values of at least 0 in one dimension")
    return values


def _rounded(values: np.ndarray) -> np.ndarray:
    """`values` in bfloat16's precision, as float32: the zero bits compress well, and the range stays float32's."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().float().numpy()
