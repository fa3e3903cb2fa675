"""What is decided before anything is rounded: the alpha of each group, the scheme of each layer.

    alpha is a number    eq. 4 with it for every group                         (Xiao et al., 2022: 0.5)
    alpha is "grid"      the single number with the smallest simulated loss    (the paper's own search, section 4.2)
    alpha is "auto"      for each group the one with the smallest error        (search.py)
    alpha is "learned"   first as "auto"; then learn.py moves every factor
    no smoothing         only rounding, as a baseline

With static scales, the kinds of layers for which these are too coarse keep a scale per token (fallback.py), unless a
--level asks for the paper's scheme to the letter. Layers whose error stays too large may fall back: from static to
per-token scales, from there to floating point.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError

from ..observation.observation import Observation, input_range
from ..options import Options
from ..rounding.groups import schemes_of
from ..running.products import expert_layers
from . import fallback, simulate, size
from .factors import Smoothing, smooth_groups
from .fallback import Fallback
from .search import GRID, Alpha, SearchResult, search_alphas
from .simulate import LayerScheme

AS_SERVED = "as served"  # among the perplexities of a plan: its own


@dataclass(frozen=True)
class Plan:
    """schemes: layer -> scheme of every layer that becomes integers; `scheme` is that of most of them.

    fallbacks: layer -> what it fell back to. input_ranges: layer -> |x / s| that a static input_scale maps to 127.
    search: what the search measured, if there was one. perplexities: simulated ones that decided something.
    eight_bits: layer -> why it has 8 bits where the scheme has 4. learned: how the factors were learned, if they were.
    """

    scheme: Scheme
    schemes: Mapping[str, Scheme]
    smoothing: Smoothing
    alphas: Mapping[str, Alpha]
    input_ranges: Mapping[str, float]
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    search: SearchResult | None = None
    perplexities: Mapping[str, float] = field(default_factory=dict)
    eight_bits: Mapping[str, str] = field(default_factory=dict)
    learned: Mapping[str, Any] = field(default_factory=dict)

    def layers(self) -> dict[str, LayerScheme]:
        """What each quantised layer will compute."""
        columns, rows, transposed = self.smoothing.input_factor, self.smoothing.output_factor, self.smoothing.transposed
        return {
            name: LayerScheme(scheme, columns(name), rows(name), self.input_ranges[name], transposed.get(name, False))
            for name, scheme in self.schemes.items()
        }


def make_plan(observation: Observation, options: Options) -> Plan:
    """How to serve the observed model under `options`. The same inputs give the same plan.

    Errors (SmoothQuantError): a budget that no number of fallbacks can meet.
    """
    alpha: Alpha | str = None
    if not options.no_smoothing:
        alpha = options.alpha_for(rotated=observation.rotation is not None)
    perplexities: dict[str, float] = {}
    if alpha == "grid":
        losses = {a: perplexity(observation, _plan(observation, options, (a,))) for a in GRID if a is not None}
        alpha = min(losses, key=losses.__getitem__)
        perplexities = {f"alpha {a}": value for a, value in losses.items()}
    grid = GRID if isinstance(alpha, str) else (alpha,)

    kept: tuple[Fallback, ...] = ()
    if options.static_by_design:
        decisive = None if alpha is None else alpha if isinstance(alpha, float) else 0.5
        kept = fallback.per_token_kinds(observation, _plan(observation, options, (decisive,)).layers())

    def plan(fallbacks: tuple[Fallback, ...] = ()) -> Plan:
        return replace(_plan(observation, options, grid, kept + fallbacks), perplexities=perplexities)

    first = plan()
    if not options.may_fall_back:
        return first
    if options.budget_size is not None:
        budget = size.budget(observation.model, observation.layers, options.budget_size)
        fallbacks = fallback.rank_by_size(observation, first.layers(), budget)
    else:
        most = size.part(options.max_fallback, len(observation.layers))
        fallbacks = fallback.rank_fallbacks(observation, first.layers(), most)
    if options.budget_ppl is None:
        return plan(fallbacks)
    return _fewest(observation, lambda count: plan(fallbacks[:count]), len(fallbacks), options.budget_ppl)


def perplexity(observation: Observation, plan: Plan | None = None) -> float:
    """Simulated perplexity on some of the calibration text under `plan`; without a plan, of the model as it is."""
    layers = None if plan is None else plan.layers()
    return math.exp(simulate.loss(observation.model, observation.search_ids, layers))


def _fewest(observation: Observation, plan: Callable[[int], Plan], most: int, budget: float) -> Plan:
    """The plan with the fewest fallbacks within the budget, by bisection: more fallbacks are assumed to be better."""
    original = perplexity(observation)
    plans: dict[int, Plan] = {}

    def within_budget(count: int) -> bool:
        candidate = plan(count)
        simulated = perplexity(observation, candidate)
        decisive = {"floating point": original, AS_SERVED: simulated}
        plans[count] = replace(candidate, perplexities={**candidate.perplexities, **decisive})
        return simulated <= (1 + budget) * original

    if not within_budget(most):
        change = plans[most].perplexities[AS_SERVED] / original - 1
        expected = f"at most {budget:+.2%} perplexity over floating point"
        got = f"{change:+.2%} with {len(plans[most].fallbacks)} layers that fell back"
        fix = "raise --max-fallback or --budget-size, or this budget, or use --activations token"
        raise SmoothQuantError("--budget-ppl", expected, got, fix)
    return plans[bisect_left(range(most), True, key=within_budget)]


def _plan(
    observation: Observation, options: Options, grid: tuple[Alpha, ...], fallbacks: tuple[Fallback, ...] = ()
) -> Plan:
    """The plan after `fallbacks`. The alphas of a grid are compared under the schemes that the fallbacks leave."""
    scheme = options.scheme
    target = {name: item.to for item in fallbacks for name in item.names}
    experts = expert_layers(observation.model)
    schemes, eight_bits = dict[str, Scheme](), dict[str, str]()
    integers = [name for name in observation.layers if target.get(name) != fallback.FLOAT]
    for name, (schemes[name], reason) in schemes_of(observation.model, integers, scheme).items():
        if reason is not None:
            eight_bits[name] = reason
        # No kernel for INT8 experts has another scale than one for each token.
        if name in target or (name in experts and schemes[name].weights.num_bits == 8):
            schemes[name] = fallback.finer(schemes[name])
    # Only the search chooses a division at run time.
    alphas = {group.source: None if group.kind == "input" else grid[0] for group in observation.graph.groups}
    # Dividing the rows of a layer that has one weight scale spreads them: its readers must gain more than it loses.
    linear_sources = any(group.kind == "linear" for group in observation.graph.groups)
    one_scale = scheme.weights.strategy == "tensor" and linear_sources
    result = None
    if len(grid) > 1 or fallbacks or (one_scale and grid[0] is not None):
        result = search_alphas(observation, schemes, grid, optional=one_scale, quiet=options.quiet)
        alphas |= result.alphas
    fixed = {source: alpha for source, alpha in alphas.items() if alpha is not None}
    smoothing = smooth_groups(observation.model, observation.graph, observation.absmax, fixed, schemes)
    ranges = {name: input_range(observation.absmax[name], smoothing.input_factor(name)) for name in schemes}
    return Plan(scheme, schemes, smoothing, alphas, ranges, target, result, eight_bits=eight_bits)
