"""The model card that calibrate and convert write."""

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


def test_the_hub_can_read_the_metadata_and_the_licence_is_copied_from_the_source(checkpoint):
    data = ModelCard.load(checkpoint / model_card.CARD).data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "house"
    assert data["language"] == ["en", "fr"]
    assert data["tags"] == model_card.TAGS
    assert data["library_name"] == "vllm"
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data  # the source is a folder, not a model on the hub


def test_the_card_agrees_with_the_manifest_and_names_no_folder(checkpoint, model):
    card = (checkpoint / model_card.CARD).read_text()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert f"| linear layers in INT8 | {len(manifest['quantized'])} |" in card
    assert "fixed by calibration" in card
    assert "4 x 32 tokens of my-secret-notes.jsonl" in card
    assert f"{manifest['gate']['logits']['change']:.1e}" in card
    assert str(model.parent) not in card
    assert "--quantization smoothquant" in card


def test_the_same_manifest_gives_the_same_card_and_verify_does_not_check_it(checkpoint, tmp_path):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    model_card.write(tmp_path, manifest, checkpoint)
    assert (tmp_path / model_card.CARD).read_bytes() == (checkpoint / model_card.CARD).read_bytes()
    assert model_card.CARD not in manifest["files"]
    assert not verify(checkpoint).faults


def test_a_model_and_a_data_set_on_the_hub_are_named(checkpoint, tmp_path, monkeypatch):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["source"]["model"] = "someone/a-model"
    manifest["calibration"]["dataset"] = "someone/data:part@train"

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(model_card, "hf_hub_download", fail)
    model_card.write(tmp_path, manifest, manifest["source"]["model"])
    card = ModelCard.load(tmp_path / model_card.CARD)
    assert card.data.base_model == "someone/a-model"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.datasets == ["someone/data"]
    assert "names no licence" in card.text


def test_the_card_of_a_converted_checkpoint_says_how_to_serve_it(checkpoint, model, text, tmp_path):
    calibrate(str(model), tmp_path / "ours", dataset=str(text), samples=4, seq_len=32, quiet=True)
    convert(tmp_path / "ours", tmp_path / "out", "compressed-tensors")
    card = (tmp_path / "out" / model_card.CARD).read_text()
    assert "needs no plugin" in card
    assert "one scale per token" in card
