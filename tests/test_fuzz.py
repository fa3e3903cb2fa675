"""A small, fixed part of benchmarks/fuzz.py: damaged checkpoints, given to `verify` and to the plugin's checks."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.checkpoint.verify import verify
from calibration.pipeline import calibrate
from tests.helpers import corruptions, tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import size_faults

config = pytest.importorskip("vllm_smoothquant.config", reason="the plugin needs vLLM; `make venv` installs it")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    text = tiny_checkpoints.save_text(root / "text.jsonl")
    source = tiny_checkpoints.save("llama", root / "source")
    options = {"samples": 8, "seq_len": 32, "activations": "static", "alpha": "auto"}
    calibrate(str(source), root / "int8", dataset=str(text), quiet=True, **options)
    corruptions.shard(root / "int8")
    assert not verify(root / "int8").faults
    return root / "int8"


def read_by_the_plugin(folder: Path) -> None:
    quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config.SmoothQuantVllmConfig.from_config(quantization_config).maybe_update_config(str(folder))


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_with_our_error_or_means_the_same(data, checkpoint):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(checkpoint, Path(temporary) / "copy"))
        damage = corruptions.damage(folder, data.draw)
        same = corruptions.meaning(folder) == corruptions.meaning(checkpoint)
        faults = verify(folder).faults
        assert all(str(fault).isprintable() for fault in faults)
        # If the manifest was regenerated, only --source detects other values (test_verify_source.py).
        assert faults or same or corruptions.REGENERATED in damage, damage
        try:
            read_by_the_plugin(folder)
        except SmoothQuantError:
            pass
        except (OSError, ValueError, KeyError, RecursionError, TypeError):
            # The JSON is damaged: vLLM could not have read it either.
            assert corruptions.meaning(folder) is None, damage


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
