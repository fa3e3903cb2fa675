"""Several processes that calibrate as one: each runs its share of the batches, the statistics are reduced by max.

Started by `accelerate launch` or `torchrun`. A maximum does not depend on order and the batches are the same however
many processes share them, so the result is that of one process, bit for bit.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process and how many there are; without a launcher it is alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_launcher(cls) -> "Processes":
        """As the environment of `accelerate launch` or torchrun says; joins the other processes."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def placement(self, device_map: str) -> Any:
        """Where the model goes. auto: what of it fits on the GPUs, each process on its own; without one on the CPU.

        There, weights stay in their memory-mapped files, so that none need be put elsewhere.
        """
        if device_map == "auto" and not torch.accelerator.is_available():
            return "cpu"
        if device_map == "auto" and self.size > 1:
            return {"": torch.accelerator.current_device_index()}
        return device_map

    @property
    def first(self) -> bool:
        """Whether this one plans, proves and writes."""
        return self.rank == 0

    def mine(self, batches: Sequence[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
        """(number, batch) of those that this process runs."""
        return list(enumerate(batches))[self.rank :: self.size]

    def largest(self, absmax: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The elementwise maximum over all processes. sizes: layer -> channels, of all layers that may be in any."""
        if self.size == 1:
            return dict(absmax)
        device = _device()
        joined = torch.cat([absmax.get(name, torch.full((n,), -1.0)).to(device) for name, n in sizes.items()] or [
            torch.zeros(0, device=device)
        ])  # fmt: skip
        nan = torch.isnan(joined).any().to(torch.int32)
        dist.all_reduce(joined, dist.ReduceOp.MAX)
        dist.all_reduce(nan, dist.ReduceOp.MAX)  # MAX may lose a NaN
        parts = joined.split(list(sizes.values()))
        found = {name: part.clone() for name, part in zip(sizes, parts, strict=True) if not (part < 0).all()}
        return {name: part.fill_(torch.nan) for name, part in found.items()} if nan else found

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; all of them wait for that."""
        if self.size == 1:
            return here
        flag = torch.tensor([int(here)], device=_device())
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
