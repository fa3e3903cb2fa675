"""What is decided before anything is rounded: the alpha of each group, the scheme of each layer.

    alpha is a number    eq. 4 with it for every group                         (Xiao et al., 2022: 0.5)
    alpha is "grid"      the single number with the smallest simulated loss    (the paper's own search, section 4.2)
    alpha is "auto"      for each group the one with the smallest error        (search.py)
    no smoothing         only rounding, as a baseline

Layers whose error stays too large may fall back: from static to per-token scales, from there to floating point.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError

from ..observation.observation import Observation, input_range
from ..options import Options
from . import fallback, simulate
from .factors import Smoothing, smooth_groups
from .fallback import Fallback
from .search import GRID, Alpha, SearchResult, search
from .simulate import LayerScheme


@dataclass(frozen=True)
class Plan:
    """schemes: layer -> scheme of every layer that becomes INT8; `scheme` is that of most of them.

    fallbacks: layer -> what it fell back to. input_ranges: layer -> |x / s| that a static input_scale maps to 127.
    search: what the search measured, if there was one. perplexities: simulated ones that decided something.
    """

    scheme: Scheme
    schemes: Mapping[str, Scheme]
    smoothing: Smoothing
    alphas: Mapping[str, Alpha]
    input_ranges: Mapping[str, float]
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    search: SearchResult | None = None
    perplexities: dict[str, float] = field(default_factory=dict)

    def layers(self) -> dict[str, LayerScheme]:
        """What each quantised layer will compute."""
        return simulate.layer_schemes(self.schemes, self.smoothing, self.input_ranges)


def make_plan(observation: Observation, options: Options) -> Plan:
    """How to serve the observed model as `options` ask. The same inputs give the same plan.

    Errors (SmoothQuantError): a budget that no number of fallbacks can meet.
    """
    alpha: Alpha | str = None if options.no_smoothing else options.alpha
    perplexities: dict[str, float] = {}
    if alpha == "grid":
        alpha, perplexities = best_single_alpha(observation, options.scheme)
    grid = GRID if isinstance(alpha, str) else (alpha,)

    def plan(fallbacks: tuple[Fallback, ...]) -> Plan:
        return _plan(observation, options.scheme, grid, fallbacks, perplexities, quiet=options.quiet)

    first = plan(())
    if not options.max_fallback:
        return first
    most = int(options.max_fallback * len(observation.layers))
    fallbacks = fallback.rank_fallbacks(observation, first.layers(), most)
    if options.budget_ppl is None:
        return plan(fallbacks)
    return _fewest(observation, lambda count: plan(fallbacks[:count]), len(fallbacks), options.budget_ppl)


def best_single_alpha(observation: Observation, scheme: Scheme) -> tuple[float, dict[str, float]]:
    """(the number in GRID with the smallest simulated perplexity as the alpha of every group, all perplexities)."""
    perplexities = {
        alpha: perplexity(observation, _plan(observation, scheme, (alpha,))) for alpha in GRID if alpha is not None
    }
    best = min(perplexities, key=perplexities.__getitem__)
    return best, {f"alpha {alpha}": value for alpha, value in perplexities.items()}


def perplexity(observation: Observation, plan: Plan | None = None) -> float:
    """Simulated perplexity on some of the calibration text under `plan`; without a plan, of the model as it is."""
    layers = None if plan is None else plan.layers()
    return math.exp(simulate.loss(observation.model, observation.search_ids, layers))


def _fewest(observation: Observation, plan: Callable[[int], Plan], most: int, budget: float) -> Plan:
    """The plan with the fewest fallbacks within the budget, by bisection: more fallbacks are assumed to be better."""
    original = perplexity(observation)
    plans: dict[int, Plan] = {}

    def within_budget(count: int) -> bool:
        plans[count] = plan(count)
        simulated = perplexity(observation, plans[count])
        plans[count].perplexities.update({"floating point": original, "as served": simulated})
        return simulated <= (1 + budget) * original

    if not within_budget(most):
        change = plans[most].perplexities["as served"] / original - 1
        raise SmoothQuantError(
            "--budget-ppl", f"at most {budget:+.2%} perplexity over floating point",
            f"{change:+.2%} with {len(plans[most].fallbacks)} layers fallen back",
            "raise --max-fallback, or the budget, or use --activations token",
        )  # fmt: skip
    low, high = 0, most  # high is within the budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within_budget(middle) else (middle + 1, high)
    return plans[high]


def _plan(
    observation: Observation, scheme: Scheme, grid: tuple[Alpha, ...], fallbacks: tuple[Fallback, ...] = (),
    perplexities: Mapping[str, float] | None = None, *, quiet: bool = True,
) -> Plan:  # fmt: skip
    """The plan after `fallbacks`. The alphas of a grid are compared under the schemes that the fallbacks leave."""
    fallen = {name: item.to for item in fallbacks for name in item.names}
    per_token = Scheme(scheme.weights, fallback.PER_TOKEN)
    schemes = {
        name: per_token if fallen.get(name) == fallback.TOKEN else scheme
        for name in observation.layers
        if fallen.get(name) != fallback.FLOAT
    }
    result = search(observation, schemes, grid, quiet=quiet) if len(grid) > 1 or fallbacks else None
    # Division at run time is chosen by the search alone.
    alphas = {group.source: None if group.kind == "input" else grid[0] for group in observation.graph.groups}
    alphas |= {} if result is None else result.alphas
    smoothing = smooth_groups(
        observation.model, observation.graph, observation.absmax, {g: a for g, a in alphas.items() if a is not None}
    )
    ranges = {name: input_range(observation.absmax[name], smoothing.input_factor(name)) for name in schemes}
    return Plan(scheme, schemes, smoothing, alphas, ranges, fallen, result, dict(perplexities or {}))
