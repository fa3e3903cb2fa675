"""Choose alpha for every group by what the runtime will compute.

    error(layer) = sum over tokens t of |y_t - y^_t|^2 / |y_t|, over the sum of |y_t|

y = x W^T without bias; y^ is that as it will be served (simulate.py).

One forward pass over a few calibration samples does it. When the first reader of a group gets its input, every alpha of
the grid is tried on that very input, under the scheme the readers will be served with, and the best is kept. Each layer
then hands on what it will give as served, so that later layers choose on what they will really see; no activations but
the running layer's are held.

The error weighs a token by the size of its output. By plain squared error a few sink tokens, thousands of times larger
than the rest, decide alone; by relative error they, whom all other tokens attend to, count for nothing. On SmolLM2 (per
token, per channel) the three give a KL divergence from floating point of 0.0118, 0.0125 and 0.0145; alpha 0.5 0.0157.

Source: eq. 4 and section 4.2 of SmoothQuant (arXiv 2211.10438) for alpha and its grid, there one for the whole model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm import tqdm

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import Scheme

from ..discovery.graph import Graph, Group
from ..running.modules import decoder_of
from ..running.precision import fast_arithmetic
from . import simulate
from .factors import smoothing_factors
from .simulate import LayerScheme

Alpha = float | None  # None: the group is not smoothed

# 0.5 is the paper's choice, 0.75 to 0.9 what it takes for harder models.
GRID: tuple[Alpha, ...] = (None, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Tokens each alpha is tried on, spread evenly over all samples: a mean over tokens settles early.
ROWS = 1024
# Where static scales can end: at the observed absmax, at this percentile of |x / s|, or at the best of these shares of
# the absmax by the error above.
RANGES = ("absmax", "percentile", "error")
PERCENTILE = 0.9999
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# What cannot be folded costs a multiplication of every activation at run time: it must remove a quarter of the error.
RUNTIME_GAIN = 0.75


@dataclass
class SearchResult:
    """alphas: source -> the best. trials: source -> error of its readers, summed, under each alpha of the grid.

    errors: layer -> error as served.
    clips: static layer -> share of the observed absmax that its scale maps to 127; what is beyond is cut off.
    """

    alphas: dict[str, Alpha] = field(default_factory=dict)
    trials: dict[str, dict[Alpha, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)


def search(
    model: nn.Module,
    graph: Graph,
    absmax: Mapping[str, torch.Tensor],
    schemes: Mapping[str, Scheme],
    input_ids: torch.Tensor,
    *,
    grid: Sequence[Alpha] = GRID,
    static_range: str = "absmax",
    quiet: bool = False,
) -> SearchResult:
    """The best alpha of every group of `graph` when the layers `schemes` are served by their scheme.

    absmax: layer -> float32 [in], as for eq. 4. input_ids: int64 [samples, tokens], run as one batch. grid: of several
    that are equally good the first is taken. static_range: one of RANGES.
    """
    state = _Search(model, graph, absmax, schemes, grid, static_range, len(input_ids))
    runs = decoder_of(model, schemes)
    bar = tqdm(total=len(schemes), desc="search", unit="layer", disable=True if quiet else None)
    with torch.no_grad(), fast_arithmetic(model), state.hooks(bar):
        runs(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    bar.close()
    return state.found


class _Search:
    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        absmax: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        grid: Sequence[Alpha],
        static_range: str,
        samples: int,
    ) -> None:
        self.model, self.absmax, self.schemes = model, absmax, schemes
        self.grid, self.static_range, self.samples = grid, static_range, samples
        self.together = {name: [n for n in reading if n in schemes] for reading in graph.inputs for name in reading}
        self.found = SearchResult()
        self.factors: dict[str, torch.Tensor] = {}
        self.head = getattr(model, "get_output_embeddings", lambda: None)()
        self.transposed = {linear.name: linear.transposed for linear in graph.linears}
        # Layers whose rows a group divides, and what they read: under one scale for the whole weight that changes them.
        self.sources = {group.source for group in graph.groups if group.kind == "linear"}
        self.divided: dict[str, torch.Tensor] = {}
        self.groups: dict[str, list[Group]] = {}
        for group in graph.groups:
            for reader in group.readers:
                self.groups.setdefault(reader.name, []).append(group)

    @contextmanager
    def hooks(self, bar: tqdm) -> Iterator[None]:
        def hook(name: str) -> Callable:
            def after(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
                bar.update()
                served = self.serve(name, module, simulate.by_sample(args[0].detach().float(), self.samples))
                return y if served is None else served.reshape(y.shape).to(y.dtype)

            return after

        handles = [self.model.get_submodule(name).register_forward_hook(hook(name)) for name in self.schemes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def serve(self, name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Choose for the groups that layer `name` is first to read; what the layer then gives as served for x.

        None from the output head, whose output is large and which no layer reads.
        """
        for group in self.groups.get(name, ()):
            if group.source not in self.factors:
                self.choose(group, name, x)
        if not self.schemes[name].input_activations.dynamic and name not in self.found.clips:
            self.clip(self.together[name], x)
        served = self.served(name)
        self.found.errors[name] = self.error(name, x, self.exact(name, x), served)
        if name in self.sources and served.scheme.weights.strategy == "tensor":
            self.divided[name] = _rows(x)
        if module is self.head:
            return None
        return simulate.output(module, x, served)

    def choose(self, group: Group, first: str, x: torch.Tensor) -> None:
        """Try every alpha of the grid on the readers of `group` that read `x` as layer `first` does."""
        grid = self.grid if group.kind != "input" or len(self.grid) > 1 else (None,)  # never unless it is seen to pay
        pattern = next(r for r in group.readers if r.name == first)
        names = [
            r.name
            for r in group.readers
            if r.name in self.schemes
            and torch.equal(r.channel_of, pattern.channel_of)
            and torch.equal(r.power, pattern.power)
        ]
        y = {n: self.exact(n, x) for n in names}
        trials = self.found.trials.setdefault(group.source, {})
        for alpha in grid:
            self.keep(group, alpha)
            if len(grid) > 1:
                trials[alpha] = sum(self.error(n, x, y[n], self.served(n)) for n in names) + self.source_error(group)
        if trials:
            best = min(trials, key=lambda alpha: trials[alpha])
            pays = group.kind != "input" or trials[best] <= RUNTIME_GAIN * trials[None]
            self.keep(group, best if pays else None)

    def source_error(self, group: Group) -> float:
        """What dividing the rows of a group's source does to the source itself, if that is a layer with one scale."""
        x = self.divided.get(group.source)
        if x is None:
            return 0.0
        served = replace(self.served(group.source), output_factor=self.factors[group.source])
        return self.error(group.source, x, self.exact(group.source, x), served)

    def clip(self, names: list[str], x: torch.Tensor) -> None:
        """Where the one static scale of layers `names`, which all read `x`, ends."""
        self.found.clips |= dict.fromkeys(names, 1.0)
        if self.static_range == "percentile":
            for name in names:
                served = self.served(name)
                values = simulate.divided_input(_rows(x), served).abs().flatten()
                beyond = max(1, round(len(values) * (1 - PERCENTILE)))
                assert served.input_range
                self.found.clips[name] = min(1.0, float(values.topk(beyond).values[-1]) / served.input_range)
        elif self.static_range == "error":
            y = {name: self.exact(name, x) for name in names}
            errors = {}
            for share in CLIPS:
                self.found.clips |= dict.fromkeys(names, share)
                errors[share] = sum(self.error(name, x, y[name], self.served(name)) for name in names)
            self.found.clips |= dict.fromkeys(names, min(errors, key=lambda share: errors[share]))

    def exact(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x W^T of those rows of `x` that errors are measured on."""
        plain = LayerScheme(self.schemes[name], transposed=self.transposed[name])
        return _rows(x) @ simulate.weight_matrix(self.model.get_submodule(name), plain).t()

    def keep(self, group: Group, alpha: Alpha) -> None:
        self.found.alphas[group.source] = alpha
        self.factors[group.source] = (
            torch.ones(group.channels) if alpha is None else smoothing_factors(group, self.absmax, self.model, alpha)
        )

    def served(self, name: str) -> LayerScheme:
        """Layer `name` under the factors that are chosen so far."""
        factor: torch.Tensor | None = None
        for group in self.groups.get(name, ()):
            if group.source in self.factors:
                reader = next(r for r in group.readers if r.name == name)
                mapped = reader.channel_of >= 0
                s = self.factors[group.source][reader.channel_of.clamp(min=0)] ** reader.power
                s = torch.where(mapped, s, 1.0)
                factor = s if factor is None else factor * s
        absmax = self.absmax[name].cpu()
        return LayerScheme(
            self.schemes[name],
            input_factor=factor,
            input_range=float((absmax if factor is None else absmax / factor).max()) * self.found.clips.get(name, 1.0),
            transposed=self.transposed[name],
        )

    def error(self, name: str, x: torch.Tensor, y: torch.Tensor, served: LayerScheme) -> float:
        """relative_error of layer `name` on the rows of `x`; y: what they give exactly."""
        activations = served.scheme.input_activations
        rows = simulate.divided_input(_rows(x), served)
        # Only a dynamic per_tensor scale depends on the rows that are left out here.
        coupled = activations.dynamic and activations.strategy == "tensor"
        scale = simulate.input_scale(simulate.divided_input(x, served) if coupled else rows, served)
        module = self.model.get_submodule(name)
        weight, weight_scale = int8.quantize_weight(
            simulate.weight_matrix(module, served), served.scheme.weights.strategy
        )
        return relative_error(y, simulate.multiply(rows, scale, weight, weight_scale, served))


def relative_error(y: torch.Tensor, other: torch.Tensor) -> float:
    """Sum over rows t of |y_t - other_t|^2 / |y_t|, over the sum of |y_t|; rows that are 0 are left out."""
    wrong, size = (y - other).square().sum(dim=-1), y.norm(dim=-1)
    some = size > 0
    return float((wrong[some] / size[some]).double().sum() / size.double().sum()) if bool(some.any()) else 0.0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """At most about ROWS tokens of x [samples, tokens, in], from all samples, each one's first token among them."""
    return x[:, :: max(1, x.shape[0] * x.shape[1] // ROWS)]
