"""What a decoder block returned for each batch of samples, in safetensors files.

An interrupted run resumes from these files. The operating system keeps them in memory while there is room.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_smoothquant.format.errors import SmoothQuantError

from .saved import START_OVER, load_state


class BlockOutputs:
    """Outputs by (block, batch) in `folder`: those of the running and the previous block overwrite older ones.

    run: marks the files, because a folder may hold those of another run (resume.py).
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def write(self, block: int, batch: int, output: torch.Tensor) -> None:
        path = self._path(block, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"output": output.cpu().contiguous()}, path, metadata=self._metadata(block))

    def read(self, block: int, batch: int) -> torch.Tensor:
        """A copy, because the alignment of a matrix in memory may decide the order of a sum."""
        path = self._path(block, batch)
        tensors = load_state(path, self._metadata(block))
        if tensors is None:
            raise SmoothQuantError(str(path), f"what block {block} returned", "no such file", START_OVER)
        return tensors["output"].clone()

    def has(self, block: int, batch: int) -> bool:
        """Whether `read` would find an undamaged file. A run that is killed leaves half a file of the running block."""
        try:
            with safe_open(self._path(block, batch), "pt") as file:
                return bool(file.metadata() == self._metadata(block))
        except (OSError, SafetensorError):
            return False

    def _metadata(self, block: int) -> dict[str, str]:
        return {"run": self.run, "block": str(block)}

    def _path(self, block: int, batch: int) -> Path:
        return self.folder / str(block % 2) / f"{batch}.safetensors"
