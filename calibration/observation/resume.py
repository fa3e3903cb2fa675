"""The state folder next to the output: what an interrupted calibration has observed, so that the next run resumes.

    OUT.state/
        lock                        locked by the running process; marks the folder as ours
        key.json                    what the observation depends on: the key of saved.py, device, processes, versions
        block/N.safetensors         absmax of block N, once all samples have passed it
        pass/N.safetensors          absmax of batch N, if the model runs as a whole
        outputs/RANK/...            block_outputs.py
        observation.safetensors     the whole observation (saved.py)
        checkpoint/                 the output while it is written; it becomes OUT

A run that was killed at any point can be resumed and gives the same bytes, because files are written in order, and
those that mark a part as finished atomically. Nothing that alpha or the scheme decides is stored here, so that a run
with another alpha resumes, too. An error of any kind keeps what was observed; a finished run removes the folder. Only
files of these names are ever removed.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_smoothquant.format.errors import SmoothQuantError

from .processes import Processes
from .saved import START_OVER, Absmax, differences, load_state, save_atomically

FOLDERS = ("block", "pass", "outputs", "checkpoint")
FILES = ("observation.safetensors", "observation.safetensors.partial", "key.json")


class ObservationStore:
    """The state folder of the output folder `output`. processes: those that share it; the first creates and removes it.

    outputs: the folder for what blocks return in this process. checkpoint, observation: see above.
    """

    def __init__(self, output: Path, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.folder = Path(f"{output.absolute()}.state")
        self.observation = self.folder / "observation.safetensors"
        self.checkpoint = self.folder / "checkpoint"
        self.outputs = self.folder / "outputs" / str(self.processes.rank)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Lock the folder. It is removed when the block ends without an error, or if nothing was observed.

        Errors (SmoothQuantError): the folder is not ours, another run uses it, or the disk fails (is full, above all).
        """
        if not self.processes.first:
            yield
            return
        try:
            with self._locked():
                # A killed run leaves it, and none of its files may enter the output of this run.
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                try:
                    yield
                except BaseException:
                    if not self._observed():
                        self._remove()
                    raise
                self._remove()
        except (OSError, SafetensorError) as error:
            raise SmoothQuantError(
                str(self.folder), "room and permission to write there", error, "fix that and run the same command again"
            ) from error

    def open(self, key: Mapping[str, Any]) -> bool:
        """Start, or resume; True if there is something to resume from.

        Errors (SmoothQuantError): the folder holds an observation of other inputs or of another version.
        """
        key, path = json.loads(json.dumps(key)), self.folder / "key.json"
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

    def load(self, what: str, index: int) -> Absmax | None:
        """absmax of "block" or "pass" number `index`, if it is finished."""
        path = self._path(what, index)
        return load_state(path) if path.exists() else None

    def save(self, what: str, index: int, absmax: Absmax) -> None:
        """Record that "block" or "pass" number `index` is finished."""
        path = self._path(what, index)
        path.parent.mkdir(exist_ok=True)
        save_atomically(path, absmax)

    def _path(self, what: str, index: int) -> Path:
        return self.folder / what / f"{index:05d}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.folder / "lock"
        if self.folder.exists() and not lock.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise SmoothQuantError(
                str(self.folder), "the state of an interrupted run", "something else", "move it or choose another -o"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that ends removes its lock file. A lock on a removed file would not exclude a third run.
                if os.fstat(file.fileno()).st_nlink == 0:
                    raise BlockingIOError
            except BlockingIOError:
                raise SmoothQuantError(
                    str(self.folder), "one calibration at a time", "another running one", "wait or choose another -o"
                ) from None
            yield

    def _observed(self) -> bool:
        """Whether anything is finished, so that a later run can resume."""
        return self.observation.exists() or any(self.folder.glob("*/*.safetensors"))

    def _clear(self) -> None:
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def _remove(self) -> None:
        self._clear()
        (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # a user's own file keeps the folder
            self.folder.rmdir()


@contextmanager
def temporary_store() -> Iterator[ObservationStore]:
    """A store that is removed when the block ends, for runs that need not be resumed."""
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        store = ObservationStore(Path(folder, "observed"))
        with store.session():
            yield store
