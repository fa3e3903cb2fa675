"""One flipped bit. `verify` detects each (test_verify.py); the server detects invalid scales and unknown words."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch

from tests.helpers import handmade_checkpoint
from tests.helpers.vllm_layers import STATIC_SMOOTHED, build_layer, load, tensors
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError


def flipped(value: float, bit: int) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))[0])


# One flip turns 1 into infinity and 1.5 into NaN; 2**-126 is the smallest normal number, one flip from zero.
@pytest.mark.parametrize("value", [1.0, 1.5, 0.0078125, 2.0**-126])
@pytest.mark.parametrize("tensor", ["weight_scale", "input_scale", "smoothing_factor"])
def test_a_flip_that_makes_a_scale_invalid_is_refused(one_rank: None, tensor: str, value: float) -> None:
    refused = set()
    for bit in range(32):
        damaged = flipped(value, bit)
        layer = build_layer("o_proj", config := one_layer(), torch.float32)
        shards = tensors("o_proj", config)
        shards[0][tensor] = torch.full_like(shards[0][tensor], value)
        shards[0][tensor].view(-1)[0] = damaged
        if math.isfinite(damaged) and damaged > 0:
            load(layer, "o_proj", shards)
            continue
        refused.add(bit)
        with pytest.raises(SmoothQuantError, match=rf"o_proj\.{tensor}: expected finite values above zero"):
            load(layer, "o_proj", shards)
    assert 31 in refused  # the sign
    assert (30 in refused) == (value in (1.0, 1.5))


def one_layer() -> CheckpointConfig:
    return CheckpointConfig(
        input_activations=STATIC_SMOOTHED.input_activations, smoothed=frozenset(["model.layers.0.o_proj"])
    )


def test_a_flip_in_the_configuration_is_refused_or_without_effect(tmp_path: Path) -> None:
    """Every bit of quantization_config. If a name in `ignore` changes, loading detects the layer in floating point."""
    quantization = handmade_checkpoint.config("channel", "static")
    folder = handmade_checkpoint.write(tmp_path / "model", quantization, handmade_checkpoint.tensors(quantization))
    text = json.dumps(quantization.to_dict()).encode()
    accepted = 0
    for bit in range(8 * len(text)):
        data = bytearray(text)
        data[bit // 8] ^= 1 << bit % 8
        try:
            quantization_config = json.loads(bytes(data))
        except ValueError:
            continue  # vLLM reads config.json before it calls the plugin
        try:
            config = SmoothQuantVllmConfig.from_config(quantization_config)
            config.maybe_update_config(str(folder))
        except SmoothQuantError:
            continue
        accepted += 1
        assert config.config is not None
        same = {"smoothed", "overrides", "weights", "input_activations"}
        assert all(getattr(config.config, key) == getattr(quantization, key) for key in same)
        assert len(config.config.ignore - quantization.ignore) <= 1
    # The accepted flips turn spaces into other spaces, or change letters of the names in `ignore`.
    assert accepted < 8 * sum(map(len, quantization.ignore)) + 8 * text.count(b" ")
