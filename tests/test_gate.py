"""The gate passes exact folds, refuses every wrong fold and names it, and does not change the model."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from calibration.discovery.discover import discover
from calibration.discovery.graph import Graph
from calibration.smoothing import gate
from calibration.smoothing.factors import Smoothing
from tests.helpers import tiny_architectures, toy_block
from tests.test_factors import fold, layers_of, logits, observe
from vllm_smoothquant.format.errors import SmoothQuantError

BATCHES = (tiny_architectures.tokens(7), tiny_architectures.tokens(8))

ARCHITECTURES = ("llama", "opt", "gpt2", "falcon-7b", "phi3", "gemma2")


@cache
def built(name: str) -> tuple[nn.Module, Graph, Smoothing]:
    model = tiny_architectures.build(name)
    return model, *fold(model)


def refusal(smoothing: Smoothing) -> SmoothQuantError:
    """The error of the gate, which must refuse `smoothing`."""
    with pytest.raises(SmoothQuantError) as raised:
        gate.check_equivalence(smoothing, BATCHES)
    assert "\n" not in str(raised.value)
    return raised.value


def changed(graph: Graph, source: str, **changes: object) -> Graph:
    """`graph` with other fields in the group of `source`."""
    groups = tuple(dataclasses.replace(g, **changes) if g.source == source else g for g in graph.groups)
    return dataclasses.replace(graph, groups=groups)


# --- Exact folds pass ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma", "glm4-moe", "opt", "qwen2", "gpt-neox", "bloom", "llama-bias"])
def test_exact_smoothing_passes_and_leaves_the_model(name: str, dtype: torch.dtype) -> None:
    model = tiny_architectures.build(name, dtype=dtype)
    graph, smoothing = fold(model)
    parameters = {key: value.clone() for key, value in model.state_dict().items()}
    pointers = {key: value.data_ptr() for key, value in model.state_dict().items()}
    report = gate.check_equivalence(smoothing, BATCHES)
    assert report["batches"] == 2
    assert 0 <= report["logits"]["change"] <= report["logits"]["allowed"] < 1e-3  # 0 if all factors are powers of two
    assert any(factors.ne(1).any() for factors in smoothing.factors.values())
    assert set(report["groups"]) == {g.source for g in graph.groups}
    json.dumps(report)
    for key, value in model.state_dict().items():
        assert value.dtype == parameters[key].dtype
        assert torch.equal(value, parameters[key])
        assert value.data_ptr() == pointers[key]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_gate_runs_in_float32_whatever_the_dtype_of_the_model() -> None:
    """The gate's original model is the float32 model, not the bfloat16 one."""
    model = tiny_architectures.build("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        outputs = gate.Original(model, BATCHES[0], ["lm_head"]).outputs
    expected = logits(model.float(), BATCHES[0])
    (rows,) = outputs[gate.LOGITS]
    torch.testing.assert_close(rows, expected.reshape(-1, tiny_architectures.VOCAB), rtol=1e-5, atol=1e-5)


def test_a_graph_without_factors_passes() -> None:
    model = tiny_architectures.build("llama")
    graph = discover(model, tiny_architectures.tokens())
    report = gate.check_equivalence(Smoothing(model, graph, {}, layers_of(graph)), BATCHES)
    assert report["logits"] == {"change": 0.0, "allowed": 0.0}


def test_a_model_that_accelerate_dispatches_passes() -> None:
    model = tiny_architectures.build("llama", dtype=torch.bfloat16)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    graph, smoothing = fold(model)
    assert len(graph.groups) == 8
    gate.check_equivalence(smoothing, BATCHES)


# --- Wrong folds are refused ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_reader_that_is_left_out_is_caught(name: str) -> None:
    model, graph, smoothing = built(name)
    for group in graph.groups:
        if "1" in group.source.split(".") or group.source not in smoothing.factors:
            continue
        for missed in group.readers:
            rest = tuple(r for r in group.readers if r.name != missed.name)
            wrong = changed(graph, group.source, readers=rest)
            error = refusal(Smoothing(model, wrong, smoothing.factors, layers_of(wrong)))
            assert error.where.startswith(f"smoothing of {group.source} ")
            assert missed.name in error.got


@pytest.mark.parametrize(("name", "owner"), [
    ("opt", "model.decoder.layers.1.self_attn_layer_norm"),
    ("opt", "model.decoder.layers.0.self_attn.v_proj"),
    ("opt", "model.decoder.layers.1.fc1"),
    ("gpt2", "transformer.h.0.attn.c_attn"),
    ("stablelm", "model.layers.0.post_attention_layernorm"),
])  # fmt: skip
def test_a_bias_that_is_not_folded_is_caught(name: str, owner: str) -> None:
    model, graph, smoothing = built(name)

    class WithoutBias(Smoothing):
        def parameters(self, name: str) -> dict[str, torch.Tensor]:
            params = super().parameters(name)
            if name == owner and owner in self.factors:
                params["bias"] = self.model.get_submodule(name).bias.detach().float()
            return params

        def only(self, sources: object) -> Smoothing:
            factors = {s: f for s, f in self.factors.items() if s in sources}
            return WithoutBias(self.model, self.graph, factors, self.quantized)

    error = refusal(WithoutBias(model, graph, smoothing.factors, layers_of(graph)))
    assert owner in error.where


def test_heads_that_do_not_share_are_caught() -> None:
    """Query heads 1 and 2 read each other's value head."""
    model, graph, smoothing = built("llama")
    source = "model.layers.1.self_attn.v_proj"
    (reader,) = next(g for g in graph.groups if g.source == source).readers
    swapped = reader.channel_of.reshape(4, 64)[[0, 2, 1, 3]].reshape(-1)
    wrong = changed(graph, source, readers=(dataclasses.replace(reader, channel_of=swapped),))
    error = refusal(Smoothing(model, wrong, smoothing.factors, layers_of(wrong)))
    assert source in error.where
    assert reader.name in error.got


@pytest.mark.parametrize(("name", "rule"), [("gemma", "p"), ("llama", "1+p")])
def test_a_wrong_norm_rule_is_caught(name: str, rule: str) -> None:
    model, graph, smoothing = built(name)
    source = "model.layers.0.post_attention_layernorm"
    wrong = changed(graph, source, rules={"weight": rule})
    assert source in refusal(Smoothing(model, wrong, smoothing.factors, layers_of(wrong))).where


def test_a_power_of_one_for_a_square_is_caught() -> None:
    model, graph, smoothing = built("arcee")
    source = "model.layers.0.mlp.up_proj"
    (reader,) = next(g for g in graph.groups if g.source == source).readers
    wrong = changed(graph, source, readers=(dataclasses.replace(reader, power=torch.ones_like(reader.power)),))
    assert source in refusal(Smoothing(model, wrong, smoothing.factors, layers_of(wrong))).where


def test_faults_of_a_thousandth_are_caught() -> None:
    """One channel of one reader, wrong by 1 in 1000."""
    model, graph, _ = built("llama")
    group = graph.groups[0]
    first = group.readers[0]
    wrong = changed(graph, group.source, readers=(
        dataclasses.replace(first, channel_of=torch.where(torch.arange(128) == 5, -1, first.channel_of)),
        *group.readers[1:],
    ))  # fmt: skip
    factors = {group.source: torch.where(torch.arange(128) == 5, 1.001, 1.0)}
    gate.check_equivalence(Smoothing(model, graph, factors, layers_of(graph)), BATCHES)
    refusal(Smoothing(model, wrong, factors, layers_of(wrong)))


def test_the_first_wrong_group_is_named_when_several_are() -> None:
    model, graph, smoothing = built("llama")
    wrong = graph
    for group in graph.groups[3:]:
        wrong = changed(wrong, group.source, readers=group.readers[1:])
    assert graph.groups[3].source in refusal(Smoothing(model, wrong, smoothing.factors, layers_of(wrong))).where


# --- Readers that the trace cannot see ---


def _through_numpy(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy().mean(-1, keepdims=True))


def _through_python(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(x.numpy().sum()) * 0.01)


@pytest.mark.parametrize("reader", [_through_numpy, _through_python])
def test_an_unseen_reader_is_caught_and_its_source_named(reader: Callable) -> None:
    toy = toy_block.Toy(reader)
    graph = discover(toy, toy_block.tokens())
    assert "layers.0.norm" in {g.source for g in graph.groups}, "the trace sees this reader, so the test shows nothing"
    absmax = observe(toy, graph, toy_block.tokens())
    factors = {g.source: torch.where(g.foldable, 2.0, 1.0) for g in graph.groups}
    with pytest.raises(SmoothQuantError) as raised:
        gate.check_equivalence(Smoothing(toy, graph, factors, layers_of(graph)), [toy_block.tokens(3)])
    assert raised.value.where == "smoothing of layers.0.norm (read by layers.0.up)"
    assert "not known to read the source" in raised.value.got
    assert absmax


# --- Errors ---


def test_an_original_that_is_not_finite_is_an_error() -> None:
    model = tiny_architectures.build("llama")
    _, smoothing = fold(model)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SmoothQuantError, match="expected finite output of the original model"):
        gate.check_equivalence(smoothing, BATCHES)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_restored_when_it_fails(fault: type[BaseException]) -> None:
    model = tiny_architectures.build("llama", dtype=torch.bfloat16)
    _, smoothing = fold(model)
    parameters = {key: value.clone() for key, value in model.state_dict().items()}

    def stop(module: nn.Module, args: object) -> None:
        raise fault("stop")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(fault, match="stop"):
        gate.check_equivalence(smoothing, BATCHES)
    handle.remove()
    state = model.state_dict()
    assert all(torch.equal(parameters[k], v) and v.dtype == parameters[k].dtype for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    gate.check_equivalence(smoothing, BATCHES)


def test_a_tie_that_rounding_decides_is_not_a_fault() -> None:
    """Two channels of equal value are compared, as two experts may be: the last bit decides which one is larger."""

    def tie(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = block.spare(x).split(8, -1)
        return 0.5 * (a.sum() > b.flip(-1).sum()).float()

    toy = toy_block.Toy(tie)
    with torch.no_grad():
        for block in toy.layers:
            block.spare.weight[8:] = block.spare.weight[:8].flip(0)
            block.spare.bias[8:] = block.spare.bias[:8].flip(0)
    graph = discover(toy, toy_block.tokens())
    group = graph.groups[0]
    assert "layers.0.spare" in {r.name for r in group.readers}
    flips = 0
    for seed in range(8):
        factors = {group.source: 1 + torch.rand(16, generator=torch.Generator().manual_seed(seed))}
        smoothing = Smoothing(toy, graph, factors, layers_of(graph))
        gate.check_equivalence(smoothing, [toy_block.tokens(seed)])
        with gate.settled(toy):
            comparisons = gate._compare(smoothing, toy_block.tokens(seed), [], floors=1)
        flips += not comparisons[gate.LOGITS].within
    assert flips, "rounding changed no decision, so the test shows nothing"
