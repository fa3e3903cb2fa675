"""tests/helpers/reference.py: it loads every tensor, invents none, and computes with the stored values."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import handmade_checkpoint, tiny_architectures
from tests.helpers.reference import ReferenceLinear, load_reference
from vllm_smoothquant.format.errors import SmoothQuantError


def edit(folder: Path, **changes: torch.Tensor | None) -> Path:
    """The handmade checkpoint with some tensors replaced, or removed where None."""
    quantization = handmade_checkpoint.config("channel", "token")
    tensors = {**handmade_checkpoint.tensors(quantization), **changes}
    return handmade_checkpoint.write(
        folder, quantization, {n: t for n, t in tensors.items() if t is not None}, shards=2
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", None, "model.norm.weight: expected a tensor in the checkpoint, got none"),
        ("lm_head.weight", None, "lm_head.weight: expected a tensor in the checkpoint, got none"),
        ("model.layers.0.self_attn.q_proj.bias", None, "q_proj.bias: expected a tensor in the checkpoint"),
        ("model.layers.9.mlp.up_proj.bias", torch.zeros(4), "up_proj.bias: expected a tensor in the model, got none"),
        ("model.norm.weight", torch.ones(5), "model.norm.weight"),
        ("model.layers.0.mlp.up_proj.weight_scale", None, "up_proj.weight_scale: expected F32 [256, 1], got no such"),
        ("model.layers.9.fc.weight", torch.zeros(4, 4, dtype=torch.int8), "fc.weight_scale: expected F32 [4, 1]"),
    ],
)
def test_a_missing_or_extra_tensor_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(SmoothQuantError) as error:
        load_reference(edit(tmp_path / "model", **{name: tensor}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quantised_layer_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    extra = {
        "model.nowhere.weight": torch.zeros(4, 4, dtype=torch.int8),
        "model.nowhere.weight_scale": torch.ones(4, 1),
    }
    with pytest.raises(SmoothQuantError, match="nowhere"):
        load_reference(edit(tmp_path / "model", **extra))


def test_a_floating_point_model_is_refused(tmp_path: Path) -> None:
    folder = handmade_checkpoint.write(tmp_path / "model", None, {"model.norm.weight": torch.ones(4)})
    with pytest.raises(SmoothQuantError, match="run `smoothquant calibrate"):
        load_reference(folder)


def test_a_folder_without_weight_files_is_refused(tmp_path: Path) -> None:
    folder = handmade_checkpoint.write(
        tmp_path / "model", handmade_checkpoint.config("channel", "token"), {"a": torch.ones(1)}
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(SmoothQuantError, match="expected safetensors files"):
        load_reference(folder)


def test_scales_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = load_reference(handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static"), torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, ReferenceLinear)]
    assert len(layers) == 13  # 14 linear layers, of which one is ignored
    for layer in layers:
        assert {t.dtype for t in layer.tensors.values()} == {torch.int8, torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "gpt2", "phi3"])
def test_the_reference_is_close_to_the_floating_point_model(tmp_path: Path, architecture: str) -> None:
    """INT8 by channel and token changes these logits by a few percent; a misread layer changes them completely."""
    model = tiny_architectures.build(architecture).eval()
    folder = handmade_checkpoint.from_model(tmp_path / "model", model, "channel", "token")
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        exact, ours = model(ids).logits, load_reference(folder)(ids).logits
    assert 0 < (ours - exact).norm() < 0.1 * exact.norm()
