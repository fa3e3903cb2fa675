"""Two processes share the samples and write the same bytes as one."""

import multiprocessing
import os
import socket

import pytest
import torch

from calibration.observation.processes import Processes
from calibration.pipeline import calibrate
from tests.helpers import tiny_checkpoints

FORK = multiprocessing.get_context("fork")

OPTIONS = {"samples": 11, "seq_len": tiny_checkpoints.SEQ_LEN, "activations": "static", "quiet": True}


def launched(rank: int, port: int, model: str, output: str, text: str, results) -> None:
    """Calibrate as process `rank` of two that torchrun started; put (rank, whether it returned a manifest)."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    results.put((rank, bool(calibrate(model, output, dataset=text, **OPTIONS))))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_write_the_bytes_of_one(name, tmp_path):
    model, text = tiny_checkpoints.save(name, tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(model), tmp_path / "one", dataset=str(text), **OPTIONS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = FORK.SimpleQueue()
    processes = [
        FORK.Process(target=launched, args=(rank, port, str(model), str(tmp_path / "two"), str(text), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert dict(results.get() for _ in processes) == {0: True, 1: False}, "only the first returns the manifest"
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / o).iterdir()} for o in ("one", "two"))
    assert one == two
    assert not (tmp_path / "two.state").exists()


def test_each_batch_is_run_by_one_process():
    batches = torch.arange(7).split(1)
    shares = [Processes(rank, 3).share(batches) for rank in range(3)]
    assert sorted(number for share in shares for number, _ in share) == list(range(7))
    assert all(torch.equal(batch, batches[number]) for share in shares for number, batch in share)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes.of_launcher()
    assert (processes, torch.distributed.is_initialized()) == (Processes(0, 1), False)
    assert processes.largest({"a": torch.ones(2)}, {"a": 2})["a"].tolist() == [1, 1]


def test_nan_survives_the_maximum_over_processes(monkeypatch):
    """As infinity, in the layer that has it; a layer that no process reached stays out."""
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op: None)
    absmax = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([2.0])}
    largest = Processes(0, 2).largest(absmax, {"a": 2, "b": 1, "unreached": 3})
    assert {name: value.tolist() for name, value in largest.items()} == {"a": [1.0, float("inf")], "b": [2.0]}
