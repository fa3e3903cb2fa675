"""`smoothquant adapter`: adapters give on a checkpoint what they gave on its source; all others are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.checkpoint import transforms
from calibration.checkpoint.adapter import adapt
from calibration.pipeline import smooth
from tests.helpers import tiny_architectures, tiny_checkpoints
from tests.helpers.lora import merged, save_adapter
from vllm_smoothquant import adapters
from vllm_smoothquant.format.errors import SmoothQuantError

# GQA; biases in q, k and v; fused q/k/v and gate/up; Conv1D; every layer with a bias; a squared ReLU.
ARCHITECTURES = ("llama", "qwen2", "phi3", "gpt2", "opt", "arcee", "gemma")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("adapters"))


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_architectures.tokens(9), use_cache=False).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_gives_on_the_smoothed_model_what_it_gave_on_the_source(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The smoothed model is in floating point, so that nothing but the adapter can differ."""
    source, text = tiny_checkpoints.save(name, tmp_path / "source"), tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    smooth(str(source), tmp_path / "smoothed", dataset=str(text), samples=8, seq_len=32, quiet=True)
    adapter = save_adapter(tmp_path / "adapter", tiny_architectures.build(name), **options)
    result = adapt(adapter, tmp_path / "smoothed", tmp_path / "adapted")
    assert result["error"] < 1e-5
    assert result["layers"]
    model, smoothed = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("source", "smoothed"))
    plain, expected = logits(model), logits(merged(model, adapter))
    assert change(plain, expected) > 0.05  # the adapter does something
    assert change(logits(merged(smoothed, tmp_path / "adapted")), expected) < 1e-4
    smoothed = AutoModelForCausalLM.from_pretrained(tmp_path / "smoothed")
    assert change(logits(merged(smoothed, adapter)), expected) > 0.01  # as it was, it does not fit


def test_every_folded_factor_is_stored_exactly(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert len(config["transforms"]["smoothing"]) == 64
    factors = transforms.read(folder).modules
    source, stored = (
        load_file(next(path.glob("model*.safetensors"))) for path in (tiny_checkpoints.source(folder), folder)
    )
    norm = "model.layers.0.input_layernorm"
    product = stored[f"{norm}.weight"] * factors[norm]["output_factor"]
    torch.testing.assert_close(product, source[f"{norm}.weight"], rtol=2**-22, atol=0)  # two roundings
    for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}"
        weight = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]
        s, r = (factors[name].get(kind, torch.ones(())) for kind in (transforms.INPUT_FACTOR, transforms.OUTPUT_FACTOR))
        weight = weight / s * (r[:, None] if r.dim() else r)
        step = stored[f"{name}.weight_scale"] / s * (r[:, None] if r.dim() else r)
        assert ((weight - source[f"{name}.weight"]).abs() <= 0.5001 * step).all()


def test_a_checkpoint_without_folded_factors_takes_adapters_as_they_are(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama", no_smoothing=True)
    assert "transforms" not in json.loads((folder / "config.json").read_text())["quantization_config"]
    adapter = save_adapter(tmp_path / "adapter", tiny_architectures.build("llama"))
    with pytest.raises(SmoothQuantError, match="as it is"):
        adapt(adapter, folder, tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.down_proj"]),
        ("smoothquant", {"smoothing": "0" * 64}),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    key: str, value: object, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_architectures.build("llama"), **{key: value})
    with pytest.raises(SmoothQuantError, match=key):
        adapt(adapter, checkpoint("llama"), tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_an_adapter_of_another_model_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", tiny_architectures.build("opt"))
    with pytest.raises(SmoothQuantError, match="a linear layer of the checkpoint"):
        adapt(other, checkpoint("llama"), tmp_path / "adapted")
    adapter = save_adapter(tmp_path / "adapter", tiny_architectures.build("llama"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    narrow = {name: t[:, :64] if name.endswith("q_proj.lora_A.weight") else t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in narrow.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(SmoothQuantError, match="128 channels"):
        adapt(adapter, checkpoint("llama"), tmp_path / "adapted")


@pytest.mark.parametrize("damage", ["unpaired", "unknown", "nan", "missing"])
def test_damaged_tensors_are_refused(damage: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_architectures.build("llama"))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    if damage == "unpaired":
        del tensors[name]
    elif damage == "unknown":
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(4)
    elif damage == "nan":
        tensors[name][0, 0] = torch.nan
    path.unlink()
    if damage != "missing":
        save_file(tensors, path)
    with pytest.raises(SmoothQuantError):
        adapt(adapter, checkpoint("llama"), tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


# --- The plugin's refusal ---


def _open_as_vllm(path: Path) -> Any:
    """What vLLM's PEFTHelper does with an adapter: it reads adapter_config.json."""
    from vllm.lora.peft_helper import PEFTHelper

    return PEFTHelper.from_local_dir(str(path), 256)


def test_vllm_cannot_load_an_adapter_of_the_source(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    adapter = save_adapter(tmp_path / "adapter", tiny_architectures.build("llama"))
    adapt(adapter, folder, tmp_path / "adapted")
    smoothing = json.loads((folder / "config.json").read_text())["quantization_config"]["transforms"]["smoothing"]
    layer = nn.Linear(2, 2)
    adapters.watch(layer, smoothing, str(folder))
    with pytest.raises(SmoothQuantError, match=f"smoothquant adapter {adapter} --checkpoint {folder}"):
        _open_as_vllm(adapter)
    assert _open_as_vllm(tmp_path / "adapted").r == 8
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8  # everyone else may read the file
    del layer
    assert _open_as_vllm(adapter).r == 8  # the model is gone
    other = nn.Linear(2, 2)
    adapters.watch(other, "f" * 64, "OTHER")
    with pytest.raises(SmoothQuantError, match="another checkpoint"):
        _open_as_vllm(tmp_path / "adapted")
