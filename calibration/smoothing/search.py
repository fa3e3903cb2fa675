"""Choose alpha for every group by what the runtime will compute.

    error(layer) = sum over tokens t of |y_t - y^_t|^2 / |y_t|, divided by the sum of |y_t|

y = x W^T without bias; y^ is the same as it will be served (simulate.py).

How. One forward pass over a few calibration samples is enough. When the first reader of a group gets its input, every
alpha of the grid is tried on that input, under the scheme of the readers, and the best is taken. Each layer then
returns its output as served, so that later layers are decided on the inputs that they will get. No activations are
stored except those of the running layer.

Why this error. It weighs a token by the size of its output. With the plain squared error, a few sink tokens, which are
thousands of times larger than the rest, decide alone. The relative error ignores sink tokens, although all others
attend to them. On SmolLM2 (per token, per channel) the three errors lead to a KL divergence from floating point of
0.0118, 0.0125 and 0.0145; alpha 0.5 leads to 0.0157.

Example (numbers invented). A norm is read by q, k and v. When q gets x, eq. 4 gives one s for each alpha of the grid.
For each s the errors of q, k and v on x are added: 0.031 at alpha 0.4, 0.027 at 0.5, 0.040 at 0.6. The group gets 0.5.

Source: eq. 4 and section 4.2 of SmoothQuant (arXiv 2211.10438) for alpha and its grid, there one for the whole model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from vllm_smoothquant.format.config import Scheme

from ..discovery.graph import Group
from ..observation.observation import Observation, input_range
from ..running.forward import Batch, forward, input_ids
from ..running.hooks import hooked
from ..running.modules import block_of, decoder_of, output_head
from ..running.precision import fast_arithmetic
from . import simulate
from .factors import needs_power_of_two, smoothing_factors
from .simulate import LayerScheme

Alpha = float | None  # None: the group is not smoothed

# 0.5 is the paper's choice; for harder models the paper takes 0.75 to 0.9.
GRID: tuple[Alpha, ...] = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Tokens on which each alpha is tried, spread evenly over all samples: a mean over tokens converges early.
ROWS = 1024
# A factor that cannot be folded costs a multiplication of every activation at run time. It must remove a quarter of the
# error to be worth that.
RUNTIME_GAIN = 0.75


@dataclass
class SearchResult:
    """alphas: source -> the best. trials: source -> sum of its readers' errors under each alpha of the grid.

    errors: layer -> error as served.
    """

    alphas: dict[str, Alpha] = field(default_factory=dict)
    trials: dict[str, dict[Alpha, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def search_alphas(
    observation: Observation, schemes: Mapping[str, Scheme], grid: Sequence[Alpha] = GRID, *, optional: bool = False,
    quiet: bool = True,
) -> SearchResult:  # fmt: skip
    """The best alpha of every group when the layers `schemes` are served by their scheme.

    grid: of several alphas that are equally good, the first is taken. optional: a group whose source is a linear layer
    may also stay as it is.
    """
    with tqdm(total=len(schemes), desc="search", unit="layer", disable=True if quiet else None) as bar:
        return _Search(observation, observation.search_batch, schemes, grid, bar, optional).run()


def layer_errors(
    observation: Observation, schemes: Mapping[str, Scheme], factors: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """The errors of SearchResult under `factors` (source -> [channels]), without a search."""
    search = _Search(observation, observation.search_batch, schemes, (None,), tqdm(disable=True), False)
    groups = observation.graph.groups
    search.factors = {group.source: factors.get(group.source, torch.ones(group.channels)) for group in groups}
    return search.run().errors


class _Search:
    def __init__(
        self, observation: Observation, batch: Batch, schemes: Mapping[str, Scheme], grid: Sequence[Alpha], bar: tqdm,
        optional: bool,
    ) -> None:  # fmt: skip
        self.batch, self.optional = batch, optional
        self.model, self.absmax, graph = observation.model, observation.absmax, observation.graph
        self.schemes, self.grid, self.bar, self.samples = schemes, grid, bar, len(input_ids(batch))
        # 0 for what fills up a sample with images.
        self.token_weights = None if isinstance(batch, torch.Tensor) else batch["attention_mask"].float()
        self.is_image = input_ids(batch) == observation.samples.image_token
        self.image_weights = observation.image_weights
        self.result = SearchResult()
        self.factors: dict[str, torch.Tensor] = {}
        self.head = output_head(self.model)
        self.transposed = {linear.name: linear.transposed for linear in graph.linears}
        # The input of each layer whose rows a group divides: under one scale per weight, that changes its own error.
        self.sources = {group.source for group in graph.groups if group.kind == "linear"}
        self.source_inputs: dict[str, torch.Tensor] = {}
        self.groups: dict[str, list[Group]] = {}
        for group in graph.groups:
            for reader in group.readers:
                self.groups.setdefault(reader.name, []).append(group)

    def run(self) -> SearchResult:
        """Choose for every group that has no factors yet, in one forward pass, and measure the error of every layer."""
        with torch.no_grad(), fast_arithmetic(self.model), hooked(self.hooks()):
            forward(decoder_of(self.model, self.schemes), self.batch)
        return self.result

    def hooks(self) -> Iterator[RemovableHandle]:
        for name in self.schemes:
            yield self.model.get_submodule(name).register_forward_hook(partial(self.replace_output, name))
        for name in self.groups.keys() - self.schemes.keys():  # a router reads all tokens, before each expert its own
            yield self.model.get_submodule(name).register_forward_pre_hook(partial(self.choose_for_readers, name))

    def choose_for_readers(self, name: str, module: nn.Module, args: Any) -> None:
        """Choose for the groups that layer `name`, in floating point, is the first to read."""
        x = simulate.by_sample(args[0].detach().float(), self.samples)
        for group in self.groups[name]:
            if group.source not in self.factors:
                self.choose(group, name, x)

    def replace_output(self, name: str, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        """Choose for the groups that layer `name` is the first to read; return the layer's output as served."""
        self.bar.update()
        x = simulate.by_sample(args[0].detach().float(), self.samples)
        for group in self.groups.get(name, ()):
            if group.source not in self.factors:
                self.choose(group, name, x)
        layer = self.layer_scheme(name)
        self.result.errors[name] = self.error(name, x, self.exact(name, x), layer)
        if name in self.sources and layer.scheme.weights.strategy == "tensor":
            self.source_inputs[name] = _rows(x)
        # The output of the head is large, and no layer reads it.
        return y if module is self.head else simulate.in_place_of(y, module, x, layer, self.samples)

    def choose(self, group: Group, first: str, x: torch.Tensor) -> None:
        """Try every alpha of the grid on the readers of `group` that read `x` as layer `first` does."""
        # A grid of one alpha compares nothing: no error shows that a division at run time is worth its cost.
        grid = self.grid if group.kind != "input" or len(self.grid) > 1 else (None,)
        if self.optional and group.kind == "linear" and None not in grid:
            grid = (None, *grid)
        pattern = next(reader for reader in group.readers if reader.name == first)
        outputs = {
            reader.name: self.exact(reader.name, x)
            for reader in group.readers
            if reader.name in self.schemes
            and torch.equal(reader.channel_of, pattern.channel_of)
            and torch.equal(reader.power, pattern.power)
        }
        trials = self.result.trials.setdefault(group.source, {})
        for alpha in grid:
            self.set_alpha(group, alpha)
            if len(grid) > 1:
                errors = sum(self.error(name, x, y, self.layer_scheme(name)) for name, y in outputs.items())
                trials[alpha] = errors + self.source_error(group)
        if trials:
            best = min(trials, key=lambda alpha: trials[alpha])
            pays = group.kind != "input" or trials[best] <= RUNTIME_GAIN * trials[None]
            self.set_alpha(group, best if pays else None)

    def set_alpha(self, group: Group, alpha: Alpha) -> None:
        self.result.alphas[group.source] = alpha
        exact = needs_power_of_two(self.model, group, self.schemes)
        self.factors[group.source] = (
            torch.ones(group.channels)
            if alpha is None
            else smoothing_factors(group, self.absmax, self.model, alpha, power_of_two=exact)
        )

    def source_error(self, group: Group) -> float:
        """The error that dividing the rows of a group's source adds to the source, if it is a layer with one scale."""
        x = self.source_inputs.get(group.source)
        if x is None:
            return 0.0
        layer = replace(self.layer_scheme(group.source), output_factor=self.factors[group.source])
        return self.error(group.source, x, self.exact(group.source, x), layer)

    def exact(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x W^T of those rows of `x` on which errors are measured."""
        plain = LayerScheme(self.schemes[name], transposed=self.transposed[name])
        return _rows(x) @ simulate.weight_matrix(self.model.get_submodule(name), plain).t()

    def layer_scheme(self, name: str) -> LayerScheme:
        """Layer `name` under the factors that are chosen so far."""
        factor: torch.Tensor | None = None
        for group in self.groups.get(name, ()):
            if group.source in self.factors:
                columns = next(r for r in group.readers if r.name == name).columns(self.factors[group.source])
                factor = columns if factor is None else factor * columns
        range_ = input_range(self.absmax[name], factor)
        return LayerScheme(self.schemes[name], factor, input_range=range_, transposed=self.transposed[name])

    def error(self, name: str, x: torch.Tensor, y: torch.Tensor, layer: LayerScheme) -> float:
        """relative_error of layer `name` on the rows of `x`; y: their exact output."""
        activations = layer.scheme.input_activations
        rows = simulate.divided_input(_rows(x), layer)
        # Only a dynamic per_tensor scale depends on the rows that are left out here.
        depends = activations.dynamic and activations.strategy == "tensor"
        scale = simulate.input_scale(simulate.divided_input(x, layer) if depends else rows, layer)
        rounded = simulate.multiply(rows, scale, self.model.get_submodule(name), layer)
        return relative_error(y, rounded, self.weights_of(name, rows))

    def weights_of(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """The weight of each token of `rows` [samples, tokens, in] in layer `name`; None: all alike, as routed ones."""
        if self.token_weights is None:
            return None
        weights = self.token_weights * (1 + (self.image_weights.get(block_of(name), 1.0) - 1) * self.is_image)
        weights = _rows(weights[..., None])[..., 0]
        return weights.to(rows.device) if weights.shape == rows.shape[:-1] else None


def relative_error(exact: torch.Tensor, rounded: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Sum over rows t of |exact_t - rounded_t|^2 / |exact_t|, over the sum of |exact_t|; rows of 0 are left out.

    weights: of the rows in both sums.
    """
    squared, size = (exact - rounded).square().sum(dim=-1), exact.norm(dim=-1)
    if weights is not None:
        squared, size = weights**2 * squared, weights * size
    some = size > 0
    return float((squared[some] / size[some]).double().sum() / size.double().sum()) if bool(some.any()) else 0.0


def _rows(x: torch.Tensor) -> torch.Tensor:
    """At most about ROWS tokens of x [samples, tokens, in] from all samples, including each sample's first token."""
    return x[:, :: max(1, x.shape[0] * x.shape[1] // ROWS)]
