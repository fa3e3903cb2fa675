"""The model card that calibrate writes, and its upload, with a hub that is not there."""

import json

import pytest
from huggingface_hub import ModelCard

from calibration.checkpoint import model_card
from calibration.checkpoint.convert import convert
from calibration.checkpoint.verify import verify
from calibration.pipeline import calibrate
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.files import MANIFEST

SOURCE_CARD = (
    "---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\nlanguage: [en, fr]\ntags: [x]\n---\n# Source\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_checkpoints.save("llama", tmp_path_factory.mktemp("card") / "model")
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


@pytest.fixture(scope="module")
def text(model):
    return tiny_checkpoints.save_text(model.parent / "my-secret-notes.jsonl")


@pytest.fixture(scope="module")
def checkpoint(model, text):
    options = {"activations": "static", "alpha": "auto", "max_fallback": 0.2}
    calibrate(str(model), model.parent / "out", dataset=str(text), samples=4, seq_len=32, quiet=True, **options)
    return model.parent / "out"


def test_metadata_as_the_hub_reads_it_and_the_licence_carried_over(checkpoint):
    data = ModelCard.load(checkpoint / model_card.CARD).data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "house"
    assert data["language"] == ["en", "fr"]
    assert data["tags"] == model_card.TAGS
    assert data["library_name"] == "vllm"
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data  # a folder is no model of the hub


def test_it_says_what_the_manifest_says_and_not_where_things_lay(checkpoint, model):
    said = (checkpoint / model_card.CARD).read_text()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert f"| linear layers in INT8 | {len(manifest['quantized'])} |" in said
    assert "fixed by calibration" in said
    assert "4 x 32 tokens of my-secret-notes.jsonl" in said
    assert f"{manifest['gate']['logits']['change']:.1e}" in said
    assert str(model.parent) not in said
    assert "--quantization smoothquant" in said


def test_the_same_manifest_gives_the_same_card_and_verify_does_not_mind_another(checkpoint, tmp_path):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    model_card.write(tmp_path, manifest)
    assert (tmp_path / model_card.CARD).read_bytes() == (checkpoint / model_card.CARD).read_bytes()
    assert model_card.CARD not in manifest["files"]
    assert not verify(checkpoint).faults


def test_models_and_data_of_the_hub_are_named(checkpoint, tmp_path, monkeypatch):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["source"]["model"] = "someone/a-model"
    manifest["calibration"]["dataset"] = "someone/data:part@train"

    def nowhere(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(model_card, "hf_hub_download", nowhere)
    model_card.write(tmp_path, manifest)
    loaded = ModelCard.load(tmp_path / model_card.CARD)
    assert loaded.data.base_model == "someone/a-model"
    assert loaded.data.to_dict()["base_model_relation"] == "quantized"
    assert loaded.data.datasets == ["someone/data"]
    assert "names no licence" in loaded.text


def test_a_converted_checkpoint_says_how_that_one_is_served(checkpoint, model, text, tmp_path):
    calibrate(str(model), tmp_path / "ours", dataset=str(text), samples=4, seq_len=32, quiet=True)
    convert(tmp_path / "ours", tmp_path / "out", "compressed-tensors")
    said = (tmp_path / "out" / model_card.CARD).read_text()
    assert "needs no plugin" in said
    assert "one scale per token" in said
