"""--alpha learned: gradients through the layers as served, the descent, what is taken and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from calibration.checkpoint.verify import verify
from calibration.discovery.graph import Graph, Group, Linear, Reader
from calibration.inputs.text import Samples
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import calibrate, observe_model
from calibration.report.page import report
from calibration.smoothing import differentiable, learn, simulate
from calibration.smoothing.factors import LARGEST, Smoothing, smallest_factors
from calibration.smoothing.plan import Plan, make_plan, perplexity
from calibration.smoothing.search import layer_errors
from tests.helpers import tiny_checkpoints, tiny_vision
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

SCHEMES: dict[str, dict[str, Any]] = {
    "default": {}, "static": {"activations": "static"}, "O1": {"level": "O1"}, "O2": {"level": "O2"},
    "O3": {"level": "O3"},
}  # fmt: skip


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_integers_are_those_that_are_served():
    x, weight = random(16, 128) * 5, random(64, 128)
    scale = int8.input_scale(x, "token")
    assert torch.equal(differentiable.rounded(x, scale), int8.quantize(x, scale).float() * scale)
    for strategy in ("channel", "tensor"):
        integers, scale = int8.quantize_weight(weight, strategy)
        assert torch.equal(differentiable.rounded_weight(weight, strategy), integers.float() * scale)


def test_the_gradient_is_that_of_rounding_passed_straight_through():
    """Compared with autograd's, through each part; the static scale clips a third of x."""
    weight, x, scale = random(4, 8), random(4, 8).requires_grad_(), (random(4, 1).abs() / 9 + 0.1).requires_grad_()
    found = torch.autograd.grad((differentiable.rounded(x, scale) * weight).sum(), (x, scale))
    q = x / scale
    q = q + (q.round() - q).detach()
    expected = torch.autograd.grad((q * scale * weight).sum(), (x, scale))

    static = torch.tensor(1 / int8.QMAX, requires_grad=True)
    found += torch.autograd.grad(
        (differentiable.rounded(differentiable.clipped(x, static), static) * weight).sum(), (x, static)
    )
    q = (x / static).clamp(int8.QMIN, int8.QMAX)
    assert ((q == int8.QMIN) | (q == int8.QMAX)).float().mean() > 0.2
    q = q + (q.round() - q).detach()
    expected += torch.autograd.grad((q * static * weight).sum(), (x, static))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)  # float32 sums of at most 32 in another order


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("learned")
    model = tiny_checkpoints.save("llama", folder / "model", torch.bfloat16)
    text = tiny_checkpoints.save_text(folder / "text.jsonl")
    return Options(
        model=str(model), dataset=str(text), samples=tiny_checkpoints.SAMPLES, seq_len=tiny_checkpoints.SEQ_LEN,
        quiet=True, rotation="none", alpha="learned",
    )  # fmt: skip


@pytest.fixture(scope="module")
def observation(options: Options) -> Observation:
    return observe_model(options)


@pytest.mark.parametrize("changes", SCHEMES.values(), ids=SCHEMES)
def test_every_factor_is_learned_through_the_model_as_served(
    options: Options, observation: Observation, changes: dict[str, Any]
) -> None:
    plan = make_plan(observation, replace(options, **changes))
    groups = learn.learnable(observation, plan)
    first = {group.source: plan.smoothing.factors.get(group.source, torch.ones(group.channels)) for group in groups}
    with torch.no_grad():
        for name, layer in learn.differentiable_layers(observation, plan, first).items():
            module, absmax = observation.model.get_submodule(name), observation.absmax[name]
            x = random(2, 8, module.in_features) * absmax
            # The same integers; float32 sums in another order.
            served = simulate.output(module, x, plan.layers()[name])
            torch.testing.assert_close(
                differentiable.output(module, x, layer, absmax), served, atol=1e-5 * float(served.abs().max()), rtol=0
            )

    with learn.whole_in_float32(observation.model):
        batches, _ = learn.split(observation.samples)
        found = learn._descend(observation, plan, batches, rate=1e-2, steps=1, quiet=True)
    for group in groups:
        # Dividing rows that have a scale each, or in float a reader that is not rounded, changes no integer.
        moved = (found[group.source] != first[group.source])[group.foldable].float().mean()
        # Under one scale for a tensor, only the largest values have a gradient besides that of rounding itself.
        assert moved > 0.5, group.source
        assert (found[group.source][~group.foldable] == 1).all()


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


C = 2.0 ** torch.tensor([0.0, 3, -3, 2, -2, 1, -1, 0])


def toy(model: nn.Module) -> tuple[Any, Plan]:
    """The observation of `model` without files, and the plan that divides by ones."""
    every = torch.arange(len(C))
    reader = Reader("head", every, torch.ones_like(every))
    group = Group("input of head", "input", {}, len(C), torch.ones(len(C), dtype=torch.bool), (reader,))
    graph = Graph((group,), (), (Linear("head", len(C), 32, False, 0),), (("head",),))
    ids = torch.arange(64).reshape(8, 8)
    absmax = {"head": model.embed.weight.detach().abs().amax(0)}
    observation = SimpleNamespace(
        model=model, graph=graph, absmax=absmax, samples=Samples(ids, "", "", 0), source=SimpleNamespace(name="toy")
    )
    smoothing = Smoothing(model, graph, {group.source: torch.ones(len(C))}, {"head"})
    return observation, Plan(Scheme(), {"head": Scheme()}, smoothing, {}, {"head": 1.0})


def test_learning_moves_towards_the_best_factors_and_says_by_how_much():
    observation, plan = toy(Toy(C))
    (source,) = plan.smoothing.factors

    def distance(s: torch.Tensor) -> float:
        """From c, whatever multiple of it."""
        apart = (s / C).log()
        return float((apart - apart.mean()).norm())

    _, held_out = learn.split(observation.samples)
    best = learn.with_factors(observation, plan, {source: C})
    assert learn.divergence(observation.model, held_out, best.layers()) < 1e-6  # what is left is float32's
    found = learn.learn(observation, plan, rate=0.05, steps=100)
    assert distance(found.smoothing.factors[source]) < distance(torch.ones(len(C))) / 2
    figures = found.learned
    assert figures["taken"]
    assert figures["learned_kl"] < figures["searched_kl"] / 2
    for key, layers in (("searched_kl", plan.layers()), ("learned_kl", found.layers())):
        assert figures[key] == learn.divergence(observation.model, held_out, layers)
    assert learn.learn(observation, plan, rate=0.05, steps=100).learned == figures  # the same in every run


def test_what_was_measured_of_searched_factors_is_measured_again(options: Options, observation: Observation) -> None:
    options = replace(options, level="O1", max_fallback=0.5, budget_ppl=1.0)
    plan = make_plan(observation, options)
    found = learn.learn(observation, plan, steps=40)
    assert found.learned["taken"]
    assert plan.search is not None
    assert found.search is not None
    assert found.search.errors.keys() == plan.search.errors.keys()
    assert found.search.errors != plan.search.errors
    assert found.perplexities["as served"] == perplexity(observation, found) != plan.perplexities["as served"]


def test_worse_factors_are_not_taken():
    observation, plan = toy(Toy(C))
    found = learn.learn(observation, plan, rate=10.0, steps=3)
    assert found.learned["learned_kl"] > found.learned["searched_kl"]
    assert not found.learned["taken"]
    assert found.smoothing is plan.smoothing


def test_what_is_divided_stays_in_float16():
    """Factors go down with a rate this high, but not so far that what is divided leaves float16's range."""
    observation, plan = toy(Toy(C))
    (group,) = observation.graph.groups
    observation.absmax["head"] = torch.tensor([1.0, LARGEST] * 4)
    smallest = smallest_factors(group, observation.absmax, observation.model)
    with learn._frozen(observation.model):
        batches, _ = learn.split(observation.samples)
        found = learn._descend(observation, plan, batches, rate=5.0, steps=9, quiet=True)[group.source]
    assert (found >= smallest).all()
    assert (found == smallest).any()
    assert float((observation.absmax["head"] / found).max()) <= LARGEST


class NoGradient(Toy):
    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return super().forward(input_ids, use_cache)


class Overflow(Toy):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=super().forward(input_ids, use_cache).logits * torch.nan)


class ForwardOnly(torch.autograd.Function):
    """An operator without a derivative, as a kernel made for serving is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Opaque(Toy):
    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=ForwardOnly.apply(super().forward(input_ids, use_cache).logits))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (NoGradient, "expected an output that depends on smoothing factors"),
        (Overflow, "expected a finite KL of the rounded model, got nan"),
        (Opaque, "expected a model that passes gradients"),
    ],
)
def test_a_model_that_cannot_be_learned_on_is_refused(kind: type[Toy], expected: str) -> None:
    observation, plan = toy(kind(C))
    flags = {name: p.requires_grad for name, p in observation.model.named_parameters()}
    with pytest.raises(SmoothQuantError, match=f"--alpha learned: toy: {expected}"):
        learn.learn(observation, plan)
    assert {name: p.requires_grad for name, p in observation.model.named_parameters()} == flags


def test_offloaded_weights_and_too_few_samples_are_refused(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "hf_device_map", {"embed": 0, "head": "disk"}, raising=False)
    with pytest.raises(SmoothQuantError, match="all weights on accelerators, or none, got some on disk"):
        learn.check_placement(Toy(C))
    with pytest.raises(SmoothQuantError, match="--samples: expected at least 2 with --alpha learned, got 1"):
        replace(options, samples=1)
    with pytest.raises(SmoothQuantError, match="--alpha learned: expected 8-bit weights, got 4 bits"):
        replace(options, bits=4)
    assert not replace(options, samples=1, no_smoothing=True).learned  # as every --alpha beside it


def test_errors_without_a_search_are_those_of_the_search(options: Options, observation: Observation) -> None:
    plan = make_plan(observation, options)
    assert plan.search is not None
    assert layer_errors(observation, plan.schemes, plan.smoothing.factors) == pytest.approx(
        plan.search.errors, rel=0.05
    )  # the search decides with eq. 4's factors, before norms round them to bfloat16


def test_batches_are_not_shorter_than_a_step_wants_and_some_are_held_out():
    for samples, length, size, held_out in (
        (64, 512, 1, 8),
        (64, 128, 4, 2),
        (8, 32, 1, 1),
        (64, 4096, 1, 8),
        (2, 8, 1, 1),
    ):
        ids = torch.arange(samples * length).reshape(samples, length)
        rest, kept = learn.split(Samples(ids, "", "", 0))
        assert {len(batch) for batch in (*rest, *kept)} == {size}
        assert len(kept) == held_out
        assert torch.equal(torch.cat([*rest, *kept]).sort(0).values, ids)


# Of each kind: state spaces, linear attention, routers of several kinds, positions in the scores, caps on the logits.
KINDS = ("bloom", "deepseek-v3", "falcon-h1", "gemma2-tied", "gpt-oss", "mamba2", "mixtral", "qwen3-next")


@pytest.mark.parametrize("name", KINDS)
def test_architectures_pass_gradients_and_stay_as_they_are(options: Options, tmp_path: Path, name: str) -> None:
    source = tiny_checkpoints.save(name, tmp_path / "model", torch.bfloat16)
    observation = observe_model(replace(options, model=str(source)))
    before = {key: (tensor, tensor.clone()) for key, tensor in observation.model.state_dict().items()}
    plan = make_plan(observation, options)
    assert learn.learn(observation, plan, steps=2).learned["learned_kl"] != 0
    for key, tensor in observation.model.state_dict().items():
        assert tensor.data_ptr() == before[key][0].data_ptr()
        assert torch.equal(tensor, before[key][1])


def test_images_are_learned_on(tmp_path: Path) -> None:
    source = tiny_vision.save("llava", tmp_path / "model")
    pictures = tiny_vision.save_pictures(tmp_path / "pictures")
    given = {"samples": 8, "seq_len": 32, "quiet": True, "rotation": "none", "level": "O1", "alpha": "learned"}
    observation = observe_model(Options(model=str(source), dataset=str(pictures), **given))
    rest, held_out = learn.split(observation.samples)
    assert any("pixel_values" in batch for batch in rest)
    assert any("pixel_values" in batch for batch in held_out)
    plan = make_plan(observation, Options(model=str(source), **given))
    assert learn.learn(observation, plan, steps=8).learned["taken"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "learned factors are better without (docs/learned.md)"),
        ({"activations": "static"}, None),
        ({"rotation": "always"}, None),
        ({"alpha": "auto"}, None),
    ],
    ids=str,
)
def test_what_is_learned_is_not_rotated(options: Options, changes: dict[str, Any], reason: str | None) -> None:
    found = observe_model(replace(options, **{"rotation": "auto"} | changes)).rotated
    assert (found["reason"] if "simulated_kl" not in found and not found["rotated"] else None) == reason


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3-moe"])
def test_a_checkpoint_with_learned_factors(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It has its source's function, says what was learned, and is the same when it is made again."""
    monkeypatch.setattr(learn, "STEPS", 60)
    source = tiny_checkpoints.save(name, tmp_path / "model", torch.bfloat16)
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl", documents=40)
    # One in which learning helps random models on random text.
    arguments: dict[str, Any] = {
        "dataset": str(text), "samples": 32, "seq_len": options.seq_len, "quiet": True, "rotation": "none",
        "level": "O1" if name != "qwen3-moe" else None,
    }  # fmt: skip
    manifest = calibrate(str(source), tmp_path / "out", alpha="learned", **arguments)
    assert manifest["learned"]["taken"]
    assert manifest["errors"]
    assert not verify(tmp_path / "out", str(source)).faults
    assert ", then learned" in (tmp_path / "out" / "README.md").read_text()
    report(tmp_path / "out", tmp_path / "report.html")
    assert "Learning started from these alphas" in (tmp_path / "report.html").read_text()
    again = calibrate(str(source), tmp_path / "again", alpha="learned", **arguments)
    assert again["files"] == manifest["files"]
    searched = calibrate(str(source), tmp_path / "searched", alpha="auto", **arguments)
    assert searched["alphas"] == manifest["alphas"]
    assert "learned" not in json.loads((tmp_path / "searched" / MANIFEST).read_text())


def test_nothing_is_learned_if_all_layers_fell_back(options: Options) -> None:
    options = replace(options, alpha="learned", max_fallback=1.0)
    plan = learn.planned(observe_model(options), options)
    assert not plan.schemes
    assert not plan.learned
