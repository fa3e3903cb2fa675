"""A checkpoint is data: nothing in it runs, leads elsewhere, or reaches a terminal as it is."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calibration.from_pretrained  # noqa: F401 (registers)
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
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    text = tiny_checkpoints.save_text(root / "text.jsonl")
    source = tiny_checkpoints.save("llama", root / "source")
    calibrate(str(source), root / "int8", dataset=str(text), samples=8, seq_len=32, quiet=True)
    return source, root / "int8"


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def with_code(folder: Path, ran: Path, model_type: str) -> Path:
    """config.json and the tokenizer's name classes in a file of the folder, as repositories with their own code do."""
    (folder / "evil.py").write_text(EVIL.format(str(ran)))
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
    ran = tmp_path / "ran"
    with_code(copy, ran, model_type)
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
    assert not ran.exists()


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_code_in_a_model_to_calibrate_does_not_run_nor_is_it_copied(made, model_type, tmp_path):
    ran = tmp_path / "ran"
    folder = with_code(Path(shutil.copytree(made[0], tmp_path / "copy")), ran, model_type)
    if model_type == "llama":
        text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
        calibrate(str(folder), tmp_path / "out", dataset=str(text), samples=8, seq_len=32, quiet=True)
        assert not verify(tmp_path / "out").faults
        assert not (tmp_path / "out" / "evil.py").exists()
    else:
        with pytest.raises(SmoothQuantError):
            load(str(folder))
    assert not ran.exists()


def test_a_pickle_is_a_fault_and_is_never_read(copy, tmp_path):
    ran = tmp_path / "ran"
    state = load_file(copy / "model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    assert "a format that can run code" in "\n".join(map(str, verify(copy).faults))
    load_reference(copy)
    AutoModelForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    for read in (load_reference, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(SmoothQuantError):
            read(copy)
    assert state
    assert not ran.exists()


def test_no_name_reaches_the_terminal_as_it_is(copy, capsys):
    name = "x\x1b[2J\r\n\u202e.weight"
    state = load_file(copy / "model.safetensors") | {name: torch.ones(2)}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    for arguments in (["verify", str(copy)], ["verify", str(copy), "--json"]):
        assert cli.main(arguments) == 1
        said = capsys.readouterr()
        shown = said.err + said.out
        assert r"x\x1b[2J\r\n\u202e.weight" in shown.replace("\\\\", "\\")
        assert all(line.isprintable() for line in shown.splitlines())


def test_a_long_value_is_cut():
    error = SmoothQuantError("a", "b", "c" * 10**6, "d")
    assert len(str(error)) < 1100


def test_nothing_in_the_tree_trusts_remote_code_or_unpickles():
    """Every from_pretrained and from_config of the two packages says no; tests and benchmarks do not say yes."""
    for folder in ("calibration", "vllm_smoothquant", "benchmarks", "demo", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert said.get("trust_remote_code") in (None, False), f"{file.name}:{node.lineno}"
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                owner = getattr(getattr(node.func, "value", None), "id", "")
                if folder == "calibration" and owner.startswith("Auto") and name.startswith("from_"):
                    assert "trust_remote_code" in said, f"{file.name}:{node.lineno}"
                if folder in ("calibration", "vllm_smoothquant"):
                    assert owner != "pickle", f"{file.name}:{node.lineno}"
                    assert said.get("weights_only") is not False, f"{file.name}:{node.lineno}"
                    assert getattr(node.func, "id", "") not in ("eval", "exec"), f"{file.name}:{node.lineno}"
