"""Two processes share the samples and make the same bytes as one."""

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


def launched(rank: int, port: int, model: str, output: str, text: str, given) -> None:
    """What torchrun does for process `rank` of two."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    given.put((rank, bool(calibrate(model, output, dataset=text, **OPTIONS))))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_make_the_bytes_of_one(name, tmp_path):
    model, text = tiny_checkpoints.save(name, tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(model), tmp_path / "one", dataset=str(text), **OPTIONS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = FORK.SimpleQueue()
    processes = [
        FORK.Process(target=launched, args=(rank, port, str(model), str(tmp_path / "two"), str(text), given))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert dict(given.get() for _ in processes) == {0: True, 1: False}, "the first writes, and tells"
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / o).iterdir()} for o in ("one", "two"))
    assert one == two
    assert not (tmp_path / "two.state").exists()


def test_batches_are_shared_without_rest():
    batches = torch.arange(7).split(1)
    shared = [Processes(rank, 3).share(batches) for rank in range(3)]
    assert sorted(number for mine in shared for number, _ in mine) == list(range(7))
    assert all(torch.equal(batch, batches[number]) for mine in shared for number, batch in mine)


def test_without_a_launcher_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Processes.of_launcher()
    assert (ranks, torch.distributed.is_initialized()) == (Processes(0, 1), False)
    assert ranks.largest({"a": torch.ones(2)}, {"a": 2})["a"].tolist() == [1, 1]
