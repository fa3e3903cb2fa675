"""`smoothquant verify --source`: whether a checkpoint is that model, smoothed and rounded, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration import __main__ as cli
from calibration.checkpoint.intervals import inverse_bounds
from calibration.checkpoint.verify import verify
from calibration.pipeline import calibrate
from tests.helpers import tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.files import MANIFEST


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(model, options) -> (source, checkpoint), made on first use, in bfloat16 like most published models."""
    get = tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("checkpoints"), torch.bfloat16)

    def pair(name: str, **options) -> tuple[Path, Path]:
        folder = get(name, **options)
        return tiny_checkpoints.source(folder), folder

    return pair


@pytest.fixture
def pair(checkpoints, tmp_path):
    """A Llama with smoothed norms and values, and a copy of its checkpoint that tests may damage."""
    source, folder = checkpoints("llama", activations="static")
    return source, Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_interval_of_the_worked_example():
    """The module docstring of verify_source.py: a row of two weights with the scale 0.01."""
    q, scale, weight = torch.tensor([[40.0, -20.0]]), 0.01, torch.tensor([[0.8, -0.4]])
    low, high = inverse_bounds((q - 0.5) * scale / weight, (q + 0.5) * scale / weight)
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor([1.9753, 2.0253]), atol=1e-4, rtol=0)


def float16(name, folder, changes, **options):
    """(source, checkpoint) of the model `name` in float16 with other weights; q, k and v stay in floating point."""
    model = tiny_architectures.build(name, dtype=torch.float16)
    with torch.no_grad():
        for layer, factor in changes.items():
            model.get_submodule(layer).weight.mul_(factor)
    model.save_pretrained(folder / "source")
    tiny_checkpoints.tokenizer().save_pretrained(folder / "source")
    calibrate(
        str(folder / "source"), folder / "int8", dataset=str(tiny_checkpoints.save_text(folder / "text.jsonl")),
        samples=8, seq_len=32, rotation="none", ignore=frozenset({"re:.*[qkv]_proj"}), quiet=True, **options,
    )  # fmt: skip
    return folder / "source", folder / "int8"


def test_values_below_the_smallest_normal_number_are_verified(tmp_path):
    """There float16 rounds to multiples of 6e-8, which is more than a part of a small value."""
    source, folder = float16("starcoder2", tmp_path, {}, alpha=0.0, level="O3")
    groups = json.loads((folder / MANIFEST).read_text())["groups"]
    assert any("v_proj" in group["source"] and group["factor_max"] > 1 for group in groups)
    assert not fault_text(source, folder)


def test_what_float16_cannot_hold_is_not_divided(tmp_path):
    """Quotients of v_proj would be multiples of 6e-8 with a few bits each; the gate refuses such a model."""
    attention = "model.layers.0.self_attn"
    source, folder = float16("llama", tmp_path, {f"{attention}.v_proj": 1e-3, f"{attention}.o_proj": 1e-4})
    groups = {group["source"]: group for group in json.loads((folder / MANIFEST).read_text())["groups"]}
    assert groups[f"{attention}.v_proj"]["factor_max"] == 1
    assert groups["model.layers.1.self_attn.v_proj"]["factor_max"] != 1
    assert not fault_text(source, folder)


def fault_text(source, folder) -> str:
    return "\n".join(map(str, verify(folder, str(source)).faults))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"activations": "static"}),
        ("llama", {"no_smoothing": True}),
        ("qwen2", {"alpha": "auto", "max_fallback": 0.2}),
        ("gpt2", {"weights": "tensor"}),
        ("opt", {"weights": "tensor"}),
        ("mixtral", {"activations": "static"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_a_checkpoint_is_its_source(name, options, checkpoints):
    """Weights are within half a step, plus float32's rounding of 127 steps. Zero weights would have an error of 1."""
    source, folder = checkpoints(name, **options)
    verdict = verify(folder, str(source))
    assert not verdict.faults, fault_text(source, folder)
    assert len(verdict.layers) == len(json.loads((folder / MANIFEST).read_text())["quantized"])
    for layer in verdict.layers.values():
        assert 0 < layer["error"] < 1
        assert layer["steps"] <= 0.501


def test_another_model_is_detected_by_hash_and_by_weight(pair, tmp_path):
    source, folder = pair
    other = Path(shutil.copytree(source, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 4] *= 2
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    faults = fault_text(other, folder)
    assert "sha256 by the manifest: model.safetensors: expected" in faults
    assert "down_proj.weight: expected the source's weights, smoothed and rounded, got 1 of" in faults


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def one_off(tensor) -> None:
    """Add 1 to an integer that stays far from the largest of its row, so that value checks cannot detect it."""
    row = tensor[7]
    column = int((row.abs() < 60).nonzero()[0])
    row[column] += 1


CHANGED_TENSORS = {
    "one integer by one": (lambda s: one_off(s[f"{UP}.weight"]), f"{UP}.weight"),
    "one integer by one, after a linear layer": (lambda s: one_off(s[f"{DOWN}.weight"]), f"{DOWN}.weight"),
    "a scale by 0.1 %": (lambda s: s[f"{DOWN}.weight_scale"][5].mul_(1.001), f"{DOWN}.weight"),
    "a norm by 1 %": (lambda s: s["model.layers.0.input_layernorm.weight"][9].mul_(1.01), "q_proj.weight"),
    "an embedding": (lambda s: s["model.embed_tokens.weight"][9, 9].mul_(1.01), "model.embed_tokens.weight"),
    "another dtype": (
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"].double()}), "model.norm.weight: expected torch",
    ),
    "rows swapped": (
        lambda s: s[f"{UP}.weight"].copy_(s[f"{UP}.weight"].roll(1, 0)), f"{UP}.weight",
    ),
}  # fmt: skip


def rehash(folder: Path) -> None:
    tiny_checkpoints.rehash(folder)
    assert not verify(folder).faults  # without the source, nothing detects the change


@pytest.mark.parametrize(("change", "where"), CHANGED_TENSORS.values(), ids=CHANGED_TENSORS)
def test_a_changed_weight_is_detected_although_the_manifest_was_regenerated(change, where, pair):
    source, folder = pair
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rehash(folder)
    assert where in fault_text(source, folder)


@pytest.mark.parametrize(
    ("name", "key"), [("config.json", "rms_norm_eps"), ("tokenizer_config.json", "eos_token"), ("config.json", "new")]
)
def test_a_changed_configuration_is_detected(name, key, pair):
    source, folder = pair
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(value | {key: 0.25}))
    rehash(folder)
    assert f"{name}: {key}: expected" in fault_text(source, folder)


CLAIMS = {
    "another source": (lambda m: m["source"].update(sha256={"model.safetensors": "0" * 64}), "by the manifest"),
    "another dtype": (lambda m: m["source"].update(dtype="float32"), "source.dtype"),
    "factors": (lambda m: m["groups"][0].update(factor_max=99.0), "factor_max"),
    "a missing group": (lambda m: m["groups"].pop(), "manifest: groups"),
    "a missing layer": (lambda m: m["quantized"].pop(), "manifest: quantized"),
    "a reason": (lambda m: m["kept"].update(lm_head="because"), "manifest: kept: lm_head"),
    "no groups": (lambda m: m.pop("groups"), "manifest: groups: expected a list"),
}


@pytest.mark.parametrize(("change", "message"), CLAIMS.values(), ids=CLAIMS)
def test_a_wrong_claim_is_a_fault(change, message, pair):
    source, folder = pair
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert message in fault_text(source, folder)


def test_the_command_prints_the_largest_error(pair, capsys):
    source, folder = pair
    assert cli.main(["verify", str(folder), "--source", str(source)]) == 0
    assert "differ from the source's by" in capsys.readouterr().out
    assert cli.main(["verify", str(folder), "--source", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    assert cli.main(["verify", str(folder), "--source", str(folder / "nowhere"), "--json"]) == 1
    assert "nowhere" in json.loads(capsys.readouterr().out)["faults"][0]["where"]
