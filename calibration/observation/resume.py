"""The state folder beside the output: what an interrupted calibration has done, so that the same command goes on.

    OUT.state/
        inputs.json             what the run is made from: options, weight and token hashes, versions
        block/N.safetensors     absmax of block N; whoever finds it finds the block's output in activations/
        pass/N.safetensors      absmax of batch N, where the model runs as a whole
        activations/RANK/...    activations.py
        checkpoint/             the output as far as it is written; becomes OUT
        finished.json           OUT is whole: only this folder remains to be removed

Each file appears whole, by renaming, in an order in which every prefix is a state that can be gone on from: SIGKILL at
any moment, and the same command makes the same bytes. A fault of the input removes the folder, whatever else ends the
run leaves it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

from ..inputs.model import sha256

FORMAT = 1


class State:
    """`asked`: the options of the command, compared with those of the run that is to be gone on with."""

    def __init__(self, output: Path, asked: Mapping[str, Any]) -> None:
        self.output = output
        self.folder = output.absolute().with_name(f"{output.name}.state")
        self.asked = json.loads(json.dumps(asked))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Removes the folder when the block ends well, or by a fault of the input; else it stays.

        Errors (SmoothQuantError): what the disk has to say, a full one above all.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise SmoothQuantError(
                str(self.folder), expected="room and permission to write there", got=str(error),
                do="mend it and run the same command again: it goes on from there",
            ) from error  # fmt: skip
        except SmoothQuantError as error:
            # The disk may be full today and not tomorrow; a difference is no fault of what lies there.
            if not isinstance(error.__cause__, OSError | SafetensorError) and not isinstance(error, DifferentInputs):
                self.remove()
            raise
        self.remove()

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if an earlier run of the same command made the output and was stopped while tidying up."""
        mark = self.folder / "finished.json"
        manifest = self.output / MANIFEST
        if not (self.folder.is_dir() and manifest.is_file()):
            return None
        if mark.exists():
            record = json.loads(mark.read_text())
            if record != {"asked": self.asked, "manifest": sha256(manifest)}:
                return None
        elif any(self.folder.iterdir()):
            return None
        self.remove()
        found: dict[str, Any] = json.loads(manifest.read_text())
        return found

    def open(self, found: Mapping[str, Any]) -> bool:
        """Begin, or go on; True if there was something to go on with.

        found: what the command's inputs are, beside its options.
        Errors (Differs): the folder belongs to other inputs, or to another version.
        """
        inputs = json.loads(json.dumps({"format": FORMAT, "options": self.asked, **found}))
        path = self.folder / "inputs.json"
        if not path.exists():
            self._clear()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(inputs, indent=2))
            return False
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        found_different = differences(before, inputs)
        if found_different:
            raise DifferentInputs(
                str(self.folder),
                expected="the state of the same command: model, data, options and versions",
                got="; ".join(found_different[:4]) + (" ..." if len(found_different) > 4 else ""),
                do="run the first command again, remove that folder to begin anew, or choose another -o",
            )
        return True

    def done(self, what: str, index: int) -> dict[str, torch.Tensor] | None:
        """absmax of block or pass (`what`) `index`, if it is finished."""
        path = self._path(what, index)
        return load_file(path) if path.exists() else None

    def save(self, what: str, index: int, absmax: Mapping[str, torch.Tensor]) -> None:
        """From here on block or pass `index` is finished."""
        path = self._path(what, index)
        path.parent.mkdir(exist_ok=True)
        save_atomically(path, dict(absmax))

    def activations(self, rank: int) -> Path:
        """Where process `rank` keeps what blocks give."""
        return self.folder / "activations" / str(rank)

    @property
    def checkpoint(self) -> Path:
        """Where the output is written."""
        return self.folder / "checkpoint"

    def publish(self) -> None:
        """The checkpoint is whole: it becomes the output."""
        record = {"asked": self.asked, "manifest": sha256(self.checkpoint / MANIFEST)}
        write_atomically(self.folder / "finished.json", json.dumps(record))
        os.rename(self.checkpoint, self.output)

    def remove(self) -> None:
        """finished.json last, so that a run stopped in here is known to have finished."""
        if self.folder.is_dir():
            self._clear()
            for name in ("inputs.json", "finished.json"):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def _clear(self) -> None:
        for path in self.folder.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in ("inputs.json", "finished.json"):
                path.unlink(missing_ok=True)

    def _path(self, what: str, index: int) -> Path:
        return self.folder / what / f"{index:05d}.safetensors"


class DifferentInputs(SmoothQuantError):
    """The state folder belongs to another command."""


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Each leaf in which two JSON values differ, with both."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys()):
            found += differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if before == now else [f"{where} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " ..."


def write_atomically(path: Path, text: str) -> None:
    """`path` is what it was, or has all of `text`."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text + "\n")
    os.replace(beside, path)


def save_atomically(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """`path` is what it was, or a safetensors file of all `tensors`."""
    beside = path.with_name(path.name + ".partial")
    # Clones, because layers that read one tensor share its absmax, and safetensors refuses shared memory.
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, beside, metadata=metadata)
    os.replace(beside, path)
