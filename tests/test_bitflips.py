"""One flipped bit: `verify` sees each (test_verify.py); the server sees what makes a scale none or a word unknown."""

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


# One flip makes 1 infinite and 1.5 NaN; 2**-126 is the smallest normal number, two flips from zero.
@pytest.mark.parametrize("value", [1.0, 1.5, 0.0078125, 2.0**-126])
@pytest.mark.parametrize("tensor", ["weight_scale", "input_scale", "smoothing_factor"])
def test_a_flip_in_a_scale_is_refused_where_it_is_no_scale_any_more(
    one_rank: None,
    tensor: str,
    value: float,
) -> None:
    refused = set()
    for bit in range(32):
        now = flipped(value, bit)
        layer = build_layer("o_proj", config := one_layer(), torch.float32)
        found = tensors("o_proj", config)
        found[0][tensor] = torch.full_like(found[0][tensor], value)
        found[0][tensor].view(-1)[0] = now
        if math.isfinite(now) and now > 0:
            load(layer, "o_proj", found)
            continue
        refused.add(bit)
        with pytest.raises(SmoothQuantError, match=rf"o_proj\.{tensor}: expected finite values above zero"):
            load(layer, "o_proj", found)
    assert 31 in refused  # the sign
    assert (30 in refused) == (value in (1.0, 1.5))


def one_layer() -> CheckpointConfig:
    return CheckpointConfig(
        input_activations=STATIC_SMOOTHED.input_activations, smoothed=frozenset(["model.layers.0.o_proj"])
    )


def test_a_flip_in_the_configuration_is_refused_or_without_effect(tmp_path: Path) -> None:
    """Every bit of quantization_config. A name in `ignore` that changed leaves a float layer to be found at loading."""
    quantization = handmade_checkpoint.config("channel", "static")
    folder = handmade_checkpoint.write(tmp_path / "model", quantization, handmade_checkpoint.tensors(quantization))
    text = json.dumps(quantization.to_dict()).encode()
    accepted = 0
    for place in range(8 * len(text)):
        data = bytearray(text)
        data[place // 8] ^= 1 << place % 8
        try:
            said = json.loads(bytes(data))
        except ValueError:
            continue  # vLLM reads config.json before it knows of us
        try:
            config = SmoothQuantVllmConfig.from_config(said)
            config.maybe_update_config(str(folder))
        except SmoothQuantError:
            continue
        accepted += 1
        assert config.config is not None
        same = {"smoothed", "overrides", "weights", "input_activations"}
        assert all(getattr(config.config, key) == getattr(quantization, key) for key in same)
        assert len(config.config.ignore - quantization.ignore) <= 1
    # Spaces that became other spaces, and letters of the names in `ignore`.
    assert accepted < 8 * sum(map(len, quantization.ignore)) + 8 * text.count(b" ")
