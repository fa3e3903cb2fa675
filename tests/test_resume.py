"""After SIGKILL at any moment, the same command resumes and writes the same bytes. Other inputs are refused.

Runs are forked from a process that has imported everything, because starting one takes seconds and a tiny calibration
half a second.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calibration import __main__ as cli
from calibration.checkpoint import export
from calibration.observation import block_outputs, observe, resume, saved, sinks
from calibration.observation.blocks import BlockNotIsolated, IsolatedBlock
from calibration.observation.observe import BATCH_SIZE
from calibration.observation.resume import ObservationStore
from calibration.pipeline import calibrate, smooth
from calibration.smoothing import plan
from tests.helpers import tiny_checkpoints
from tests.helpers.forked import own_tqdm_locks
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

FORK = multiprocessing.get_context("fork")

TIMEOUT_S = 120  # a run takes half a second

SHARD = 60_000  # bytes: several shards of a tiny model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return tiny_checkpoints.save("llama", folder / "llama"), tiny_checkpoints.save_text(folder / "text.jsonl")


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.write_tensors, "__defaults__", (SHARD,))
        yield


def run(source, output, **options):
    model, text = source
    size = {"samples": 2 * BATCH_SIZE + 1, "seq_len": tiny_checkpoints.SEQ_LEN}
    options = {"activations": "static", "rotation": "none"} | size | options
    return calibrate(str(model), output, **({"dataset": str(text), "quiet": True} | options))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """File -> bytes of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(source, output)
    assert len(list(output.glob("*.safetensors"))) > 2
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def with_own_locks(target, *args) -> None:
    own_tqdm_locks()
    target(*args)


def forked(target, *args) -> int:
    """Exit code of target(*args) in a process of its own; -9 if it was killed."""
    process = FORK.Process(target=with_own_locks, args=(target, *args))
    process.start()
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{target.__name__}: no end after {TIMEOUT_S} s")
    return process.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_event(source, output: Path, at: int, counted=None) -> None:
    """Run until the process kills itself before file operation number `at` on the output or its state.

    counted: a queue for the number of operations, if the run ends.
    """
    events = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal events
        if event.split(".")[0] in ("open", "os", "shutil") and args and str(output) in str(args[0]):
            events += 1
            if events == at:
                die()

    sys.addaudithook(hook)
    run(source, output)
    if counted is not None:
        counted.put(events)


def killed_in_write(source, output: Path, at: int) -> None:
    """Run until the process kills itself when half of tensor file number `at` is written."""
    written = 0

    def half(tensors, path, metadata=None) -> None:
        nonlocal written
        save(tensors, path, metadata=metadata)
        written += 1
        if written == at:
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    save = export.save_file
    for module in (block_outputs, export, saved):
        module.save_file = half
    run(source, output)


def check_resumes(source, output: Path, whole) -> None:
    assert forked(run, source, output) == 0
    assert contents(output) == whole
    assert [p.name for p in output.parent.iterdir()] == [output.name], "the state is removed"


@pytest.fixture(scope="module")
def operations(source, tmp_path_factory):
    """The number of file operations of a run on its output and its state."""
    counted = FORK.SimpleQueue()
    assert forked(killed_at_event, source, tmp_path_factory.mktemp("counting") / "out", 0, counted) == 0
    return counted.get()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_killed_between_file_operations(share, operations, source, whole, tmp_path):
    at = max(1, round(share * operations))
    assert forked(killed_at_event, source, tmp_path / "out", at) == -signal.SIGKILL
    check_resumes(source, tmp_path / "out", whole)


@pytest.mark.parametrize("at", [1, 4, 5, 9, 12])
def test_killed_in_the_middle_of_a_write(at, source, whole, tmp_path):
    assert forked(killed_in_write, source, tmp_path / "out", at) == -signal.SIGKILL
    check_resumes(source, tmp_path / "out", whole)


def test_killed_again_and_again_at_random(source, whole, tmp_path):
    """Each run is killed later than the previous one, so that the last one ends."""
    rng, kills = random.Random(0), 0
    output = tmp_path / "out"
    for attempt in range(80):
        process = FORK.Process(target=with_own_locks, args=(run, source, output))
        process.start()
        process.join(rng.uniform(0.02, 0.1) * (attempt + 1))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
        if output.exists() and not (tmp_path / "out.state").exists():
            break  # only the end of the process was missing: the same command would now refuse to overwrite OUT
    assert kills >= 2
    assert contents(output) == whole
    assert not (tmp_path / "out.state").exists()


@pytest.fixture(scope="module")
def interrupted(source, tmp_path_factory):
    """The state folder of a run that was killed in its second block."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    assert forked(killed_in_write, source, output, 5) == -signal.SIGKILL
    return output.with_name("out.state")


def test_the_copy_of_an_interrupted_run_resumes(interrupted, source, whole, tmp_path):
    """Other tests only show that its files stay."""
    shutil.copytree(interrupted, tmp_path / "out.state")
    check_resumes(source, tmp_path / "out", whole)


def blocks(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "block").iterdir())


def test_finished_blocks_are_not_run_again(source, whole, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, 12) == -signal.SIGKILL
    assert blocks(tmp_path / "out.state") == [f"{i:05d}.safetensors" for i in range(3)]
    monkeypatch.setattr(block_outputs, "save_file", None)  # no block runs
    run(source, output)
    assert contents(output) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7}, {"activations": "token"}, {"ignore": ["model.layers.0.mlp.up_proj"]},
        {"alpha": "auto", "max_fallback": 0.3},
        {"bits": 4, "activations": "none", "rounding": "nearest", "budget_size": 0.4},
    ],
)  # fmt: skip
def test_another_alpha_or_scheme_resumes_from_the_same_observation(options, source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, 12) == -signal.SIGKILL
    monkeypatch.setattr(block_outputs, "save_file", None)  # no block runs
    run(source, output, **options)
    monkeypatch.undo()
    run(source, tmp_path / "fresh", **options)
    assert contents(output) == contents(tmp_path / "fresh")


def state(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if "checkpoint" not in p.parts}


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"samples": 5}, "tokens.samples was 9, is 5"),
        ({"seed": 1}, "tokens.sha256 was"),
        ({"quantize_lm_head": True}, "output_head was false, is true"),
    ],
)
def test_other_inputs_are_refused_with_the_difference(options, difference, source, whole, tmp_path):
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, 5) == -signal.SIGKILL
    files = state(tmp_path / "out.state")
    with pytest.raises(SmoothQuantError) as error:
        run(source, output, **options)
    assert difference in str(error.value)
    assert state(tmp_path / "out.state") == files
    check_resumes(source, output, whole)


ALL_LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)]  # fmt: skip

# Every option whose value may be mistyped.
MISTAKES = [
    {"text_column": "texts"}, {"dataset": "nowhere.jsonl"}, {"dataset": __file__}, {"samples": 100_000}, {"samples": 8},
    {"samples": 0}, {"seq_len": 4096}, {"seq_len": 31}, {"seq_len": 1}, {"seed": 1}, {"device_map": "gpu"},
    {"alpha": "best"}, {"alpha": 2.0}, {"level": "O1"}, {"level": "O9"}, {"weights": "row"}, {"activations": "row"},
    {"max_fallback": 29}, {"budget_ppl": 0.01}, {"budget_size": 0.6},
    {"bits": 4, "activations": "none", "budget_size": 0.2}, {"quantize_lm_head": True}, {"save_stats": "/"},
    {"stats": "nowhere"}, {"ignore": ["typo"]}, {"ignore": ALL_LAYERS},
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_in_a_later_command_keeps_the_observation(mistake, interrupted, source, tmp_path):
    folder = tmp_path / "out.state"
    shutil.copytree(interrupted, folder)
    files = state(folder)
    with pytest.raises(SmoothQuantError):
        run(source, tmp_path / "out", **mistake)
    assert state(folder) == files


def test_another_model_keeps_the_observation(interrupted, source, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out.state")
    files = state(tmp_path / "out.state")
    for model in (tmp_path / "nowhere", source[1], tiny_checkpoints.save("llama-bias", tmp_path / "other")):
        with pytest.raises(SmoothQuantError):
            run((model, source[1]), tmp_path / "out")
        assert state(tmp_path / "out.state") == files


def test_a_budget_that_cannot_be_met_keeps_the_whole_observation(source, tmp_path, monkeypatch):
    """The advice is to raise the budget, and this must not need another pass."""
    output = tmp_path / "out"
    perplexities = iter((10.0, 20.0))
    with monkeypatch.context() as patch:
        patch.setattr(plan, "perplexity", lambda *_: next(perplexities))
        with pytest.raises(SmoothQuantError, match="--budget-ppl"):
            run(source, output, max_fallback=0.5, budget_ppl=0.1)
    assert (tmp_path / "out.state/observation.safetensors").exists()
    monkeypatch.setattr(observe, "observe_samples", None)
    run(source, output, max_fallback=0.5)


def test_a_changed_model_or_text_is_refused_with_the_difference(source, tmp_path):
    model = tiny_checkpoints.save("llama", tmp_path / "model")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    output = tmp_path / "out"
    assert forked(killed_in_write, (model, text), output, 5) == -signal.SIGKILL
    tiny_checkpoints.save_text(text, documents=13)
    with pytest.raises(SmoothQuantError, match=r"tokens\.sha256 was "):
        run((model, text), output)
    tiny_checkpoints.save_text(text)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(SmoothQuantError, match="config was "):
        run((model, text), output)
    tiny_checkpoints.save("llama-bias", model)
    with pytest.raises(SmoothQuantError, match=r"source\.model\.safetensors was "):
        run((model, text), output)


def test_a_damaged_key_is_refused(source, tmp_path):
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, 5) == -signal.SIGKILL
    (tmp_path / "out.state/key.json").write_text("{")
    with pytest.raises(SmoothQuantError, match="remove the state folder to start over"):
        run(source, output)


def test_a_damaged_block_is_named(source, tmp_path):
    output, name = tmp_path / "out", "block/00000.safetensors"
    assert forked(killed_in_write, source, output, 5) == -signal.SIGKILL
    os.truncate(tmp_path / "out.state" / name, 20)
    with pytest.raises(SmoothQuantError, match=f"{name}: .*; remove the state folder to start over"):
        run(source, output)


@pytest.mark.parametrize("lose", [lambda path: os.truncate(path, 20), Path.unlink], ids=["half", "gone"])
@pytest.mark.parametrize("at", [5, 9])
def test_a_block_whose_outputs_are_lost_runs_again(at, lose, source, whole, tmp_path, capsys):
    """At 5 the second block runs and needs the outputs of the first; at 9 what follows it needs those of the second."""
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, at) == -signal.SIGKILL
    block = {5: 0, 9: 1}[at]
    lose(tmp_path / f"out.state/outputs/0/{block % 2}/1.safetensors")
    run(source, output, quiet=False)
    assert f"observe: again from block {block + 1}, because" in capsys.readouterr().err
    assert contents(output) == whole


def test_a_damaged_observation_is_named(source, tmp_path):
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, 12) == -signal.SIGKILL
    os.truncate(tmp_path / "out.state/observation.safetensors", 20)
    with pytest.raises(SmoothQuantError, match=r"observation\.safetensors: .*; remove the state folder to start over"):
        run(source, output)


def test_another_device_is_refused(source, tmp_path):
    """Its sums are rounded differently, so that the bytes would be those of neither device."""
    output = tmp_path / "out"
    assert forked(killed_in_write, source, output, 5) == -signal.SIGKILL
    path = tmp_path / "out.state/key.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "NVIDIA H100"}))
    with pytest.raises(SmoothQuantError, match='device was "NVIDIA H100", is "cpu"'):
        run(source, output)


def change_output(path: Path) -> None:
    """Change the last place of one number, as another machine or another number of threads may."""
    with safe_open(path, "pt") as file:
        output, metadata = file.get_tensor("output"), file.metadata()
    output[0, 0, 0] = output[0, 0, 0].nextafter(torch.tensor(torch.inf))
    save_file({"output": output}, path, metadata=metadata)


def test_a_machine_that_rounds_differently_is_refused(interrupted, source, tmp_path):
    """It would find that no block can run isolated, and run the whole model again, with that as the reason."""
    shutil.copytree(interrupted, tmp_path / "out.state")
    change_output(tmp_path / "out.state/outputs/0/0/0.safetensors")
    files = state(tmp_path / "out.state")
    with pytest.raises(SmoothQuantError, match=r"expected the rounding of the interrupted run, got model\.layers\.1"):
        run(source, tmp_path / "out")
    assert state(tmp_path / "out.state") == files


@pytest.mark.parametrize("at", [5, 6])
def test_a_run_of_the_whole_model_resumes(at, source, tmp_path, monkeypatch):
    """The blocks of the model cannot run isolated; killed in the first and in the second batch of the whole model."""

    def check(self, returned, absmax):
        if self.index == 1:
            raise BlockNotIsolated("the test wants it")

    monkeypatch.setattr(IsolatedBlock, "check", check)
    run(source, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    output = tmp_path / "killed/out"
    assert forked(killed_in_write, source, output, at) == -signal.SIGKILL
    assert len(list(Path(f"{output}.state").glob("pass/0/*.safetensors"))) == at - 5
    check_resumes(source, output, contents(tmp_path / "whole"))
    passes = json.loads((output / MANIFEST).read_text())["calibration"]["passes"]
    assert passes == "whole model: the test wants it"


def test_other_inputs_start_over_if_nothing_was_observed(source, whole, tmp_path):
    assert forked(killed_in_write, source, tmp_path / "out", 1) == -signal.SIGKILL
    assert json.loads((tmp_path / "out.state/key.json").read_text())["tokens"]["samples"] == 9
    run(source, tmp_path / "out", samples=5)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["calibration"]["samples"] == 5


def test_no_file_of_a_killed_export_enters_the_checkpoint(source, whole, tmp_path):
    """Also with --stats, which does not read the state."""
    run(source, tmp_path / "first", save_stats=tmp_path / "stats")
    assert forked(killed_in_write, source, tmp_path / "out", 12) == -signal.SIGKILL
    (tmp_path / "out.state/checkpoint/model-00009-of-00009.safetensors").write_text("of another scheme")
    run(source, tmp_path / "out", stats=tmp_path / "stats")
    assert contents(tmp_path / "out") == whole


def test_a_layer_that_no_sample_reached_is_named_after_resuming(source, tmp_path):
    """It may have been in --ignore when the state was recorded, so that its absence was no error."""
    output, name = tmp_path / "out", "model.layers.1.mlp.up_proj"
    assert forked(killed_in_write, source, output, 12) == -signal.SIGKILL
    path = tmp_path / "out.state/observation.safetensors"
    with safe_open(path, "pt") as file:
        absmax, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    del absmax[name]
    save_file(absmax, path, metadata=metadata)
    with pytest.raises(SmoothQuantError, match=f"{name}: expected calibration text that reaches every linear layer"):
        run(source, output)


def test_sinks_of_a_layer_that_is_no_longer_ignored_are_in_the_manifest(source, tmp_path, monkeypatch):
    """The state has the sinks of all layers; the manifest those of layers that are INT8."""
    monkeypatch.setattr(sinks, "TIMES", 1.01)
    ignored = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    run(source, tmp_path / "first", ignore=ignored, save_stats=tmp_path / "stats")
    run(source, tmp_path / "resumed", stats=tmp_path / "stats")
    run(source, tmp_path / "fresh")
    layers = {
        folder: [sink["layers"] for sink in json.loads((tmp_path / folder / MANIFEST).read_text())["sinks"]]
        for folder in ("first", "resumed", "fresh")
    }
    assert layers["resumed"] == layers["fresh"]
    assert [names for names in layers["fresh"] if names not in layers["first"]] == [[name] for name in ignored]


def test_a_checkpoint_folder_that_cannot_be_removed_is_refused(source, interrupted, tmp_path):
    """Its files could enter the output."""
    shutil.copytree(interrupted, tmp_path / "out.state")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/model-00009-of-00009.safetensors").write_text("of another run")
    (tmp_path / "out.state/checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SmoothQuantError, match="symbolic link"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    "files",
    [
        ["block/0.safetensors"], ["notes.txt"], ["checkpoint/model.safetensors"], ["lock"],
        ["lock", "checkpoint/model.safetensors", "key.json", "outputs/0/0/0.safetensors"],
    ],
)  # fmt: skip
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(files, source, tmp_path):
    for name in files:
        (path := tmp_path / "out.state" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SmoothQuantError, match="got something else"):
        run(source, tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_state_folder_is_refused(source, tmp_path):
    (tmp_path / "out.state").write_text("mine")
    with pytest.raises(SmoothQuantError, match="got something else"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out.state").read_text() == "mine"


def test_a_run_that_was_killed_before_it_marked_the_folder_is_continued(source, whole, tmp_path):
    (tmp_path / "out.state").mkdir()
    (tmp_path / "out.state/lock").touch()
    check_resumes(source, tmp_path / "out", whole)


def test_a_users_file_in_the_state_folder_stays(source, tmp_path):
    assert forked(killed_in_write, source, tmp_path / "out", 5) == -signal.SIGKILL
    (tmp_path / "out.state/notes.txt").write_text("mine")
    run(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out.state").iterdir()] == ["notes.txt"]


def test_a_state_that_cannot_be_created_is_an_error_in_one_line(source, tmp_path):
    (tmp_path / "out.state").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SmoothQuantError, match=r"out\.state: expected room and permission to write there"):
        run(source, tmp_path / "out")


def test_the_root_is_refused_as_output(source):
    with pytest.raises(SmoothQuantError, match="/: expected a new folder"):
        run(source, Path("/"))


def test_the_lock_of_a_run_that_ends_just_now_is_not_taken(tmp_path, monkeypatch):
    """A run that opened the lock file before another run removed it would hold a lock that a third run cannot see."""
    store, flock = ObservationStore(tmp_path / "out"), resume.fcntl.flock

    def remove_and_lock(file, operation):
        (store.folder / "lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(resume.fcntl, "flock", remove_and_lock)
    with pytest.raises(SmoothQuantError, match="one calibration at a time"), store.session():
        pass


def test_a_second_run_at_the_same_time_is_refused(source, tmp_path):
    store = ObservationStore(tmp_path / "out")
    with store.session():
        with pytest.raises(SmoothQuantError, match="one calibration at a time"):
            run(source, tmp_path / "out")
        assert store.folder.is_dir()
    run(source, tmp_path / "out")


def test_an_error_before_anything_is_observed_leaves_nothing(source, tmp_path):
    with pytest.raises(SmoothQuantError):
        run(source, tmp_path / "out", text_column="texts")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_the_observation(source, whole, tmp_path, monkeypatch, capsys):
    """The disk is full when the export writes its second shard; the observation stays for the next run."""
    output, save = tmp_path / "out", export.save_file

    def full(tensors, path, metadata=None):
        if "shard-1" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path, metadata=metadata)

    model, text = source
    argv = ["calibrate", str(model), "-o", str(output), "--dataset", str(text), "--samples", "9", "--seq-len"]
    argv += [str(tiny_checkpoints.SEQ_LEN), "--activations", "static", "--rotation", "none", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        assert cli.main(argv) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "No space left on device" in line
    assert not (tmp_path / "out.state/checkpoint").exists()
    assert not output.exists()
    monkeypatch.setattr(block_outputs, "save_file", None)  # no block runs
    assert cli.main(argv) == 0
    assert contents(output) == whole


def test_the_recipe_is_part_of_what_is_published(source, tmp_path, monkeypatch):
    """A disk that is full when the recipe is written leaves no output without it."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("calibration.checkpoint.write.dump_recipe", full)
    with pytest.raises(SmoothQuantError, match="No space left on device"):
        run(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.state"]


def full_after(files: int):
    """A save_file that fails after `files` files because the disk is full."""
    save, calls = block_outputs.save_file, []

    def save_until_full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path, metadata)

    return save_until_full


def test_a_full_disk_before_a_block_is_finished_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(block_outputs, "save_file", full_after(0))
    with pytest.raises(SmoothQuantError, match="No space left on device"):
        run(source, tmp_path / "out")
    with pytest.raises(SmoothQuantError, match="No space left on device"):  # in a temporary folder
        smooth(str(source[0]), tmp_path / "out", dataset=str(source[1]), seq_len=tiny_checkpoints.SEQ_LEN, samples=9)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_observing_loses_nothing(source, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(block_outputs, "save_file", full_after(4))
        with pytest.raises(SmoothQuantError, match="No space left on device"):
            run(source, tmp_path / "out")
    assert (tmp_path / "out.state/block/00000.safetensors").exists()
    run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


# --- --save-stats and --stats ---


def test_saved_statistics_give_the_same_bytes_without_a_pass(source, whole, tmp_path, monkeypatch):
    run(source, tmp_path / "first", alpha=0.7, weights="tensor", save_stats=tmp_path / "stats.safetensors")
    monkeypatch.setattr(observe, "observe_samples", None)
    run(source, tmp_path / "out", stats=tmp_path / "stats.safetensors")
    assert contents(tmp_path / "out") == whole
    with safe_open(tmp_path / "stats.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dim() == 1 for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 5}, "key.tokens.samples was 9, is 5"),
        ({"quantize_lm_head": True}, "expected the absmax of lm_head"),
    ],
)
def test_statistics_of_something_else_are_refused(options, message, source, tmp_path):
    stats = tmp_path / "stats.safetensors"
    run(source, tmp_path / "first", save_stats=stats)
    with pytest.raises(SmoothQuantError, match="--stats") as error:
        run(source, tmp_path / "out", stats=stats, **options)
    assert message in str(error.value)
    assert not (tmp_path / "out.state").exists()


def test_a_file_that_cannot_be_written_is_refused_before_the_work(source, tmp_path):
    (tmp_path / "stats").mkdir()
    with pytest.raises(SmoothQuantError, match=r"--save-stats .*: expected a file that can be written"):
        run(source, tmp_path / "out", save_stats=tmp_path / "stats")
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]


def test_another_file_is_refused_as_statistics(source, tmp_path):
    (tmp_path / "stats").write_text("none")
    save_file({}, tmp_path / "list", metadata={saved.KEY: "[]"})
    for name in ("stats", "list", "missing"):
        with pytest.raises(SmoothQuantError, match=f"--stats .*{name}: expected an observation that calibrate wrote"):
            run(source, tmp_path / "out", stats=tmp_path / name)


def test_a_partial_statistics_file_of_a_killed_run_is_replaced(source, tmp_path):
    (tmp_path / "stats.partial").write_text("half")
    run(source, tmp_path / "out", save_stats=tmp_path / "stats")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "stats"]


@pytest.mark.parametrize("name", ["out", "out/stats", "", "/"])
def test_statistics_have_a_path_of_their_own(name, source, tmp_path, monkeypatch):
    """Inside the output they would make the output exist, and the run would fail when it has observed everything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SmoothQuantError, match=r"--save-stats.*: expected a file"):
        run(source, tmp_path / "out", save_stats=name)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_manifest_has_batch_size_and_passes(whole):
    manifest = json.loads(whole[MANIFEST])
    assert manifest["calibration"]["batch_size"] == BATCH_SIZE
    assert manifest["calibration"]["passes"] == "block by block"
