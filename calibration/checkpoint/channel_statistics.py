"""What calibration saw of every channel, kept beside the checkpoint so that it can be looked at (report.py).

    statistics.npz      "<n>.activations"  float32 [in]   max|X_j| before smoothing, of the n-th tensor that layers read
                        "<n>.weights"      float32 [in]   max|W_j| over all layers that read it, before smoothing
                        "<n>.factor"       float32 [in]   s_j: the tensor is divided by it
                        "<n>.smoothed"     float32 [in]   max|W_j| after smoothing, as it was rounded
                        "layers"           JSON           the layers that read each of them

Numbers keep eight bits of precision, as a picture needs no more. No ending that vLLM or transformers loads weights by;
numpy's archives carry no time, so the same calibration gives the same bytes.
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
# Far more than any model has, so that a damaged file cannot take all memory.
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
            layers = tuple(name for name in names if name in observation.layers)
            if not layers:
                continue
            factor = plan.smoothing.input_factor(layers[0])
            absmax = observation.absmax[layers[0]]
            before = _column_absmax(plan, layers, smoothed=False)
            after = _column_absmax(plan, layers, smoothed=True)
            s = torch.ones_like(absmax) if factor is None else factor.cpu()
            channels.append(Channels(layers, absmax.numpy(), before, s.numpy(), after))
    return channels


def _column_absmax(plan: Plan, layers: Sequence[str], *, smoothed: bool) -> np.ndarray:
    """max|W_j| over the weights of `layers`, float32 [in]."""
    smoothing, maxima = plan.smoothing, []
    for name in layers:
        changed = smoothed and name in smoothing.modules
        parameters = smoothing.parameters(name) if changed else float_parameters(smoothing.model.get_submodule(name))
        maxima.append(parameters["weight"].abs().amax(dim=1 if smoothing.transposed.get(name) else 0).cpu())
    return torch.stack(maxima).amax(0).numpy()


def write(folder: Path, channels: Sequence[Channels]) -> None:
    arrays = {f"{i}.{key}": _rounded(getattr(c, key)) for i, c in enumerate(channels) for key in ARRAYS}
    names = json.dumps([c.layers for c in channels]).encode()
    np.savez_compressed(folder / STATISTICS, layers=np.frombuffer(names, dtype=np.uint8), **arrays)  # type: ignore[arg-type]


def read(folder: Path) -> list[Channels] | None:
    """What `write` wrote; None where there is no such file. SmoothQuantError where it is damaged."""
    path = folder / STATISTICS
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = json.loads(file["layers"].tobytes())
            found = [
                Channels(tuple(map(str, names)), **{key: _checked(file[f"{i}.{key}"]) for key in ARRAYS})
                for i, names in enumerate(layers)
            ]
        if any(len({getattr(c, key).shape for key in ARRAYS}) != 1 for c in found):
            raise ValueError("arrays of different lengths")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise SmoothQuantError(
            str(path),
            "what calibrate saw of every channel",
            error,
            "copy the checkpoint again, or delete the file",
        ) from error
    return found


def _checked(values: np.ndarray) -> np.ndarray:
    good = values.ndim == 1 and values.dtype == np.float32 and 0 < len(values) <= MAX_CHANNELS
    if not good or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("expected finite float32 values of at least 0 in one dimension")
    return values


def _rounded(values: np.ndarray) -> np.ndarray:
    """To bfloat16's precision, in float32: the zeros compress away. Nothing becomes infinite or nothing."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().float().numpy()
