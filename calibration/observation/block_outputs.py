"""What the previous and the running block returned for each batch of samples, in safetensors files.

An interrupted run finds them again. While there is room, the operating system keeps files in memory.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_smoothquant.format.errors import SmoothQuantError


class BlockOutputs:
    """Outputs by (block, batch) in `folder`. Those of two consecutive blocks are kept; older ones are overwritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, block: int, batch: int, output: torch.Tensor) -> None:
        path = self._path(block, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"output": output.cpu().contiguous()}, path)

    def read(self, block: int, batch: int) -> torch.Tensor:
        """A copy in memory of its own, because the layout of a matrix may decide the order of a sum."""
        try:
            return load_file(self._path(block, batch))["output"].clone()
        except (OSError, SafetensorError) as error:
            raise SmoothQuantError(
                str(self.folder), f"the output of block {block} for batch {batch}", error,
                "remove the state folder to start over",
            ) from error  # fmt: skip

    def _path(self, block: int, batch: int) -> Path:
        return self.folder / str(block % 2) / f"{batch}.safetensors"
