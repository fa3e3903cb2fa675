"""Whole models through vLLM's engine against the plain reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import engine, handmade_checkpoint, tiny_architectures

NAN = float("nan")


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, handmade_checkpoint.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def reference(folder: Path, ids: list[list[int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    from tests.helpers.reference import load_reference

    model = load_reference(folder, dtype)
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([p])).logits[0, :-1].float(), -1) for p in ids]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Served:
    """folder: a checkpoint. ids: prompts. answer: the engine's log-probabilities of every position."""

    folder: Path
    ids: list[list[int]]
    answer: list[torch.Tensor]


LOADERS = ("bloom", "gpt2", "phi3")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Served]:
    """Every eager engine of this module, one after the other in one process."""
    root = tmp_path_factory.mktemp("served")
    requests: dict[Any, dict[str, Any]] = {}
    for weights, activations in handmade_checkpoint.SCHEMES:
        # With "tensor", one absmax couples all tokens of a batch, and vLLM forms the batches: one prompt is one batch.
        ids = prompts((60,) if activations == "tensor" else (40, 7, 100))
        folder = handmade_checkpoint.checkpoint(root / f"{weights}-{activations}", weights, activations)
        requests[weights, activations] = {"model": folder, "prompts": ids}
    for architecture in LOADERS:
        model = tiny_architectures.build(architecture)
        if architecture == "bloom":
            # vLLM's loader has no untied lm_head.
            model.config.tie_word_embeddings = True
            model.tie_weights()
        ids = [[token % tiny_architectures.VOCAB for token in prompt] for prompt in prompts((40, 7))]
        folder = handmade_checkpoint.from_model(root / architecture, model, "tensor", "static")
        requests[architecture] = {"model": folder, "prompts": ids}
    requests["bfloat16"] = requests["channel", "static"] | {"dtype": "bfloat16"}
    answers = engine.logprobs_of_all([request | {"vocabulary": True} for request in requests.values()])
    return {
        key: Served(request["model"], request["prompts"], answer)
        for (key, request), answer in zip(requests.items(), answers, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("scheme", handmade_checkpoint.SCHEMES, ids="-".join)
def test_an_engine_serves_the_reference(served: dict[Any, Served], scheme: tuple[str, str]) -> None:
    """float32, all log-probabilities of every position.

    Attention and norms differ in the order of float32 sums, which changes nearly every value by about 1e-6. A value
    within 1e-6 of a rounding tie may round the other way and change the rest of its prompt a little. The bound of the
    mean allows for that: it is a third of the error of weights per tensor instead of per channel (0.14), and a fiftieth
    of the error of another activation scheme (2.6).
    """
    one = served[scheme]
    error = distance(one.answer, reference(one.folder, one.ids))
    assert error.median() < 1e-4
    assert error.mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LOADERS)
def test_loaders_that_reorder_transpose_or_fuse(served: dict[Any, Served], architecture: str) -> None:
    """BLOOM's loader reorders query_key_value (bloom.py), GPT-2's transposes, Phi-3's checkpoint has fused layers.

    The scheme, per tensor and static, has the most scales. Random models whose logits differ by 0.5; bounds as above.
    """
    one = served[architecture]
    expected = reference(one.folder, one.ids)
    error = distance([s[:, : e.shape[1]] for s, e in zip(one.answer, expected, strict=True)], expected)
    assert error.median() < 1e-4
    assert error.mean() < 0.01


@pytest.mark.slow
def test_an_engine_in_bfloat16_is_as_good_as_bfloat16(served: dict[Any, Served]) -> None:
    """At most 1.25 times as far from the float32 reference as the reference in bfloat16; 0.25 is for chance."""
    one = served["bfloat16"]
    exact = reference(one.folder, one.ids)
    error = distance(one.answer, exact).mean()
    assert error < 1.25 * distance(reference(one.folder, one.ids, torch.bfloat16), exact).mean()


@pytest.mark.slow
def test_a_compiled_engine_serves_the_reference(tmp_path: Path) -> None:
    """torch.compile: both kinds of activations at once, since the overridden layer is dynamic. Bounds as above."""
    ids = prompts((40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static")
    error = distance(engine.logprobs(folder, ids, vocabulary=True, enforce_eager=False), reference(folder, ids))
    assert error.median() < 1e-4
    assert error.mean() < 0.05


@pytest.mark.slow
def test_two_ranks_serve_the_reference(tmp_path: Path) -> None:
    """Tensor parallel: scales and smoothing factors are split with their weights. Bounds as above.

    All layers are static, because two ranks measure two dynamic scales, one per half of a row: another rounding.
    """
    ids = prompts((40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static", overrides={})
    served = engine.logprobs(
        folder,
        ids,
        vocabulary=True,
        tensor_parallel_size=2,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    error = distance(served, reference(folder, ids))
    assert error.median() < 1e-4
    assert error.mean() < 0.05


@pytest.mark.slow
def test_an_engine_refuses_a_nan_in_one_line(tmp_path: Path) -> None:
    quantization = handmade_checkpoint.config("channel", "token")
    tensors = handmade_checkpoint.tensors(quantization)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = NAN
    folder = handmade_checkpoint.write(tmp_path / "model", quantization, tensors)
    with pytest.raises(engine.EngineFailedError) as caught:
        engine.logprobs(folder, [[1, 2]])
    line = (
        "model.layers.1.mlp.up_proj.weight_scale: expected finite values above zero, got nan; calibrate the model again"
    )
    assert any(written.endswith(line) for written in str(caught.value).splitlines())


@pytest.mark.slow
def test_an_engine_refuses_a_floating_point_model_in_one_line(tmp_path: Path) -> None:
    folder = handmade_checkpoint.write(tmp_path / "model", None, {"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(engine.EngineFailedError) as caught:
        engine.logprobs(folder, [[1, 2]], quantization="smoothquant")
    assert f"run `smoothquant calibrate {folder} -o OUT` first, then serve OUT" in str(caught.value)
