"""LoRA through vLLM's engine: an adapted adapter on a smoothed checkpoint, and the refusal of one of the source."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibration.checkpoint.adapter import adapt
from calibration.pipeline import calibrate
from tests.helpers import lora_engine, tiny_architectures, tiny_checkpoints
from tests.helpers.lora import merged, save_adapter

pytestmark = pytest.mark.slow

# Key-value heads that query heads share; biases in q, k and v; q/k/v and gate/up fused in the files.
ARCHITECTURES = ("llama", "qwen2", "phi3")
PROMPTS = torch.randint(3, 256, (64, 12), generator=torch.Generator().manual_seed(5)).tolist()
Answer = list[torch.Tensor | str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Answer]]:
    """Architecture -> its folder, and the answers without an adapter, with the adapted one, with the source's."""
    root = tmp_path_factory.mktemp("lora")
    text, requests = tiny_checkpoints.save_text(root / "text.jsonl"), []
    for name in ARCHITECTURES:
        folder = root / name
        model = tiny_architectures.build(name)
        with torch.no_grad():
            model.lm_head.weight *= 4  # or the distributions would be nearly uniform
        model.save_pretrained(folder / "source")
        tiny_checkpoints.tokenizer().save_pretrained(folder / "source")
        size = {"samples": 8, "seq_len": 32, "rotation": "always", "quiet": True}
        calibrate(str(folder / "source"), folder / "out", dataset=str(text), **size)
        adapter = save_adapter(folder / "adapter", model)
        adapt(adapter, folder / "out", folder / "adapted")
        adapters = [None, folder / "adapted", adapter]
        requests.append({"model": folder / "out", "prompts": PROMPTS, "adapters": adapters})
    answers = lora_engine.answers(requests)
    return {name: (root / name, answer) for name, answer in zip(ARCHITECTURES, answers, strict=True)}


def reference(folder: Path, adapter: Path | None) -> torch.Tensor:
    """Log-probabilities of the token after each prompt, [prompts, vocabulary], by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder / "source").eval()
    if adapter is not None:
        model = merged(model, adapter)
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor(PROMPTS)).logits[:, -1], dim=-1)


def divergence(expected: torch.Tensor, got: torch.Tensor | str) -> float:
    """Mean KL(expected || got) in nats."""
    assert isinstance(got, torch.Tensor), got
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapted_adapter_loses_no_more_than_the_checkpoint(
    name: str, served: dict[str, tuple[Path, Answer]]
) -> None:
    folder, (plain, adapted, _) = served[name]
    base, tuned = reference(folder, None), reference(folder, folder / "adapter")
    without = divergence(base, plain)
    assert divergence(tuned, adapted) <= 2 * without
    assert divergence(tuned, plain) > 20 * without  # the adapter changes more than rounding does


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_of_the_source_is_refused(name: str, served: dict[str, tuple[Path, Answer]]) -> None:
    folder, (_, _, refused) = served[name]
    assert isinstance(refused, str)
    assert f"smoothquant adapter {folder / 'adapter'} --checkpoint {folder / 'out'}" in refused
