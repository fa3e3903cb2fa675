"""Several processes that calibrate as one: each runs its share of the batches, and absmax is reduced by maximum.

`accelerate launch` or `torchrun` starts them. A maximum does not depend on the order, and the batches are the same for
any number of processes. Therefore the result is that of one process, bit for bit.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes, which is 1 without a launcher."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_launcher(cls) -> "Processes":
        """Join the processes that the environment of `accelerate launch` or torchrun describes."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def placement(self, device_map: str) -> Any:
        """The device map of this process. auto: its own GPU, or all GPUs if it is alone; without a GPU the CPU.

        On the CPU, weights stay in their memory-mapped files, so that nothing needs to be offloaded.
        """
        if device_map == "auto" and not torch.accelerator.is_available():
            return "cpu"
        if device_map == "auto" and self.size > 1:
            return {"": torch.accelerator.current_device_index()}
        return device_map

    @property
    def first(self) -> bool:
        """Whether this process plans, checks and writes."""
        return self.rank == 0

    def share(self, batches: Sequence[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """(number, batch) of the batches that this process runs."""
        return list(enumerate(batches))[self.rank :: self.size]

    def largest(self, absmax: Mapping[str, torch.Tensor], channels: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The elementwise maximum over all processes. channels: each layer that any of them may have -> in_features."""
        if self.size == 1:
            return dict(absmax)
        device = _device()
        parts = [absmax.get(name, torch.full((n,), -1.0)).to(device) for name, n in channels.items()]
        joined = torch.cat(parts or [torch.zeros(0, device=device)])
        joined[joined.isnan()] = torch.inf  # because a maximum over processes may lose a NaN
        dist.all_reduce(joined, dist.ReduceOp.MAX)
        reduced = zip(channels, joined.split(list(channels.values())), strict=True)
        return {name: part.clone() for name, part in reduced if (part >= 0).all()}

    def any(self, here: bool) -> bool:
        """Whether `here` is true in any process. Each process waits until all have called this."""
        if self.size == 1:
            return here
        flag = torch.tensor([int(here)], device=_device())
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
