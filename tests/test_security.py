"""A checkpoint is data: no code in it runs, no link leads outside, and no control character reaches a terminal."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calibration.from_pretrained  # noqa: F401 (registers the quantiser)
from calibration import __main__ as cli
from calibration.checkpoint.verify import verify
from calibration.inputs.model import load
from calibration.pipeline import calibrate
from tests.helpers import tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.errors import SmoothQuantError

ROOT = Path(__file__).parent.parent

EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.fixture(scope="module")
def source_and_checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    text = tiny_checkpoints.save_text(root / "text.jsonl")
    source = tiny_checkpoints.save("llama", root / "source")
    calibrate(str(source), root / "int8", dataset=str(text), samples=8, seq_len=32, quiet=True)
    return source, root / "int8"


@pytest.fixture
def copy(source_and_checkpoint, tmp_path):
    return Path(shutil.copytree(source_and_checkpoint[1], tmp_path / "copy"))


def add_code(folder: Path, marker: Path, model_type: str) -> Path:
    """Add a Python file that creates `marker`, and name its classes in config.json and tokenizer_config.json."""
    (folder / "evil.py").write_text(EVIL.format(str(marker)))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for name, change in (
        ("config.json", {"auto_map": auto_map, "model_type": model_type}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | change))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_code_in_a_checkpoint_does_not_run(copy, model_type, tmp_path):
    marker = tmp_path / "ran"
    add_code(copy, marker, model_type)
    assert "auto_map: expected none" in "\n".join(map(str, verify(copy).faults))
    readers = [lambda: load_reference(copy)]
    if model_type == "llama":
        readers.append(lambda: AutoModelForCausalLM.from_pretrained(copy))
    for read in readers:
        if model_type == "llama":
            read()
        else:
            with pytest.raises((ValueError, OSError)):
                read()
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_code_in_a_model_to_calibrate_does_not_run_and_is_not_copied(source_and_checkpoint, model_type, tmp_path):
    marker = tmp_path / "ran"
    folder = add_code(Path(shutil.copytree(source_and_checkpoint[0], tmp_path / "copy")), marker, model_type)
    if model_type == "llama":
        text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
        calibrate(str(folder), tmp_path / "out", dataset=str(text), samples=8, seq_len=32, quiet=True)
        assert not verify(tmp_path / "out").faults
        assert not (tmp_path / "out" / "evil.py").exists()
    else:
        with pytest.raises(SmoothQuantError):
            load(str(folder))
    assert not marker.exists()


def test_a_pickle_is_a_fault_and_is_never_read(copy, tmp_path):
    marker = tmp_path / "ran"
    state = load_file(copy / "model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert "a format that can run code" in "\n".join(map(str, verify(copy).faults))
    load_reference(copy)
    AutoModelForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    for read in (load_reference, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(SmoothQuantError):
            read(copy)
    assert state
    assert not marker.exists()


def test_control_characters_in_names_are_escaped(copy, capsys):
    name = "x\x1b[2J\r\n\u202e.weight"
    state = load_file(copy / "model.safetensors") | {name: torch.ones(2)}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    for arguments in (["verify", str(copy)], ["verify", str(copy), "--json"]):
        assert cli.main(arguments) == 1
        streams = capsys.readouterr()
        output = streams.err + streams.out
        assert r"x\x1b[2J\r\n\u202e.weight" in output.replace("\\\\", "\\")
        assert all(line.isprintable() for line in output.splitlines())


def test_a_long_value_is_truncated():
    error = SmoothQuantError("a", "b", "c" * 10**6, "d")
    assert len(str(error)) < 1100


def test_no_code_of_ours_trusts_remote_code_or_unpickles():
    """calibration passes trust_remote_code=False to every Auto class; no other folder passes True."""
    for folder in ("calibration", "vllm_smoothquant", "benchmarks", "demo", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                arguments = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert arguments.get("trust_remote_code") in (None, False), f"{file.name}:{node.lineno}"
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                owner = getattr(getattr(node.func, "value", None), "id", "")
                if folder == "calibration" and owner.startswith("Auto") and name.startswith("from_"):
                    assert "trust_remote_code" in arguments, f"{file.name}:{node.lineno}"
                if folder in ("calibration", "vllm_smoothquant"):
                    assert owner != "pickle", f"{file.name}:{node.lineno}"
                    assert arguments.get("weights_only") is not False, f"{file.name}:{node.lineno}"
                    assert getattr(node.func, "id", "") not in ("eval", "exec"), f"{file.name}:{node.lineno}"
