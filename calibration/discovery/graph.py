from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from vllm_smoothquant.format.errors import SmoothQuantError


@dataclass(frozen=True)
class Linear:
    """A linear layer that ran. uncovered: input channels that no group can smooth. transposed: weight is [in, out]."""

    name: str
    in_features: int
    out_features: int
    transposed: bool
    uncovered: int


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads a source.

    channel_of: int64 [in_features], the source's channel behind each input channel, -1 where there is none to fold.
    power: int64 [in_features], dividing the source's channel by s divides that input by s ** power (1 unless squared).
    transposed: weight is [in, out]. quantized: False if it stays in floating point.
    """

    name: str
    channel_of: torch.Tensor
    power: torch.Tensor
    transposed: bool = False
    quantized: bool = True

    def columns(self, s: torch.Tensor) -> torch.Tensor:
        """float32 [in_features]: the factor of each input channel, from s [channels] of the source, or 1."""
        return torch.where(self.channel_of >= 0, s[self.channel_of.clamp(min=0)] ** self.power, 1.0)


@dataclass(frozen=True)
class Group:
    """One source and every linear layer that reads its foldable channels.

    kind: "norm", "linear" or "input". rules: parameter -> key of probe.NORM_RULES, for "norm" only. The rows and the
    bias of a "linear" source are divided. An "input" is divided at run time, by its readers themselves. foldable: bool
    [channels]; the scale of the other channels stays 1.
    """

    source: str
    kind: str
    rules: dict[str, str]
    channels: int
    foldable: torch.Tensor
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Refusal:
    """`channels` of `total` channels of `source` are not folded because of `reader`."""

    source: str
    reader: str
    reason: str
    channels: int
    total: int

    def __str__(self) -> str:
        part = "" if self.channels == self.total else f" ({self.channels} of {self.total} channels)"
        return f"{self.source}{part}: not folded, {self.reader}: {self.reason}"


@dataclass(frozen=True)
class Graph:
    """The result of `discover`. groups in the order in which their sources ran, linears in the order in which they ran.

    shared_input_groups: linear layers that read the same tensor (q, k and v); each layer that ran is in one of them.
    """

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    linears: tuple[Linear, ...]
    shared_input_groups: tuple[tuple[str, ...], ...]

    def linear(self, name: str) -> Linear:
        """The linear layer `name`; SmoothQuantError if it did not run."""
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise SmoothQuantError(name, "a linear layer that ran", "none of that name", "check the name")

    def keeping(self, in_float: Collection[str]) -> "Graph":
        """This graph if the linear layers `in_float` stay in floating point.

        They may follow a scale, but no group is made for them alone.
        """
        groups, refusals = [], list(self.refusals)
        uncovered = {linear.name: torch.ones(linear.in_features, dtype=torch.bool) for linear in self.linears}
        for group in self.groups:
            readers = tuple(replace(reader, quantized=reader.name not in in_float) for reader in group.readers)
            if any(reader.quantized for reader in readers):
                groups.append(replace(group, readers=readers))
                for reader in readers:
                    uncovered[reader.name] &= reader.channel_of < 0
            else:
                reason, foldable = "every reader stays in floating point", int(group.foldable.sum())
                refusals.append(Refusal(group.source, readers[0].name, reason, foldable, group.channels))
        linears = tuple(replace(linear, uncovered=int(uncovered[linear.name].sum())) for linear in self.linears)
        return replace(self, groups=tuple(groups), refusals=tuple(refusals), linears=linears)

    def with_inputs(self, names: Collection[str]) -> "Graph":
        """This graph and a group of kind "input" for each tensor that layers of `names` read and no group can smooth.

        The group's source is named after its first reader. Readers that are not in `names` get the undivided tensor.
        """
        groups = []
        for layers in self.shared_input_groups:
            linears = [self.linear(name) for name in layers if name in names]
            if linears and all(linear.uncovered == linear.in_features for linear in linears):
                channels = linears[0].in_features
                each, once = torch.arange(channels), torch.ones(channels, dtype=torch.int64)
                readers = tuple(Reader(linear.name, each, once, linear.transposed) for linear in linears)
                groups.append(Group(f"input of {linears[0].name}", "input", {}, channels, once.bool(), readers))
        return replace(self, groups=(*self.groups, *groups))
