"""Hybrids of attention with state-space layers, gated delta rules and short convolutions: what is INT8, and serving."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from calibration.pipeline import calibrate
from calibration.running.modules import LINEAR_TYPES, output_head
from calibration.running.products import make_linear
from tests.helpers import engine, tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format.config import CheckpointConfig

HYBRIDS = (
    "bamba", "falcon-h1", "granite-4-h", "nemotron-h", "mamba2", "lfm2", "qwen3-next", "qwen3.5", "olmo-hybrid",
)  # fmt: skip
# Those that vLLM's CPU backend serves in float32 as transformers computes them. Its kernel for gated delta rules takes
# bfloat16 alone, its short convolution is another than transformers', and it has dropped Bamba (docs/architectures.md).
SERVED = ("falcon-h1", "granite-4-h", "nemotron-h", "mamba2")
PROMPTS = [list(range(3, 40)), [5, 9, 200, 17]]
OPTIONS = {"samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[..., Path]:
    return tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("hybrids"))


@pytest.mark.parametrize("name", HYBRIDS)
def test_nearly_all_weights_become_integers(name: str, checkpoints) -> None:
    """The rest are gates with a few outputs, and what routes tokens."""
    record = json.loads((checkpoints(name) / "smoothquant.json").read_text())
    model = tiny_architectures.build(name)
    make_linear(model)
    head = output_head(model)
    sizes = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, LINEAR_TYPES) and m is not head}
    assert sum(sizes[layer] for layer in record["quantized"]) >= 0.99 * sum(sizes.values())


@pytest.mark.parametrize(
    ("prefix", "stored", "expected"),
    [
        ("model.layers.1.mixer.in_proj", ["model.layers.1.mamba.in_proj"], "model.layers.1.mamba.in_proj"),
        ("model.layers.0.short_conv.out_proj", ["model.layers.0.conv.out_proj"], "model.layers.0.conv.out_proj"),
        # The model has two blocks: number 3 is the second part of block 1.
        (
            "model.3.mixer.out_proj",
            ["model.layers.0.mamba.out_proj", "model.layers.1.mamba.out_proj"],
            "model.layers.1.mamba.out_proj",
        ),
        # Two layers of the block could be meant: nothing is guessed.
        (
            "model.layers.0.mixer.out_proj",
            ["model.layers.0.mamba.out_proj", "model.layers.0.attn.out_proj"],
            "model.layers.0.mixer.out_proj",
        ),
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"], "model.layers.0.mlp.down_proj"),
    ],
)
def test_a_part_of_a_block_may_have_another_name_in_vllm(prefix: str, stored: list[str], expected: str) -> None:
    config = SmoothQuantVllmConfig(CheckpointConfig())
    config.tensors = frozenset(f"{name}.weight" for name in stored)
    assert config.config is not None
    assert config._checkpoint_names(config.config, prefix) == [expected]


def test_what_a_tower_fuses_is_in_floating_point_if_its_parts_are() -> None:
    """Models of vLLM often do not say what their towers fuse."""
    parts = [f"vision_tower.layers.0.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    config = CheckpointConfig(ignore=frozenset(parts))
    assert SmoothQuantVllmConfig(config)._checkpoint_names(config, "vision_tower.layers.0.qkv_proj") == parts
    assert SmoothQuantVllmConfig(config)._checkpoint_names(config, "layers.0.qkv_proj") == ["layers.0.qkv_proj"]


def logprobs(model: torch.nn.Module) -> list[torch.Tensor]:
    found = []
    for ids in PROMPTS:
        with torch.no_grad():
            rows = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return found


@pytest.mark.slow
def test_vllm_serves_them_like_the_reference(checkpoints) -> None:
    """With factors at run time and static scales, which are lost where a layer is not known by its name.

    The bound is that of tests/test_vision.py: half of the rounding error, for a value near a tie.
    """
    folders = [checkpoints(name, alpha="auto", activations="static") for name in SERVED]
    for name, folder, answer in zip(SERVED, folders, engine.logprobs_of(folders, PROMPTS), strict=True):
        source = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoints.source(folder)).eval()
        expected, exact, got = (
            torch.cat(rows) for rows in (logprobs(load_reference(folder)), logprobs(source), answer)
        )
        assert float((got - expected).abs().mean()) < 0.5 * float((expected - exact).abs().mean()), name


@pytest.mark.slow
def test_two_ranks_cut_a_mixer_as_one_has_it(tmp_path) -> None:
    """vLLM copies the one group of states to each rank, so that its rows are cut in a way of their own.

    4-bit weights: their activations are not rounded, so that two ranks compute what one does. The static checkpoint has
    scales that no rank may cut; two ranks round a dynamic scale's halves otherwise, by up to the rounding error.
    """
    source = tiny_checkpoints.save("nemotron-h", tmp_path / "model")
    text = str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))
    exact = torch.cat(logprobs(transformers.AutoModelForCausalLM.from_pretrained(source).eval()))
    schemes = {"four": ({"bits": 4, "group_size": 32}, 0.01), "static": ({"activations": "static"}, 1.77)}
    for name, (options, share) in schemes.items():
        calibrate(str(source), tmp_path / name, dataset=text, **OPTIONS, **options)
        expected = torch.cat(logprobs(load_reference(tmp_path / name)))
        got = torch.cat(
            engine.logprobs(
                tmp_path / name, PROMPTS, tensor_parallel_size=2,
                environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            )
        )  # fmt: skip
        assert float((got - expected).abs().mean()) < share * float((expected - exact).abs().mean()), name
