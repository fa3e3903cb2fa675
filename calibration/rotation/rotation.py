"""A rotation: which parameters change and how (discovery/rotations.py finds where).

    the stream          x -> x Q                n(x) = norm without its weights
    embeddings, rows    E -> E Q
    writers             W -> Q^T W              b -> b Q
    norms               scale -> 1              shift -> (shift / scale) Q
    readers             W -> W diag(scale) Q    scale: that of the norm that the layer reads
    heads               the same with R for each head, in v_proj's rows and in o_proj's columns

x, y: row vectors; W [out, in]; Q, R orthogonal. The model computes the same function: a reader gets (n(x) + shift /
scale) Q and multiplies it by (W diag(scale) Q)^T. Source: QuaRot (arXiv 2404.00456), section 4; the shift, and
norms that subtract a mean, are ours.

All is computed in float64 and rounded once to the model's dtype. The rotated model then takes the place of the source
for all later stages.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vllm_smoothquant.format.config import STREAM
from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.probe import NormForm, linear_transposed
from ..discovery.rotations import RotationGraph, Side
from ..running.modules import own_parameters
from .orthogonal import is_orthogonal

ROWS = 4096  # of a matrix are computed at once, because embeddings in float64 may be larger than the model


class Rotation:
    """Building it modifies nothing; apply_ does.

    matrices: name -> float64 [n, n]. modules: names of all modules whose parameters change. scales: norm -> float64
    [channels], what it multiplies its channels by.
    """

    def __init__(self, model: nn.Module, graph: RotationGraph, matrices: Mapping[str, torch.Tensor]) -> None:
        """Errors (SmoothQuantError): a matrix that is not orthogonal, a norm whose shift has no scale."""
        self.model, self.graph = model, graph
        # As the checkpoint stores them, because `verify --source` must compute the same weights from the stored ones.
        self.matrices = {name: matrices[name].float().double() for name in graph.sizes}
        for name, matrix in self.matrices.items():
            n = graph.sizes[name]
            if matrix.shape != (n, n) or not is_orthogonal(matrix):
                raise SmoothQuantError(f"rotation {name}", f"an orthogonal [{n}, {n}]", "another matrix", "report this")
        self.modules = frozenset((*graph.embeddings, *graph.norms, *graph.inputs, *graph.outputs))
        # Read now, because a norm may be changed before its readers are computed.
        self.scales = {name: _scale(model, name, form) for name, form in graph.norms.items()}
        self._transposed = {n: bool(linear_transposed(model.get_submodule(n))) for n in (*graph.inputs, *graph.outputs)}

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """All parameters of module `name` itself in float32, rotated; those that do not change may be its own."""
        params = {key: p.detach() for key, p in own_parameters(self.model.get_submodule(name)).items()}
        if name in self.graph.norms:
            params |= self._norm(name, self.graph.norms[name])
        elif name in self.graph.embeddings:
            side = Side(STREAM, torch.arange(params["weight"].shape[1])[None])
            params["weight"] = by_rows(params["weight"], lambda rows: self._rotate(rows, side))
        elif name in self.modules:
            params |= self._linear(name, params)
        return {key: p.float() if p.is_floating_point() else p for key, p in params.items()}

    def _norm(self, name: str, form: NormForm) -> dict[str, torch.Tensor]:
        scale = self.scales[name]
        new = {form.scale: torch.full_like(scale, 0.0 if form.rule == "1+p" else 1.0)}
        if form.shift:
            shift = self.model.get_submodule(name).get_parameter(form.shift).detach().double().cpu()
            if bool(((scale == 0) & (shift != 0)).any()):
                raise SmoothQuantError(name, "a scale where there is a shift", "0", "use --rotation none")
            new[form.shift] = torch.where(scale == 0, 0.0, shift / scale) @ self.matrices[STREAM]
        return new

    def _linear(self, name: str, params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs, outputs = self.graph.inputs.get(name), self.graph.outputs.get(name)
        norm = self.graph.norm_of.get(name)
        weight = params["weight"].t() if self._transposed[name] else params["weight"]
        if inputs is not None:
            scale = None if norm is None else self.scales[norm]

            def columns(rows: torch.Tensor) -> torch.Tensor:
                return self._rotate(rows if scale is None else rows * scale, inputs)

            weight = by_rows(weight, columns)
        new = {}
        if outputs is not None:
            weight = by_rows(weight.t(), lambda rows: self._rotate(rows, outputs)).t()
            if params.get("bias") is not None:
                new["bias"] = self._rotate(params["bias"].double().cpu(), outputs)
        return new | {"weight": weight.t() if self._transposed[name] else weight}

    def _rotate(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        return rotate(x, self.matrices[side.matrix], side.channels)

    def apply_(self, place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Callable[[], None]:
        """Give the model its rotated parameters, in their own dtype and device; returns what takes that back.

        place: where new values go, such as into a mapped file. Errors (SmoothQuantError): one of them is not finite;
        nothing is changed then.
        """
        new: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name in sorted(self.modules):
            owned = own_parameters(self.model.get_submodule(name))
            for key, value in self.parameters(name).items():
                stored = value.to(owned[key].dtype)
                if not torch.isfinite(stored).all():
                    where, fix = f"{name}.{key}", "load the model in bfloat16, or use --rotation none"
                    raise SmoothQuantError(where, f"finite values in {stored.dtype}", "overflow after rotation", fix)
                new.append((owned[key], place(stored.contiguous()).to(owned[key].device)))
        old = [(parameter, parameter.data) for parameter, _ in new]

        def write(values: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
            for parameter, value in values:
                parameter.data = value

        write(new)
        return lambda: write(old)

    def hashes(self) -> dict[str, str]:
        """Matrix -> sha256 of it in float32, which identifies the rotation of a model."""
        return {name: hashlib.sha256(m.float().numpy().tobytes()).hexdigest() for name, m in self.matrices.items()}

    def describe(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "matrices": {name: list(matrix.shape) for name, matrix in self.matrices.items()},
            "embeddings": list(self.graph.embeddings),
            "norms": list(self.graph.norms),
            "readers": {name: side.matrix for name, side in self.graph.inputs.items()},
            "writers": {name: side.matrix for name, side in self.graph.outputs.items()},
        }


def rotate(x: torch.Tensor, matrix: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """x [..., n] with each vector x[..., channels[i]] times `matrix`; a new tensor of matrix's dtype."""
    out = x.to(matrix.dtype, copy=True)
    out[..., channels] = out[..., channels] @ matrix
    return out


def by_rows(matrix: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`compute` of the rows of `matrix` in float64 on the CPU, in float32."""
    parts = [compute(rows.double().cpu()).float() for rows in matrix.detach().split(ROWS)]
    return torch.cat(parts)


def _scale(model: nn.Module, norm: str, form: NormForm) -> torch.Tensor:
    values = model.get_submodule(norm).get_parameter(form.scale).detach().double().cpu()
    return values + 1 if form.rule == "1+p" else values
