"""benchmarks/gpu.py on a CPU: that it measures, compares and writes what it says, not how fast anything is."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.files import header_faults, read_headers


def test_candidates_are_measured_in_turn() -> None:
    order = []
    found = gpu.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, inner=1)
    assert "".join(order) == "ab" + "abab"  # once to warm up, then in turn
    assert set(found) == {"a", "b"}
    assert all(seconds >= 0 for seconds in found.values())


def test_the_synthetic_checkpoints_are_checkpoints(tmp_path: Path) -> None:
    rows = gpu.write_checkpoints(tmp_path, gpu.TINY)
    assert [name for name in rows if name.startswith("ours")] == list(gpu.SCHEMES)
    for name in gpu.SCHEMES:
        folder = Path(rows[name]["model"])
        config = CheckpointConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
        assert config.scheme("model.layers.0.mlp.down_proj") == gpu.SCHEMES[name]
        assert not list(header_faults(config, read_headers(folder)))
    # What it is compared with has the same integers.
    ours, theirs = (read_headers(rows[name]["model"]) for name in ("ours, per channel", "compressed-tensors INT8"))
    assert ours == theirs


@pytest.mark.slow
def test_it_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Products and layers. Engines take a minute: `--small --parts engine` runs them by hand."""
    gpu.main(["--small", "--parts", "gemm", "--output", str(tmp_path / "gpu.md")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    limits, *rows = result["gemm"]
    assert limits["bytes_per_s"] > 0
    assert {row["layer"] for row in rows} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    for row in rows:
        assert all(row[name] > 0 for name in ("BF16", "bound", *gpu.SCHEMES))
    text = (tmp_path / "gpu.md").read_text()
    assert "| qkv_proj | 1 |" in text
    assert "Engines" not in text


def test_failed_rows_stay_in_the_table() -> None:
    text = gpu.table([{"row": "a", "decode 1": 0.0021}, {"row": "b", "failed": "no"}])
    assert "| a | 2.100 |  |" in text
    assert "| b |  | no |" in text
