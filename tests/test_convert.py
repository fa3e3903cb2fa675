"""`smoothquant convert`: compressed-tensors' readers compute the same as ours, or the conversion is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibration import __main__ as cli
from calibration.checkpoint import export
from calibration.checkpoint.convert import COMPRESSED_TENSORS, convert
from calibration.checkpoint.verify import verify
from tests.helpers import engine, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import TRANSFORMS_FILE
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

# name -> options of calibrate: every strategy, layers that fall back, a quantised output head.
SCHEMES = {
    "token": {},
    "mixed": {"activations": "static", "max_fallback": 0.3, "quantize_lm_head": True},
    "tensor-static": {"weights": "tensor", "activations": "static"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(name in SCHEMES, name of the model) -> a checkpoint in our format, made on first use."""
    get = tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("checkpoints"))
    return lambda scheme, model="llama", **options: get(model, **SCHEMES[scheme] | options)


def change(folder: Path, change_tensor) -> Path:
    """Change every tensor in `folder`, and remove the manifest, because the integers are then no longer calibrate's."""
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({name: change_tensor(name, tensor) for name, tensor in state.items()}, path, metadata={"format": "pt"})
    (folder / MANIFEST).unlink()
    return folder


def quantization_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("scheme", "model"),
    [*((scheme, "llama") for scheme in SCHEMES), ("token", "llama-tied"), ("token", "mixtral"), ("token", "qwen2-moe")],
)
def test_converting_there_and_back_gives_the_same_checkpoint(checkpoints, tmp_path, scheme, model):
    ours = checkpoints(scheme, model)
    there, back = tmp_path / "there", tmp_path / "back"
    convert(ours, there, COMPRESSED_TENSORS)
    manifest = convert(there, back, "smoothquant")
    assert manifest["converted_from"] == "smoothquant", "calibrate rounded these integers"
    assert not verify(back).faults
    assert json.loads((back / "config.json").read_text()) == json.loads((ours / "config.json").read_text())
    assert (ours / TRANSFORMS_FILE).is_file(), "a file in a folder"
    assert export.file_hashes(back) == export.file_hashes(ours)


def test_compressed_tensors_own_reader_reads_the_same_numbers(checkpoints, tmp_path):
    """transformers reads the export with compressed-tensors. Activations are not compared, because compressed-tensors
    uses absmax / 127.5 for dynamic scales, and vLLM and we use absmax / 127."""
    ours = checkpoints("tensor-static")
    convert(ours, tmp_path / "out", COMPRESSED_TENSORS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs(torch.tensor([[1, 2]]))  # decompresses the weights
    state = load_file(ours / "model.safetensors")
    names = [name.removesuffix(".weight") for name, tensor in state.items() if tensor.dtype == torch.int8]
    assert len(names) == 14
    for name in names:
        layer = theirs.get_submodule(name)
        assert torch.equal(layer.weight, state[f"{name}.weight"] * state[f"{name}.weight_scale"]), name
        assert torch.equal(layer.input_scale, state[f"{name}.input_scale"]), name


@pytest.mark.slow
def test_stock_vllm_without_our_plugin_computes_the_same(checkpoints, tmp_path):
    """In float32 around the integers. These are halved, because oneDNN on CPUs without VNNI adds pairs of products in
    16 bits and clips them if |weight| may exceed 64 (vllm_smoothquant/kernels/exact.py). Then results are right on any
    CPU and differ only by the order of sums; if this moves an activation across a rounding tie, later tokens differ."""
    prompts = [list(range(i, i + 30)) for i in (3, 100)]
    folder, ours = tmp_path / "there", tmp_path / "ours"
    convert(checkpoints("mixed"), folder, COMPRESSED_TENSORS)
    change(folder, lambda _, t: torch.div(t, 2, rounding_mode="trunc") if t.dtype == torch.int8 else t)
    convert(folder, ours, "smoothquant")
    model = load_reference(ours)
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in prompts]
    served = engine.logprobs(folder, prompts, vocabulary=True, environment={"VLLM_PLUGINS": ""})
    difference = (torch.cat(served) - torch.cat(expected)).abs().amax(-1)
    print(f"largest difference {difference.max():.1e}")
    assert (difference < 1e-5).float().mean() > 0.5


def test_overrides_become_separate_groups(checkpoints, tmp_path):
    ours = checkpoints("mixed")
    overrides = quantization_config(ours)["overrides"]
    assert overrides
    convert(ours, tmp_path / "out", COMPRESSED_TENSORS)
    first, last = quantization_config(tmp_path / "out")["config_groups"].values()
    assert set(first["targets"]) == overrides.keys()
    assert first["input_activations"]["dynamic"] is True
    assert last["targets"] == ["lm_head", "Linear"]
    assert last["input_activations"]["dynamic"] is False


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("llama", {"activations": "tensor"}, "dynamic per_tensor"),
        ("gpt-neox", {"alpha": "auto", "activations": "static"}, "smoothing at run time"),
        ("gpt2", {}, "Conv1D"),
        ("bloom-tied", {"weights": "tensor"}, "rows stock vLLM reorders"),
    ],
)
def test_a_property_that_cannot_be_expressed_is_refused_with_the_reason(
    checkpoints, tmp_path, capsys, monkeypatch, model, options, reason
):
    # Accept any gain of smoothing at run time, so that a layer of a random model divides its own input.
    monkeypatch.setattr("calibration.smoothing.search.RUNTIME_GAIN", 2.0)
    ours = checkpoints("token", model, **options)
    command = ["convert", str(ours), "-o", str(tmp_path / "out"), "--format", COMPRESSED_TENSORS]
    assert cli.main(command) == 1
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused_by_the_hashes_of_either_format(checkpoints, tmp_path):
    there = tmp_path / "there"
    convert(checkpoints("token"), there, COMPRESSED_TENSORS)
    convert(there, tmp_path / "ours", "smoothquant")
    for folder, to in ((there, "smoothquant"), (tmp_path / "ours", COMPRESSED_TENSORS)):
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(SmoothQuantError, match="sha256"):
            convert(folder, tmp_path / "out", to)


def test_integers_that_were_changed_after_calibrate_are_not_calibrates(checkpoints, tmp_path):
    convert(checkpoints("token"), tmp_path / "there", COMPRESSED_TENSORS)
    folder = change(tmp_path / "there", lambda _, t: t // 2 if t.dtype == torch.int8 else t)
    manifest = convert(folder, tmp_path / "back", "smoothquant")
    assert manifest["converted_from"] == COMPRESSED_TENSORS
    assert not verify(tmp_path / "back").faults
