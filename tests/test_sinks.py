"""A token that dwarfs the others is named; without one nothing is."""

import torch

from calibration.observation.sinks import TIMES, first_readers, name_sinks, watching_peaks
from tests.helpers import tiny_architectures, tiny_checkpoints


def find_sinks(model, inputs, ids):
    readers = first_readers(inputs)
    with torch.no_grad(), watching_peaks(model, readers) as peaks:
        model(ids)
    return name_sinks(peaks, readers, ids, tiny_checkpoints.tokenizer())


def test_the_token_and_the_layers_are_named():
    model = tiny_architectures.build("llama")
    ids = torch.randint(30, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    inputs = [["model.layers.0.mlp.down_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]]
    assert find_sinks(model, inputs, ids) == []

    def shout(module, args):
        x = args[0].clone()
        x[:, 0, 5] = 1000 * x.abs().max()
        return (x,)

    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(shout)
    ids[:, 0] = 70
    (sink,) = find_sinks(model, inputs, ids)
    handle.remove()
    assert sink["layers"] == ["model.layers.0.mlp.down_proj"]
    assert sink["times_median"] > TIMES
    assert (sink["first_token"], sink["tokens"]) == (1.0, [tiny_checkpoints.tokenizer().decode([70])])
