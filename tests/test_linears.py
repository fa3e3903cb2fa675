"""Which layers become INT8, decided before the first sample, and the reason for each that does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, MambaConfig, MambaForCausalLM

from calibration.discovery.discover import discover
from calibration.discovery.linears import NO_TEXT, REQUESTED, choose_layers, choose_linears, fused_layers
from calibration.pipeline import calibrate
from tests.helpers import tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError

OPTIONS: dict[str, Any] = {"samples": 8, "seq_len": 32, "quiet": True}


def chosen(name: str, *ignore: str, **options: bool) -> tuple[list[str], dict[str, str]]:
    model = tiny_architectures.build(name)
    return choose_layers(model, discover(model, tiny_architectures.tokens()), frozenset(ignore), **options)


# --- No expert, no convolution, no small head is taken for another ---


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bamba", "model.layers.0.mamba.in_proj"),
        ("bamba", "model.layers.0.mamba.out_proj"),
        ("qwen3-next", "model.layers.0.linear_attn.in_proj_qkvz"),
        ("qwen3-next", "model.layers.0.linear_attn.out_proj"),
        ("qwen3-next", "model.layers.0.mlp.shared_expert.down_proj"),
        ("qwen2-moe", "model.layers.0.mlp.shared_expert.up_proj"),
        ("glm4-moe", "model.layers.1.mlp.shared_experts.gate_proj"),
        ("deepseek-v3", "model.layers.1.mlp.shared_experts.down_proj"),
    ],
)
def test_convolutions_are_no_experts_and_shared_experts_are_plain_layers(name: str, layer: str) -> None:
    layers, in_float = chosen(name)
    assert layer in layers, in_float.get(layer)


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("deepseek-v2", "model.layers.0.self_attn.kv_b_proj", "MLA"),
        ("deepseek-v3", "model.layers.1.self_attn.kv_b_proj", "MLA"),
        ("phimoe", "model.layers.0.mlp.router", "4 x 128"),
        ("qwen2-moe", "model.layers.0.mlp.shared_expert_gate", "1 x 128"),
        ("llama", "lm_head", "language-model head"),
    ],
)
def test_what_vllm_needs_in_floating_point_stays_so(name: str, layer: str, why: str) -> None:
    layers, in_float = chosen(name)
    assert layer not in layers
    assert why in in_float[layer]


def test_a_model_that_vllm_serves_in_floating_point_only_is_refused_with_the_reason() -> None:
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with pytest.raises(SmoothQuantError, match="Mamba-1 mixer has no quantised layers"):
        choose_linears(model, frozenset())


def test_sizes_that_16_does_not_divide_become_int8() -> None:
    """Key-value heads of 40 rows: our kernels and Triton's take them."""
    model = tiny_architectures.build("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj = torch.nn.Linear(128, 40)
    layers, _ = choose_linears(model, frozenset())
    assert "model.layers.0.self_attn.k_proj" in layers


# --- What vLLM computes as one layer is treated alike ---


def test_layers_that_read_one_tensor_are_found_in_any_order() -> None:
    """DeepSeek runs q_b_proj between q_a_proj and kv_a_proj_with_mqa, which vLLM computes as one."""
    model = tiny_architectures.build("deepseek-v3")
    fused = fused_layers(discover(model, tiny_architectures.tokens()))
    prefix = "model.layers.0.self_attn"
    assert (f"{prefix}.q_a_proj", f"{prefix}.kv_a_proj_with_mqa") in fused


@pytest.mark.parametrize("name", ["falcon-7b", "gpt-j", "phi"])
def test_attention_and_mlp_of_a_parallel_block_are_not_one_layer(name: str) -> None:
    model = tiny_architectures.build(name)
    graph = discover(model, tiny_architectures.tokens())
    assert any(len({layer.rpartition(".")[0] for layer in names}) > 1 for names in graph.shared_input_groups)
    assert all(len({layer.rpartition(".")[0] for layer in names}) == 1 for names in fused_layers(graph))


@pytest.mark.parametrize("pattern", ["model.layers.0.self_attn.q_proj", "*.0.self_attn.k_proj", r"re:.*\.0\..*v_proj$"])
def test_an_ignored_layer_takes_those_along_that_vllm_fuses_with_it(pattern: str) -> None:
    layers, in_float = chosen("llama", pattern)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert not set(names) & set(layers)
    assert [in_float[name] for name in names].count(REQUESTED) == 1
    assert sum("vLLM computes it as one layer with" in in_float[name] for name in names) == 2
    assert "model.layers.1.self_attn.q_proj" in layers


@pytest.mark.parametrize("pattern", ["*.layers.9.*", "re:layers", "re:(", "q_proj", "model.layers.0"])
def test_a_pattern_that_fits_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(SmoothQuantError, match="--ignore"):
        choose_linears(tiny_architectures.build("llama"), frozenset({pattern}))


def test_ignoring_everything_says_so() -> None:
    with pytest.raises(SmoothQuantError, match="14 x asked for by --ignore"):
        choose_linears(tiny_architectures.build("llama"), frozenset({"*_proj"}))


# --- Towers ---


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64,
        "sliding_window": 16, "max_position_embeddings": 256,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    tokens = {"mm_tokens_per_image": 4, "boi_token_index": 250, "eoi_token_index": 251, "image_token_index": 252}
    folder = tmp_path_factory.mktemp("vision")
    config = Gemma3Config(text_config=text, vision_config=vision, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder / "m")
    tiny_checkpoints.tokenizer().save_pretrained(folder / "m")
    (folder / "m" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder / "m"


def test_a_tower_that_text_does_not_reach_stays_in_floating_point(
    vision_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    manifest = calibrate(str(vision_model), tmp_path / "out", dataset=str(text), **OPTIONS | {"quiet": False})
    tower = [name for name in manifest["kept"] if "vision" in name]
    assert tower
    assert {manifest["kept"][name] for name in tower} == {NO_TEXT}
    assert all("vision" in name or name == "lm_head" for name in manifest["kept"])
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    said = capsys.readouterr().err
    assert said.index(NO_TEXT) < said.index("4. observe")  # before the long work
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", *tower} <= set(ignore)
