"""Every script in examples/ runs on a small model, started as a user would start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.evaluation.measure import engine_environment
from demo.server import free_port
from tests.helpers import tiny_checkpoints

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(command: list[str], **environment: str) -> str:
    """stdout of `command`, with this environment's programs first in PATH, as in an activated environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        command, env=engine_environment() | {"PATH": path, **environment}, stdout=subprocess.PIPE, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_every_example_has_a_test():
    """tests/test_privacy.py runs domain_data.py, and tests/test_own_exam.py own_exam, without a network."""
    assert {path.name for path in EXAMPLES.iterdir()} == {
        "calibrate.py", "domain_data.py", "offline_batch.py", "own_exam", "serve.sh",
    }  # fmt: skip


def test_calibrate(tmp_path):
    model = tiny_checkpoints.save("llama", tmp_path / "model")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    script = str(EXAMPLES / "calibrate.py")
    output = output_of([sys.executable, script, str(model), str(tmp_path / "out"), str(text), "8", "32"])
    assert "14 linear layers in INT8" in output
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_offline_batch(smollm2_int8):
    command = [sys.executable, str(EXAMPLES / "offline_batch.py"), str(smollm2_int8), "--enforce-eager"]
    answers = [line for line in output_of(command, VLLM_CPU_KVCACHE_SPACE="1").splitlines() if " -> " in line]
    assert len(answers) == 4
    for line, capital in zip(answers, ("Paris", "Rome", "Tokyo"), strict=False):
        assert capital in line


@pytest.mark.slow
def test_serve(smollm2_int8):
    command = ["sh", str(EXAMPLES / "serve.sh"), str(smollm2_int8), "--enforce-eager", "--max-model-len", "512"]
    output = output_of([*command, "--kv-cache-memory-bytes", "512M"], PORT=str(free_port()))
    # The server's log is in the same output; curl's line is the one in JSON.
    (reply,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert "Paris" in reply["choices"][0]["message"]["content"]
