"""Discovery: the right readers for every source, and no fold where a reader cannot follow the scale."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.discovery.discover import discover
from calibration.discovery.graph import Graph, Group
from tests.helpers import tiny_architectures, toy_block
from vllm_smoothquant.format.errors import SmoothQuantError


@cache
def graph_of(name: str, keep: frozenset[str] = frozenset()) -> Graph:
    return discover(tiny_architectures.build(name), tiny_architectures.tokens(), keep)


def group(graph: Graph, source: str) -> Group:
    return next(g for g in graph.groups if g.source == source)


def folds(graph: Graph) -> set[str]:
    """ "source>reader,reader" by last names, with [foldable/channels] where only some channels fold."""
    result = set()
    for g in graph.groups:
        part = "" if g.foldable.all() else f"[{int(g.foldable.sum())}/{g.channels}]"
        readers = ",".join(sorted({r.name.rpartition(".")[2] for r in g.readers}))
        result.add(f"{g.source.rpartition('.')[2]}{part}>{readers}")
    return result


QKV = "k_proj,q_proj,v_proj"

LLAMA = {f"input_layernorm>{QKV}", "v_proj>o_proj", "post_attention_layernorm>gate_proj,up_proj", "up_proj>down_proj"}

GEMMA2 = {f"input_layernorm>{QKV}", "v_proj>o_proj", "pre_feedforward_layernorm>gate_proj,up_proj", "up_proj>down_proj"}

PARALLEL = {"input_layernorm>gate_proj,k_proj,q_proj,up_proj,v_proj", "v_proj>o_proj", "up_proj>down_proj"}

MOE = {f"input_layernorm>{QKV}", "v_proj>o_proj"}

MLA = {
    "input_layernorm>kv_a_proj_with_mqa,q_a_proj", "q_a_layernorm>q_b_proj", "kv_a_layernorm>kv_b_proj",
    "kv_b_proj[256/384]>o_proj", "post_attention_layernorm>gate_proj,up_proj", "up_proj>down_proj",
}  # fmt: skip

OPT_ATTENTION = {f"self_attn_layer_norm>{QKV}", "v_proj>out_proj", "final_layer_norm>fc1"}

NEOX = {
    "input_layernorm>query_key_value", "query_key_value[128/384]>dense", "post_attention_layernorm>dense_h_to_4h",
}  # fmt: skip

POST_NORM = {"v_proj>o_proj", "up_proj>down_proj"}

# Every fold but the final norm's, read from the code of each architecture.
EXPECTED: dict[str, set[str]] = {
    "opt": OPT_ATTENTION | {"fc1>fc2"},
    "opt-gelu": OPT_ATTENTION,
    "opt-350m": {"v_proj>out_proj", "fc1>fc2"},
    "bloom": NEOX,
    "bloom-postln": {"query_key_value[128/384]>dense"},
    "gpt2": {"ln_1>c_attn", "c_attn[128/384]>c_proj", "ln_2>c_fc"},
    "gpt-neox": NEOX,
    "gpt-j": {"ln_1>fc_in,k_proj,q_proj,v_proj", "v_proj>out_proj"},
    "llama": LLAMA,
    "llama-bias": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "phi": {f"input_layernorm>fc1,{QKV}", "v_proj>dense"},
    "phi3": {
        "input_layernorm>qkv_proj", "qkv_proj[64/256]>o_proj", "post_attention_layernorm>gate_up_proj",
        "gate_up_proj[192/384]>down_proj",
    },
    "falcon-7b": {"input_layernorm>dense_h_to_4h,query_key_value", "query_key_value[64/256]>dense"},
    "falcon-40b": {"ln_attn>query_key_value", "ln_mlp>dense_h_to_4h", "query_key_value[64/256]>dense"},
    "falcon-rw": NEOX,
    "glm": {
        f"input_layernorm>{QKV}", "v_proj>o_proj", "post_attention_layernorm>gate_up_proj",
        "gate_up_proj[192/384]>down_proj",
    },
    "stablelm": LLAMA,
    "starcoder2": {f"input_layernorm>{QKV}", "v_proj>o_proj", "post_attention_layernorm>c_fc"},
    "olmo": POST_NORM,
    "olmo-clip": {"up_proj>down_proj"},
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "granite": LLAMA,
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "mpt": {"norm_1>Wqkv", "Wqkv[128/384]>out_proj", "norm_2>up_proj"},
    "nemotron": {f"input_layernorm>{QKV}", "v_proj>o_proj", "post_attention_layernorm>up_proj", "up_proj>down_proj"},
    "mixtral": MOE,
    "qwen3-moe": MOE,
    "olmoe": MOE,
    "granite-moe": MOE,
    "phimoe": MOE,
    "gpt-oss": MOE,
    "glm4-moe": LLAMA,
    "deepseek-v3": MLA,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_folds_are_those_that_the_code_allows(name: str) -> None:
    final = {fold for fold in folds(graph_of(name)) if fold.endswith((">lm_head", ">project_out"))}
    assert folds(graph_of(name)) - final == EXPECTED[name]


def test_grouped_queries_share_their_value_head() -> None:
    """Four query heads, two value heads of 64: heads 0 and 1 read channels 0-63, heads 2 and 3 channels 64-127."""
    (reader,) = group(graph_of("llama"), "model.layers.0.self_attn.v_proj").readers
    channels = torch.arange(128).reshape(2, 1, 64).expand(2, 2, 64).reshape(-1)
    assert torch.equal(reader.channel_of, channels)


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        # Fused q, k, v one after another; interleaved by head; gate before up.
        ("phi3", "model.layers.0.self_attn.qkv_proj", torch.arange(192, 256).repeat(2)),
        (
            "bloom",
            "transformer.h.0.self_attention.query_key_value",
            torch.cat([torch.arange(128, 192), torch.arange(320, 384)]),
        ),
        ("phi3", "model.layers.0.mlp.gate_up_proj", torch.arange(192, 384)),
    ],
)
def test_fused_projections_are_split(name: str, source: str, expected: torch.Tensor) -> None:
    fused = group(graph_of(name), source)
    assert torch.equal(fused.readers[0].channel_of, expected)
    assert set(fused.foldable.nonzero().flatten().tolist()) == set(expected.tolist())


def test_squared_relu_carries_the_square() -> None:
    (reader,) = group(graph_of("arcee"), "model.layers.0.mlp.up_proj").readers
    assert reader.power.eq(2).all()


def test_norm_rules_are_measured() -> None:
    expected = {
        "llama": {"weight": "p"},
        "gemma": {"weight": "1+p"},
        "stablelm": {"weight": "p", "bias": "p"},
        "nemotron": {"weight": "1+p", "bias": "p"},
    }
    assert {name: group(graph_of(name), "model.layers.0.input_layernorm").rules for name in expected} == expected


def test_norms_of_heads_are_refused_with_a_reason() -> None:
    refusals = {r.source: r for r in graph_of("qwen3").refusals}
    assert "self_attn" in refusals["model.layers.0.self_attn.q_norm"].reader
    assert "layers.0.self_attn" in str(refusals["model.layers.0.self_attn.q_norm"])


def test_a_norm_that_a_router_reads_is_refused() -> None:
    readers = {r.source: r.reader for r in graph_of("mixtral").refusals}
    assert readers["model.layers.0.post_attention_layernorm"].startswith("model.layers.0.mlp")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "gemma3"])
def test_a_norm_whose_output_leaves_the_model_is_refused(name: str) -> None:
    """Drafts, poolers and reward heads read the hidden states after the last norm."""
    graph = graph_of(name)
    (last,) = [r for r in graph.refusals if r.reader == "the hidden states"]
    assert "norm" in last.source
    assert last.channels == last.total
    assert graph.linear("lm_head").uncovered == graph.linear("lm_head").in_features


def test_groups_only_for_quantised_readers() -> None:
    graph = graph_of("llama", frozenset({"lm_head"}))
    assert all(g.source != "model.norm" for g in graph.groups)
    assert "model.norm" in {r.source for r in graph.refusals}
    assert graph.linear("lm_head").uncovered == 128


def test_linears_are_in_the_order_in_which_they_run() -> None:
    names = [linear.name.rpartition(".")[2] for linear in graph_of("llama").linears]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2 + ["lm_head"]
    gpt2 = graph_of("gpt2").linear("transformer.h.0.mlp.c_fc")
    assert (gpt2.in_features, gpt2.out_features, gpt2.transposed, gpt2.uncovered) == (128, 512, True, 0)
    with pytest.raises(SmoothQuantError, match="a linear layer that ran"):
        graph_of("llama").linear("nope")


def test_discovery_does_not_change_the_model() -> None:
    model = tiny_architectures.build("llama")
    model.train()
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    discover(model, tiny_architectures.tokens())
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bfloat16_gives_the_same_graph() -> None:
    graph = discover(tiny_architectures.build("phi3", dtype=torch.bfloat16), tiny_architectures.tokens())
    assert folds(graph) == folds(graph_of("phi3"))


def test_a_sample_that_is_too_short_is_an_error() -> None:
    with pytest.raises(SmoothQuantError, match="tokens >= 2"):
        discover(toy_block.Toy(), torch.zeros(1, 1, dtype=torch.int64))


# --- Readers that cannot follow a scale: there must be no group of the norm, and a refusal must name the reader. ---


def _copy_in_place(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros_like(x)
    buffer[:, 1:] = x[:, 1:]
    return buffer


READERS = {
    "residual": lambda block, x: x,
    "activation": lambda block, x: torch.tanh(x),
    "router": lambda block, x: torch.softmax(x, -1).sum(-1, keepdim=True),
    "statistics": lambda block, x: x.mean(-1, keepdim=True),
    "python number": lambda block, x: float(x.sum()) * 0.01,
    "alias": lambda block, x: x.data.mean(-1, keepdim=True),
    "view in place": lambda block, x: x.clone().add_(1.0),
    "copied": _copy_in_place,
    "weight read outside": lambda block, x: nn.functional.linear(x, block.spare.weight),
    "wrong order": lambda block, x: block.spare(x.flip(-1).cumsum(-1)),
    "mixed positions": lambda block, x: block.spare(torch.cat([x[:, :1], x[:, 1:].flip(-1)], 1)),
    "shared reader": lambda block, x: block.spare(x) + block.spare(x.roll(1, -1)),
    "whole numbers": lambda block, x: x.to(torch.int32).float(),
    "clamp": lambda block, x: block.spare(x.clamp(max=1.0)),
}


@pytest.mark.parametrize("reader", READERS)
def test_planted_reader_forbids_the_fold(reader: str) -> None:
    graph = discover(toy_block.Toy(READERS[reader]), toy_block.tokens())
    assert "layers.0.norm" not in {g.source for g in graph.groups}
    refusals = [r for r in graph.refusals if r.source == "layers.0.norm"]
    assert sum(r.channels for r in refusals) == 16
    assert all(r.reader.startswith("layers.0") and r.reason for r in refusals)
    # The other fold of the block stays.
    assert "layers.0.up" in {g.source for g in graph.groups}


def test_reader_of_some_channels_forbids_only_these() -> None:
    graph = discover(toy_block.Toy(lambda block, x: torch.tanh(x[..., 4:8]).sum()), toy_block.tokens())
    norm = group(graph, "layers.0.norm")
    assert (~norm.foldable).nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert norm.readers[0].channel_of.tolist() == [0, 1, 2, 3, -1, -1, -1, -1, *range(8, 16)]


FOLLOWERS = {
    "one more linear layer": lambda block, x: block.spare(x),
    "behind a permutation": lambda block, x: block.spare(x.flip(-1)),
    "behind a scale": lambda block, x: block.spare(torch.relu(-x / 3.0)),
    "behind weights over tokens": lambda block, x: block.spare(torch.full((6, 6), 0.1) @ x),
    "behind a product in place": lambda block, x: block.spare(x.clone().mul_(2.0)),
    "shape only": lambda block, x: torch.zeros_like(x),
}


@pytest.mark.parametrize("reader", FOLLOWERS)
def test_reader_that_follows_keeps_the_fold(reader: str) -> None:
    graph = discover(toy_block.Toy(FOLLOWERS[reader]), toy_block.tokens())
    readers = {r.name for r in group(graph, "layers.0.norm").readers}
    assert readers == {"layers.0.up"} | ({"layers.0.spare"} if reader != "shape only" else set())


def test_permuted_channels_are_followed() -> None:
    graph = discover(toy_block.Toy(FOLLOWERS["behind a permutation"]), toy_block.tokens())
    channels = {r.name: r.channel_of for r in group(graph, "layers.0.norm").readers}
    assert torch.equal(channels["layers.0.spare"], torch.arange(16).flip(0))


def test_module_that_did_not_run_forbids_the_fold() -> None:
    """An expert that no token of the sample reached could read every tensor that its block sees."""

    def expert(block: nn.Module, x: torch.Tensor) -> torch.Tensor | float:
        return block.spare(x) if len(x) > 100 else 0.0

    graph = discover(toy_block.Toy(expert), toy_block.tokens())
    assert graph.groups == ()
    reasons = {r.reason for r in graph.refusals if r.source == "layers.0.norm"}
    assert any("did not run" in reason for reason in reasons)


def test_unreached_module_elsewhere_forbids_nothing() -> None:
    toy = toy_block.Toy(FOLLOWERS["one more linear layer"])
    toy.vision = nn.Linear(16, 16)
    assert {g.source for g in discover(toy, toy_block.tokens()).groups} >= {"layers.0.norm", "layers.0.up"}


def test_two_runs_of_one_module_are_one_reader() -> None:
    toy = toy_block.Toy(FOLLOWERS["one more linear layer"])
    toy.layers[1] = toy.layers[0]
    graph = discover(toy, toy_block.tokens())
    assert {r.name for r in group(graph, "layers.0.norm").readers} == {"layers.0.up", "layers.0.spare"}


class Odd(nn.Module):
    """Scales by its weight's square, which is no rule of NORM_RULES."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True) * self.weight**2


def test_unproved_norm_is_no_source() -> None:
    toy = toy_block.Toy(FOLLOWERS["one more linear layer"])
    toy.layers[0].norm = Odd(16)
    graph = discover(toy, toy_block.tokens())
    assert {g.source for g in graph.groups} == {"layers.0.up", "layers.1.norm", "layers.1.up"}
    assert any("not proved" in r.reason for r in graph.refusals if r.source == "layers.0.norm")


class OwnLinear(nn.Module):
    """A linear layer of an unknown class; weight [in, out]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_linear_layers_are_recognised_by_what_they_compute() -> None:
    toy = toy_block.Toy(FOLLOWERS["one more linear layer"])
    toy.layers[0].spare = OwnLinear(16)
    graph = discover(toy, toy_block.tokens())
    assert graph.linear("layers.0.spare").transposed
    assert "layers.0.spare" in {r.name for r in group(graph, "layers.0.norm").readers}


# --- No table of architectures ---

ROOT = Path(__file__).parent.parent

# First words of the names; two of them are English words.
NAMES = {re.split(r"[-\d.]", name)[0] for name in tiny_architectures.ZOO} - {"opt", "seed"}

# vLLM reorders BLOOM's tensors by their name, and it ties Cohere's head: facts about vLLM, in tables of format/.
ALLOWED = {
    "config.py": {"bloom", "cohere"},
    "linear.py": {"bloom"},
    "loading.py": {"bloom", "mamba"},
    "linears.py": {"mamba"},
    "chat.py": {"gpt"},
    "claims.py": {"llama", "qwen", "smollm"},
}  # ShareGPT calls the assistant "gpt"; the first mixer of that name is known by its layers; claims: measured models


def _words(path: Path) -> Iterator[str]:
    """Every word in the identifiers and strings of a file, except its docstrings and comments."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(getattr(node, field, None), str):
                yield from re.findall(r"[A-Z]?[a-z]+|[A-Z]+", getattr(node, field))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"[A-Za-z]+", node.value)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("calibration/**/*.py")) + sorted(ROOT.glob("vllm_smoothquant/**/*.py"))
)
def test_no_architecture_is_named_in_code(path: Path) -> None:
    assert {word.lower() for word in _words(path)} & NAMES <= ALLOWED.get(path.name, set())
