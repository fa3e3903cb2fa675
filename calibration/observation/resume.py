"""The state folder next to the output: what an interrupted calibration has observed, so that the next run resumes.

    OUT.state/
        lock                        locked by the running process; its text marks the folder as ours
        key.json                    what the observation depends on: the key of saved.py, device, processes, versions
        block/N.safetensors         absmax of block N, once all samples have passed it
        pass/RANK/N.safetensors     absmax of batch N, if the model runs as a whole
        outputs/RANK/...            block_outputs.py
        observation.safetensors     the whole observation (saved.py)
        checkpoint/                 the output while it is written; it becomes OUT
        request.yaml                the command whose output that is, with the paths of this machine

A run that was killed at any point can be resumed and gives the same bytes, because files are written in order, and
those that mark a part as finished atomically. Nothing that alpha or the scheme decides is stored here, so that a run
with another alpha resumes, too. An error of any kind keeps what was observed; a finished run removes the folder. Only
files of these names are ever removed.

Several processes share the folder if they share the disk. On a node with a disk of its own, the folder of the same name
has only the files of the node's ranks, and each rank removes its own. The first process alone locks, compares keys and
decides where to resume. Files name their run (a hash of the key), because a node may have files of another run.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from vllm_smoothquant.format.errors import SmoothQuantError

from .processes import Processes
from .saved import START_OVER, Absmax, differences, load_state, save_atomically

MARK = "state of smoothquant calibrate\n"  # the text of the file `lock`
FOLDERS = ("block", "pass", "outputs", "checkpoint")
FILES = ("observation.safetensors", "observation.safetensors.partial", "key.json")
LAST = ("lock", "request.yaml")  # a finished run is recognised by its request until it has removed the rest


class ObservationStore:
    """The state folder of the output folder `output`, for one of the `processes` of a run.

    outputs: the folder for what blocks return in this process. checkpoint, observation: see above. run: marks the files
    of this run. resumable: whether a later run could resume from what the processes have recorded.
    """

    def __init__(self, output: Path, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.folder = Path(f"{output.absolute()}.state")
        self.observation = self.folder / "observation.safetensors"
        self.checkpoint = self.folder / "checkpoint"
        self.outputs = self.folder / "outputs" / str(self.processes.rank)
        self.run, self.resumable = "", True

    @contextmanager
    def session(self) -> Iterator[None]:
        """Mark the folder as ours; the first process also locks it.

        When the block ends without an error, or if nothing was observed, the first process removes the folder, and
        every other process what it wrote itself.
        Errors (SmoothQuantError): the folder is not ours, another run uses it, or the disk fails (is full, above all).
        """
        try:
            with self._marked() as lock:
                if self.processes.first:
                    self._lock(lock)
                    # A killed run leaves it, and none of its files may enter the output of this run.
                    if self.checkpoint.exists():
                        shutil.rmtree(self.checkpoint)
                try:
                    yield
                except BaseException:
                    if not (self._observed() if self.processes.first else self.resumable):
                        self._remove(lock)
                    raise
                self._remove(lock)
        except (OSError, SafetensorError) as error:
            raise SmoothQuantError(
                str(self.folder), "room and permission to write there", error, "fix that and run the same command again"
            ) from error

    def open(self, inputs: Mapping[str, Any]) -> bool:
        """Start, or resume; True if there is something to resume from. All processes call it, each with its own inputs.

        inputs: what the observation depends on.

        Errors (SmoothQuantError): the folder holds an observation of other inputs or of another version, or the
        processes have different inputs.
        """
        key = json.loads(json.dumps(inputs))
        self.resumable, common = self.processes.from_first(lambda: (self._open(key), key))
        changes = differences(common, key)
        if self.processes.any(bool(changes)):
            got = "; ".join(changes[:4]) or "others in another process"
            fix = "give each node the same model, data and versions, and the same kind of device"
            raise SmoothQuantError(f"process {self.processes.rank}", "the inputs of the first process", got, fix)
        self.run = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.resumable

    def _open(self, key: dict[str, Any]) -> bool:
        path = self.folder / "key.json"
        if not (path.exists() and self._observed()):
            self._clear()
            path.write_text(json.dumps(key, indent=2) + "\n")
            return False
        try:
            changes = differences(json.loads(path.read_text()), key)
        except ValueError:
            changes = ["key.json was damaged"]
        if changes:
            raise SmoothQuantError(
                str(self.folder), "the observation of the same model, data and versions", "; ".join(changes[:4]),
                f"run the first command again, {START_OVER}, or choose another -o",
            )  # fmt: skip
        return True

    def remember(self, request: str) -> None:
        """Record which command writes the output that follows."""
        if self.folder.is_dir():
            (self.folder / "request.yaml").write_text(request, encoding="utf-8")

    def request(self) -> str | None:
        """What `remember` recorded. "" if the folder is empty: a finished run was killed in its last step."""
        if self.folder.is_dir() and not self._entries():
            return ""
        path = self.folder / "request.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def finished_blocks(self) -> list[Absmax]:
        """absmax of each finished block, in order; the same in all processes."""

        def load() -> list[Absmax]:
            finished: list[Absmax] = []
            while (absmax := self.load("block", len(finished))) is not None:
                finished.append(absmax)
            return finished

        return self.processes.from_first(load)

    def load(self, what: str, index: int) -> Absmax | None:
        """absmax of "block" or "pass" number `index`, if it is finished."""
        return load_state(self._path(what, index), {"run": self.run})

    def save(self, what: str, index: int, absmax: Absmax) -> None:
        """Record that "block" or "pass" number `index` is finished. Of a block all processes call it."""
        self.resumable = True
        if what == "block" and not self.processes.first:
            return
        path = self._path(what, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, absmax, {"run": self.run})

    def begin_passes(self) -> None:
        """Record that the whole model runs, because its blocks cannot run isolated."""
        self._folder("pass").mkdir(parents=True, exist_ok=True)

    def passes_began(self) -> bool:
        return self.processes.from_first(self._folder("pass").is_dir)

    def forget(self, *what: str) -> None:
        """Remove the "outputs" or "pass" of this process."""
        for name in what:
            shutil.rmtree(self._folder(name), ignore_errors=True)
            with suppress(OSError):  # other processes have theirs beside it
                (self.folder / name).rmdir()

    def _folder(self, what: str) -> Path:
        return self.folder / what if what == "block" else self.folder / what / str(self.processes.rank)

    def _path(self, what: str, index: int) -> Path:
        return self._folder(what) / f"{index:05d}.safetensors"

    @contextmanager
    def _marked(self) -> Iterator[TextIO]:
        """The open lock file of a folder that is new or ours."""
        lock = self.folder / "lock"
        # The list comes first, because another process marks the folder before it writes anything else there.
        entries = self._entries() if self.folder.is_dir() or not self.folder.exists() else {"a file"}
        mark = lock.read_text(errors="replace") if lock.is_file() else None
        new = not entries or (entries == {"lock"} and mark == "")  # created, and killed before it was marked
        if not new and mark != MARK:
            raise SmoothQuantError(
                str(self.folder), "the state of an interrupted run", "something else", "move it or choose another -o"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
        with lock.open("r+") as file:
            file.write(MARK)
            file.flush()
            yield file

    def _lock(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ends removes its lock file. A lock on a removed file would not exclude a third run.
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError
        except BlockingIOError:
            raise SmoothQuantError(
                str(self.folder), "one calibration at a time", "another running one", "wait or choose another -o"
            ) from None

    def _observed(self) -> bool:
        """Whether anything is finished, so that a later run can resume."""
        finished = (self.folder.glob(pattern) for pattern in ("block/*.safetensors", "pass/*/*.safetensors"))
        return self.observation.exists() or any(map(any, finished))

    def _clear(self) -> None:
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def _remove(self, lock: TextIO) -> None:
        """Remove the folder. A process that is not the first removes its own files, then the folder if it is empty."""
        if self.processes.first:
            self._clear()
        else:
            self.forget("outputs", "pass")
            try:
                self._lock(lock)  # refused on the disk of the first process, as long as that one is at work
            except (OSError, SmoothQuantError):
                return
            if self._entries() != {"lock"}:
                return
        for name in LAST:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # a user's own file keeps the folder
            self.folder.rmdir()

    def _entries(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()


@contextmanager
def temporary_store() -> Iterator[ObservationStore]:
    """A store that is removed when the block ends, for runs that need not be resumed."""
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        store = ObservationStore(Path(folder, "observed"))
        with store.session():
            yield store
