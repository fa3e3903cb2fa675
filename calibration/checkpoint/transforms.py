"""What was folded into a checkpoint's weights, exactly, because LoRA adapters, drafts and hidden states need it.

    norm_scale       float32 [in]         the layer's columns were multiplied by the weights of the norm that it reads
    input_MATRIX     int32 [vectors, n]   then each vector x[channels] of its input was rotated by MATRIX
    input_factor     float32 [in]         then its columns were multiplied by the factor: its input arrives divided
    output_MATRIX    int32 [vectors, n]   vectors of its output (of an embedding's rows) were rotated by MATRIX
    output_factor    float32 [out]        then its rows and bias, or the norm's parameters, were divided by the factor
    rotation.MATRIX  float32 [n, n]       orthogonal; rows x of what it rotates became x MATRIX

Names are those of transformers' modules, as LoRA adapters have them. Factors at run time (`smoothing_factor`) are not
here, because the layer divides by them itself.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_smoothquant.format.config import STREAM, TRANSFORMS_FILE, Transforms
from vllm_smoothquant.format.errors import SmoothQuantError

from ..inputs.model import sha256
from ..rotation.orthogonal import is_orthogonal
from ..rotation.rotation import Rotation, rotate
from ..smoothing.factors import Smoothing
from .export import save_tensors

NORM_SCALE, INPUT_FACTOR, OUTPUT_FACTOR = "norm_scale", "input_factor", "output_factor"
FACTORS = (NORM_SCALE, INPUT_FACTOR, OUTPUT_FACTOR)
INPUT, OUTPUT, MATRICES = "input_", "output_", "rotation"


@dataclass(frozen=True)
class Folded:
    """modules: module -> kind -> tensor, as the module docstring has them. matrices: name -> float32 [n, n]."""

    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)

    def columns(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [rows, in] for the input that layer `name` has in the checkpoint."""
        kinds = self.modules.get(name, {})
        if NORM_SCALE in kinds:
            weight = weight * kinds[NORM_SCALE]
        weight = self._rotated(kinds, INPUT, weight)
        return weight * kinds[INPUT_FACTOR] if INPUT_FACTOR in kinds else weight

    def rows(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [out, columns], or [out], for the output that module `name` has in the checkpoint."""
        kinds = self.modules.get(name, {})
        weight = self._rotated(kinds, OUTPUT, weight.t()).t()
        return (weight.t() / kinds[OUTPUT_FACTOR]).t() if OUTPUT_FACTOR in kinds else weight

    def features(self, name: str) -> tuple[int | None, int | None]:
        """(in, out) of module `name` as far as its tensors show them."""
        kinds = self.modules.get(name, {})

        def size(factors: tuple[str, ...], side: str) -> int | None:
            known = (kinds[kind].numel() for kind in (*factors, side + STREAM) if kind in kinds)
            return next(known, None)

        return size((NORM_SCALE, INPUT_FACTOR), INPUT), size((OUTPUT_FACTOR,), OUTPUT)

    def _rotated(self, kinds: dict[str, torch.Tensor], side: str, x: torch.Tensor) -> torch.Tensor:
        for name, matrix in self.matrices.items():
            if side + name in kinds:
                last = int(kinds[side + name].max())
                if last >= x.shape[-1]:
                    fix = "give the checkpoint of the model that the adapter was trained on"
                    raise SmoothQuantError(side + name, f"more than {last} channels", str(x.shape[-1]), fix)
                x = rotate(x.float(), matrix, kinds[side + name].long())
        return x


def folded(smoothing: Smoothing, rotation: Rotation | None = None) -> Folded:
    """What `rotation`, then `smoothing`, folded into the weights."""
    parts, found = smoothing.folded(), defaultdict[str, dict[str, torch.Tensor]](dict)
    if rotation is not None:
        graph = rotation.graph
        for name, norm in graph.norm_of.items():
            found[name][NORM_SCALE] = rotation.scales[norm].float()
        for side, sides in ((INPUT, graph.inputs), (OUTPUT, graph.outputs)):
            for name, each in sides.items():
                found[name][side + each.matrix] = each.channels.int()
    for name in sorted(parts.modules):
        for kind, factor in ((INPUT_FACTOR, parts.input_factor(name)), (OUTPUT_FACTOR, parts.factors.get(name))):
            if factor is not None:
                found[name][kind] = factor
    matrices = {} if rotation is None else {name: matrix.float() for name, matrix in rotation.matrices.items()}
    return Folded(dict(found), matrices)


def write(folder: Path, smoothing: Smoothing, rotation: Rotation | None = None) -> Transforms | None:
    """Write TRANSFORMS_FILE into the checkpoint `folder`; None if nothing was folded."""
    parts = folded(smoothing, rotation)
    tensors = {f"{name}.{kind}": value for name, kinds in parts.modules.items() for kind, value in kinds.items()}
    tensors |= {f"{MATRICES}.{name}": matrix for name, matrix in parts.matrices.items()}
    if not tensors:
        return None
    path = folder / TRANSFORMS_FILE
    path.parent.mkdir(mode=0o755)
    save_tensors(path, {name: value.cpu().contiguous().clone() for name, value in sorted(tensors.items())})
    return Transforms(sha256(path), frozenset(parts.matrices))


def read(folder: Path) -> Folded:
    """What `write` stored, empty without such a file. Errors (SmoothQuantError): a damaged file, a faulty tensor."""
    path = folder / TRANSFORMS_FILE
    if not path.exists():
        return Folded()
    fix = "copy the checkpoint again"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(str(path), "a safetensors file", error, fix) from error
    matrices = {name.removeprefix(f"{MATRICES}."): t for name, t in tensors.items() if name.startswith(f"{MATRICES}.")}
    for name, matrix in matrices.items():
        if matrix.dtype != torch.float32 or not is_orthogonal(matrix):
            raise SmoothQuantError(f"{path}: {MATRICES}.{name}", "an orthogonal matrix", "another one", fix)
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if name == MATRICES:
            continue
        if kind in FACTORS:
            good = tensor.dtype == torch.float32 and tensor.dim() == 1 and bool(torch.isfinite(tensor).all())
            if not good or (kind != NORM_SCALE and not bool((tensor > 0).all())):
                raise SmoothQuantError(f"{path}: {key}", "finite float32 factors above zero", str(tensor.dtype), fix)
        else:
            sizes = {side + name: len(matrix) for side in (INPUT, OUTPUT) for name, matrix in matrices.items()}
            if kind not in sizes or tensor.dtype != torch.int32 or tensor.shape[1:] != (sizes[kind],):
                raise SmoothQuantError(f"{path}: {key}", f"one of {', '.join((*FACTORS, *sizes))}", kind, fix)
            if bool((tensor < 0).any()) or len(tensor.unique()) != tensor.numel():
                raise SmoothQuantError(f"{path}: {key}", "each channel once", "one twice, or below 0", fix)
        found[name][kind] = tensor
    return Folded(dict(found), matrices)
