"""A small, fixed part of benchmarks/fuzz.py: damaged checkpoints, given to `verify` and to the plugin's checks."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from benchmarks.fuzz import only_claims, ours_to_refuse
from calibration.checkpoint import export
from calibration.checkpoint.verify import verify
from calibration.pipeline import calibrate
from tests.helpers import corruptions, tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, read_tensors, size_faults

config = pytest.importorskip("vllm_smoothquant.config", reason="the plugin needs vLLM; `make venv` installs it")
linear = pytest.importorskip("vllm.model_executor.layers.linear", reason="as above")


BASES = {
    "static": {"activations": "static", "alpha": "auto"},
    "token-tensor": {"weights": "tensor", "alpha": "auto"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name in BASES -> a sound checkpoint in two shards; "source" -> the model that all were made from."""
    root = tmp_path_factory.mktemp("checkpoints")
    text = tiny_checkpoints.save_text(root / "text.jsonl")
    source = tiny_checkpoints.save("llama", root / "source")
    for name, options in BASES.items():
        calibrate(str(source), root / name, dataset=str(text), quiet=True, samples=8, seq_len=32, **options)
        corruptions.shard(root / name)
        assert not verify(root / name, str(source)).faults
    return {name: root / name for name in ("source", *BASES)}


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints["static"]


def read_by_the_plugin(folder: Path) -> Any:
    """The plugin's configuration, after its checks of config.json and headers."""
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{path}: a pipe or a folder, which vLLM reads before it calls the plugin")
    quantization_config = json.loads(path.read_text())["quantization_config"]
    read = config.SmoothQuantVllmConfig.from_config(quantization_config)
    read.maybe_update_config(str(folder))
    return read


def load_by_the_plugin(folder: Path, read: Any, sound: corruptions.Meaning) -> None:
    """Load each quantised layer of `sound` from `folder` into a layer of vLLM, with the plugin's checks."""
    tensors = dict(read_tensors(folder))
    for name in sound[0]["layers"]:
        rows, columns = sound[1][f"{name}.weight"][1]
        layer = linear.ReplicatedLinear(
            columns, rows, bias=False, params_dtype=torch.float32, quant_config=read, prefix=name
        )
        for suffix, param in dict(layer.named_parameters()).items():
            if f"{name}.{suffix}" in tensors:
                param.weight_loader(param, tensors[f"{name}.{suffix}"])
        layer.quant_method.loading.check_complete(layer)


def check_verify(folder: Path, source: Path, sound: Any) -> None:
    """Assert that `verify` finds every difference between `folder` and a checkpoint with the meaning `sound`."""
    verdict, means = verify(folder), corruptions.meaning(folder)
    assert all(str(fault).isprintable() for fault in verdict.faults)
    if verdict.faults or means == sound:
        return
    assert means is not None, "what cannot be read was accepted"
    # Hashes show any other change, unless the manifest was written again. Then the format and the architecture still
    # show other names and shapes, and the source shows other values, except those that only calibration could know.
    assert json.loads((folder / MANIFEST).read_text())["files"] == export.file_hashes(folder)
    assert corruptions.structure(means) == corruptions.structure(sound)
    assert verify(folder, str(source)).faults or only_claims(sound, means)


def check_plugin(folder: Path, sound: Any) -> None:
    """Assert that the plugin refuses a folder with our error, unless its quantised layers are those of `sound`.

    Their integers, and the values of valid scales, may be others: only `verify` can know them. vLLM itself checks the
    tensors of other layers (benchmarks/fuzz.py).
    """
    means = corruptions.meaning(folder)
    try:
        load_by_the_plugin(folder, read_by_the_plugin(folder), sound)
    except SmoothQuantError:
        return
    except (OSError, ValueError, KeyError, RecursionError, TypeError):
        # The JSON is damaged: vLLM could not have read it either.
        assert means is None
        return
    assert means is not None, "what cannot be read was accepted"
    assert means[0]["layers"] == sound[0]["layers"]
    assert not ours_to_refuse(sound, means)


@pytest.mark.parametrize("base", BASES)
@settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # the damage is printed, and shrinking it takes minutes
)  # fmt: skip
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_with_our_error_or_means_the_same(one_rank, data, base, checkpoints):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(checkpoints[base], Path(temporary) / "copy"))
        note(str(corruptions.damage(folder, data.draw)))
        sound = corruptions.meaning(checkpoints[base])
        check_verify(folder, checkpoints["source"], sound)
        check_plugin(folder, sound)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "num_labels"])
def test_an_absurd_size_is_refused_before_anything_is_built(key, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: 10**9}))
    assert f"config.json: {key}: expected at most" in "\n".join(map(str, verify(folder).faults))
    with pytest.raises(SmoothQuantError, match=f"{key}: expected at most"):
        read_by_the_plugin(folder)


@pytest.mark.parametrize("name", list(tiny_architectures.ZOO))
def test_no_tested_architecture_has_an_absurd_size(name):
    model = tiny_architectures.build(name)
    headers = {key: ("F32", tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    assert not list(map(str, size_faults(model.config.to_dict(), headers)))
