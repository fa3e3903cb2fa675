"""An isolated block gets the same inputs as in the whole model, bit for bit; if it cannot, the whole model runs."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from calibration.discovery.linears import choose_linears
from calibration.inputs.text import Samples
from calibration.observation.absmax import observe_absmax, watching_absmax
from calibration.observation.observe import BY_BLOCKS, observe_samples
from calibration.observation.resume import temporary_store
from calibration.running import precision
from tests.helpers import tiny_architectures

# One model for each way in which blocks depend on what is around them: masks and positions that differ between blocks,
# tuples, recurrent and hybrid blocks, routed experts, scaled embeddings, projections around the blocks.
FAMILIES = (
    "llama", "gemma3", "gpt-oss", "opt-350m", "bloom", "gpt-neox", "falcon-40b", "qwen3-moe", "qwen3-next",
    "deepseek-v3", "phi", "bamba", "cohere", "gpt2",
)  # fmt: skip


def samples(count: int = 10, length: int = 24) -> torch.Tensor:
    return torch.randint(3, tiny_architectures.VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


def observe(model, names, peaks_of, quiet=False):
    with temporary_store() as store:
        return observe_samples(model, names, peaks_of, Samples(samples(), "", "", 0), store, quiet=quiet)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16 in float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_gives_the_absmax_of_the_whole_model_bit_for_bit(name, arithmetic, monkeypatch):
    monkeypatch.setitem(precision._NATIVE_ON_CPU, torch.bfloat16, lambda: arithmetic == "bfloat16")
    model = tiny_architectures.build(name)
    if arithmetic != "float32":
        for parameter in model.parameters():  # not .to(dtype): buffers are loaded in float32
            parameter.data = parameter.data.bfloat16()
    names, _ = choose_linears(model, frozenset())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    whole = observe_absmax(model, names, samples())
    absmax, _, passes = observe(model, names, names[:1], quiet=True)
    assert passes == BY_BLOCKS
    assert all(torch.equal(absmax[layer], whole[layer]) for layer in names)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_head_is_observed_after_the_last_block():
    model = tiny_architectures.build("llama")
    names, _ = choose_linears(model, frozenset(), lm_head=True)
    whole = observe_absmax(model, names, samples())
    absmax, _, passes = observe(model, names, names[:1], quiet=True)
    assert passes == BY_BLOCKS
    assert torch.equal(absmax["lm_head"], whole["lm_head"])


class Stack(nn.Module):
    """Three blocks that `flow` runs; called like a transformers model."""

    def __init__(self, flow, block=lambda: nn.Linear(16, 16)) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(tiny_architectures.VOCAB, 16)
            self.layers = nn.ModuleList(block() for _ in range(3))
        self.flow = flow

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self.flow(self.embed(input_ids), self.layers)


def twice(x, layers):
    for layer in (*layers, *layers):
        x = layer(x).tanh()
    return x


def skip_ahead(x, layers):
    """The last block adds the output of the first, two blocks before."""
    first = layers[0](x)
    return layers[2](layers[1](first).tanh() + first)


def one_more_layer(x, layers):
    """A layer of the last block runs only if the first block ran in the same pass."""
    layers[0].ran = False
    for layer in layers:
        x = layer(x)
    if layers[0].ran:
        layers[2].more(x)
    return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran = True
        return self.linear(x)


@pytest.mark.parametrize("flow", [twice, skip_ahead])
def test_blocks_that_cannot_run_isolated_run_in_the_whole_model_with_the_reason(flow, capsys):
    model = Stack(flow)
    names = [f"layers.{i}" for i in range(3)]
    absmax, _, passes = observe(model, names, names)
    assert passes.startswith("whole model: ")
    assert "observe: not block by block but the whole model: " in capsys.readouterr().err
    whole = observe_absmax(model, names, samples())
    assert all(torch.equal(absmax[name], whole[name]) for name in names)


def test_a_layer_that_an_isolated_block_does_not_reach_is_observed_in_the_whole_model():
    model = Stack(one_more_layer, Block)
    names = [f"layers.{i}.linear" for i in range(3)] + ["layers.2.more"]
    absmax, _, passes = observe(model, names, names, quiet=True)
    assert passes == "whole model: layers.2: isolated, layers.2.more gets another input"
    whole = observe_absmax(model, names, samples())
    assert all(torch.equal(absmax[name], whole[name]) for name in names)


class OnDevice(torch.Tensor):
    """A CPU tensor that behaves like one on another device: no operation takes both, and .cpu() copies it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        assert all(type(a) is cls for a in args if isinstance(a, torch.Tensor)), "tensors on different devices"
        return super().__torch_function__(function, types, args, kwargs)


def test_passes_of_the_whole_model_resume_on_another_device_than_the_cpu(monkeypatch):
    """Absmax of finished passes comes from files, and therefore is on the CPU."""
    model, names = Stack(twice), ["layers.1"]

    @contextmanager
    def on_device(model, names):
        with watching_absmax(model, names) as absmax:
            yield (maxima := {})
        maxima |= {name: value.as_subclass(OnDevice) for name, value in absmax.items()}

    monkeypatch.setattr("calibration.observation.observe.watching_absmax", on_device)
    with temporary_store() as store:
        finished = observe_absmax(model, names, samples()[:4])
        store.save("pass", 0, finished)
        absmax, _, _ = observe_samples(model, names, names, Samples(samples(), "", "", 0), store, quiet=True)
    assert torch.equal(absmax["layers.1"], observe_absmax(model, names, samples())["layers.1"])
