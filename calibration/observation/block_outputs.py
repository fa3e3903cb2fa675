"""What the last block gave for every batch of samples, and what the running block gives: memory, then files.

With a folder, everything lies in it as safetensors, so that an interrupted run finds it again; the operating system
keeps files in memory while there is room. Without one it is held in memory up to a limit, and what is beyond is spilled
to a temporary folder.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

IN_MEMORY = 2 * 10**9


class BlockOutputs:
    """Outputs of blocks by (block, batch); those of two blocks running are kept, the older ones are overwritten."""

    def __init__(self, folder: Path | None = None, in_memory: int = IN_MEMORY) -> None:
        """folder: where to keep them for good. in_memory: bytes to hold before spilling, without a folder."""
        self.spilled = None if folder is not None else tempfile.TemporaryDirectory(prefix="smoothquant-")
        self.folder = folder or Path(self.spilled.name if self.spilled else "")
        self.in_memory = 0 if folder is not None else in_memory
        self.held: dict[tuple[int, int], torch.Tensor] = {}

    def write(self, block: int, batch: int, output: torch.Tensor) -> None:
        """Keep `output`; from here on the block before has nothing for this batch, unless it lies in a file."""
        self.held.pop((block - 1, batch), None)
        if sum(t.nbytes for t in self.held.values()) + output.nbytes <= self.in_memory:
            self.held[block, batch] = output.cpu().clone()
            return
        path = self._path(block, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"output": output.cpu().contiguous()}, path)

    def read(self, block: int, batch: int) -> torch.Tensor:
        """A copy of its own: how a matrix lies in memory may decide in which order a product is summed."""
        held = self.held.get((block, batch))
        return (load_file(self._path(block, batch))["output"] if held is None else held).clone()

    def close(self) -> None:
        self.held.clear()
        if self.spilled is not None:
            self.spilled.cleanup()

    def _path(self, block: int, batch: int) -> Path:
        return self.folder / str(block % 2) / f"{batch}.safetensors"
