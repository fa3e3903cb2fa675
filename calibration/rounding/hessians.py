"""The sums that GPTQ needs of the inputs of linear layers.

    H = sum over calibration tokens of x^T x        float32 [in, in]; its diagonal shows how large each input is

A model has more of these matrices than fit into memory. They are computed for as many layers as fit, in one pass over
the calibration samples, when the first of them is asked for; a large model takes several passes.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..observation.observation import Observation
from ..running.hooks import hooked
from ..running.modules import decoder_of, weight_shape
from ..running.precision import fast_arithmetic

MAX_BYTES = 2 * 2**30
BATCH_SIZE = 4


class Hessians:
    """layers: those that will be asked for, in this order. max_bytes: of the matrices that are kept at once."""

    def __init__(self, observation: Observation, layers: Sequence[str], max_bytes: int = MAX_BYTES) -> None:
        self.model, self.input_ids = observation.model, observation.samples.input_ids
        self.layers, self.max_bytes = list(layers), max_bytes
        # Layers that read one tensor share a matrix.
        groups = observation.graph.shared_input_groups
        self.owner = {name: next((g[0] for g in groups if name in g), name) for name in layers}
        self.sums: dict[str, torch.Tensor] = {}

    def of(self, name: str) -> torch.Tensor:
        """float32 [in, in] of the input of layer `name`, as the model computes it now (not smoothed)."""
        if self.owner[name] not in self.sums:
            self._compute(self.layers.index(name))
        return self.sums[self.owner[name]]

    def _compute(self, first: int) -> None:
        names: dict[str, int] = {}
        for name in self.layers[first:]:
            names.setdefault(self.owner[name], 4 * weight_shape(self.model.get_submodule(name))[1] ** 2)
            if len(names) > 1 and sum(names.values()) > self.max_bytes:
                names.pop(self.owner[name])
                break
        self.sums = {}

        def add(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if name in self.sums:
                self.sums[name].addmm_(x.t(), x)
            else:
                self.sums[name] = x.t() @ x

        def handles() -> Iterator[RemovableHandle]:
            for name in names:
                yield self.model.get_submodule(name).register_forward_pre_hook(partial(add, name))

        device = next(self.model.parameters()).device
        with torch.no_grad(), fast_arithmetic(self.model), hooked(handles()):
            for batch in self.input_ids.split(BATCH_SIZE):
                decoder_of(self.model, names)(input_ids=batch.to(device), use_cache=False)
