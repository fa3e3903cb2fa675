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
from calibration.checkpoint.verify import SCALES_OF_ZEROS, verify
from calibration.pipeline import calibrate
from tests.helpers import tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.config import TRANSFORMS_FILE, CheckpointConfig
from vllm_smoothquant.format.files import MANIFEST, header_faults


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
    "row of zeros": (lambda s: s[f"{UP}.weight"][5].fill_(0), "or only zeros and the scale 1, got 1 that"),
    "matrix of zeros": (lambda s: s[f"{UP}.weight"].fill_(0), "or only zeros and the scale 1, got 192 that"),
    "int8 embedding": (
        lambda s: s.update(
            {"model.embed_tokens.weight": s["model.embed_tokens.weight"].char(),
             "model.embed_tokens.weight_scale": torch.ones(256, 1)}
        ),
        "model.embed_tokens.weight: expected F64 or F32 or BF16 or F16, because it is no weight of a linear layer",
    ),
    "integers in a norm": (
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"].int()}),
        "model.norm.weight: expected F64 or F32 or BF16 or F16",
    ),
    "FP8 in a norm": (
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "model.norm.weight: expected F64 or F32 or BF16 or F16",
    ),
    "scales of a KV cache": (
        lambda s: s.update({"model.layers.1.self_attn.k_scale": torch.ones(1)}), "self_attn.k_scale: expected nothing",
    ),
    "missing tensor": (lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale: expected F32"),
    "missing norm": (lambda s: s.pop("model.norm.weight"), "model.norm.weight: expected a tensor in the checkpoint"),
    "extra tensor": (lambda s: s.update(x=torch.ones(3)), "x: expected a tensor of this architecture"),
    "wrong shape": (lambda s: s.update({f"{UP}.weight": s[f"{UP}.weight"][:-16]}), f"{UP}.weight"),
    "fused layers differ": (lambda s: s[f"{UP}.input_scale"].mul_(2), "which reads the same tensor"),
}  # fmt: skip


# --- sound weights that are not normally distributed ------------------------------------------------------------------


def ternary(shape):
    return torch.randint(-1, 2, shape).float() * 0.02


WEIGHTS = {
    "ternary": ternary,
    "one sign": lambda shape: torch.full(shape, -0.02),
    "signs": lambda shape: ternary(shape).sign() * 0.02 + (ternary(shape) == 0) * 0.02,
    "all zero": torch.zeros,
    "rows of zeros": lambda shape: torch.randn(shape) * (torch.arange(shape[0]) % 3 > 0)[:, None],
    "one weight in each row": lambda shape: torch.eye(*shape) * 0.3,
    "the same row": lambda shape: torch.randn(shape)[:1].repeat(shape[0], 1),
    "rows of constants": lambda shape: torch.randn(shape[0], 1).repeat(1, shape[1]),
    "rows too small for a scale": lambda shape: torch.randn(shape) * (1e-38 ** (torch.arange(shape[0]) % 2))[:, None],
    "all too small for a scale": lambda shape: torch.randn(shape) * 1e-40,
    "rows just large enough": lambda shape: torch.full(shape, 127 * torch.finfo(torch.float32).tiny),
    "huge": lambda shape: torch.randn(shape) * 1e30,
}


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_sound_weights_of_any_distribution_have_no_fault(kind, weights, tmp_path):
    torch.manual_seed(0)
    model = tiny_architectures.build("llama")
    with torch.no_grad():
        layer = model.get_submodule(UP)
        layer.weight.copy_(WEIGHTS[kind](tuple(layer.weight.shape)))
    model.save_pretrained(tmp_path / "source")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "source")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    options = {"samples": 2, "seq_len": 16, "quiet": True, "no_smoothing": True, "weights": weights}
    calibrate(str(tmp_path / "source"), tmp_path / "out", dataset=str(text), **options)
    assert not verify(tmp_path / "out").faults, fault_text(tmp_path / "out")


# --- checkpoints that others rounded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [*SCALES_OF_ZEROS, 1e-5 / 127, 1e-9])
def test_of_others_integers_only_zeros_under_an_ordinary_scale_are_a_fault(scale, copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"converted_from": "compressed-tensors"}))

    def change(state):
        state[f"{UP}.weight"][3] = -128
        state[f"{UP}.weight"][4] //= 2
        state[f"{UP}.weight"][5] = 0
        state[f"{UP}.weight_scale"][5] = scale

    edit(copy, change)
    assert not verify(copy).faults, fault_text(copy)
    edit(copy, lambda state: state[f"{UP}.weight_scale"][5].fill_(0.01))
    assert f"{UP}.weight: expected a weight other than zero in every channel" in fault_text(copy)
    assert len(verify(copy).faults) == 1


SCALES_WITHOUT_INT8 = (
    "a.weight_scale", "a.weight_scale_inv", "a.weight_zero_point", "a.input_scale", "a.input_zero_point",
    "a.smoothing_factor", "a.output_scale", "attn.k_scale", "attn.v_zero_point", "w_scale", "mlp.w2_weight_scale",
    "mlp.w2_input_scale", "a.weight_global_scale",
)  # fmt: skip


@pytest.mark.parametrize("name", SCALES_WITHOUT_INT8)
def test_scales_of_layers_that_are_not_int8_are_faults(name):
    headers = {"a.weight": ("BF16", (16, 16)), "w": ("BF16", (16, 16)), name: ("F32", (1,))}
    (fault,) = header_faults(CheckpointConfig(), headers)
    assert fault.where in (name, "a.weight")


def test_scales_that_an_architecture_has_of_its_own_are_no_fault():
    names = "router.scale", "router.per_expert_scale", "logit_scale", "layer_scale_1", "residual_scale", "global_scale"
    assert not list(header_faults(CheckpointConfig(), dict.fromkeys(names, ("F32", (16,)))))


@pytest.mark.parametrize(
    "tensors",
    [
        {f"mlp.experts.{i}.{p}_proj.weight": (16, 32) for i in range(3) for p in ("up", "down")},
        {f"block_sparse_moe.experts.{i}.w1.weight": (16, 32) for i in range(3)},
        {"mlp.experts.gate_up_proj": (4, 16, 32)},
        {"block_sparse_moe.input_linear.weight": (4, 16, 32)},
        {"experts.up_proj.weight": (64, 32)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_int8_routed_experts_are_one_fault_with_the_reason(tensors):
    headers = {name: ("I8", shape) for name, shape in tensors.items()}
    headers |= {f"{name}_scale": ("F32", (*shape[:-1], 1)) for name, shape in tensors.items()}
    headers["mlp.shared_experts.up_proj.weight"] = ("I8", (16, 32))
    headers["mlp.shared_experts.up_proj.weight_scale"] = ("F32", (16, 1))
    (fault,) = header_faults(CheckpointConfig(), headers)
    assert "floating point: config.json has no `experts`" in str(fault)


# --- damage -----------------------------------------------------------------------------------------------------------


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
    "a deeper link outside": (lambda f: (f / "transforms/x").symlink_to("/etc"), "expected a file in this folder"),
    "a pickle in a folder": (lambda f: (f / "transforms/x.pt").write_bytes(b""), "a format that can run code"),
    "factors changed": (lambda f: (f / TRANSFORMS_FILE).write_bytes(b""), "smoothing.safetensors: expected sha256"),
    "factors changed, with a new manifest": (
        lambda f: ((f / TRANSFORMS_FILE).write_bytes(b""), tiny_checkpoints.rehash(f)),
        "smoothing.safetensors: expected sha256",
    ),
    "factors that nothing names": (
        lambda f: (edit_json("config.json", lambda c: c["quantization_config"].pop("transforms"))(f),
                   tiny_checkpoints.rehash(f)),
        "smoothing.safetensors: expected no such file",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGED_FILES.values(), ids=CHANGED_FILES)
def test_files_that_do_not_belong_together(change, message, copy):
    change(copy)
    assert message in fault_text(copy)


def test_a_checkpoint_of_the_first_version_of_the_format_is_still_sound(copy):
    (copy / TRANSFORMS_FILE).unlink()
    edit_json("config.json", lambda c: c["quantization_config"].pop("transforms"))(copy)
    edit_json("config.json", lambda c: c["quantization_config"].update(format_version=1))(copy)
    tiny_checkpoints.rehash(copy)
    assert not verify(copy).faults, fault_text(copy)


def test_hidden_folders_such_as_gits_are_not_looked_into(copy):
    (copy / ".git").mkdir()
    (copy / ".git/x.pt").write_bytes(b"")
    (copy / ".git/x.safetensors").write_bytes(b"")
    assert not verify(copy).faults, fault_text(copy)
    (copy / ".x.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert ".x.safetensors" in fault_text(copy)


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
