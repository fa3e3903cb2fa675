"""A small, fixed part of benchmarks/fuzz.py: spoilt checkpoints against `verify` and the plugin's reading of files."""

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
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    text = tiny_checkpoints.save_text(root / "text.jsonl")
    calibrate(
        str(tiny_checkpoints.save("llama", root / "source")), root / "int8", dataset=str(text), samples=8, seq_len=32,
        quiet=True,
        activations="static", alpha="auto",
    )  # fmt: skip
    corruptions.shard(root / "int8")
    assert not verify(root / "int8").faults
    return root / "int8"


def read_by_the_plugin(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    config.SmoothQuantVllmConfig.from_config(said).maybe_update_config(str(folder))


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_spoilt_checkpoint_is_refused_by_our_error_or_means_the_same(data, sound):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(sound, Path(temporary) / "copy"))
        done = corruptions.spoil(folder, data.draw)
        same = corruptions.meaning(folder) == corruptions.meaning(sound)
        faults = verify(folder).faults
        assert all(str(fault).isprintable() for fault in faults)
        # With a manifest made anew only --source can tell other values (test_against_source.py).
        assert faults or same or "manifest made anew" in done, done
        try:
            read_by_the_plugin(folder)
        except SmoothQuantError:
            pass
        except (OSError, ValueError, KeyError, RecursionError, TypeError):
            # Of JSON that vLLM could not have read either.
            assert corruptions.meaning(folder) is None, done


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "num_labels"])
def test_an_absurd_size_is_refused_before_anything_is_built(key, sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "copy"))
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {key: 10**9}))
    assert f"config.json: {key}: expected at most" in "\n".join(map(str, verify(folder).faults))
    with pytest.raises(SmoothQuantError, match=f"{key}: expected at most"):
        read_by_the_plugin(folder)


@pytest.mark.parametrize("name", list(tiny_architectures.ZOO))
def test_no_architecture_we_try_has_an_absurd_size(name):
    model = tiny_architectures.build(name)
    headers = {key: ("F32", tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    assert not list(map(str, size_faults(model.config.to_dict(), headers)))
