"""Whole models through vLLM on a GPU: every scheme, with overrides and smoothed layers, in three modes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers import engine

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}},
    "graphs": {"enforce_eager": False},
}

# Compiling takes half a minute per model, so this has each kind of activations and of weights, not each combination.
COMPILED = [("channel", "token"), ("tensor", "tensor"), ("channel", "static")]

ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}

LLM = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_is_as_good_as_bfloat16(tmp_path: Path, mode: str) -> None:
    """At most 1.25 times as far from the float32 reference as the reference in bfloat16; 0.25 is for chance.

    The models of handmade_checkpoint have smoothed layers, an overridden layer and an ignored one. One engine per model
    in one process. One absmax couples a batch, so the only prompt is the batch; vLLM pads it from 60 to 64 for graphs.
    """
    from tests.helpers import handmade_checkpoint
    from tests.test_served_models import distance, prompts, reference

    ids = prompts((60,))
    folders = {
        scheme: handmade_checkpoint.checkpoint(tmp_path / "-".join(scheme), *scheme)
        for scheme in (handmade_checkpoint.SCHEMES if mode == "eager" else COMPILED)
    }
    answers = engine.logprobs_of(
        list(folders.values()), ids, vocabulary=True, environment=ENVIRONMENT, **LLM, **MODES[mode]
    )
    for (scheme, folder), answer in zip(folders.items(), answers, strict=True):
        exact = reference(folder, ids)
        ours = distance(answer, exact).mean()
        assert ours < 1.25 * distance(reference(folder, ids, torch.bfloat16), exact).mean(), scheme


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_serve_the_reference(tmp_path: Path) -> None:
    from tests.helpers import handmade_checkpoint
    from tests.test_served_models import distance, prompts, reference

    ids = prompts((40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static", overrides={})
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    served = engine.logprobs(
        folder, ids, vocabulary=True, environment=environment, tensor_parallel_size=2, **LLM, **MODES["graphs"]
    )
    exact = reference(folder, ids)
    assert distance(served, exact).mean() < 1.25 * distance(reference(folder, ids, torch.bfloat16), exact).mean()


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}], ids=["INT8", "4 bits"])
@pytest.mark.parametrize("mode", MODES)
def test_routed_experts_are_as_good_as_bfloat16(tmp_path: Path, mode: str, options: dict[str, int]) -> None:
    """Experts through vLLM's own choice of a kernel (Triton, Marlin)."""
    from calibration.pipeline import calibrate
    from tests.helpers import tiny_checkpoints
    from tests.test_served_models import distance, reference

    model, text = (
        tiny_checkpoints.save("qwen3-moe", tmp_path / "model"),
        tiny_checkpoints.save_text(tmp_path / "t.jsonl"),
    )
    size = {"samples": 4, "seq_len": tiny_checkpoints.SEQ_LEN, "quiet": True, "rotation": "none"}
    calibrate(str(model), tmp_path / "out", dataset=str(text), **size, **options)
    ids = [list(range(3, 43))]
    served = engine.logprobs(tmp_path / "out", ids, vocabulary=True, environment=ENVIRONMENT, **LLM, **MODES[mode])
    exact = reference(tmp_path / "out", ids)
    ours = distance([s[:, : e.shape[1]] for s, e in zip(served, exact, strict=True)], exact).mean()
    assert ours < 1.25 * distance(reference(tmp_path / "out", ids, torch.bfloat16), exact).mean()


def own_logprobs(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """float32 [n - 1]: log-probabilities of the tokens of a prompt at positions 1 to n - 1."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("cache", ["auto", "int8_per_token_head"])
def test_a_real_model_loses_no_more_than_its_reference(smollm2: Path, smollm2_int8: Path, cache: str) -> None:
    """SmolLM2 in the default scheme, token by token: as near to the reference as another rounding of the same model.

    Two roundings with independent errors are sqrt(2) times as far apart as each is from floating point. The rest of the
    bound is for 16 bits around the integers. The second case adds INT8 keys and values.
    """
    from tests.helpers.reference import load_reference

    ids = [list(range(100, 228)), list(range(5000, 5064))]
    served = engine.logprobs(smollm2_int8, ids, environment=ENVIRONMENT, kv_cache_dtype=cache, **LLM, **MODES["graphs"])
    reference = load_reference(smollm2_int8)
    exact = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for prompt, ours in zip(ids, served, strict=True):
        a, b = (own_logprobs(model, prompt) for model in (reference, exact))
        assert (ours - a).abs().mean() < 2 * (a - b).abs().mean()
