"""Fixtures for several test modules: the small real model of the demo, its text, and one INT8 checkpoint of it.

A test that cannot get the model fails; none is skipped. `make test` runs two workers, each bound to one core, because
workers that share cores wait for each other's threads.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from demo import assets

TINY = (
    "test_adapter", "test_blocks", "test_calibrate", "test_factors", "test_from_pretrained", "test_fuzz", "test_gate",
    "test_graph", "test_linears", "test_offload", "test_plan", "test_processes", "test_reference", "test_resume",
    "test_security", "test_side_files", "test_verify", "test_verify_source",
)  # fmt: skip

settings.register_profile("repeatable", derandomize=True)  # benchmarks/fuzz.py explores other examples

settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Bind a worker of pytest-xdist, and all processes that it starts, to one core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first, because at the end one worker would wait for the other one's engine."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for the modules in TINY, because on tiny matrices a second thread only waits for the first."""
    threads = torch.get_num_threads()
    if request.module.__name__.rpartition(".")[2] in TINY:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in BF16, created once in .cache/."""
    return assets.model_dir()


@pytest.fixture(scope="session")
def calibration_file() -> Path:
    """A JSONL file with column `text`: Wikipedia articles to calibrate on."""
    return assets.calibration_text()


@pytest.fixture(scope="session")
def evaluation_file() -> Path:
    """A JSONL file with column `text`: other articles, to measure on."""
    return assets.evaluation_text()


@pytest.fixture(scope="session")
def smollm2_int8(smollm2: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, rotated, in the default scheme, calibrated on few samples, which suffice for short answers.

    One for all workers: the default would also try the model without the rotation and several alphas, which takes
    three minutes on one core.
    """
    from calibration.pipeline import calibrate

    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    output = folder / "smollm2-int8"
    options = {"samples": 8, "seq_len": 128, "rotation": "always", "alpha": 0.4, "quiet": True}
    with FileLock(f"{output}.lock"):
        if not output.exists():
            calibrate(str(smollm2), output, dataset=str(calibration_file), **options)
    return output


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A distributed environment of one rank, because vLLM's layers look up their rank."""
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
