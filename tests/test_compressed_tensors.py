"""`smoothquant convert` of checkpoints that other tools rounded: converted right, or refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calibration.checkpoint.convert import COMPRESSED_TENSORS, convert
from calibration.checkpoint.verify import verify
from tests.helpers import foreign_checkpoint
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError

UP, Q, K = (f"model.layers.1.{name}" for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_integers_that_compressed_tensors_rounded(tmp_path, weights, activations, dtype):
    theirs, ours, again, back = (tmp_path / name for name in ("theirs", "ours", "again", "back"))
    foreign_checkpoint.save(theirs, weights=weights, activations=activations, dtype=dtype)
    state = load_file(theirs / "model.safetensors")
    integers = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.int8}
    assert len(integers) == 14
    assert any((q == -128).any() for q in integers.values()), "our rounding gives these, too"
    manifest = convert(theirs, ours, "smoothquant")
    assert not verify(ours).faults
    assert manifest["converted_from"] == COMPRESSED_TENSORS
    assert manifest["quantized"] == sorted(name.removesuffix(".weight") for name in integers)
    config = CheckpointConfig.from_dict(quantization_config(ours))
    assert (config.weights.strategy, config.input_activations.dynamic) == (weights, activations == "token")
    # A scale in 16 bits is the same number in float32; nothing else has changed.
    state_ours = load_file(ours / "model.safetensors")
    assert state_ours.keys() == state.keys()
    for name, tensor in state_ours.items():
        assert tensor.dtype == (torch.float32 if name.endswith("_scale") else state[name].dtype), name
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    # The name of the tool stays with its integers, however often they are converted.
    assert convert(ours, again, COMPRESSED_TENSORS)["converted_from"] == COMPRESSED_TENSORS
    assert convert(again, back, "smoothquant")["converted_from"] == COMPRESSED_TENSORS
    assert not verify(back).faults
    state_back = load_file(back / "model.safetensors")
    assert all(torch.equal(state_back[name], tensor) for name, tensor in state_ours.items())


def test_rows_of_zeros_have_the_scale_that_compressed_tensors_gives_them(tmp_path):
    """Its scale is then the dtype's epsilon: 0.0078 in bfloat16, as large as that of an ordinary row."""

    def prune(state):
        state[f"{UP}.weight"][5] = 0
        state[f"{Q}.weight"].fill_(0)

    foreign_checkpoint.save(tmp_path / "theirs", dtype=torch.bfloat16, before=prune)
    convert(tmp_path / "theirs", tmp_path / "ours", "smoothquant")
    assert not verify(tmp_path / "ours").faults


def quantization_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def group(**changes):
    """A change of config.json: values of the only group, such as weights={"actorder": "static"}; a dict is merged."""

    def change(config, _):
        values = config["quantization_config"]["config_groups"]["group_0"]
        for key, value in changes.items():
            merged = isinstance(value, dict) and isinstance(values[key], dict)
            values[key] = values[key] | value if merged else value

    return change


def top(**changes):
    return lambda config, _: config["quantization_config"].update(changes)


def tensors(**changes):
    """A change of tensors: name of the suffix -> function of the tensor, or None to remove it, in layer UP."""

    def change(_, state):
        for suffix, function in changes.items():
            name = f"{UP}.{suffix}"
            state[name] = function(state[name] if name in state else state[f"{UP}.weight"])

    return change


def two_groups(config, state):
    """The MLP per token and attention static, by regular expressions."""
    quantization = config["quantization_config"]
    first = quantization["config_groups"]["group_0"] | {"targets": ["re:.*mlp.*"]}
    static = json.loads(foreign_checkpoint.INPUTS["static"].model_dump_json())
    quantization["config_groups"] = {
        "group_0": first, "group_1": first | {"targets": ["re:.*self_attn.*"], "input_activations": static},
    }  # fmt: skip
    for name in [name for name in state if name.endswith("_proj.weight") and "self_attn" in name]:
        state[name.replace("weight", "input_scale")] = torch.tensor(0.5)


def a_layer_in_float(config, state):
    """Kept by a pattern, as llm-compressor's `ignore` takes them."""
    state[f"{UP}.weight"] = state[f"{UP}.weight"].float() * state.pop(f"{UP}.weight_scale")
    config["quantization_config"]["ignore"] = ["re:.*lm_head", r"re:model\.layers\.1\.mlp\.up.*"]


def zeros(shape, dtype=torch.int8):
    return lambda _: torch.zeros(shape, dtype=dtype)


ACCEPTED = {
    "the order of GPTQ": group(weights={"actorder": "static"}),
    "the order of GPTQ by its other name": group(weights={"actorder": "weight"}),
    "strategy by the size of a group": group(weights={"strategy": None, "group_size": -1}),
    "the group's own format": group(format="int-quantized"),
    "the older name of the format": top(format="naive-quantized"),
    "a sparsity of none": top(sparsity_config={"format": "dense", "targets": ["Linear"]}, transform_config={}),
    "targets by a pattern": group(targets=[r"re:.*layers\.\d+\..*_proj$"]),
    "targets by full names": lambda config, state: group(
        targets=[name.removesuffix(".weight") for name, tensor in state.items() if tensor.dtype == torch.int8]
    )(config, state),
    "two groups by patterns": two_groups,
    "a layer in floating point by a pattern": a_layer_in_float,
    "zero points of zero": tensors(weight_zero_point=zeros((192, 1))),
    "scales in bfloat16": tensors(weight_scale=lambda t: t.bfloat16()),
    "scales [out]": tensors(weight_scale=lambda t: t.flatten()),
}


def converted(tmp_path: Path, change, **options) -> Path:
    """The checkpoint in our format of one that `change`, a function of its config and its tensors, has changed."""
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    foreign_checkpoint.save(theirs, **options)
    state = load_file(theirs / "model.safetensors")
    foreign_checkpoint.configure(theirs, lambda config: change(config, state))
    foreign_checkpoint.write(theirs, state)
    convert(theirs, out, "smoothquant")
    return out


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_what_changes_no_result_is_accepted(tmp_path, change):
    out = converted(tmp_path, change)
    assert not verify(out).faults
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", out))
    config = CheckpointConfig.from_dict(quantization_config(out))
    for name in [name for name, tensor in theirs.items() if name.endswith("_proj.weight")]:
        layer = name.removesuffix(".weight")
        assert torch.equal(ours[name], theirs[name])
        if theirs[name].dtype != torch.int8:
            assert config.scheme(layer) is None
            continue
        assert torch.equal(ours[f"{layer}.weight_scale"].flatten(), theirs[f"{layer}.weight_scale"].flatten().float())
        static = theirs.get(f"{layer}.input_scale")
        assert config.scheme(layer).input_activations.dynamic == (static is None)
        assert static is None or torch.equal(ours[f"{layer}.input_scale"], static.reshape(1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_tensor_may_have_any_shape(tmp_path, shape):
    change = tensors(weight_scale=lambda t: t.reshape(shape), input_scale=lambda t: t.reshape(shape))
    out = converted(tmp_path, change, weights="tensor", activations="static")
    state = load_file(out / "model.safetensors")
    assert state[f"{UP}.weight_scale"].shape == state[f"{UP}.input_scale"].shape == (1,)


def differing(_, state):
    state[f"{K}.input_scale"] = state[f"{K}.input_scale"] * 2


def int8_embedding(_, state):
    state["model.embed_tokens.weight"] = torch.ones(256, 128, dtype=torch.int8)
    state["model.embed_tokens.weight_scale"] = torch.ones(256, 1)


REFUSED = {
    "weights of 4 bits": (group(weights={"num_bits": 4}), "group_0.weights"),
    "floating-point weights": (group(weights={"type": "float"}), "group_0.weights"),
    "asymmetric weights": (group(weights={"symmetric": False}), "group_0.weights"),
    "groups of columns": (group(weights={"strategy": "group", "group_size": 128}), "group_0.weights"),
    "blocks": (group(weights={"strategy": "block", "block_structure": [128, 128]}), "block_structure"),
    "permuted columns": (group(weights={"actorder": "group"}), "group_0.weights"),
    "weights only": (group(input_activations=None), "group_0.input_activations: .* got nothing"),
    "asymmetric activations": (group(input_activations={"symmetric": False}), "group_0.input_activations"),
    "dynamic per tensor": (group(input_activations={"strategy": "tensor"}), "group_0.input_activations"),
    "activations in groups": (group(input_activations={"strategy": "group"}), "group_0.input_activations"),
    "output activations": (group(output_activations={"num_bits": 8}), "group_0.output_activations"),
    "no groups": (top(config_groups={}), "config_groups"),
    "no targets": (group(targets=None), "group_0.targets"),
    "a pattern that is none": (group(targets=["re:("]), "group_0.targets"),
    "a quantised KV cache": (top(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "a rotation": (top(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    "sparsity": (top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "an unknown property": (top(some_new_transform=True), "some_new_transform"),
    "packed weights": (top(format="pack-quantized"), "quantization_config.format"),
    "a packed group": (group(format="pack-quantized"), "group_0.format"),
    "an int8 layer that is ignored": (top(ignore=["re:.*up_proj"]), "up_proj: expected floating point, by config"),
    "an int8 layer that no group has": (group(targets=["re:.*(?<!up)_proj"]), "up_proj: expected floating point"),
    "a missing static scale": (group(targets=["Linear"], input_activations={"strategy": "tensor", "dynamic": False}),
                               "proj: expected int8 weights with static per_tensor"),
    "a layer in floating point": (lambda c, s: (a_layer_in_float(c, s), top(ignore=["lm_head"])(c, s)),
                                  "up_proj: expected int8 weights"),
    "zero points": (tensors(weight_zero_point=lambda t: torch.ones(192, 1)), "weight_zero_point: expected zeros"),
    "a permutation": (tensors(weight_g_idx=zeros(128)), "weight_g_idx: expected nothing"),
    "more scales than rows": (tensors(weight_scale=lambda t: t.repeat(1, 2)), "weight_scale: expected"),
    "scales of another dtype": (tensors(weight_scale=lambda t: torch.ones(192, 1).int()), "weight_scale: expected"),
    "a scale of zero": (tensors(weight_scale=lambda t: t * 0), "weight_scale: expected finite values above zero"),
    "zeros under an ordinary scale": (tensors(weight=lambda t: t * (torch.arange(192) != 5)[:, None]), "got 1;"),
    "an int8 embedding": (int8_embedding, "embed_tokens.weight: expected floating point"),
    "an int8 norm": (lambda _, s: s.update({"model.norm.weight": torch.ones(128).char()}), "norm.weight: expected"),
    "scales of a KV cache": (lambda _, s: s.update({K.replace("k_proj", "k_scale"): torch.ones(1)}), "k_scale: exp"),
    "experts in one tensor": (lambda _, s: s.update({"model.layers.1.mlp.experts.up": torch.ones(2, 3, 4).char()}),
                              "mlp.experts: expected floating point: config.json has no `experts`"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_our_format_does_not_have_is_refused_with_the_reason(tmp_path, change, reason):
    with pytest.raises(SmoothQuantError, match=reason):
        converted(tmp_path, change)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_layers_that_vllm_computes_as_one_must_share_a_static_scale(tmp_path):
    with pytest.raises(SmoothQuantError, match=r"k_proj\.input_scale: expected that of .*q_proj"):
        converted(tmp_path, differing, activations="static")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe"])
def test_int8_routed_experts_are_read(tmp_path, model):
    folder = converted(tmp_path, lambda *_: None, model=model, layers=r".*(?:_proj|\.w\d)")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["experts"] == {"num_bits": 8, "strategy": "token", "dynamic": True}
    assert not verify(folder).faults


def test_experts_with_a_static_scale_are_refused(tmp_path):
    """No kernel for experts reads one."""
    with pytest.raises(SmoothQuantError, match=r"experts\.0\.\w+\.input_scale: expected nothing"):
        converted(tmp_path, lambda *_: None, model="mixtral", layers=r".*(?:_proj|\.w\d)", activations="static")


def test_a_conv1d_is_refused(tmp_path):
    """Square: its scales fit either axis, and only the tool knows which one they belong to."""
    with pytest.raises(SmoothQuantError, match=r"attn\.c_proj\.weight: expected a Linear weight"):
        converted(tmp_path, group(targets=["Conv1D"]), model="gpt2", layers=r".*attn\.c_proj")


def test_files_that_can_run_code_or_lie_elsewhere_are_refused(tmp_path):
    theirs = foreign_checkpoint.save(tmp_path / "theirs")
    (theirs / "optimizer.pt").write_bytes(b"")
    with pytest.raises(SmoothQuantError, match="can run code"):
        convert(theirs, tmp_path / "out", "smoothquant")
    (theirs / "optimizer.pt").unlink()
    shutil.move(theirs / "tokenizer.json", tmp_path / "tokenizer.json")
    (theirs / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(SmoothQuantError, match="a link to"):
        convert(theirs, tmp_path / "out", "smoothquant")
    assert not (tmp_path / "out").exists()
