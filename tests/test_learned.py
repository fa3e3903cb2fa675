"""benchmarks/learned.py: it rounds as the product does, gradients reach the factors, learning finds a known best."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import learned, learning
from calibration.discovery.graph import Graph, Group, Linear, Reader
from calibration.options import Options
from calibration.pipeline import observe_model
from calibration.smoothing import simulate
from calibration.smoothing.factors import Smoothing
from calibration.smoothing.plan import Plan, make_plan
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import Scheme


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_integers_are_those_that_are_served():
    x, weight = random(16, 128) * 5, random(64, 128)
    scale = int8.input_scale(x, "token")
    assert torch.equal(learning.rounded(x, scale), int8.quantize(x, scale).float() * scale)
    integers, scale = int8.quantize_weight(weight, "channel")
    assert torch.equal(learning.rounded_weight(weight, None), integers.float() * scale)
    for size in int4.GROUP_SIZES:
        scale = int4.group_scale(weight, size)
        expected = int4.dequantize(int4.quantize(weight, scale), scale)
        assert torch.equal(learning.rounded_weight(weight, size), expected)


def test_the_gradient_is_that_of_rounding_passed_straight_through():
    """Compared with autograd's, through each part."""
    weight, x, scale = random(4, 8), random(4, 8).requires_grad_(), (random(4, 1).abs() / 9 + 0.1).requires_grad_()
    found = torch.autograd.grad((learning.rounded(x, scale) * weight).sum(), (x, scale))
    q = x / scale
    q = q + (q.round() - q).detach()
    for got, expected in zip(found, torch.autograd.grad((q * scale * weight).sum(), (x, scale)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)  # float32 sums of 8 in another order


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("learned")
    model, text = tiny_checkpoints.save("llama", folder / "model"), tiny_checkpoints.save_text(folder / "text.jsonl")
    return Options(
        model=str(model), dataset=str(text), samples=tiny_checkpoints.SAMPLES, seq_len=tiny_checkpoints.SEQ_LEN,
        quiet=True, rotation="none",
    )  # fmt: skip


@pytest.mark.parametrize("changes", learned.SCHEMES.values(), ids=learned.SCHEMES)
def test_every_factor_is_learned_and_the_model_is_the_served_one(options: Options, changes: dict[str, Any]) -> None:
    options = replace(options, **changes, alpha=0.5)
    observation = observe_model(options)
    plan, ids = make_plan(observation, options), observation.samples.input_ids
    model = observation.model.requires_grad_(False)
    exact = torch.stack(simulate.log_probabilities(model, ids, {}))
    for name, layer in learning.with_factors(observation.graph, plan, plan.smoothing.factors).items():
        module = model.get_submodule(name)
        x = random(1, 16, module.in_features)
        # The same integers; float32 sums in another order.
        served = simulate.output(module, x, plan.layers()[name])
        torch.testing.assert_close(learning.output(layer, module, (x,), x), served, atol=1e-5, rtol=1e-4)

    factors = learning.learn(model, observation.graph, plan, ids, exact, rate=1e-2, steps=1, batch=4)
    for group in learning.learnable(observation.graph, plan):
        before, after = plan.smoothing.factors[group.source], factors[group.source]
        # Dividing rows that have a scale each, or in float a reader that is not rounded, changes no integer.
        assert (after != before)[group.foldable].float().mean() > 0.5, group.source
        assert (after[~group.foldable] == 1).all()
    folded = learning.folded(observation, plan, factors)
    assert folded.keys() == plan.layers().keys()
    assert any(not torch.equal(folded[n].input_factor, plan.layers()[n].input_factor) for n in folded)


class Toy(nn.Module):
    """Tokens X = Z diag(c), logits X (V diag(1/c))^T: divided by s = c, both operands are integers, so that rounding
    loses nothing.
    """

    def __init__(self, c: torch.Tensor) -> None:
        super().__init__()
        z = torch.randint(-100, 101, (64, len(c)), generator=torch.Generator().manual_seed(1)).float()
        v = torch.randint(-100, 101, (32, len(c)), generator=torch.Generator().manual_seed(2)).float()
        z[:, 0] = v[:, 0] = int8.QMAX
        self.embed, self.head = nn.Embedding(64, len(c)), nn.Linear(len(c), 32, bias=False)
        self.embed.weight.data, self.head.weight.data = z / 100 * c, v / 100 / c

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def test_learning_moves_towards_the_best_factors():
    c = 2.0 ** torch.tensor([0.0, 3, -3, 2, -2, 1, -1, 0])
    model, every = Toy(c).requires_grad_(False), torch.arange(len(c))
    reader = Reader("head", every, torch.ones_like(every))
    group = Group("input of head", "input", {}, len(c), torch.ones(len(c), dtype=torch.bool), (reader,))
    graph = Graph((group,), (), (Linear("head", len(c), 32, False, 0),), (("head",),))
    ids, scheme = torch.arange(64).reshape(8, 8), Scheme()

    def plan(s: torch.Tensor) -> Plan:
        smoothing = Smoothing(model, graph, {group.source: s}, {"head"})
        return Plan(scheme, {"head": scheme}, smoothing, {}, {"head": 1.0})

    exact = torch.stack([model(x, use_cache=False).logits.log_softmax(-1) for x in ids])

    def kl(s: torch.Tensor) -> float:
        with learning.hooked(learning.hooks(model, plan(s).layers())):
            got = model(ids, use_cache=False).logits.log_softmax(-1)
        return float((exact.exp() * (exact - got)).sum(-1).mean())

    def distance(s: torch.Tensor) -> float:
        """From c, whatever multiple of it."""
        apart = (s / c).log()
        return float((apart - apart.mean()).norm())

    first = torch.ones(len(c))
    found = learning.learn(model, graph, plan(first), ids, exact, rate=0.05, steps=100, batch=4)[group.source]
    assert kl(c) < kl(first) / 1000  # what is left is float32's
    assert kl(found) < kl(first) / 2
    assert distance(found) < distance(first) / 2


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [(-0.2, 0.05, True), (-0.2, 0.11, False), (-0.09, 0.001, False), (0.2, 0.01, False), (-0.1, 0.05, True)],
)
def test_the_margin_is_a_share_and_a_number_of_errors(change: float, error: float, expected: bool) -> None:
    assert learned.passes(change, error) is expected


def test_the_verdict_compares_with_the_best_row_that_was_not_learned():
    def row(kl: float, **more: Any) -> dict[str, Any]:
        return {"kl": [kl, 1.02 * kl], learned.OTHER: [kl, kl], **more}

    def rows(weak: float, strong: float) -> dict[str, Any]:
        more = {"start": "alpha auto", "rate": 0.1, "seconds": 1.0, "before": 1.0}
        return {
            "no smoothing": row(0.8), "alpha auto": row(1.0),
            "a": row(weak, **more, held_out={"0.1": 0.9}), "b": row(strong, **more, held_out={"0.1": 0.7}),
        }  # fmt: skip

    name = "a Qwen3 trained here"
    figures = {"machine": "here", "models": {name: {"W8A8": rows(0.1, 0.6), "W4A8": rows(0.1, 0.76)}}}
    text = learned.page(figures)
    assert f"**It does in 1 of 2: {name} in W8A8.**" in text
    assert f"| {name} | W8A8 | b | no smoothing | -25.0% ± 0.2% | passes |" in text
    assert f"| {name} | W4A8 | b | no smoothing | -5.0% ± 0.0% | fails |" in text
