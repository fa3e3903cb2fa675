"""What works beside plain serving: reloading, freeing, prefix caching, chunked prefill, dummy weights."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import tiny_checkpoints
from tests.helpers.engine import TIMEOUT_S, small_engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Static scales, because each shard of a fused layer must agree on them, again at each load."""
    root = tmp_path_factory.mktemp("beside")
    folder = tiny_checkpoints.checkpoints(root)("llama", activations="static")
    damaged = shutil.copytree(folder, root / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight_scale"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    command = [sys.executable, "-m", "tests.helpers.beside_engine", str(folder), str(damaged)]
    done = subprocess.run(command, env=small_engine(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_can_be_reloaded(found: dict[str, Any]) -> None:
    assert found["same weights"]
    assert found["reloaded"] == found["plain"]


def test_a_reload_without_a_scale_is_refused(found: dict[str, Any]) -> None:
    assert "k_proj.weight_scale" in found["damaged"]


def test_an_engine_that_is_deleted_frees_its_layers(found: dict[str, Any]) -> None:
    assert found["freed"]


def test_chunks_of_a_prompt_and_cached_prefixes_give_the_same_tokens(found: dict[str, Any]) -> None:
    assert found["in chunks"] == found["plain"]
    assert found["from the cache"] == found["plain"]


def test_dummy_weights_serve(found: dict[str, Any]) -> None:
    assert len(found["dummy"]) == 8
