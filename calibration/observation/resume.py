"""The state folder next to the output: what an interrupted calibration has observed, so that the next run resumes.

    OUT.state/
        lock                        held by the running process; marks the folder as ours
        key.json                    what the observation depends on (saved.py), processes and library versions
        block/N.safetensors         absmax of block N, once all samples have passed it
        pass/N.safetensors          absmax of batch N, if the model runs as a whole
        outputs/RANK/...            block_outputs.py
        observation.safetensors     the whole observation (saved.py)
        checkpoint/                 the output while it is written; it becomes OUT

Files are written atomically and in an order such that a run killed at any point can be resumed and gives the same
bytes.
Nothing that alpha or the scheme decides is stored here, so that a run with another alpha resumes, too. An error of
any kind keeps what was observed; a finished run removes the folder. Only files of these names are ever removed.
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
from safetensors.torch import load_file

from vllm_smoothquant.format.errors import SmoothQuantError

from .saved import Absmax, differences, save_atomically

FOLDERS = ("block", "pass", "outputs", "checkpoint")
FILES = ("observation.safetensors", "key.json")


class ObservationStore:
    """The state folder of the output folder `output`."""

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f"{output.name}.state")
        self.observation = self.folder / "observation.safetensors"
        self.checkpoint = self.folder / "checkpoint"

    @contextmanager
    def session(self) -> Iterator[None]:
        """Lock the folder. It is removed when the block ends well or before anything was observed; else it stays.

        Errors (SmoothQuantError): the folder is not ours, another run uses it, or the disk fails (is full, above all).
        """
        with self._locked():
            try:
                yield
            except (OSError, SafetensorError) as error:
                raise SmoothQuantError(
                    str(self.folder), "room and permission to write there", error,
                    "fix that and run the same command again: it resumes from there",
                ) from error  # fmt: skip
            except BaseException:
                if not self.observation.exists() and not any(self.folder.glob("*/*.safetensors")):
                    self._remove()
                raise
            self._remove()

    def open(self, key: Mapping[str, Any]) -> bool:
        """Start, or resume; True if there is something to resume from.

        Errors (SmoothQuantError): the folder holds an observation of other inputs or of another version.
        """
        key, path = json.loads(json.dumps(key)), self.folder / "key.json"
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        if not path.exists():
            self._clear()
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(key, indent=2) + "\n")
            os.replace(partial, path)
            return False
        try:
            changes = differences(json.loads(path.read_text()), key)
        except ValueError:
            changes = ["key.json was damaged"]
        if changes:
            raise SmoothQuantError(
                str(self.folder), "the observation of the same model, data and versions",
                "; ".join(changes[:4]) + (" ..." if len(changes) > 4 else ""),
                "run the first command again, remove that folder to start over, or choose another -o",
            )  # fmt: skip
        return True

    def load(self, what: str, index: int) -> Absmax | None:
        """absmax of "block" or "pass" number `index`, if it is finished."""
        path = self._path(what, index)
        return load_file(path) if path.exists() else None

    def save(self, what: str, index: int, absmax: Absmax) -> None:
        """Record that "block" or "pass" number `index` is finished."""
        path = self._path(what, index)
        path.parent.mkdir(exist_ok=True)
        save_atomically(path, absmax)

    def outputs(self, rank: int) -> Path:
        """Where process `rank` keeps what blocks return."""
        return self.folder / "outputs" / str(rank)

    def _path(self, what: str, index: int) -> Path:
        return self.folder / what / f"{index:05d}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.folder / "lock"
        if self.folder.exists() and not lock.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise SmoothQuantError(
                str(self.folder), "no such folder, or the state of an interrupted calibration", "something else",
                "move it away, or choose another -o",
            )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SmoothQuantError(
                    str(self.folder), "one calibration at a time", "another one that is running",
                    "wait for it, or choose another -o",
                ) from None  # fmt: skip
            yield

    def _clear(self) -> None:
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in FILES:
            for path in (self.folder / name, self.folder / f"{name}.partial"):
                path.unlink(missing_ok=True)

    def _remove(self) -> None:
        self._clear()
        (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # what is not ours stays
            self.folder.rmdir()


@contextmanager
def temporary_store() -> Iterator[ObservationStore]:
    """A store that vanishes when the block ends, for runs that need not be resumed."""
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        store = ObservationStore(Path(folder, "observed"))
        store.folder.mkdir()
        yield store
