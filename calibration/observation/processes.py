"""Several processes that calibrate as one: each runs its share of the batches, and absmax is reduced by maximum.

`accelerate launch` or `torchrun` starts them. A maximum does not depend on the order, and the batches are the same for
any number of processes. Therefore the result is that of one process, bit for bit.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vllm_smoothquant.format.errors import SmoothQuantError

from ..options import DeviceMap

Made = TypeVar("Made")


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

    def placement(self, device_map: DeviceMap) -> DeviceMap:
        """The device map of this process. auto: its own GPU, or all GPUs if it is alone; without a GPU the CPU.

        What does not fit on the GPUs of a process that is alone stays on the CPU, and what does not fit there on disk.
        """
        if device_map == "auto" and self.size > 1:
            return {"": torch.accelerator.current_device_index()} if torch.accelerator.is_available() else "cpu"
        return device_map

    @property
    def first(self) -> bool:
        """Whether this process plans, checks and writes."""
        return self.rank == 0

    def share(self, batches: Sequence[Made]) -> list[tuple[int, Made]]:
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

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns in the first process, in every process. Only the first calls it; the others wait.

        Errors (SmoothQuantError): those of `make`, in every process, because the others would wait for ever.
        """
        if self.size == 1:
            return make()
        results: list[Any] = [None, None]
        if self.first:
            try:
                results[0] = make()
            except SmoothQuantError as error:
                results[1] = error
        dist.broadcast_object_list(results, device=_device())
        if results[1] is not None:
            raise results[1]
        made: Made = results[0]
        return made

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
