"""What lies beside the weights reaches the checkpoint unchanged, and nothing of a user's machine does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from calibration.checkpoint.verify import verify
from calibration.inputs.side_files import side_files
from calibration.pipeline import calibrate, smooth
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

OPTIONS: dict[str, Any] = {"samples": 8, "seq_len": 32, "quiet": True}


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))


def names(folder: Path) -> set[str]:
    return {key for path in folder.glob("*.safetensors") for key in safe_open(path, "pt").keys()}  # noqa: SIM118


SIDE_FILES = {
    "generation_config.json": '{"temperature": 0.9, "top_p": 0.6}',  # transformers refuses to write this
    "chat_template.jinja": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool.jinja": "{{ messages }}",
    "preprocessor_config.json": '{"image_processor_type": "SomeImageProcessor"}',
    "special_tokens_map.json": "{}",
    "modules.json": '[{"idx": 0, "path": "", "type": "T"}, {"idx": 1, "path": "1_Pooling", "type": "P"}]',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "config_sentence_transformers.json": '{"similarity_fn_name": "cosine"}',
    "LICENSE": "all rights",
}


@pytest.mark.parametrize("run", [calibrate, smooth])
def test_side_files_are_copied_byte_for_byte(run: Any, tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save("llama", tmp_path / "m")
    for name, content in SIDE_FILES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    mine = {"patients.json": "{}", "notes.txt": "mine", "trainer_state.json": "{}", "code.py": "print()"}
    for name, content in mine.items():
        (source / name).write_text(content)
    (source / "README.md").write_text("---\nlicense: other: foo\n---\n")  # no YAML; the card must not end the run
    manifest = run(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    for name in (*SIDE_FILES, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
        assert name in manifest["files"]
    assert not {path.name for path in (tmp_path / "out").rglob("*")} & mine.keys()
    if run is calibrate:
        assert not verify(tmp_path / "out", str(source)).faults
        (tmp_path / "out" / "1_Pooling" / "config.json").write_text("{}")
        assert "1_Pooling" in str(verify(tmp_path / "out").faults[0])


def test_keys_of_the_config_that_transformers_does_not_know_are_kept(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save("llama", tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_note": [1, 2], "auto_map": {"AutoModel": "x.Y"}}))
    calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_note"] == [1, 2]
    assert "auto_map" not in written  # names code in the source's folder
    assert all(written[key] == value for key, value in config.items())


def test_modules_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "m" / "modules.json").write_text('[{"path": "../secret"}]')
    with pytest.raises(SmoothQuantError, match="inside the model's folder"):
        list(side_files(tmp_path / "m"))


# --- Tokenizers ---


def test_the_ids_of_tokenizer_json_calibrate(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-R1-Distill-Llama declares a class that splits text in another way than its own tokenizer.json."""
    source = tiny_checkpoints.save("llama", tmp_path / "m")
    plain = calibrate(str(source), tmp_path / "plain", dataset=text, **OPTIONS)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    assert "other ids" not in capsys.readouterr().err
    manifest = calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    assert "other ids than LlamaTokenizer" in capsys.readouterr().err
    assert manifest["calibration"]["tokens_sha256"] == plain["calibration"]["tokens_sha256"]
    code = "def f(x):\n  return x"
    ids = [Tokenizer.from_file(str(tmp_path / f / "tokenizer.json")).encode(code).ids for f in ("m", "out")]
    assert ids[0] == ids[1]


# --- Tensors that transformers does not read ---

MTP = {
    "glm4-moe": {
        **{f"model.layers.92.{n}.weight": (128, 128) for n in ("eh_proj", "self_attn.q_proj", "shared_head.head")},
        **{f"model.layers.92.{name}.weight": (128,) for name in ("enorm", "hnorm", "shared_head.norm")},
    },
    "qwen3-next": {"mtp.fc.weight": (128, 256), "mtp.norm.weight": (128,)},
    "deepseek-v3": {"model.layers.61.eh_proj.weight": (128, 256)},
}


@pytest.mark.parametrize("run", [calibrate, smooth])
@pytest.mark.parametrize("name", MTP)
def test_tensors_that_transformers_passes_over_are_carried(name: str, run: Any, tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save(name, tmp_path / "m")
    extra = {key: torch.randn(shape) for key, shape in MTP[name].items()}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", {"format": "pt"})
    manifest = run(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    assert manifest["carried"] == sorted(extra)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in extra.items())
    if run is calibrate:
        ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        assert {key.removesuffix(".weight") for key in extra} <= set(ignore)
        assert not verify(tmp_path / "out", str(source)).faults
        del stored[next(iter(extra))]
        save_file(stored, tmp_path / "out" / "model.safetensors", {"format": "pt"})
        tiny_checkpoints.rehash(tmp_path / "out")
        assert verify(tmp_path / "out", str(source)).faults


def test_a_tensor_that_nothing_reads_is_an_error_before_the_pass(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors") | {"model.layers.0.extra.weight": torch.ones(4)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"model\.layers\.0\.extra\.weight"):
        calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)


def test_remote_code_is_said_to_be_the_reason(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save("llama", tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "code.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(SmoothQuantError, match="code of its own"):
        calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)


# --- What is published ---


def test_nothing_published_names_a_folder_of_this_machine(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save("llama", tmp_path / "private" / "my-model")
    calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"]["model"] == "my-model"
    assert manifest["calibration"]["dataset"] == "text.jsonl"
    assert {"model.safetensors", "config.json"} <= manifest["source"]["sha256"].keys()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_transformers_and_the_checkpoint_agree_on_the_tokenizer(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoints.save("llama", tmp_path / "m")
    calibrate(str(source), tmp_path / "out", dataset=text, **OPTIONS)
    a, b = (transformers.AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("m", "out"))
    assert a("some text 123").input_ids == b("some text 123").input_ids
