"""Smoothing factors, and the plan that folds them into a model's parameters.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                 one s for each channel j of a group's source
    (X diag(s)^-1) (diag(s) W) = X W                            source divided by s, readers' columns multiplied

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), eq. 3 and 4. Channels that are not foldable keep s = 1.

A plan (`Smoothing`) holds only factors; smoothed parameters are computed in float32 on demand, one module at a time.

Norms are stored in the model's own dtype, where w / s must be rounded. The rounding is not lost: the factor is read
back from what is stored, s' = w / stored, and it is s' that multiplies the readers' columns. bfloat16 costs nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.graph import Graph, Group
from ..discovery.probe import NORM_RULES
from ..running.modules import float_parameters, own_parameters

# The reference's lower clamp; beyond it a channel that was all but silent in calibration would drown all others once it
# speaks. The upper one is its mirror image.
FACTOR_RANGE = (1e-5, 1e5)

# The factor that parameter p of a norm carries after its value became q: the inverse of NORM_RULES.
FACTOR_OF = {
    "p": lambda p, q: p / q,
    "1+p": lambda p, q: (1 + p) / (1 + q),
}


def smoothing_factors(
    group: Group, absmax: Mapping[str, torch.Tensor], model: nn.Module, alpha: float, *, power_of_two: bool = False
) -> torch.Tensor:
    """s of `group`, float32 [channels]: the source's output is divided by it (eq. 4).

    absmax: max|X_j| of each reader's input, [in_features]. All readers' columns that come from one channel share
    its s: both maxima are taken over all of them. Readers kept in floating point follow but have no vote.
    A channel whose activation or weight maximum is 0 has no range to balance: s = 1.
    power_of_two rounds s (in the logarithm), so that folding is exact in any floating-point dtype.
    Non-finite maxima are a SmoothQuantError that names the layer.
    """
    activation, weight = torch.zeros(2, group.channels)
    for reader in group.readers:
        if not reader.quantized:
            continue
        if reader.name not in absmax:
            raise SmoothQuantError(
                reader.name, "an activation maximum", "none", "observe every reader that is quantised"
            )
        own = {
            "activation": absmax[reader.name],
            "weight": _column_absmax(model.get_submodule(reader.name), reader.transposed),
        }
        mapped = reader.channel_of >= 0
        for total, (what, values) in zip((activation, weight), own.items(), strict=True):
            values = values.detach().to("cpu", torch.float32)[mapped]
            if not torch.isfinite(values).all():
                raise SmoothQuantError(
                    reader.name,
                    f"finite {what} maxima",
                    f"{int((~torch.isfinite(values)).sum())} that are not",
                    "check the model for overflow: load it in bfloat16 or float32",
                )
            # An input that is divided by s ** power asks for the power-th root.
            values = values ** (1 / reader.power[mapped])
            total.scatter_reduce_(0, reader.channel_of[mapped], values, "amax")
    balanced = activation.double() ** alpha / weight.double() ** (1 - alpha)
    usable = group.foldable & (activation > 0) & (weight > 0)
    s = torch.where(usable, balanced.clamp(*FACTOR_RANGE), 1.0)
    if power_of_two:
        s = 2.0 ** s.log2().round()
    return s.to(torch.float32)


def _column_absmax(module: nn.Module, transposed: bool) -> torch.Tensor:
    """max|W_j| for each input channel j, [in_features]."""
    return own_parameters(module)["weight"].abs().amax(dim=1 if transposed else 0)


def smooth_groups(
    model: nn.Module,
    graph: Graph,
    absmax: Mapping[str, torch.Tensor],
    alpha: float | Mapping[str, float] | None,
    *,
    power_of_two: bool = False,
) -> "Smoothing":
    """The plan for every group of `graph`.

    alpha: one for all; or one for each source, those left out not being smoothed; or None for no smoothing at all.
    """
    alphas = alpha if isinstance(alpha, Mapping) else {} if alpha is None else {g.source: alpha for g in graph.groups}
    factors = {
        group.source: smoothing_factors(group, absmax, model, alphas[group.source], power_of_two=power_of_two)
        for group in graph.groups
        if group.source in alphas
    }
    return Smoothing(model, graph, factors)


class Smoothing:
    """A plan: which parameters are divided and multiplied by what. Building it modifies nothing; apply_ does.

    factors: source -> float32 [channels], what the source's output is divided by, the norms' rounding included.
    modules: names of all modules whose parameters change. transposed: linear layer -> whether its weight is [in, out].
    runtime: linear layer -> float32 [in], what it must divide its input by itself, because nothing before it does.
    """

    def __init__(self, model: nn.Module, graph: Graph, factors: Mapping[str, torch.Tensor]) -> None:
        """factors: source -> s, [channels], positive and finite, 1 where the group is not foldable."""
        self.model, self.graph = model, graph
        self.factors: dict[str, torch.Tensor] = {}
        self._norms: dict[str, dict[str, torch.Tensor]] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self.runtime: dict[str, torch.Tensor] = {}
        self.transposed = {linear.name: linear.transposed for linear in graph.linears}
        for group in graph.groups:
            if group.source in factors:
                self._fold_group(group, factors[group.source])
        self.modules = frozenset(self._norms) | frozenset(self._inputs) | frozenset(self._outputs)

    def _fold_group(self, group: Group, s: torch.Tensor) -> None:
        s = s.detach().to("cpu", torch.float32)
        fits = s.shape == (group.channels,) and bool((torch.isfinite(s) & (s > 0)).all())
        if not fits or bool((s[~group.foldable] != 1).any()):
            raise SmoothQuantError(
                group.source,
                f"[{group.channels}] positive finite factors, 1 where nothing can be folded",
                f"{list(s.shape)} from {s.min():.3g} to {s.max():.3g}" if s.numel() else "none",
                "compute them with smoothing_factors",
            )
        if group.kind == "norm":
            s, self._norms[group.source] = _fold_norm(self.model.get_submodule(group.source), group.rules, s)
        elif group.kind == "linear":
            self._outputs[group.source] = s
        else:
            self.runtime |= dict.fromkeys((reader.name for reader in group.readers), s)
        self.factors[group.source] = s
        for reader in group.readers:
            columns = reader.columns(s)
            known = self._inputs.get(reader.name)
            # Two sources may feed one layer, each its own columns.
            self._inputs[reader.name] = columns if known is None else known * columns

    def input_factor(self, name: str) -> torch.Tensor | None:
        """float32 [in_features]: columns of linear layer `name` are multiplied by it; its input arrives divided."""
        return self._inputs.get(name)

    def output_factor(self, name: str) -> torch.Tensor | None:
        """float32 [out_features]: rows and bias of linear layer `name` are divided by it."""
        return self._outputs.get(name)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """All parameters of module `name` itself in float32, smoothed where the plan says so. New tensors."""
        params = float_parameters(self.model.get_submodule(name))
        for parameter, value in self._norms.get(name, {}).items():
            params[parameter] = value.to(params[parameter].device)
        columns, rows = self._inputs.get(name), self._outputs.get(name)
        in_dim = 0 if self.transposed.get(name) else 1
        if columns is not None:
            params["weight"] = params["weight"] * _along(columns, in_dim, params["weight"])
        if rows is not None:
            params["weight"] = params["weight"] / _along(rows, 1 - in_dim, params["weight"])
            if "bias" in params:
                params["bias"] = params["bias"] / rows.to(params["bias"].device)
        return params

    def apply_(self) -> None:
        """Write the smoothed parameters into `model`, in its own dtype and place. Tied parameters are never touched.

        Nothing is written if any of them would overflow (SmoothQuantError).
        """
        for write in (False, True):
            for name in sorted(self.modules):
                owned = own_parameters(self.model.get_submodule(name))
                for parameter, value in self.parameters(name).items():
                    stored = value.to(owned[parameter].dtype)
                    if not torch.isfinite(stored).all():
                        raise SmoothQuantError(
                            f"{name}.{parameter}",
                            f"finite values in {stored.dtype}",
                            "overflow after smoothing",
                            "load the model in bfloat16 or choose a smaller alpha",
                        )
                    if write:
                        owned[parameter].data.copy_(stored)

    def folded(self) -> "Smoothing":
        """The part of this plan that is done before the model runs."""
        return self.only({group.source for group in self.graph.groups if group.kind != "input"})

    def only(self, sources: Collection[str]) -> "Smoothing":
        """The part of this plan that belongs to `sources`."""
        return Smoothing(self.model, self.graph, {s: f for s, f in self.factors.items() if s in sources})

    def describe(self, group: Group) -> dict[str, Any]:
        """What the manifest says of `group`: names, how many channels, the range of its factors."""
        factors = self.factors.get(group.source)
        folded = torch.ones(1) if factors is None else factors[group.foldable]
        return {
            "source": group.source,
            "kind": group.kind,
            "readers": [reader.name for reader in group.readers],
            "channels": int(group.foldable.sum()),
            "smoothed": factors is not None,
            "factor_min": float(folded.min()),
            "factor_max": float(folded.max()),
        }


def _along(factor: torch.Tensor, dim: int, weight: torch.Tensor) -> torch.Tensor:
    """`factor` on weight's device, shaped to broadcast along `dim` of a matrix."""
    return factor.to(weight.device).unsqueeze(1 - dim)


def _fold_norm(
    module: nn.Module, rules: Mapping[str, str], s: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The factors that a norm carries exactly, near `s`, and its float32 parameters that carry them.

    The first parameter that follows a rule is rounded to its stored dtype, and the factor is read back from it; the
    others (the bias) divide by that factor. A channel whose parameter is 0, or becomes it, keeps s = 1.
    """
    params = {name: p.detach().to("cpu") for name, p in own_parameters(module).items()}
    first = next(name for name in params if rules[name] != "fixed")
    p, rule = params[first].float(), rules[first]
    q = NORM_RULES[rule](p, s).to(params[first].dtype).float()
    carried = FACTOR_OF[rule](p, q)
    exact = torch.isfinite(carried) & (carried > 0) & torch.isfinite(q) & (s != 1)
    s = torch.where(exact, carried, 1.0)
    folded = {name: NORM_RULES[rules[name]](value.float(), s) for name, value in params.items()}
    folded[first] = torch.where(exact, q, p)
    return s, folded
