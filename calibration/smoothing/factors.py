"""Smoothing factors, and the folding that writes them into a model's parameters.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                 one s for each channel j of a group's source
    (X diag(s)^-1) (diag(s) W) = X W                            source divided by s, readers' columns multiplied

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), eq. 3 and 4. Channels that are not foldable keep s = 1.

A folding (`Smoothing`) holds only factors; smoothed parameters are computed on demand, one module at a time, with the
values that the checkpoint will store.

Exact storage. INT8 weights are rounded once, from float32. All other parameters are stored in the model's own dtype:
a norm's w / s is rounded, and the factor is computed again from the stored value, s' = w / stored, so that no output
changes. Nothing follows a second rounding in this way: the bias of a norm or of a divided layer, and the weights of
layers that stay in floating point. In a 16-bit model such a group gets powers of two, by which a division is exact, or
1 where the quotient would be below float16's smallest normal number.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.graph import Graph, Group
from ..discovery.probe import NORM_RULES
from ..observation.absmax import output_of
from ..running.modules import float_parameters, own_parameters

Tensors = Mapping[str, torch.Tensor]

# The lower bound is the reference implementation's; the upper bound is its mirror image.
FACTOR_RANGE = (1e-5, 1e5)
# A maximum counts as at least this many times the group's median, so that only channels that stand out are moved. The
# order of the others is chance: on other text (docs/domains.md) a gated MLP's quiet channels become 40 times as loud,
# and one that was amplified decides the scale of its token.
QUIET = 2
# What is divided by s must stay in float16, the smallest range that a model is served in, also for activations that are
# this many times larger than those of calibration.
HEADROOM = 8
LARGEST = torch.finfo(torch.float16).max / HEADROOM

# What a row of a weight, or a bias, may lose when its quotient is stored: about half of what the gate allows.
LOSS = 2.0**-19

# The factor that parameter p of a norm carries after its value became q: the inverse of NORM_RULES.
FACTOR_OF = {"p": lambda p, q: p / q, "1+p": lambda p, q: (1 + p) / (1 + q)}


def smoothing_factors(
    group: Group, absmax: Tensors, model: nn.Module, alpha: float, *, power_of_two: bool = False
) -> torch.Tensor:
    """s of `group`, float32 [channels]: the source's output is divided by it (eq. 4).

    absmax: max|X_j| of each reader's input, [in_features]. All readers' columns that come from one channel share
    its s: both maxima are taken over all of them. Readers kept in floating point are rescaled, but do not influence s.
    Quiet channels count as QUIET times the median; if all maxima of an operand are 0, no range can be balanced: s = 1.
    power_of_two rounds s (in the logarithm), so that folding is exact in any floating-point dtype.
    absmax may also have output_of(source), [channels]: dividing that output by s must not leave float16's range.
    Errors (SmoothQuantError): a reader without a maximum, or a maximum that is not finite; they name the layer.
    """
    activation, weight = _maxima(group, absmax, model)
    usable = group.foldable & (activation > 0) & (weight > 0)
    s = torch.where(usable, activation**alpha / weight ** (1 - alpha), 1.0)
    s = torch.where(usable, torch.maximum(s.clamp(*FACTOR_RANGE), _divided(group, absmax, activation) / LARGEST), 1.0)
    return (nearest_power_of_two(s) if power_of_two else s).to(torch.float32)


def nearest_power_of_two(s: torch.Tensor) -> torch.Tensor:
    """The power of two that is nearest to each of `s` in the logarithm."""
    return 2.0 ** s.log2().round()


def smallest_factors(group: Group, absmax: Tensors, model: nn.Module) -> torch.Tensor:
    """float32 [channels]: the smallest s that keeps what is divided in float16's range. Arguments and errors as above.

    By how much rounding to a power of two makes s smaller is left in HEADROOM.
    """
    activation, _ = _maxima(group, absmax, model)
    return (_divided(group, absmax, activation) / LARGEST).clamp(min=FACTOR_RANGE[0]).to(torch.float32)


def _divided(group: Group, absmax: Tensors, activation: torch.Tensor) -> torch.Tensor:
    """The maxima of what s divides: the source's output, and what readers get, which another tensor may multiply."""
    return torch.maximum(activation, absmax.get(output_of(group.source), activation.float()).double())


def _maxima(group: Group, absmax: Tensors, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(max|X_j|, max|W_j|), float64 [channels], over all quantised readers of `group`, quiet channels raised."""
    maxima = {"activation": torch.zeros(group.channels), "weight": torch.zeros(group.channels)}
    for reader in group.readers:
        if not reader.quantized:
            continue
        if reader.name not in absmax:
            raise SmoothQuantError(reader.name, "an activation maximum", "none", "observe every quantised reader")
        matrix = own_parameters(model.get_submodule(reader.name))["weight"]
        columns = {"activation": absmax[reader.name], "weight": matrix.abs().amax(dim=1 if reader.transposed else 0)}
        mapped = reader.channel_of >= 0
        for operand, values in columns.items():
            values = values.detach().to("cpu", torch.float32)[mapped]
            if bad := int((~torch.isfinite(values)).sum()):
                fix = "check the model for overflow: load it in bfloat16 or float32"
                raise SmoothQuantError(reader.name, f"finite {operand} maxima", f"{bad} that are not", fix)
            # An input that is divided by s ** power needs the power-th root.
            values = values ** (1 / reader.power[mapped])
            maxima[operand].scatter_reduce_(0, reader.channel_of[mapped], values, "amax")
    activation, weight = (_without_quiet(maxima[operand], group.foldable).double() for operand in maxima)
    return activation, weight


def _without_quiet(maxima: torch.Tensor, foldable: torch.Tensor) -> torch.Tensor:
    some = maxima[foldable & (maxima > 0)]
    return maxima.clamp(min=float(some.median()) * QUIET) if len(some) else maxima


def needs_power_of_two(model: nn.Module, group: Group, quantized: Collection[str]) -> bool:
    """Whether `group` is exact in storage only with powers of two. quantized: layers whose weights become INT8."""
    if group.kind == "input":
        return False
    source = own_parameters(model.get_submodule(group.source))
    rounded_again = [
        model.get_submodule(reader.name).get_parameter("weight")
        for reader in group.readers
        if reader.name not in quantized
    ]
    if group.kind == "linear":
        rounded_again += [p for name, p in source.items() if name != "weight" or group.source not in quantized]
    else:
        divided = [source[name] for name, rule in group.rules.items() if rule != "fixed"]
        rounded_again += divided[1:]  # the first one decides the factor
    return any(parameter.dtype.itemsize < 4 for parameter in rounded_again)


def smooth_groups(
    model: nn.Module, graph: Graph, absmax: Tensors, alphas: Mapping[str, float], quantized: Collection[str],
    *, power_of_two: bool = False,
) -> "Smoothing":  # fmt: skip
    """The folding of `graph`, with alphas: source -> alpha. A group without an alpha is not smoothed.

    quantized: layers whose weights become INT8. power_of_two: for every group, not only where storage needs it.
    """
    factors = {
        group.source: smoothing_factors(
            group, absmax, model, alphas[group.source],
            power_of_two=power_of_two or needs_power_of_two(model, group, quantized),
        )
        for group in graph.groups
        if group.source in alphas
    }  # fmt: skip
    return Smoothing(model, graph, factors, quantized)


class Smoothing:
    """A folding: which parameters are divided and multiplied by what. Building it modifies nothing; apply_ does.

    factors: source -> float32 [channels], what the source's output is divided by, the norms' rounding included.
    modules: names of all modules whose parameters change. transposed: linear layer -> whether its weight is [in, out].
    runtime: linear layer -> float32 [in], what it must divide its input by itself, because nothing before it does.
    quantized: layers whose weights become INT8.
    """

    def __init__(self, model: nn.Module, graph: Graph, factors: Tensors, quantized: Collection[str]) -> None:
        """factors: source -> s, [channels], positive and finite, 1 where the group is not foldable."""
        self.model, self.graph, self.quantized = model, graph, frozenset(quantized)
        self.factors: dict[str, torch.Tensor] = {}
        self._norms: dict[str, Tensors] = {}
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
            expected = f"[{group.channels}] positive finite factors, 1 where nothing can be folded"
            got = f"{list(s.shape)} from {s.min():.3g} to {s.max():.3g}" if s.numel() else "none"
            raise SmoothQuantError(group.source, expected, got, "compute them with smoothing_factors")
        if group.kind == "norm":
            exact = needs_power_of_two(self.model, group, self.quantized)
            module = self.model.get_submodule(group.source)
            s, self._norms[group.source] = _fold_norm(module, group.rules, s, power_of_two=exact)
        elif group.kind == "linear":
            s = self._outputs[group.source] = self._storable(group.source, s)
        else:
            self.runtime |= dict.fromkeys((reader.name for reader in group.readers), s)
        self.factors[group.source] = s
        for reader in group.readers:
            # Two sources may feed one layer, each its own columns.
            columns, others = reader.columns(s), self._inputs.get(reader.name)
            self._inputs[reader.name] = columns if others is None else others * columns

    def _storable(self, name: str, s: torch.Tensor) -> torch.Tensor:
        """`s` of the rows of linear layer `name`, but 1 where float16 would lose more than LOSS of what is divided."""
        for parameter, value in own_parameters(self.model.get_submodule(name)).items():
            if value.dtype != torch.float16 or (parameter == "weight" and name in self.quantized):
                continue
            p = value.detach().to("cpu").float()
            rows = (p.t() if parameter == "weight" and self.transposed[name] else p).reshape(len(s), -1)
            lost = ((rows / s[:, None]).half().float() * s[:, None] - rows).norm(dim=1)
            # A bias near 0 is compared with the largest one, because the row's weights hide what it loses.
            size = rows.norm(dim=1) if parameter == "weight" else rows.abs().max()
            s = torch.where((s > 1) & (lost > LOSS * size), 1.0, s)  # below 1, it can only overflow: _stored refuses
        return s

    def input_factor(self, name: str) -> torch.Tensor | None:
        """float32 [in_features]: columns of linear layer `name` are multiplied by it; its input arrives divided."""
        return self._inputs.get(name)

    def output_factor(self, name: str) -> torch.Tensor | None:
        """float32 [out_features]: rows and bias of linear layer `name` are divided by it."""
        return self._outputs.get(name)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """All parameters of module `name` itself in float32, smoothed where the folding says so. New tensors.

        They are rounded to the dtype in which the checkpoint stores them, except for weights that become INT8.
        """
        module = self.model.get_submodule(name)
        params = float_parameters(module)
        for parameter, value in self._norms.get(name, {}).items():
            params[parameter] = value.to(params[parameter].device)
        columns, rows = self._inputs.get(name), self._outputs.get(name)
        if columns is not None or rows is not None:
            transposed = self.transposed[name]
            weight = fold_weight(params["weight"].t() if transposed else params["weight"], columns, rows)
            params["weight"] = weight.t() if transposed else weight
        if rows is not None and "bias" in params:
            params["bias"] = params["bias"] / rows.to(params["bias"].device)
        if name in self.modules:
            dtypes = {parameter: p.dtype for parameter, p in own_parameters(module).items()}
            if name in self.quantized:
                dtypes["weight"] = torch.float32
            params = {
                parameter: _stored(f"{name}.{parameter}", p, dtypes[parameter]) for parameter, p in params.items()
            }
        return params

    def apply_(self) -> None:
        """Write the smoothed parameters into `model`, in its own dtype and place. Tied parameters are never touched.

        Nothing is written if any of them would overflow (SmoothQuantError).
        """
        for write in (False, True):
            for name in sorted(self.modules):
                owned = own_parameters(self.model.get_submodule(name))
                for parameter, value in self.parameters(name).items():
                    if write:
                        owned[parameter].data.copy_(value)

    def folded(self) -> "Smoothing":
        """The part of this folding that is done before the model runs."""
        return self.only({group.source for group in self.graph.groups if group.kind != "input"})

    def only(self, sources: Collection[str]) -> "Smoothing":
        """The part of this folding that belongs to `sources`."""
        factors = {source: s for source, s in self.factors.items() if source in sources}
        return Smoothing(self.model, self.graph, factors, self.quantized)

    def describe(self, group: Group) -> dict[str, Any]:
        """The manifest's entry of `group`: names, how many channels, the range of its factors."""
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


def fold_weight(weight: torch.Tensor, columns: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    """diag(1/rows) W diag(columns) of W float32 [out, in], columns [in] and rows [out]; None is all ones."""
    if columns is not None:
        weight = weight * columns.to(weight.device)
    return weight if rows is None else weight / rows.to(weight.device)[:, None]


def _stored(where: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `value` after it was stored as `dtype`. Errors (SmoothQuantError): it is not finite then."""
    if not dtype.is_floating_point:
        return value
    stored = value.to(dtype).float()
    if not torch.isfinite(stored).all():
        fix = "load the model in bfloat16 or choose a smaller --alpha"
        raise SmoothQuantError(where, f"finite values in {dtype}", "overflow after smoothing", fix)
    return stored


def _fold_norm(
    module: nn.Module, rules: Mapping[str, str], s: torch.Tensor, *, power_of_two: bool
) -> tuple[torch.Tensor, Tensors]:
    """The factors that a norm carries exactly, near `s`, and its float32 parameters that carry them.

    The first parameter that follows a rule is rounded to its stored dtype, and the factor is computed from it; the
    others (the bias) are divided by that factor. A channel keeps s = 1 if a parameter is 0 or becomes 0, if another
    parameter cannot be stored exactly, or, with power_of_two, if the factor of the stored parameter is no such power.
    """
    params = {name: p.detach().to("cpu") for name, p in own_parameters(module).items()}
    first = next(name for name in params if rules[name] != "fixed")
    p, rule = params[first].float(), rules[first]
    q = NORM_RULES[rule](p, s).to(params[first].dtype).float()
    carried = FACTOR_OF[rule](p, q)
    exact = torch.isfinite(carried) & (carried > 0) & torch.isfinite(q) & (s != 1)
    if power_of_two:
        exact &= carried.frexp().mantissa == 0.5
    for name, value in params.items():
        if name != first and value.dtype.itemsize < 4 and rules[name] != "fixed":
            divided = NORM_RULES[rules[name]](value.float(), carried)
            exact &= divided.to(value.dtype).float() == divided
    s = torch.where(exact, carried, 1.0)
    folded = {name: NORM_RULES[rules[name]](value.float(), s) for name, value in params.items()}
    folded[first] = torch.where(exact, q, p)
    return s, folded
