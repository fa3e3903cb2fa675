"""A block run alone sees what it sees in the whole model, bit for bit; where it cannot, whole-model passes are run."""

import pytest
import torch
from torch import nn

from calibration.discovery.linears import choose_linears
from calibration.observation.absmax import observe_absmax
from calibration.observation.observe import BY_BLOCKS, observe_samples
from calibration.observation.resume import temporary_store
from calibration.running import precision
from tests.helpers import tiny_architectures

# One of each way to hand things from block to block: masks and positions of their own kind for each block, tuples,
# recurrent and hybrid blocks, routed experts, scaled embeddings, projections around the blocks.
FAMILIES = (
    "llama", "gemma3", "gpt-oss", "opt-350m", "bloom", "gpt-neox", "falcon-40b", "qwen3-moe", "qwen3-next",
    "deepseek-v3", "phi", "bamba", "cohere", "gpt2",
)  # fmt: skip


def samples(count: int = 10, length: int = 24) -> torch.Tensor:
    return torch.randint(3, tiny_architectures.VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


def observe_here(model, names, peaks_of, quiet=False):
    with temporary_store() as store:
        return observe_samples(model, names, peaks_of, samples(), store=store, quiet=quiet)


@pytest.mark.parametrize("how", ["float32", "bfloat16 in float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_is_the_whole_model_bit_for_bit(name, how, monkeypatch):
    monkeypatch.setitem(precision._NATIVE_ON_CPU, torch.bfloat16, lambda: how == "bfloat16")
    model = tiny_architectures.build(name)
    if how != "float32":
        for parameter in model.parameters():  # not .to(dtype): buffers are loaded in float32
            parameter.data = parameter.data.bfloat16()
    names, _ = choose_linears(model, frozenset())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = observe_absmax(model, names, samples())
    absmax, _, passes = observe_here(model, names, names[:1], quiet=True)
    assert passes == BY_BLOCKS
    assert all(torch.equal(absmax[layer], whole[layer]) for layer in names)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_head_is_observed_behind_the_last_block():
    model = tiny_architectures.build("llama")
    names, _ = choose_linears(model, frozenset(), lm_head=True)
    whole = observe_absmax(model, names, samples())
    absmax, _, passes = observe_here(model, names, names[:1], quiet=True)
    assert passes == BY_BLOCKS
    assert torch.equal(absmax["lm_head"], whole["lm_head"])


class Stack(nn.Module):
    """Blocks that `flow` runs as it likes; called like a transformers model."""

    def __init__(self, flow) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(tiny_architectures.VOCAB, 16)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.flow = flow

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.flow(self.embed(input_ids), self.layers)


def twice(x, layers):
    for layer in (*layers, *layers):
        x = layer(x).tanh()
    return x


def skip_ahead(x, layers):
    """The last block adds what the first one gave, two blocks before."""
    first = layers[0](x)
    return layers[2](layers[1](first).tanh() + first)


@pytest.mark.parametrize("flow", [twice, skip_ahead])
def test_blocks_that_cannot_run_alone_are_run_in_the_whole_model_and_it_is_said(flow, capsys):
    model = Stack(flow)
    names = [f"layers.{i}" for i in range(3)]
    absmax, _, passes = observe_here(model, names, names)
    assert passes.startswith("whole model: ")
    assert "observe: not block by block but the whole model: " in capsys.readouterr().err
    whole = observe_absmax(model, names, samples())
    assert all(torch.equal(absmax[name], whole[name]) for name in names)
