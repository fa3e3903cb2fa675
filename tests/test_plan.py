"""The plan: the simulation against the reference, the search against its grid, fallbacks, the budget."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.checkpoint.write import write_checkpoint
from calibration.discovery.discover import discover
from calibration.inputs.model import Source
from calibration.inputs.text import Samples
from calibration.observation.absmax import observe_absmax
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import calibrate, check_gate, observe_model
from calibration.smoothing import fallback, search, simulate
from calibration.smoothing.plan import make_plan, perplexity
from calibration.smoothing.simulate import LayerScheme
from tests.helpers import tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError

SCHEMES = list(product(("channel", "tensor"), ("token", "tensor", "static")))


def observe(name: str, spike: float = 0.0) -> Observation:
    """The observation of a tiny model. spike: factor by which one channel of each down_proj's input is larger."""
    model = tiny_architectures.build(name)
    if spike:
        for block in model.model.layers:
            block.mlp.up_proj.weight.data[3] *= spike
            block.mlp.down_proj.weight.data[:, 3] /= spike
    ids = tiny_architectures.tokens(1)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    graph = discover(model, ids, keep={head})
    names = [linear.name for linear in graph.linears if linear.name != head]
    source, samples = Source("", model, None, {}, ""), Samples(ids, "", "", 0)
    return Observation(source, samples, graph.with_inputs(names), names, observe_absmax(model, names, ids))


def options(
    weights: str, activations: str, alpha: float | str | None = 0.5, max_fallback: float = 0.0,
    budget_ppl: float | None = None,
) -> Options:  # fmt: skip
    """alpha None: no smoothing. Static scales are those of the paper's level, in every layer."""
    level = "O3" if activations == "static" else None
    return Options(
        weights=weights, activations=activations, level=level, alpha=0.5 if alpha is None else alpha,
        no_smoothing=alpha is None, max_fallback=max_fallback, budget_ppl=budget_ppl, quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """name -> observation of a tiny model that was loaded from files."""
    root = tmp_path_factory.mktemp("models")
    text = tiny_checkpoints.save_text(root / "text.jsonl")

    def get(name):
        folder = root / name
        return observe_model(
            Options(
                model=str(folder if folder.exists() else tiny_checkpoints.save(name, folder)), dataset=str(text),
                samples=tiny_checkpoints.SAMPLES, seq_len=tiny_checkpoints.SEQ_LEN, quiet=True,
            )
        )  # fmt: skip

    return get


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("scheme", SCHEMES, ids="-".join)
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "opt"])
def test_the_simulation_computes_what_the_checkpoint_does(name, scheme, observed, tmp_path):
    """The models have divided v and up, multiplied readers, Conv1D and run-time factors; the logits are compared."""
    observation = observed(name)
    model = observation.model
    plan = make_plan(observation, options(*scheme, "auto", 0.25))
    write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), Options(output=str(tmp_path / "out")))
    # One sample, because the reference takes a dynamic scale per tensor over the whole batch.
    ids = tiny_architectures.tokens(2)[:1]
    exact = logits(model, ids)
    layers = plan.layers()
    with simulate.as_served(model, layers):
        simulated = logits(model, ids)
    reference = logits(load_reference(tmp_path / "out"), ids)
    # Both round numbers that are equal up to float32's last places. Where a number is near a tie, the integers differ
    # by one, and later layers by a part of the rounding error. Independent roundings would differ by sqrt(2) of it.
    assert (simulated - reference).norm() < 0.5 * (reference - exact).norm()


def test_tokens_that_a_model_flattens_are_scaled_by_their_sample(monkeypatch):
    """OPT flattens tokens before fc1: a scale per tensor (O2) is one for each sample, also for flattened tokens."""
    linear, layer = torch.nn.Linear(16, 8), simulate.LayerScheme(options("tensor", "tensor").scheme)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100])[:, None, None]
    flat = x.flatten(0, 1)
    with torch.no_grad():
        simulated = simulate.in_place_of(linear(flat), linear, flat, layer, 3)
        one_by_one = [simulate.output(linear, sample[None], layer)[0] for sample in x]
    assert torch.equal(simulated, torch.cat(one_by_one))

    monkeypatch.setattr(search, "ROWS", 8)  # fewer rows than the sample has
    observation = observe("opt")
    plan = make_plan(observation, options("tensor", "tensor", "auto", 0.25))
    assert plan.fallbacks.keys() | plan.search.errors.keys() == set(observation.layers)


def test_the_loss_equals_that_of_transformers():
    observation = observe("llama")
    with torch.no_grad():
        output = observation.model(input_ids=observation.samples.input_ids, labels=observation.samples.input_ids)
    loss = simulate.loss(observation.model, observation.samples.input_ids)
    assert loss == pytest.approx(float(output.loss), rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids="-".join)
def test_the_best_alpha_of_the_grid_is_taken(scheme):
    observation = observe("llama")
    plan = make_plan(observation, options(*scheme, "auto"))
    assert len(plan.search.trials) == len(observation.graph.groups)
    for source, trials in plan.search.trials.items():
        assert set(trials) == set(search.GRID)
        assert trials[plan.alphas[source]] == min(trials.values()) <= trials[0.5]


def test_groups_differ_in_their_best_alpha():
    plan = make_plan(observe("llama"), options("channel", "token", "auto"))
    assert len(set(plan.alphas.values())) > 1


@settings(max_examples=10, deadline=None)
@given(
    spike=st.floats(1, 300), scheme=st.sampled_from(SCHEMES), grid=st.sets(st.sampled_from(search.GRID[1:]), min_size=1)
)
def test_a_larger_grid_never_chooses_worse(spike, scheme, grid):
    """Shown on the first group, because its input does not depend on other choices."""
    observation = observe("llama", spike)
    errors = {}
    for candidates in ((0.5,), (None, 0.5, *sorted(grid))):
        schemes = dict.fromkeys(observation.layers, options(*scheme).scheme)
        result = search.search_alphas(observation, schemes, candidates)
        first = observation.graph.groups[0]
        errors[len(candidates) > 1] = sum(result.errors[r.name] for r in first.readers)
    assert errors[True] <= errors[False] * (1 + 1e-6)


def test_the_same_inputs_give_the_same_plan():
    first, second = (make_plan(observe("llama"), options("tensor", "static", "auto", 0.3)) for _ in range(2))
    assert (first.alphas, first.fallbacks, first.search) == (second.alphas, second.fallbacks, second.search)


def test_grid_takes_the_alpha_with_the_smallest_perplexity():
    observation = observe("llama")
    plan = make_plan(observation, options("channel", "static", "grid"))
    (alpha,) = {a for source, a in plan.alphas.items() if not source.startswith("input of")}
    assert plan.perplexities[f"alpha {alpha}"] == min(plan.perplexities.values())
    assert perplexity(observation, plan) == pytest.approx(plan.perplexities[f"alpha {alpha}"])


# --- fallbacks ---


def test_static_layers_with_an_outlier_fall_back_to_a_scale_per_token():
    observation = observe("llama", spike=1000)
    plan = make_plan(observation, options("channel", "static", None, 2 / 14))
    assert dict(plan.fallbacks) == {f"model.layers.{i}.mlp.down_proj": fallback.TOKEN for i in (0, 1)}
    static = make_plan(observation, options("channel", "static", None))
    original = perplexity(observation)
    assert abs(perplexity(observation, plan) - original) < abs(perplexity(observation, static) - original)


def test_static_by_design_keeps_the_kinds_per_token_that_static_scales_cannot_serve():
    """No option asks for it; a kind is found by what it does to the error, not by its name."""
    observation = observe("llama", spike=1000)
    design = Options(activations="static", alpha=0.5, quiet=True)
    plan = make_plan(observation, design)
    assert dict(plan.fallbacks) == {f"model.layers.{i}.mlp.down_proj": fallback.TOKEN for i in (0, 1)}
    errors = fallback.block_errors(
        observation.model, observation.graph, make_plan(observation, options("channel", "static")).layers(),
        observation.samples.input_ids[: fallback.SAMPLES],
    )  # fmt: skip
    down = [errors[f"model.layers.{i}.mlp.down_proj",] for i in (0, 1)]
    assert sum(static - token for static, token in down) > sum(token for _, token in errors.values())
    assert not make_plan(observe("llama"), design).fallbacks
    assert not make_plan(observation, replace(design, level="O3", weights="channel")).fallbacks


def test_a_layer_that_adds_little_to_its_block_does_not_fall_back():
    observation = observe("llama", spike=1000)
    observation.model.model.layers[0].mlp.down_proj.weight.data *= 1e-4
    plan = make_plan(observation, options("channel", "static", None, 1 / 14))
    assert set(plan.fallbacks) == {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_fallbacks_are_limited_and_readers_of_one_tensor_fall_back_together(share):
    observation = observe("llama", spike=100)
    plan = make_plan(observation, options("channel", "static", 0.5, share))
    assert len(plan.fallbacks) <= share * len(observation.layers)
    for layers in observation.graph.shared_input_groups:
        assert len({plan.fallbacks.get(name) for name in layers}) == 1


def test_dynamic_layers_fall_back_to_floating_point():
    observation = observe("llama")
    plan = make_plan(observation, options("tensor", "token", 0.5, 0.2))
    assert set(plan.fallbacks.values()) == {fallback.FLOAT}
    assert set(plan.schemes) == set(observation.layers) - set(plan.fallbacks)


def test_the_budget_takes_the_fewest_fallbacks_that_meet_it():
    observation = observe("llama", spike=1000)
    scheme = ("channel", "static")
    most = make_plan(observation, options(*scheme, None, 1.0))
    original = perplexity(observation)
    two = make_plan(observation, options(*scheme, None, 2 / 14))
    budget = abs(perplexity(observation, two) / original - 1) + 1e-6
    plan = make_plan(observation, options(*scheme, None, 1.0, budget))
    assert plan.perplexities["as served"] <= (1 + budget) * original
    assert plan.perplexities["floating point"] == pytest.approx(original)
    assert len(plan.fallbacks) < len(most.fallbacks)


def test_a_budget_that_no_plan_meets_is_refused():
    observation = observe("llama", spike=1000)
    # The model generates the text that it finds most likely, so rounding can only raise the perplexity.
    likely = observation.model.generate(
        observation.samples.input_ids[:, :2], do_sample=False, max_new_tokens=20, min_new_tokens=20
    )
    observation = replace(observation, samples=Samples(likely, "", "", 0))
    with pytest.raises(SmoothQuantError, match=r"--budget-ppl: .*raise --max-fallback"):
        make_plan(observation, options("tensor", "static", None, 1e-9, 1e-9))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("best",), "--alpha: expected a number in"),
        ((1.5,), "--alpha: expected a number in"),
        ((math.nan,), "--alpha: expected a number in"),
        ((0.5, 1.5), "--max-fallback: expected a share"),
        ((0.5, 0.1, 0.0), "--budget-ppl: expected a share"),
        ((0.5, 0.0, 0.1), "--budget-ppl: expected layers that may fall back"),
    ],
)
def test_bad_options_are_refused(choice, message):
    with pytest.raises(SmoothQuantError, match=message):
        options("channel", "static", *choice)


# --- run-time smoothing ---


def test_an_input_that_no_fold_smooths_is_divided_at_run_time_where_that_pays(observed, tmp_path):
    observation = observed("gpt2")
    plan = make_plan(observation, options("channel", "token", "auto"))
    inputs = {g.readers[0].name: g.source for g in observation.graph.groups if g.kind == "input"}
    assert set(inputs) == {f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)}
    for name, source in inputs.items():
        trials = plan.search.trials[source]
        pays = min(trials.values()) <= search.RUNTIME_GAIN * trials[None]
        assert (plan.alphas[source] is not None) == pays == (name in plan.smoothing.runtime)
    assert plan.smoothing.runtime
    write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), Options(output=str(tmp_path / "out")))
    config = CheckpointConfig.from_dict(json.loads((tmp_path / "out/config.json").read_text())["quantization_config"])
    assert {name.removeprefix("transformer.") for name in config.smoothed} == {
        name.removeprefix("transformer.") for name in plan.smoothing.runtime
    }


def test_a_fixed_alpha_smooths_nothing_at_run_time():
    observation = observe("gpt2")
    plan = make_plan(observation, options("channel", "token", 0.5, 0.2))
    assert not plan.smoothing.runtime


# --- the command ---


def test_fallbacks_are_overrides_in_the_checkpoint(observed, tmp_path):
    observation = observed("llama")
    model, dataset = observation.source.name, observation.samples.dataset
    manifest = calibrate(
        model, tmp_path / "out", weights="channel", activations="static", alpha="auto", max_fallback=0.3,
        dataset=dataset, samples=tiny_checkpoints.SAMPLES, seq_len=tiny_checkpoints.SEQ_LEN, quiet=True,
    )  # fmt: skip
    config = CheckpointConfig.from_dict(manifest["quantization_config"])
    per_token = {name for name, to in manifest["fallen_back"].items() if to == fallback.TOKEN}
    assert set(config.overrides) == per_token
    assert set(manifest["fallen_back"]) - per_token <= config.ignore
    assert manifest["alphas"]
    assert set(manifest["errors"]) == set(manifest["quantized"])
    load_reference(tmp_path / "out")


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_one_gate_that_is_nearly_closed_costs_nothing(weights: str, tmp_path: Path) -> None:
    """Eq. 4 alone would multiply its row of up_proj until, under one scale for the weight, no other row has bits."""
    model, text = tiny_architectures.build("llama-bias"), tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight[7], block.mlp.gate_proj.bias[7] = 0, -16
    model.save_pretrained(tmp_path / "m")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "m")
    options = {
        "model": str(tmp_path / "m"), "dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True,
        "rotation": "none",
    }  # fmt: skip
    observation = observe_model(Options(**options))
    ids = tiny_architectures.tokens(3, 8, 32)
    exact = as_served(observation, {}, ids)
    without, smoothed = (
        kl(exact, as_served(observation, make_plan(observation, Options(**options, **choice)).layers(), ids))
        for choice in ({"weights": weights, "no_smoothing": True}, {"weights": weights})
    )
    assert smoothed <= 1.1 * without


def as_served(observation: Observation, layers: Mapping[str, LayerScheme], ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), simulate.as_served(observation.model, layers):
        return observation.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected.exp() * (expected - got)).sum(-1).mean())
