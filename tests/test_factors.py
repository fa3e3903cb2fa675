"""Factors by eq. 4, folds that keep the function of every tiny architecture, and the rounding of stored norms."""

from collections.abc import Collection
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calibration.discovery.discover import discover
from calibration.discovery.graph import Graph, Group
from calibration.discovery.linears import choose_layers
from calibration.observation.absmax import output_of
from calibration.smoothing import factors, gate
from calibration.smoothing.factors import HEADROOM, QUIET, Smoothing, smooth_groups, smoothing_factors
from tests.helpers import tiny_architectures, toy_block
from vllm_smoothquant.format.errors import SmoothQuantError

# Largest relative change of the logits, in float32.
BOUND = 1e-4


def observe(model: nn.Module, graph: Graph, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """max|X_j| of every linear layer's input, [in_features]."""
    maxima: dict[str, torch.Tensor] = {}
    handles = []
    for linear in graph.linears:

        def record(module: nn.Module, args: tuple, name: str = linear.name) -> None:
            absmax = args[0].abs().reshape(-1, args[0].shape[-1]).amax(0).float()
            maxima[name] = torch.maximum(maxima[name], absmax) if name in maxima else absmax

        handles.append(model.get_submodule(linear.name).register_forward_pre_hook(record))
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return maxima


def logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=input_ids, use_cache=False)
    return output if isinstance(output, torch.Tensor) else output.logits


def change(original: torch.Tensor, smoothed: torch.Tensor) -> float:
    return float((smoothed - original).abs().max() / original.abs().max())


def layers_of(graph: Graph) -> set[str]:
    return {linear.name for linear in graph.linears}


def fold(model: nn.Module, alpha: float = 0.5, quantized: Collection[str] | None = None) -> tuple[Graph, Smoothing]:
    """quantized: the layers that become INT8, by default all."""
    graph = discover(model, tiny_architectures.tokens())
    absmax = observe(model, graph, tiny_architectures.tokens())
    quantized = layers_of(graph) if quantized is None else quantized
    return graph, smooth_groups(model, graph, absmax, {g.source: alpha for g in graph.groups}, quantized)


# --- Eq. 4 ---

TOY = discover(toy_block.Toy(), toy_block.tokens())


def toy_group(source: str) -> Group:
    return next(g for g in TOY.groups if g.source == source)


@pytest.fixture
def without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation 4 as the paper has it: quiet channels count as what they are."""
    monkeypatch.setattr(factors, "QUIET", 0)


@pytest.mark.usefixtures("without_bound")
def test_factors_are_equation_4() -> None:
    toy = toy_block.Toy(lambda block, x: block.spare(x))
    graph = discover(toy, toy_block.tokens())
    group = next(g for g in graph.groups if g.source == "layers.0.norm")
    absmax = {"layers.0.up": torch.full((16,), 8.0), "layers.0.spare": torch.arange(1.0, 17.0)}
    with torch.no_grad():
        toy.layers[0].up.weight.fill_(-0.5)
        toy.layers[0].spare.weight.fill_(0.25)
    s = smoothing_factors(group, absmax, toy, 0.75)
    expected = torch.arange(1.0, 17.0).clamp(min=8) ** 0.75 / 0.5**0.25
    torch.testing.assert_close(s, expected)
    assert s.dtype == torch.float32


@pytest.mark.parametrize("operand", ["activation", "weight"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_quiet_channel_counts_as_a_multiple_of_the_median(alpha: float, operand: str) -> None:
    """A channel of zeros gets the factor that QUIET times the median would give, and not one of its own."""
    toys = toy_block.Toy(), toy_block.Toy()
    inputs = [{"layers.0.up": torch.ones(16)} for _ in toys]
    for toy, absmax, quiet in zip(toys, inputs, (0.0, QUIET), strict=True):
        if operand == "activation":
            absmax["layers.0.up"][3] = quiet
        else:
            toy.layers[0].up.weight.data.fill_(1.0)[:, 3] = quiet
    s, expected = (
        smoothing_factors(toy_group("layers.0.norm"), absmax, toy, alpha)
        for toy, absmax in zip(toys, inputs, strict=True)
    )
    assert torch.equal(s, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_without_any_range_all_factors_are_one(alpha: float) -> None:
    s = smoothing_factors(toy_group("layers.0.norm"), {"layers.0.up": torch.zeros(16)}, toy_block.Toy(), alpha)
    assert torch.equal(s, torch.ones(16))


def test_a_divided_output_stays_in_the_range_of_float16() -> None:
    """One gate that is nearly closed makes its product quiet, but the output of `up` may be large."""
    group = toy_group("layers.0.up")
    (reader,) = group.readers
    absmax = {
        reader.name: torch.full((group.channels,), 1e-6),
        output_of(group.source): torch.full((group.channels,), 50.0),
    }
    s = smoothing_factors(group, absmax, toy_block.Toy(), 0.9)
    assert (50.0 * HEADROOM / s <= torch.finfo(torch.float16).max * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["opt", "qwen2", "gpt-neox", "bloom", "llama-bias", "qwen3-next"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_folded_parameter_is_stored_exactly(name: str, dtype: torch.dtype) -> None:
    """stored * s is the original's value, for biases and for weights in floating point: nothing is rounded again."""
    model = tiny_architectures.build(name, dtype=dtype)
    graph = discover(model, tiny_architectures.tokens())
    ignored = frozenset(linear.name for linear in graph.linears if linear.name.endswith("0.mlp.down_proj"))
    layers, in_float = choose_layers(model, graph, ignored)
    graph = graph.keeping(in_float)
    absmax = observe(model, graph, tiny_architectures.tokens())
    smoothing = smooth_groups(model, graph, absmax, {g.source: 0.5 for g in graph.groups}, layers)
    exact = Smoothing(model.float(), graph, smoothing.factors, layers)  # of a float32 model, nothing is rounded
    compared = 0
    for module in smoothing.modules:
        exact_parameters = exact.parameters(module)
        for parameter, value in smoothing.parameters(module).items():
            if parameter != "weight" or module in in_float:
                compared += 1
                # Below float16's smallest normal number, a value is stored with an absolute error instead.
                tiny = 2.0**-25 if dtype == torch.float16 else 0.0
                torch.testing.assert_close(value, exact_parameters[parameter], rtol=0, atol=tiny)
    assert compared


@pytest.mark.usefixtures("without_bound")
def test_readers_in_floating_point_do_not_influence_the_factors() -> None:
    model = tiny_architectures.build("llama")
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    graph = discover(model, tiny_architectures.tokens(), keep=set(names[1:]))
    absmax = {names[0]: torch.ones(128)}
    s = smoothing_factors(graph.groups[0], absmax, model, 0.5)
    q = model.get_submodule(names[0]).weight.detach().abs().amax(0)
    torch.testing.assert_close(s, q**-0.5)
    assert torch.equal(
        Smoothing(model, graph, {graph.groups[0].source: s}, layers_of(graph)).input_factor(names[2]).ne(1), s.ne(1)
    )


@pytest.mark.usefixtures("without_bound")
def test_grouped_queries_take_the_largest_of_their_heads() -> None:
    model = tiny_architectures.build("llama")
    graph = discover(model, tiny_architectures.tokens())
    group = next(g for g in graph.groups if g.source.endswith("0.self_attn.v_proj"))
    absmax = torch.ones(256)
    absmax[64 + 7] = 100.0  # query head 1 reads value head 0
    model.get_submodule("model.layers.0.self_attn.o_proj").weight.data.fill_(1.0)
    s = smoothing_factors(group, {group.readers[0].name: absmax}, model, 0.5)
    assert s[7] == 10
    assert s.eq(1).sum() == 127


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_statistics_name_the_layer(value: float) -> None:
    absmax = {"layers.0.up": torch.full((16,), value)}
    with pytest.raises(SmoothQuantError, match=r"layers\.0\.up: expected finite activation"):
        smoothing_factors(toy_group("layers.0.norm"), absmax, toy_block.Toy(), 0.5)
    toy = toy_block.Toy()
    toy.layers[0].up.weight.data[2, 3] = value
    with pytest.raises(SmoothQuantError, match=r"layers\.0\.up: expected finite weight"):
        smoothing_factors(toy_group("layers.0.norm"), {"layers.0.up": torch.ones(16)}, toy, 0.5)


def test_missing_statistics_name_the_layer() -> None:
    with pytest.raises(SmoothQuantError, match=r"layers\.0\.up: expected an activation maximum"):
        smoothing_factors(toy_group("layers.0.norm"), {}, toy_block.Toy(), 0.5)


@pytest.mark.parametrize("bad", [torch.zeros(16), torch.full((16,), torch.nan), -torch.ones(16), torch.ones(3)])
def test_folding_refuses_bad_factors(bad: torch.Tensor) -> None:
    with pytest.raises(SmoothQuantError, match="positive finite factors"):
        Smoothing(toy_block.Toy(), TOY, {"layers.0.norm": bad}, ())


# --- The folding ---


def test_folding_modifies_nothing_until_it_is_applied() -> None:
    model = tiny_architectures.build("opt")
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    _, smoothing = fold(model)
    for name in smoothing.modules:
        smoothing.parameters(name)
    assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())
    smoothing.apply_()
    assert any(not torch.equal(parameters[name], value) for name, value in model.state_dict().items())


def test_factors_of_a_layer_that_is_source_and_reader() -> None:
    """v_proj: columns times the norm's s, rows and bias divided by its own s; all other modules stay as they are."""
    model = tiny_architectures.build("opt")
    graph, smoothing = fold(model)
    name = "model.decoder.layers.0.self_attn.v_proj"
    v = model.get_submodule(name)
    smoothed = smoothing.parameters(name)
    columns, rows = smoothing.input_factor(name), smoothing.output_factor(name)
    torch.testing.assert_close(smoothed["weight"], v.weight.detach() * columns / rows[:, None])
    torch.testing.assert_close(smoothed["bias"], v.bias.detach() / rows)
    norm = "model.decoder.layers.0.self_attn_layer_norm"
    assert torch.equal(smoothing.factors[norm], columns)
    bias = smoothing.parameters(norm)["bias"] * columns
    torch.testing.assert_close(bias, model.get_submodule(norm).bias.detach())
    untouched = smoothing.parameters("model.decoder.embed_tokens")
    assert torch.equal(untouched["weight"], model.model.decoder.embed_tokens.weight)
    assert smoothing.input_factor("nope") is None
    assert smoothing.output_factor("nope") is None
    assert "model.decoder.embed_tokens" not in smoothing.modules
    entry = smoothing.describe(graph.groups[0])
    assert entry["source"] == norm
    assert entry["factor_min"] == float(columns.min())


def test_no_smoothing_is_an_empty_folding() -> None:
    model = tiny_architectures.build("llama")
    graph = discover(model, tiny_architectures.tokens())
    smoothing = smooth_groups(model, graph, {}, {}, ())
    assert not smoothing.modules
    assert smoothing.describe(graph.groups[0])["smoothed"] is False


def test_alpha_for_each_group() -> None:
    model = tiny_architectures.build("llama")
    graph = discover(model, tiny_architectures.tokens())
    source = graph.groups[0].source
    absmax = observe(model, graph, tiny_architectures.tokens())
    smoothing = smooth_groups(model, graph, absmax, {source: 0.8}, layers_of(graph))
    assert set(smoothing.factors) == {source}


@pytest.mark.parametrize("name", ["llama", "gemma", "nemotron"])
def test_readers_undo_the_rounding_of_a_stored_norm(name: str) -> None:
    """The stored weight is bfloat16, and stored weight * s' is the original weight up to float32 rounding."""
    model = tiny_architectures.build(name, dtype=torch.bfloat16)
    _, smoothing = fold(model)
    norm = "model.layers.0.input_layernorm"
    plus = 0.0 if name == "llama" else 1.0
    stored = smoothing.parameters(norm)["weight"]
    s = smoothing.factors[norm]
    weight = model.get_submodule(norm).weight.detach().float()
    assert torch.equal(stored, stored.bfloat16().float())
    torch.testing.assert_close((plus + stored) * s, plus + weight, rtol=2**-22, atol=0)
    assert not torch.equal(s, torch.ones(128))


@pytest.mark.parametrize(("name", "dead"), [("llama", 0.0), ("gemma", -1.0)])
def test_dead_channel_of_a_norm_keeps_scale_one(name: str, dead: float) -> None:
    model = tiny_architectures.build(name, dtype=torch.bfloat16)
    graph = discover(model, tiny_architectures.tokens())
    norm = model.model.layers[0].input_layernorm
    norm.weight.data[9] = dead
    smoothing = Smoothing(model, graph, {graph.groups[0].source: torch.full((128,), 3.0)}, layers_of(graph))
    s = smoothing.factors["model.layers.0.input_layernorm"]
    assert s[9] == 1
    assert smoothing.parameters("model.layers.0.input_layernorm")["weight"][9] == dead
    assert (s[:9] > 2).all()


def test_overflow_writes_nothing() -> None:
    model = tiny_architectures.build("llama", dtype=torch.float16)
    graph = discover(model.float(), tiny_architectures.tokens())
    model.half()
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    source = "model.layers.0.mlp.up_proj"
    smoothing = Smoothing(model, graph, {source: torch.full((192,), 1e-8)}, ())
    with pytest.raises(SmoothQuantError, match="overflow"):
        smoothing.apply_()
    assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_architectures.build("llama-tied")
    _, smoothing = fold(model)
    embedding = model.model.embed_tokens.weight.clone()
    smoothing.apply_()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "arcee"])
def test_powers_of_two_keep_every_bit_of_a_bfloat16_model(name: str) -> None:
    model = tiny_architectures.build(name, dtype=torch.bfloat16)
    _, smoothing = fold(model, quantized=())
    norms = [f for s, f in smoothing.factors.items() if "norm" in s or "ln" in s]
    assert any(f.ne(1).any() for f in norms)
    expected = logits(model, tiny_architectures.tokens(2))
    smoothing.apply_()
    assert torch.equal(expected, logits(model, tiny_architectures.tokens(2)))


# --- All tiny architectures ---

# Layers that read the norms of the residual stream in attention and in a dense MLP, by the last part of their names.
ATTENTION_INPUTS = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "q_a_proj", "kv_a_proj_with_mqa",
}  # fmt: skip

MLP_INPUTS = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"}


@cache
def smoothed(name: str) -> tuple[float, Graph]:
    """Relative change of the logits of tiny model `name` after the folding is applied, and its graph."""
    model = tiny_architectures.build(name)
    graph, smoothing = fold(model)
    gate.check_equivalence(smoothing, [tiny_architectures.tokens(2), tiny_architectures.tokens(3)])
    expected = logits(model, tiny_architectures.tokens(4))
    smoothing.apply_()
    return change(expected, logits(model, tiny_architectures.tokens(4))), graph


@pytest.mark.parametrize("name", tiny_architectures.ZOO)
def test_smoothing_keeps_the_function(name: str) -> None:
    measured, _ = smoothed(name)
    assert 0 < measured <= BOUND


def test_attention_and_mlp_inputs_are_smoothed_on_at_least_24_architectures() -> None:
    full = []
    for name in tiny_architectures.ZOO:
        measured, graph = smoothed(name)
        inputs = [
            [linear for linear in graph.linears if linear.name.rpartition(".")[2] in names]
            for names in (ATTENTION_INPUTS, MLP_INPUTS)
        ]
        if measured <= BOUND and all(group and all(x.uncovered == 0 for x in group) for group in inputs):
            full.append(name)
    assert len(full) >= 24


@cache
def original(name: str) -> tuple[nn.Module, Graph, torch.Tensor, dict[str, torch.Tensor]]:
    model = tiny_architectures.build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return model, discover(model, tiny_architectures.tokens()), logits(model, tiny_architectures.tokens(5)), state


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["llama", "opt", "gemma2", "phi3", "falcon-7b", "arcee"]),
    exponents=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=9),
    seed=st.integers(0, 2**16),
)
def test_any_positive_factors_keep_the_function(name: str, exponents: list[float], seed: int) -> None:
    model, graph, expected, state = original(name)
    generator = torch.Generator().manual_seed(seed)
    values = 2.0 ** torch.tensor(exponents)
    factors = {}
    for group in graph.groups:
        s = values[torch.randint(len(values), (group.channels,), generator=generator)]
        factors[group.source] = torch.where(group.foldable, s, 1.0)
    Smoothing(model, graph, factors, ()).apply_()
    smoothed_logits = logits(model, tiny_architectures.tokens(5))
    model.load_state_dict(state)
    assert change(expected, smoothed_logits) <= BOUND
