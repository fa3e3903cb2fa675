"""What a decoder block returned for each batch of samples, in safetensors files.

An interrupted run resumes from these files. The operating system keeps them in memory while there is room.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from .saved import load_state


class BlockOutputs:
    """Outputs by (block, batch) in `folder`: those of the running and the previous block overwrite older ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, block: int, batch: int, output: torch.Tensor) -> None:
        path = self._path(block, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"output": output.cpu().contiguous()}, path)

    def read(self, block: int, batch: int) -> torch.Tensor:
        """A copy, because the alignment of a matrix in memory may decide the order of a sum."""
        return load_state(self._path(block, batch))["output"].clone()

    def _path(self, block: int, batch: int) -> Path:
        return self.folder / str(block % 2) / f"{batch}.safetensors"
