"""Drafts that read hidden states, on our checkpoint: the source's guesses are as good as on the source."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from calibration.checkpoint.verify import verify
from calibration.inputs.model import load
from calibration.pipeline import calibrate
from tests.helpers import draft_engine, tiny_checkpoints, tiny_drafts
from vllm_smoothquant.format.errors import SmoothQuantError

OPTIONS = {"samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}
PROMPTS = [[5, 6, 7, 8], [100, 50, 25], [200, 201, 7, 9, 11]]
MTP = {"method": "mtp", "num_speculative_tokens": 1}


def quiet_qwen3(folder: Path) -> Path:
    """A Qwen3 whose next token is almost a function of the last one."""
    tiny_checkpoints.save("qwen3", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tiny_drafts.quieten(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_draft_guesses_as_on_the_source(tmp_path):
    """EAGLE and MTP. A draft with other weights, or with other hidden states, is right once in 256 guesses."""
    text = str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))
    sources = {
        "eagle": quiet_qwen3(tmp_path / "qwen3"), "mtp": tiny_drafts.save_mtp("ernie4.5-moe", tmp_path / "ernie")
    }  # fmt: skip
    eagle = {"method": "eagle", "model": str(tiny_drafts.save_eagle(sources["eagle"], tmp_path / "draft"))}
    drafts = {"eagle": eagle | {"num_speculative_tokens": 2}, "mtp": MTP}
    requests = []
    for name, source in sources.items():
        out = tmp_path / f"{name}-int8"
        calibrate(str(source), out, dataset=text, **OPTIONS)
        common = {"prompts": PROMPTS, "new": 24}
        requests += [{"model": str(folder), "speculative_config": drafts[name], **common} for folder in (source, out)]
        requests.append({"model": str(out), **common})
    spoken = iter(draft_engine.speak(requests))
    for name in sources:
        source, checkpoint, plain = next(spoken), next(spoken), next(spoken)
        shares = [sum(s[2] for s in by) / sum(s[1] for s in by) for by in (source, checkpoint)]
        assert min(shares) > 0.9, (name, shares)
        assert [new for new, _, _ in checkpoint] == [new for new, _, _ in plain], name


@pytest.mark.parametrize("name", ["glm4-moe", "deepseek-v3"])
def test_a_draft_of_any_size_of_the_model_is_carried(name, tmp_path):
    """transformers' classes name the layer of one size of the model (92 of GLM-4.5, 61 of DeepSeek-V3)."""
    source = tiny_drafts.save_mtp(name, tmp_path / "m")
    text = str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))
    manifest = calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    draft = {key: t for key, t in load_file(source / "model.safetensors").items() if ".layers.2." in key}
    assert draft
    assert manifest["carried"] == sorted(draft)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in draft.items())
    assert not verify(tmp_path / "out", str(source)).faults


def test_a_layer_after_the_draft_is_an_error(tmp_path):
    source = tiny_drafts.save_mtp("glm4-moe", tmp_path / "m")
    tensors = load_file(source / "model.safetensors") | {"model.layers.3.eh_proj.weight": torch.ones(4)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"model\.layers\.3\.eh_proj\.weight"):
        load(str(source))


def test_without_a_draft_in_the_configuration_its_layer_is_an_error(tmp_path):
    source = tiny_drafts.save_mtp("glm4-moe", tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SmoothQuantError, match=r"model\.layers\.2\."):
        load(str(source))
