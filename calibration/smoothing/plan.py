"""What is decided before anything is rounded: the alpha of each group, the scheme of each layer.

    alpha a number   eq. 4 with it, everywhere                          (Xiao et al., 2022: 0.5)
    alpha "grid"     one number for all, of smallest simulated loss     (the paper's own search, section 4.2)
    alpha "auto"     each group its own, of smallest error as served    (search.py)
    alpha None       no smoothing

Layers whose error stays too large may fall back: from static to a scale for each token, from there to floating point.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.graph import Graph
from . import fallback, search, simulate
from .factors import Smoothing, smooth_groups
from .fallback import Fallback
from .search import GRID, Alpha, SearchResult
from .simulate import LayerScheme

# Tokens that searches and simulations run on: enough for a mean over tokens, little beside calibration itself.
TOKENS = 4096


@dataclass(frozen=True)
class Watched:
    """A model after calibration watched it: everything that plans are made from.

    names: the layers that become INT8. absmax: layer -> float32 [in], of them and of every reader of a group.
    input_ids: int64 [samples, tokens], those it was watched on.
    """

    model: nn.Module
    graph: Graph
    names: list[str]
    absmax: Mapping[str, torch.Tensor]
    input_ids: torch.Tensor

    @property
    def some_ids(self) -> torch.Tensor:
        """About TOKENS tokens of the samples."""
        return self.input_ids[: max(1, TOKENS // self.input_ids.shape[1])]


@dataclass(frozen=True)
class Choice:
    """What the user asks for. alpha: a number in [0, 1], "grid", "auto" or None.

    max_fallback: the share of linear layers that may fall back, 0 to 1. budget_ppl: no more of them do than it takes to
    keep the simulated perplexity within this share of the model's own (0.015 is 1.5 %); None: all that gain by it.
    static_range: where static scales end, one of search.RANGES.
    """

    alpha: float | str | None = 0.5
    max_fallback: float = 0.0
    budget_ppl: float | None = None
    static_range: str = "absmax"

    def check(self) -> None:
        """SmoothQuantError where a value is out of range."""
        number = isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1
        if not (number or self.alpha in ("auto", "grid", None)):
            raise SmoothQuantError(
                "--alpha", expected="a number in [0, 1], auto or grid", got=str(self.alpha), do="0.5 is the paper's"
            )
        if self.static_range not in search.RANGES:
            raise SmoothQuantError(
                "--static-range", expected=" or ".join(search.RANGES), got=repr(self.static_range), do="choose one"
            )
        if not 0 <= self.max_fallback <= 1:
            raise SmoothQuantError(
                "--max-fallback", expected="a share from 0 to 100 %", got=f"{self.max_fallback:.4g}", do="try 10%"
            )
        if self.budget_ppl is not None and not 0 < self.budget_ppl < math.inf:
            raise SmoothQuantError(
                "--budget-ppl", expected="a share above 0 %", got=f"{self.budget_ppl:.4g}", do="try 1.5%"
            )
        if self.budget_ppl is not None and not self.max_fallback:
            raise SmoothQuantError(
                "--budget-ppl", expected="layers that may fall back to meet it", got="none",
                do="say how many may: --max-fallback 10%",
            )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """schemes: layer -> what it does, for every layer that becomes INT8; `scheme` is what most of them do.

    fallen: layer -> what it fell back to. input_ranges: layer -> |x / s| that a static input_scale maps to 127.
    found: what the search measured, if there was one. perplexities: simulated ones that decided something.
    """

    scheme: Scheme
    schemes: Mapping[str, Scheme]
    smoothing: Smoothing
    alphas: Mapping[str, Alpha]
    input_ranges: Mapping[str, float]
    fallen: Mapping[str, str] = field(default_factory=dict)
    found: SearchResult | None = None
    perplexities: dict[str, float] = field(default_factory=dict)

    def layers(self) -> dict[str, LayerScheme]:
        """What each quantised layer will compute."""
        return simulate.layer_schemes(self.schemes, self.smoothing, self.input_ranges)


def make_plan(watched: Watched, scheme: Scheme, choice: Choice, *, quiet: bool = False) -> Plan:
    """How to serve `watched` by `scheme` as `choice` asks. The same inputs give the same plan.

    Errors (SmoothQuantError): a choice out of range; a budget that falling back cannot meet.
    """
    choice.check()
    alpha, perplexities = choice.alpha, dict[str, float]()
    if alpha == "grid":
        alpha, perplexities = best_for_all(watched, scheme, choice.static_range)
    grid = GRID if isinstance(alpha, str) else (alpha,)
    schemes = dict.fromkeys(watched.names, scheme)
    if not choice.max_fallback:
        return _plan(
            watched, scheme, schemes, grid, static_range=choice.static_range, perplexities=perplexities, quiet=quiet
        )

    before = _plan(watched, scheme, schemes, grid, static_range=choice.static_range, quiet=quiet)
    moves = fallback.rank_fallbacks(
        watched.model, watched.graph, before.layers(), watched.input_ids, int(choice.max_fallback * len(schemes))
    )

    def after(count: int) -> Plan:
        return _plan(
            watched, scheme, schemes, grid, moves[:count], static_range=choice.static_range, perplexities=perplexities,
            quiet=quiet,
        )  # fmt: skip

    return after(len(moves)) if choice.budget_ppl is None else _fewest(watched, after, len(moves), choice.budget_ppl)


def best_for_all(watched: Watched, scheme: Scheme, static_range: str) -> tuple[float, dict[str, float]]:
    """The number in GRID that gives the smallest simulated perplexity as the alpha of every group; all perplexities."""
    perplexities = {}
    for alpha in (a for a in GRID if a is not None):
        plan = _plan(watched, scheme, dict.fromkeys(watched.names, scheme), (alpha,), static_range=static_range)
        perplexities[f"alpha {alpha}"] = perplexity(watched, plan)
    best = min(perplexities, key=lambda name: perplexities[name])
    return float(best.removeprefix("alpha ")), perplexities


def perplexity(watched: Watched, plan: Plan | None = None) -> float:
    """Of the model on some of the calibration text, as `plan` will have it served; without one, as it is."""
    return math.exp(simulate.loss(watched.model, watched.some_ids, None if plan is None else plan.layers()))


def _fewest(watched: Watched, after: Callable[[int], Plan], most: int, budget: float) -> Plan:
    """The plan with the fewest moves that keeps the budget, by bisection: more moves are taken to be better."""
    own = perplexity(watched)
    tried: dict[int, Plan] = {}

    def keeps(count: int) -> bool:
        tried[count] = after(count)
        tried[count].perplexities["floating point"] = own
        tried[count].perplexities["as served"] = perplexity(watched, tried[count])
        return tried[count].perplexities["as served"] <= (1 + budget) * own

    if not keeps(most):
        reached = tried[most].perplexities["as served"] / own - 1
        raise SmoothQuantError(
            "--budget-ppl", expected=f"at most {budget:+.2%} perplexity over floating point",
            got=f"{reached:+.2%} with {len(tried[most].fallen)} layers fallen back",
            do="raise --max-fallback, or the budget, or use --activations token",
        )  # fmt: skip
    low, high = 0, most  # high keeps it
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return tried[high]


def _plan(
    watched: Watched, scheme: Scheme, schemes: Mapping[str, Scheme], grid: tuple[Alpha, ...],
    moves: tuple[Fallback, ...] = (), *, static_range: str, perplexities: Mapping[str, float] | None = None,
    quiet: bool = True,
) -> Plan:  # fmt: skip
    """The plan after `moves`; with several alphas to choose from, chosen under what they make of the layers."""
    fallen = {name: move.to for move in moves for name in move.names}
    changed = {name: Scheme(scheme.weights, fallback.PER_TOKEN) for name, to in fallen.items() if to == fallback.TOKEN}
    schemes = {name: changed.get(name, s) for name, s in schemes.items() if fallen.get(name) != fallback.FLOAT}
    clips = static_range != "absmax" and any(not s.input_activations.dynamic for s in schemes.values())
    found = _search(watched, schemes, grid, static_range, quiet=quiet) if len(grid) > 1 or moves or clips else None
    groups = watched.graph.groups
    fixed = {group.source: None if group.kind == "input" else grid[0] for group in groups}
    alphas = fixed if found is None else fixed | found.alphas
    smoothing = smooth_groups(
        watched.model, watched.graph, watched.absmax, {source: a for source, a in alphas.items() if a is not None}
    )
    ranges = {}
    for name in schemes:
        factor = smoothing.input_factor(name)
        absmax = watched.absmax[name].cpu()
        clip = 1.0 if found is None else found.clips.get(name, 1.0)
        ranges[name] = float((absmax if factor is None else absmax / factor).max()) * clip
    return Plan(scheme, schemes, smoothing, alphas, ranges, fallen, found, dict(perplexities or {}))


def _search(
    watched: Watched, schemes: Mapping[str, Scheme], grid: tuple[Alpha, ...], static_range: str, *, quiet: bool
) -> SearchResult:
    return search.search(
        watched.model, watched.graph, watched.absmax, schemes, watched.some_ids, grid=grid, static_range=static_range,
        quiet=quiet,
    )  # fmt: skip
