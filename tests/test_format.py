"""The checkpoint format: reading returns what was written, and everything else is refused."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_smoothquant.format.config import FORMAT_VERSION, CheckpointConfig, InputActivations, Override, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import header_faults, read_headers

names = st.from_regex(r"model\.layers\.[0-9]\.(self_attn|mlp)\.[a-z_]{2,9}", fullmatch=True)

activations = st.sampled_from(
    [InputActivations("token", True), InputActivations("tensor", True), InputActivations("tensor", False)]
)


eight_bits = st.builds(Weights, st.sampled_from(["channel", "tensor"]))
four_bits = st.builds(Weights, st.just("group"), st.sampled_from([128, 64, 32]), num_bits=st.just(4))
beside_four_bits = st.sampled_from([InputActivations("token", True), InputActivations(num_bits=16)])


@st.composite
def configs(draw: Any) -> CheckpointConfig:
    quantised = draw(st.frozensets(names, max_size=4))
    some = st.sampled_from(sorted(quantised)) if quantised else st.nothing()
    own, others = draw(st.sampled_from([(eight_bits, activations), (four_bits, beside_four_bits)]))
    override = st.builds(Override, others) | st.builds(Override, activations, eight_bits)
    in_eight_bits = st.tuples(st.sampled_from([None, InputActivations()]), st.none())
    experts, expert_weights = draw(in_eight_bits | st.tuples(beside_four_bits, four_bits))
    return CheckpointConfig(
        weights=draw(own),
        input_activations=draw(others),
        overrides=draw(st.dictionaries(some, override)),
        smoothed=draw(st.frozensets(st.sampled_from(sorted(quantised)))) if quantised else frozenset(),
        ignore=draw(st.frozensets(names, max_size=3)) - quantised,
        experts=experts,
        expert_weights=expert_weights,
    )


@given(config=configs())
@settings(max_examples=100, deadline=None)
def test_config_survives_json(config: CheckpointConfig) -> None:
    assert CheckpointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(config=configs(), data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_unknown_key_anywhere_is_refused(config: CheckpointConfig, data: st.DataObject) -> None:
    value = config.to_dict()
    places = [value, value["weights"], value["input_activations"]]
    places += [o for override in value["overrides"].values() for o in (override, override["input_activations"])]
    data.draw(st.sampled_from(places))["kv_cache_scheme"] = None
    with pytest.raises(SmoothQuantError, match=r"kv_cache_scheme: expected one of .* an unknown key"):
        CheckpointConfig.from_dict(value)


GOOD = CheckpointConfig(
    overrides={"a.b": Override(InputActivations("tensor", False))},
    smoothed=frozenset(["a.b"]),
    ignore=frozenset(["lm_head"]),
).to_dict()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], FORMAT_VERSION + 1, "format_version: expected at most 2, got 3; upgrade vllm-smoothquant"),
        (["format_version"], True, "format_version: expected 1 or 2, got True"),
        (["format_version"], "1", "format_version: expected 1 or 2, got '1'"),
        (["format_version"], None, "format_version"),
        (["quant_method"], "gptq", "quant_method: expected 'smoothquant', got 'gptq'"),
        (["weights"], "channel", "weights: expected an object"),
        (["weights", "num_bits"], 8.0, "weights.num_bits: expected 8 or 4, got 8.0"),
        (["weights", "num_bits"], 4, "weights: expected 8 bits with strategy channel or tensor, or 4 bits"),
        (["weights", "strategy"], "group", "weights: expected 8 bits with strategy channel or tensor, or"),
        (["input_activations", "dynamic"], 1, "input_activations.dynamic: expected True or False, got 1"),
        (["input_activations", "dynamic"], False, "expected true with strategy 'token'"),
        (["overrides"], ["a.b"], "overrides: expected an object"),
        (
            ["overrides", "a.b"],
            {"weights": {}, "input_activations": GOOD["input_activations"]},
            "overrides.a.b.weights",
        ),
        (["overrides", "a.b"], {}, "overrides.a.b.input_activations: expected a value"),
        (["smoothed"], "a.b", "smoothed: expected a list of module names"),
        (["smoothed"], [1], "smoothed: expected a list of module names"),
        (["ignore"], None, "ignore: expected a list of module names"),
        (["ignore"], ["a.b"], "expected a.b either ignored or quantised, got both"),
    ],
)
def test_a_value_out_of_range_is_one_line(path: list[str], value: Any, message: str) -> None:
    config = copy.deepcopy(GOOD)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SmoothQuantError) as caught:
        CheckpointConfig.from_dict(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["weights", "input_activations", "ignore", "quant_method", "format_version"])
def test_a_missing_key_is_refused(key: str) -> None:
    config = copy.deepcopy(GOOD)
    del config[key]
    with pytest.raises(SmoothQuantError, match=key):
        CheckpointConfig.from_dict(config)


@pytest.mark.parametrize("value", [None, [], "smoothquant"])
def test_a_value_that_is_not_an_object_is_refused(value: Any) -> None:
    with pytest.raises(SmoothQuantError, match="expected an object"):
        CheckpointConfig.from_dict(value)


def test_scheme_follows_ignore_and_overrides() -> None:
    config = CheckpointConfig.from_dict(GOOD)
    assert config.scheme("lm_head") is None
    overridden, plain = config.scheme("a.b"), config.scheme("a.c")
    assert overridden is not None
    assert plain is not None
    assert overridden.input_activations == InputActivations("tensor", False)
    assert plain.input_activations == InputActivations("token", True)
    assert set(overridden.tensors(4, 3)) == {"weight", "weight_scale", "input_scale"}
    assert plain.tensors(4, 3) == {"weight": (torch.int8, (4, 3)), "weight_scale": (torch.float32, (4, 1))}


def test_an_error_crosses_processes() -> None:
    error = SmoothQuantError("a", "b", "c", "d")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.where) == (SmoothQuantError, str(error), "a")


# --- files -----------------------------------------------------------------------------------------------------------

FILE_CONFIG = CheckpointConfig(
    weights=Weights("channel"),
    input_activations=InputActivations("tensor", False),
    overrides={"b": Override(InputActivations("token", True))},
    smoothed=frozenset(["a"]),
    ignore=frozenset(["c"]),
)


def file_tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.zeros(6, 4, dtype=torch.int8),
        "a.weight_scale": torch.ones(6, 1),
        "a.input_scale": torch.ones(1),
        "a.smoothing_factor": torch.ones(4),
        "a.bias": torch.zeros(6),
        "b.weight": torch.zeros(4, 6, dtype=torch.int8),  # [in, out], as in GPT-2
        "b.weight_scale": torch.ones(6, 1),
        "c.weight": torch.zeros(3, 3),
        "norm.weight": torch.ones(4),
    }


def faults(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    save_file(tensors, tmp_path / "model.safetensors")
    return [str(fault) for fault in header_faults(FILE_CONFIG, read_headers(tmp_path))]


def test_a_correct_file_has_no_faults(tmp_path: Path) -> None:
    assert faults(tmp_path, file_tensors()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a.weight_scale", None, "a.weight_scale: expected F32 [6, 1], got no such tensor"),
        ("a.weight_scale", torch.ones(6), "a.weight_scale: expected F32 [6, 1], got F32 [6]"),
        ("a.weight_scale", torch.ones(1), "a.weight_scale: expected F32 [6, 1], got F32 [1]"),
        ("a.weight_scale", torch.ones(6, 1).half(), "a.weight_scale: expected F32 [6, 1], got F16 [6, 1]"),
        ("a.input_scale", None, "a.input_scale: expected F32 [1], got no such tensor"),
        ("b.input_scale", torch.ones(1), "b.input_scale: expected nothing, by quantization_config, got F32 [1]"),
        ("a.smoothing_factor", None, "a.smoothing_factor: expected F32 [4], got no such tensor"),
        ("b.smoothing_factor", torch.ones(4), "b.smoothing_factor: expected nothing"),
        ("a.weight", torch.zeros(6, 4), "a.weight: expected int8"),
        ("a.weight", None, "a.weight: expected int8"),
        ("c.weight", torch.zeros(3, 3, dtype=torch.int8), "c.weight: expected floating point"),
        ("c.weight_scale", torch.ones(3, 1), "c.weight: expected floating point"),
        ("d.weight_scale", torch.ones(3, 1), "d.weight: expected int8 [out, in], got no such tensor"),
        ("d.input_scale", torch.ones(1), "d.weight: expected int8 [out, in], got no such tensor"),
    ],
)
def test_headers_show_the_fault(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = file_tensors()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    texts = faults(tmp_path, tensors)
    assert any(message in text for text in texts), texts


def write_shards(folder: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {n: f"model-0000{i}-of-00002.safetensors" for n, i in (("a.weight", 1), ("b.weight", 2))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_together(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert read_headers(tmp_path) == {"a.weight": ("F32", (2,)), "b.weight": ("F32", (2,))}


def test_a_missing_shard_an_extra_tensor_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(SmoothQuantError, match=r"expected b\.weight in model-00002.*copy the missing file"):
        read_headers(tmp_path)
    second.write_bytes(content[: len(content) // 3])
    with pytest.raises(SmoothQuantError, match="expected a safetensors file"):
        read_headers(tmp_path)
    second.write_bytes(content)
    extra = tmp_path / "adapter.safetensors"
    save_file({"c.weight": torch.zeros(2)}, extra)
    with pytest.raises(SmoothQuantError, match=r"an entry for c\.weight"):
        read_headers(tmp_path)
    save_file({"a.weight": torch.zeros(2)}, extra)
    with pytest.raises(SmoothQuantError, match=r"expected a\.weight in one file"):
        read_headers(tmp_path)


# --- imports ---------------------------------------------------------------------------------------------------------


def test_the_format_needs_neither_vllm_nor_transformers() -> None:
    code = (
        "import sys, vllm_smoothquant, vllm_smoothquant.format.files, vllm_smoothquant.format.int8; "
        "print([m for m in ('vllm', 'transformers', 'calibration') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
