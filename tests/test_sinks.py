"""A sink token is named with the layers that read it; a model without sinks has none."""

import json
import math

import pytest
import torch

from calibration.observation.sinks import TIMES, name_sinks, watching_peaks
from tests.helpers import tiny_architectures, tiny_checkpoints


def find_sinks(model, shared_input_groups, ids):
    readers = {names[0]: names for names in shared_input_groups}
    with torch.no_grad(), watching_peaks(model, readers) as peaks:
        model(ids)
    return name_sinks(peaks, readers, ids, tiny_checkpoints.tokenizer())


def test_the_token_and_the_layers_are_named():
    model = tiny_architectures.build("llama")
    ids = torch.randint(30, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    groups = [["model.layers.0.mlp.down_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]]
    assert find_sinks(model, groups, ids) == []

    def add_outlier(module, args):
        x = args[0].clone()
        x[:, 0, 5] = 1000 * x.abs().max()
        return (x,)

    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(add_outlier)
    ids[:, 0] = 70
    (sink,) = find_sinks(model, groups, ids)
    handle.remove()
    assert sink["layers"] == ["model.layers.0.mlp.down_proj"]
    assert sink["times_median"] > TIMES
    assert (sink["first_token"], sink["tokens"]) == (1.0, [tiny_checkpoints.tokenizer().decode([70])])


def test_an_input_that_is_mostly_zero_has_no_sink():
    """Its median peak is zero, and a multiple of zero would be infinite, which JSON cannot hold."""
    peaks = {"a": torch.tensor([[0.0, 0.0, 5.0]])}
    assert name_sinks(peaks, {"a": ["a"]}, torch.tensor([[1, 2, 3]]), tiny_checkpoints.tokenizer()) == []


@pytest.mark.parametrize("median", [1e-45, 1e-38, 1e-30])
def test_a_median_of_almost_zero_gives_a_finite_multiple(median):
    """Such as that of a layer whose SiLU gates are at -90 for most tokens. float32 has no 3e38 / 1e-45."""
    peak = torch.tensor([[median, median, median, 3e38]])
    (sink,) = name_sinks({"a": peak}, {"a": ["a"]}, torch.tensor([[5, 6, 7, 8]]), tiny_checkpoints.tokenizer())
    json.dumps(sink, allow_nan=False)
    assert math.isclose(sink["times_median"], float(peak[0, 3]) / float(peak[0, 0]))
