"""Models for embeddings, rewards and classes: loaded by their own class, heads and pooling carried, served alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from calibration.checkpoint.verify import verify
from calibration.pipeline import calibrate
from tests.helpers import engine, tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.errors import SmoothQuantError

OPTIONS = {"samples": 8, "seq_len": 32, "quiet": True}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 50, 60, 70], [9, 8, 7], [200, 100, 50, 25, 12]]
# Name -> (architecture of the zoo, number of labels); no labels: an embedding model without a head.
MODELS = {
    "embedding": ("qwen3", 0),
    "tied": ("llama-tied", 0),
    "headless": ("mistral", 0),
    "reward": ("llama", 1),
    "classes": ("qwen2", 32),
}


def save(name: str, folder: Path) -> Path:
    architecture, labels = MODELS[name]
    tokenizer = tiny_checkpoints.tokenizer()
    if labels:
        config = tiny_architectures.config(architecture)
        config.num_labels = labels
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        tiny_architectures.add_outliers(model, torch.Generator().manual_seed(0))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    else:
        model = tiny_architectures.build(architecture).model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name == "embedding":
        tiny_checkpoints.save_pooling(folder, "lasttoken", tiny_architectures.HIDDEN)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """(source, checkpoint) of a model, made by the first call."""
    root = tmp_path_factory.mktemp("pooling")
    text = tiny_checkpoints.save_text(root / "text.jsonl")

    def get(name: str) -> tuple[Path, Path]:
        source, checkpoint = root / name, root / f"{name}-int8"
        if not checkpoint.exists():
            calibrate(str(save(name, source)), checkpoint, dataset=str(text), **OPTIONS)
        return source, checkpoint

    return get


def answers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of each prompt: the logits, or the last hidden state of length 1."""
    found = []
    for ids in PROMPTS:
        with torch.no_grad():
            output = model(torch.tensor([ids]))
        logits = getattr(output, "logits", None)
        last = None if logits is not None else output.last_hidden_state[0, -1]
        found.append(logits[0] if last is None else torch.nn.functional.normalize(last, dim=0))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_model_keeps_its_class_and_its_files(name: str, folders) -> None:
    source, checkpoint = folders(name)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, checkpoint)]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    record = json.loads((checkpoint / "smoothquant.json").read_text())
    assert len(record["quantized"]) == 14
    assert list(record["kept"]) == (["score"] if MODELS[name][1] else [])
    assert not record["rotation"]["rotated"]
    for file in ("modules.json", "1_Pooling/config.json") if name == "embedding" else ():
        assert (checkpoint / file).read_bytes() == (source / file).read_bytes()
    assert verify(checkpoint).faults == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "grid"}, "--alpha grid: expected a model with an output head"),
        ({"alpha": "learned"}, "--alpha learned: expected a model with an output head"),
        ({"budget_ppl": 0.01, "max_fallback": 0.5}, "--budget-ppl: expected a model with an output head"),
        ({"rotation": "always"}, "--rotation always.*no output head"),
        ({"quantize_lm_head": True}, "--quantize-lm-head: expected a model with an output head"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_needs_an_output_head_is_refused(options, message, folders, tmp_path) -> None:
    source, _ = folders("reward")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    with pytest.raises(SmoothQuantError, match=message):
        calibrate(str(source), tmp_path / "out", dataset=str(text), **OPTIONS | options)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.slow
def test_vllm_serves_them_like_the_reference(folders) -> None:
    """`--runner pooling` finds pooling and head; rewards rank as the source's, embeddings point where they did."""
    pairs = {name: folders(name) for name in MODELS}
    served = serve([(str(checkpoint), not MODELS[name][1]) for name, (_, checkpoint) in pairs.items()])
    for (name, (source, checkpoint)), got in zip(pairs.items(), served, strict=True):
        expected = answers(load_reference(checkpoint))
        model_class = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
        original = answers(model_class.from_pretrained(source).eval())
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5), name  # sums in another order; a wrong row moves it by 0.1
        if name == "reward":
            assert torch.equal(torch.cat(got).argsort(), torch.cat(original).argsort())
        else:
            for a, b in zip(got, original, strict=True):
                assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.998, name


def serve(requests: list[tuple[str, bool]]) -> list[list[torch.Tensor]]:
    """The answers of vLLM to PROMPTS; requests: (folder, whether it is an embedding model)."""
    return engine.elsewhere(_answer, requests)


def _answer(request: tuple[str, bool]) -> list[torch.Tensor]:
    from vllm import LLM, PoolingParams

    folder, embeds = request
    llm = LLM(folder, runner="pooling", **engine.DEFAULTS | {"skip_tokenizer_init": False})
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    if embeds:
        return [torch.tensor(output.outputs.embedding) for output in llm.embed(prompts, use_tqdm=False)]
    plain = PoolingParams(use_activation=False)
    outputs = llm.classify(prompts, use_tqdm=False, pooling_params=plain)
    return [torch.tensor(output.outputs.probs) for output in outputs]
