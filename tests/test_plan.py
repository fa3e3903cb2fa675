"""Choosing alphas and fallbacks: the simulation against the reference, the search against its own grid, the budget."""

import json
import math
from dataclasses import replace
from itertools import product

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
from tests.helpers import tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError

SCHEMES = list(product(("channel", "tensor"), ("token", "tensor", "static")))


def watch(name: str, spike: float = 0.0) -> Observation:
    """A tiny model of the zoo after calibration. spike: times what one channel of each down_proj's input is larger."""
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


def asked(
    weights: str, activations: str, alpha: float | str | None = 0.5, max_fallback: float = 0.0,
    budget_ppl: float | None = None,
) -> Options:  # fmt: skip
    """alpha None: no smoothing."""
    return Options(
        weights=weights, activations=activations, alpha=0.5 if alpha is None else alpha, no_smoothing=alpha is None,
        max_fallback=max_fallback, budget_ppl=budget_ppl, quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """name -> what `prepare` makes of a tiny model."""
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
def test_the_simulation_computes_what_the_checkpoint_does(name, scheme, ready, tmp_path):
    """v and up divided, their readers multiplied, Conv1D, run-time factors: all in one model, compared at its end."""
    made = ready(name)
    model, watched = made.model, made
    plan = make_plan(watched, asked(*scheme, "auto", 0.25))
    write_checkpoint(made, plan, check_gate(made, plan.smoothing), Options(output=str(tmp_path / "out")))
    # One sample, because the reference takes a dynamic scale per tensor over the whole batch.
    ids = tiny_architectures.tokens(2)[:1]
    exact = logits(model, ids)
    layers = plan.layers()
    with simulate.as_served(model, layers):
        simulated = logits(model, ids)
    reference = logits(load_reference(tmp_path / "out"), ids)
    # Both round the same numbers but for float32's last places; where one lies on a tie the integers differ by one, and
    # what follows by a part of the rounding error. Were all rounded apart, the two would be sqrt(2) of it apart.
    assert (simulated - reference).norm() < 0.5 * (reference - exact).norm()


def test_tokens_that_a_model_flattens_are_scaled_by_their_sample(monkeypatch):
    """As OPT does before fc1: one scale for a tensor (O2) is one for each sample, in whatever shape its tokens come."""
    linear, served = torch.nn.Linear(16, 8), simulate.LayerScheme(asked("tensor", "tensor").scheme)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100])[:, None, None]
    flat = x.flatten(0, 1)
    with torch.no_grad():
        simulated = simulate.in_place_of(linear(flat), linear, flat, served, 3)
        one_by_one = [simulate.output(linear, sample[None], served)[0] for sample in x]
    assert torch.equal(simulated, torch.cat(one_by_one))

    monkeypatch.setattr(search, "ROWS", 8)  # fewer than there are
    watched = watch("opt")
    plan = make_plan(watched, asked("tensor", "tensor", "auto", 0.25))
    assert plan.fallbacks.keys() | plan.search.errors.keys() == set(watched.layers)


def test_the_loss_is_pytorchs():
    watched = watch("llama")
    with torch.no_grad():
        output = watched.model(input_ids=watched.samples.input_ids, labels=watched.samples.input_ids)
    assert simulate.loss(watched.model, watched.samples.input_ids) == pytest.approx(float(output.loss), rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids="-".join)
def test_the_best_alpha_of_the_grid_is_taken(scheme):
    watched = watch("llama")
    plan = make_plan(watched, asked(*scheme, "auto"))
    assert len(plan.search.trials) == len(watched.graph.groups)
    for source, trials in plan.search.trials.items():
        assert set(trials) == set(search.GRID)
        assert trials[plan.alphas[source]] == min(trials.values()) <= trials[0.5]


def test_groups_differ_in_their_best_alpha():
    plan = make_plan(watch("llama"), asked("channel", "token", "auto"))
    assert len(set(plan.alphas.values())) > 1


@settings(max_examples=10, deadline=None)
@given(
    spike=st.floats(1, 300), scheme=st.sampled_from(SCHEMES), grid=st.sets(st.sampled_from(search.GRID[1:]), min_size=1)
)
def test_a_larger_grid_never_chooses_worse(spike, scheme, grid):
    """For the first group, which sees the same input whatever is chosen after it."""
    watched = watch("llama", spike)
    errors = {}
    for candidates in ((0.5,), (None, 0.5, *sorted(grid))):
        result = search.search(watched, dict.fromkeys(watched.layers, asked(*scheme).scheme), candidates)
        first = watched.graph.groups[0]
        errors[len(candidates) > 1] = sum(result.errors[r.name] for r in first.readers)
    assert errors[True] <= errors[False] * (1 + 1e-6)


def test_the_same_inputs_give_the_same_plan():
    one, two = (make_plan(watch("llama"), asked("tensor", "static", "auto", 0.3)) for _ in "ab")
    assert (one.alphas, one.fallbacks, one.search) == (two.alphas, two.fallbacks, two.search)


def test_the_grid_for_all_takes_the_smallest_perplexity():
    watched = watch("llama")
    plan = make_plan(watched, asked("channel", "static", "grid"))
    (alpha,) = {a for source, a in plan.alphas.items() if not source.startswith("input of")}
    assert plan.perplexities[f"alpha {alpha}"] == min(plan.perplexities.values())
    assert perplexity(watched, plan) == pytest.approx(plan.perplexities[f"alpha {alpha}"])


# --- falling back ---


def test_static_layers_with_an_outlier_fall_back_to_a_scale_for_each_token():
    watched = watch("llama", spike=1000)
    plan = make_plan(watched, asked("channel", "static", None, 2 / 14))
    assert dict(plan.fallbacks) == {f"model.layers.{i}.mlp.down_proj": fallback.TOKEN for i in (0, 1)}
    without = make_plan(watched, asked("channel", "static", None))
    own = perplexity(watched)
    assert abs(perplexity(watched, plan) - own) < abs(perplexity(watched, without) - own)


def test_a_layer_that_adds_nothing_need_not_fall_back():
    watched = watch("llama", spike=1000)
    watched.model.model.layers[0].mlp.down_proj.weight.data *= 1e-4
    plan = make_plan(watched, asked("channel", "static", None, 1 / 14))
    assert set(plan.fallbacks) == {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_no_more_fall_back_than_may_and_what_reads_together_goes_together(share):
    watched = watch("llama", spike=100)
    plan = make_plan(watched, asked("channel", "static", 0.5, share))
    assert len(plan.fallbacks) <= share * len(watched.layers)
    for reading in watched.graph.shared_input_groups:
        assert len({plan.fallbacks.get(name) for name in reading}) == 1


def test_dynamic_layers_fall_back_to_floating_point():
    watched = watch("llama")
    plan = make_plan(watched, asked("tensor", "token", 0.5, 0.2))
    assert set(plan.fallbacks.values()) == {fallback.FLOAT}
    assert set(plan.schemes) == set(watched.layers) - set(plan.fallbacks)


def test_the_budget_takes_the_fewest_that_keep_it():
    watched = watch("llama", spike=1000)
    scheme = ("channel", "static")
    most = make_plan(watched, asked(*scheme, None, 1.0))
    own = perplexity(watched)
    two = make_plan(watched, asked(*scheme, None, 2 / 14))
    budget = abs(perplexity(watched, two) / own - 1) + 1e-6
    plan = make_plan(watched, asked(*scheme, None, 1.0, budget))
    assert plan.perplexities["as served"] <= (1 + budget) * own
    assert plan.perplexities["floating point"] == pytest.approx(own)
    assert len(plan.fallbacks) < len(most.fallbacks)


def test_a_budget_that_cannot_be_kept_is_refused():
    watched = watch("llama", spike=1000)
    # Of text that the model itself holds for likeliest, rounding can only make it less sure.
    likely = watched.model.generate(
        watched.samples.input_ids[:, :2], do_sample=False, max_new_tokens=20, min_new_tokens=20
    )
    watched = replace(watched, samples=Samples(likely, "", "", 0))
    with pytest.raises(SmoothQuantError, match=r"--budget-ppl: .*raise --max-fallback"):
        make_plan(watched, asked("tensor", "static", None, 1e-9, 1e-9))


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (("best",), "--alpha: expected a number in"),
        ((1.5,), "--alpha: expected a number in"),
        ((math.nan,), "--alpha: expected a number in"),
        ((0.5, 1.5), "--max-fallback: expected a share"),
        ((0.5, 0.1, 0.0), "--budget-ppl: expected a share"),
        ((0.5, 0.0, 0.1), "--budget-ppl: expected layers that may fall back"),
    ],
)
def test_bad_choices_are_refused(choice, said):
    with pytest.raises(SmoothQuantError, match=said):
        asked("channel", "static", *choice)


# --- run-time smoothing ---


def test_what_cannot_be_folded_is_divided_at_run_time_where_that_pays(ready, tmp_path):
    made = ready("gpt2")
    plan = make_plan(made, asked("channel", "token", "auto"))
    inputs = {g.readers[0].name: g.source for g in made.graph.groups if g.kind == "input"}
    assert set(inputs) == {f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)}
    for name, source in inputs.items():
        trials = plan.search.trials[source]
        pays = min(trials.values()) <= search.RUNTIME_GAIN * trials[None]
        assert (plan.alphas[source] is not None) == pays == (name in plan.smoothing.runtime)
    assert plan.smoothing.runtime
    write_checkpoint(made, plan, check_gate(made, plan.smoothing), Options(output=str(tmp_path / "out")))
    config = CheckpointConfig.from_dict(json.loads((tmp_path / "out/config.json").read_text())["quantization_config"])
    assert {name.removeprefix("transformer.") for name in config.smoothed} == {
        name.removeprefix("transformer.") for name in plan.smoothing.runtime
    }


def test_a_fixed_alpha_smooths_nothing_at_run_time():
    watched = watch("gpt2")
    plan = make_plan(watched, asked("channel", "token", 0.5, 0.2))
    assert not plan.smoothing.runtime


# --- the command ---


def test_fallbacks_are_overrides_in_the_checkpoint(ready, tmp_path):
    made = ready("llama")
    manifest = calibrate(
        made.source.name, tmp_path / "out", weights="channel", activations="static", alpha="auto", max_fallback=0.3,
        dataset=made.samples.dataset, samples=tiny_checkpoints.SAMPLES, seq_len=tiny_checkpoints.SEQ_LEN, quiet=True,
    )  # fmt: skip
    config = CheckpointConfig.from_dict(manifest["quantization_config"])
    per_token = {name for name, to in manifest["fallen_back"].items() if to == fallback.TOKEN}
    assert set(config.overrides) == per_token
    assert set(manifest["fallen_back"]) - per_token <= config.ignore
    assert manifest["alphas"]
    assert set(manifest["errors"]) == set(manifest["quantized"])
    load_reference(tmp_path / "out")
