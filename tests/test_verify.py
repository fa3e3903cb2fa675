"""`smoothquant verify`: valid checkpoints pass, and verify reports every kind of damage that we know."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calibration import __main__ as cli
from calibration.checkpoint.verify import verify
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.files import MANIFEST


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> a checkpoint of that model, made on first use. Static activations give it every kind of tensor."""
    return tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("checkpoints"), activations="static", alpha="auto")


@pytest.fixture
def copy(checkpoints, tmp_path):
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "copy"))


def fault_text(folder) -> str:
    return "\n".join(map(str, verify(folder).faults))


def edit(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    tiny_checkpoints.rehash(folder)


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "opt", "llama-tied", "mixtral", "qwen3-moe", "falcon-7b"])
def test_a_valid_checkpoint_has_no_fault(name, weights, checkpoints):
    verdict = verify(checkpoints(name, weights=weights))
    assert not verdict.faults, fault_text(checkpoints(name, weights=weights))
    assert len(verdict.checked) == 8


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), file=st.sampled_from(["model", "config"]))
@example(where=0.2421875, bit=0, file="config")  # initializer_range 1.02 raises an exception class of huggingface_hub
def test_a_flipped_bit_is_detected(where, bit, file, checkpoints):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(checkpoints("llama"), Path(temporary) / "copy"))
        path = folder / {"model": "model.safetensors", "config": "config.json"}[file]
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        path.write_bytes(data)
        assert path.name in fault_text(folder)


NAN, UP = float("nan"), "model.layers.1.mlp.up_proj"

CHANGED_TENSORS = {
    "NaN in a scale": (
        lambda s: s[f"{UP}.weight_scale"][3].fill_(NAN),
        f"{UP}.weight_scale: expected finite values above",
    ),
    "negative scale": (lambda s: s[f"{UP}.input_scale"].neg_(), f"{UP}.input_scale: expected finite values above zero"),
    "infinity in a norm": (
        lambda s: s["model.norm.weight"][0].fill_(torch.inf),
        "model.norm.weight: expected finite values",
    ),
    "-128": (lambda s: s[f"{UP}.weight"][0, 0].fill_(-128), f"{UP}.weight: expected integers from -127"),
    "row halved": (lambda s: s[f"{UP}.weight"][5].copy_(s[f"{UP}.weight"][5] // 2), "not rounded by their own range"),
    "row clipped": (lambda s: s[f"{UP}.weight"][5].fill_(127), "of a channel at the end of its range"),
    "missing tensor": (lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale: expected F32"),
    "missing norm": (lambda s: s.pop("model.norm.weight"), "model.norm.weight: expected a tensor in the checkpoint"),
    "extra tensor": (lambda s: s.update(x=torch.ones(3)), "x: expected a tensor of this architecture"),
    "wrong shape": (lambda s: s.update({f"{UP}.weight": s[f"{UP}.weight"][:-16]}), f"{UP}.weight"),
    "fused layers differ": (lambda s: s[f"{UP}.input_scale"].mul_(2), "which reads the same tensor"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED_TENSORS.values(), ids=CHANGED_TENSORS)
def test_value_checks_detect_edits_after_which_the_manifest_was_regenerated(change, message, copy):
    edit(copy, change)
    assert message in fault_text(copy)


def edit_json(name, change):
    def edit_file(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit_file


CHANGED_FILES = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), MANIFEST),
    "manifest is not JSON": (lambda f: (f / MANIFEST).write_text("{"), "expected a JSON object"),
    "manifest without hashes": (edit_json(MANIFEST, lambda m: m.pop("files")), "the sha256 of every file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config of another model": (edit_json("config.json", lambda c: c.update(model_type="gpt2")), "config.json"),
    "unknown key": (
        edit_json("config.json", lambda c: c["quantization_config"].update(extra=1)), "quantization_config.extra",
    ),
    "not quantised": (edit_json("config.json", lambda c: c.pop("quantization_config")), "calibrate it first"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "a file, by the manifest"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(11)), "model.safetensors"),
    "a second shard": (lambda f: shutil.copy(f / "model.safetensors", f / "b.safetensors"), "b.safetensors"),
    "a link outside": (lambda f: (f / "link.json").symlink_to("/etc/hostname"), "expected a file in this folder"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGED_FILES.values(), ids=CHANGED_FILES)
def test_files_that_do_not_belong_together(change, message, copy):
    change(copy)
    assert message in fault_text(copy)


def test_every_fault_is_listed_and_not_only_the_first(copy):
    def change(state):
        state["model.norm.weight"][0] = NAN
        state[f"{UP}.weight_scale"][3] = -1
        state[f"{UP}.weight"][0, 0] = -128

    edit(copy, change)
    assert len(verify(copy).faults) == 3


def test_the_command_prints_the_faults_and_exits_with_1(copy, capsys):
    assert cli.main(["verify", str(copy)]) == 0
    assert "0 faults" in capsys.readouterr().out
    (copy / "config.json").unlink()
    assert cli.main(["verify", str(copy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"]
    assert cli.main(["verify", str(copy / "nowhere")]) == 1
    assert "expected a checkpoint folder" in capsys.readouterr().err
