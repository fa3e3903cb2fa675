"""Two processes share the samples and write the same bytes as one, on one disk or on two."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calibration.checkpoint import export
from calibration.observation import observe
from calibration.observation.block_outputs import BlockOutputs
from calibration.observation.blocks import BlockNotIsolated
from calibration.observation.processes import Processes
from calibration.observation.resume import ObservationStore
from calibration.pipeline import calibrate
from tests.helpers import tiny_checkpoints
from tests.helpers.forked import own_tqdm_locks

FORK = multiprocessing.get_context("fork")

OPTIONS = {"samples": 11, "seq_len": tiny_checkpoints.SEQ_LEN, "activations": "static", "quiet": True}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def launched(rank: int, port: int, model: Path, output: Path, text: Path, before: Callable, results: Path) -> None:
    """Calibrate as process `rank` of two that torchrun started, after before(rank).

    Writes [whether it returned a manifest, or the error; the numbers of the blocks that ran].
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    own_tqdm_locks()
    ran, write = [], BlockOutputs.write

    def record(self, block, batch, output):
        ran.append(block)
        write(self, block, batch, output)

    BlockOutputs.write = record
    before(rank)
    try:
        outcome = bool(calibrate(str(model), output, dataset=str(text), **OPTIONS))
    except Exception as error:
        outcome = str(error)
    (results / f"{rank}.json").write_text(json.dumps([outcome, sorted(set(ran))]))


def launch(
    model: Path, outputs: list[Path], texts: list[Path], before: Callable = lambda rank: None
) -> list[tuple[int, bool | str, list[int]]]:
    """Run two processes; what each did: its exit code, its outcome and the blocks that it ran (see `launched`)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = outputs[0].parent / "results"
    results.mkdir()
    processes = [
        FORK.Process(target=launched, args=(rank, port, model, output, text, before, results))
        for rank, (output, text) in enumerate(zip(outputs, texts, strict=True))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    files = [results / f"{rank}.json" for rank in range(2)]
    did = [json.loads(file.read_text()) if file.exists() else ["killed", []] for file in files]
    shutil.rmtree(results)
    return [(process.exitcode, *did[rank]) for rank, process in enumerate(processes)]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_processes_write_the_bytes_of_one(name, tmp_path):
    model, text = tiny_checkpoints.save(name, tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(model), tmp_path / "one", dataset=str(text), **OPTIONS)
    did = launch(model, [tmp_path / "two"] * 2, [text] * 2)
    assert [outcome for _, outcome, _ in did] == [True, False], "only the first returns the manifest"
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "one", "text.jsonl", "two"]


# --- nodes that share no disk: two folders stand for the same path on two nodes ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Model, text, another text of the same shape."""
    folder = tmp_path_factory.mktemp("source")
    texts = [tiny_checkpoints.save_text(folder / f"{n}.jsonl", documents=n) for n in (12, 13)]
    return tiny_checkpoints.save("llama", folder / "llama"), *texts


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """File -> bytes that one process writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    calibrate(str(source[0]), output, dataset=str(source[1]), **OPTIONS)
    return contents(output)


@pytest.fixture
def outputs(tmp_path):
    """The output of each process; its state is next to it."""
    for name in ("node0", "node1"):
        (tmp_path / name).mkdir()
    return [tmp_path / "node0/out", tmp_path / "node1/out"]


def killed_together(folder: Path, rank: int) -> None:
    """Wait for the other process and die, so that neither ends with an error first."""
    (folder / f"dying-{rank}").touch()
    while len(list(folder.glob("dying-*"))) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_block(number: int, folder: Path) -> Callable:
    """For `launch`: both processes are killed before they write what block `number` returned."""

    def before(rank: int) -> None:
        write = BlockOutputs.write

        def write_or_die(self, block, batch, output):
            if block == number:
                killed_together(folder, rank)
            write(self, block, batch, output)

        BlockOutputs.write = write_or_die

    return before


def interrupt(source, outputs, text: Path, before: Callable) -> None:
    folder = outputs[0].parent
    assert [code for code, _, _ in launch(source[0], outputs, [text] * 2, before)] == [-signal.SIGKILL] * 2
    for file in folder.glob("dying-*"):
        file.unlink()


def check_done(did, outputs, whole, ran: list[list[int]]) -> None:
    assert [(code, outcome) for code, outcome, _ in did] == [(0, True), (0, False)], did
    assert [blocks for _, _, blocks in did] == ran
    assert contents(outputs[0]) == whole
    assert [p.name for p in outputs[0].parent.iterdir()] == ["out"]
    assert list(outputs[1].parent.iterdir()) == [], "each process removes its own files"


def test_nodes_without_a_shared_disk(source, outputs, whole):
    did = launch(source[0], outputs, [source[1]] * 2)
    check_done(did, outputs, whole, [[0, 1], [0, 1]])


def no_outputs(outputs, source) -> None:
    """A new node, or one whose disk was wiped."""
    shutil.rmtree(f"{outputs[1]}.state")


def outputs_of_another_run(outputs, source) -> None:
    """A node that was part of another run: its files have the same names and shapes."""
    folder = outputs[1].parent.parent / "other"
    others = [folder / "node0/out", folder / "node1/out"]
    for output in others:
        output.parent.mkdir(parents=True)
    interrupt(source, others, source[2], killed_in_block(1, folder / "node0"))
    shutil.rmtree(f"{outputs[1]}.state")
    shutil.move(f"{others[1]}.state", f"{outputs[1]}.state")


def no_state_of_the_first(outputs, source) -> None:
    """All start again, and the files of the other process are of no use."""
    shutil.rmtree(f"{outputs[0]}.state")


@pytest.mark.parametrize(
    ("meanwhile", "first_block"),
    [(None, 1), (no_outputs, 0), (outputs_of_another_run, 0), (no_state_of_the_first, 0)],
)
def test_all_processes_resume_at_the_same_block(meanwhile, first_block, source, outputs, whole):
    interrupt(source, outputs, source[1], killed_in_block(1, outputs[0].parent))
    assert list(Path(f"{outputs[1]}.state/outputs/1/0").iterdir())
    if meanwhile is not None:
        meanwhile(outputs, source)
    did = launch(source[0], outputs, [source[1]] * 2)
    check_done(did, outputs, whole, [list(range(first_block, 2))] * 2)


def test_nodes_resume_after_the_observation(source, outputs, whole):
    """Only the disk of the first process has the observation."""

    def before(rank: int) -> None:
        export.write_tensors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert [code for code, _, _ in launch(source[0], outputs, [source[1]] * 2, before)] == [-signal.SIGKILL, 0]
    assert not Path(f"{outputs[0]}.state/outputs").exists(), "gigabytes that no run needs again"
    did = launch(source[0], outputs, [source[1]] * 2)
    check_done(did, outputs, whole, [[], []])


def test_batches_of_another_run_are_not_taken(source, outputs, tmp_path, monkeypatch):
    """Where the whole model runs at once, each process has the finished batches on its own disk."""

    def whole_model(*_):
        raise BlockNotIsolated("the test wants it")

    monkeypatch.setattr(observe, "Blocks", whole_model)
    calibrate(str(source[0]), tmp_path / "one", dataset=str(source[1]), **OPTIONS)

    def before(rank: int) -> None:
        save = ObservationStore.save

        def save_and_die(self, what, index, absmax):
            save(self, what, index, absmax)
            killed_together(outputs[0].parent, rank)

        ObservationStore.save = save_and_die

    interrupt(source, outputs, source[2], before)
    assert [p.name for p in Path(f"{outputs[1]}.state/pass/1").iterdir()] == ["00001.safetensors"]
    shutil.move(f"{outputs[1]}.state", tmp_path / "of another run")
    shutil.rmtree(f"{outputs[0]}.state")
    interrupt(source, outputs, source[1], before)
    shutil.rmtree(f"{outputs[1]}.state")
    shutil.move(tmp_path / "of another run", f"{outputs[1]}.state")
    did = launch(source[0], outputs, [source[1]] * 2)
    check_done(did, outputs, contents(tmp_path / "one"), [[], []])


def test_another_text_on_a_node_is_refused_by_all(source, outputs):
    did = launch(source[0], outputs, [source[1], source[2]])
    for (_, error, _), got in zip(did, ("others in another process", "tokens.sha256 was"), strict=True):
        assert f"expected the inputs of the first process, got {got}" in error
    assert [list(output.parent.iterdir()) for output in outputs] == [[], []]


def test_the_error_of_the_first_process_is_that_of_all(source, outputs, whole):
    """Otherwise the others would wait for it. Nothing is lost."""
    interrupt(source, outputs, source[1], killed_in_block(1, outputs[0].parent))
    did = launch(source[0], outputs, [source[2]] * 2)
    assert all("tokens.sha256 was" in error for _, error, _ in did), did
    did = launch(source[0], outputs, [source[1]] * 2)
    check_done(did, outputs, whole, [[1], [1]])


def test_a_folder_on_another_node_that_is_not_ours_is_left_alone(source, outputs):
    mine = Path(f"{outputs[1]}.state/outputs/1/0/0.safetensors")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    did = launch(source[0], outputs, [source[1]] * 2)
    assert "expected the state of an interrupted run, got something else" in did[1][1]
    assert not outputs[0].exists()
    assert mine.read_text() == "mine"


# --- Processes ---


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
