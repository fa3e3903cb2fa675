"""What several test modules share: the small real model of the demo, its text, and one INT8 checkpoint of it.

A test that cannot get the model fails; none is skipped. `make test` runs one worker for each of two cores, each bound
to its own: two that share both wait for each other's threads.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from demo import assets

TINY = (
    "test_against_source", "test_blocks", "test_calibrate", "test_from_pretrained", "test_fuzz", "test_gate",
    "test_graph", "test_plan", "test_ranks", "test_reference", "test_resume", "test_security", "test_smooth",
    "test_verify",
)  # fmt: skip

settings.register_profile("repeatable", derandomize=True)  # benchmarks/fuzz.py is the one that explores

settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """A worker of pytest-xdist, and all it starts, keeps to one core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the matrices of tiny models a second thread only waits for the first."""
    threads = torch.get_num_threads()
    if request.module.__name__.rpartition(".")[2] in TINY:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a folder in BF16; made once and kept in .cache/."""
    return assets.model_dir()


@pytest.fixture(scope="session")
def calibration_file() -> Path:
    """JSONL, column `text`: Wikipedia articles to calibrate on."""
    return assets.calibration_text()


@pytest.fixture(scope="session")
def evaluation_file() -> Path:
    """JSONL, column `text`: other articles, to measure on."""
    return assets.evaluation_text()


@pytest.fixture(scope="session")
def smollm2_int8(smollm2: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in the default scheme, calibrated on few samples: its ranges suffice for short answers."""
    from calibration.pipeline import calibrate

    output = tmp_path_factory.mktemp("smollm2") / "int8"
    calibrate(str(smollm2), output, dataset=str(calibration_file), samples=8, seq_len=128, quiet=True)
    return output


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers ask for their place among the ranks: the only one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    store = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()
