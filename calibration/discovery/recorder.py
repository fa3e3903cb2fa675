"""The hooks of one traced forward pass: which modules are opaque, what they read, what they return.

Linear layers and norms are opaque: the trace does not look inside, because what they compute is known (probe.py). Their
outputs are sources, at their inputs the labels are read. discover.py asks for scales, rotations.py for vectors; each is
a subclass that says what to do at an input and at an output.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.forward import forward
from ..running.hooks import hooked
from ..running.modules import output_head, own_parameters, plain_kernels
from ..running.products import every_expert
from .probe import linear_transposed, norm_channels
from .trace import Trace, tensors_of


class Recorder:
    """transposed: linear layer -> weight is [in, out]. norms: candidate norm -> channels. executed: modules that ran.

    input_labels: linear layer -> labels of its input channels, int64 [in_features]. norm_shapes: norm that is a source
    -> shape of its output. owners: id of a parameter -> modules. decoder, head: the model without its output head, and
    this head. opaque: other modules into which the trace does not look.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.modules = dict(model.named_modules())
        self.transposed = {n: t for n, m in self.modules.items() if (t := linear_transposed(m)) is not None}
        self.norms = {n: c for n, m in self.modules.items() if n not in self.transposed and (c := norm_channels(m))}
        self.executed: set[str] = set()
        self.input_labels: dict[str, torch.Tensor] = {}
        self.norm_shapes: dict[str, torch.Size] = {}
        self.owners: dict[int, list[str]] = {}
        self.decoder, self.head = getattr(model, "base_model", model), output_head(model)
        self.opaque: set[str] = set()
        for name, module in self.modules.items():
            for parameter in own_parameters(module).values():
                self.owners.setdefault(id(parameter), []).append(name)

    # --- what a subclass says ---

    def at_linear(self, name: str, x: torch.Tensor) -> None:
        """Linear layer `name` reads x [..., in_features] for the first time."""

    def at_norm(self, name: str, tensors: list[torch.Tensor]) -> None:
        """The candidate norm `name` reads `tensors`."""

    def at_hidden_states(self, tensors: list[torch.Tensor]) -> None:
        """`tensors` can leave the model: the head reads them, or the model without its head returns them."""

    def at_opaque(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        """A module of `opaque` ran."""

    # --- the pass ---

    def run(self, input_ids: torch.Tensor) -> None:
        """Run the model on int64 [batch, tokens]; nothing of it is changed."""
        if input_ids.dim() != 2 or input_ids.shape[1] < 2:
            shape = str(list(input_ids.shape))
            raise SmoothQuantError("discover", "input_ids [batch, tokens >= 2]", shape, "pass a longer sample")
        training = self.model.training
        self.model.eval()
        try:
            with plain_kernels(self.model), every_expert(self.model), torch.no_grad(), hooked(self.hooks()), self.trace:
                output = forward(self.model, input_ids)
                self.trace.pin_read(output, "the model's output", "it leaves the model")
        finally:
            self.model.train(training)
        self.pin_modules()

    def hooks(self) -> Iterator[RemovableHandle]:
        for name, module in self.modules.items():
            # Last before forward and first after it, so that the trace follows what other hooks do to the tensors.
            yield module.register_forward_pre_hook(partial(self.enter, name), with_kwargs=True)
            yield module.register_forward_hook(partial(self.leave, name), with_kwargs=True, prepend=True)

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = tensors_of((args, kwargs))
        self.trace.expose(tensors)
        self.trace.path.append(name)
        self.trace.expose(tensors)
        self.executed.add(name)
        if name in self.transposed:
            self.read(name, *tensors)
            if module is self.head:
                self.at_hidden_states(tensors)
        elif name in self.norms:
            self.at_norm(name, tensors)
        elif name not in self.opaque:
            return
        self.trace.opaque_parameters = set(map(id, own_parameters(module).values()))

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.trace.opaque_parameters = None
        if name in self.opaque:
            self.at_opaque(name, args, kwargs, output)
        elif isinstance(output, torch.Tensor):
            # A norm makes one tensor of one tensor of the same shape.
            shapes = [tensor.shape for tensor in tensors_of((args, kwargs))]
            is_norm = name in self.norms and shapes == [output.shape] and output.shape[-1] == self.norms[name]
            if is_norm:
                self.norm_shapes[name] = output.shape
            if is_norm or name in self.transposed:
                self.trace.emit(name, output)
        tensors = tensors_of(output)
        self.trace.expose(tensors)
        self.trace.path.pop()
        self.trace.expose(tensors)
        if module is self.decoder:
            self.at_hidden_states(tensors)

    def read(self, name: str, x: torch.Tensor, *others: torch.Tensor) -> None:
        """Record the labels of the input channels of linear layer `name`: those of x [..., in_features]."""
        self.trace.pin_read(others, name, "an argument beside the input")
        rows = self.trace.ids(x).reshape(-1, x.shape[-1])
        columns = rows[0]
        if not torch.equal(rows, columns.expand_as(rows)):
            self.trace.pin(rows, name, "its input channels come from different places at different positions")
            columns = torch.zeros_like(columns)
        columns = columns.cpu()
        if name not in self.input_labels:
            self.at_linear(name, x)
        first_columns = self.input_labels.setdefault(name, columns)
        different = torch.stack([first_columns, columns])[:, first_columns != columns]
        self.trace.pin(different, name, "it runs more than once on different inputs")

    def pin_modules(self) -> None:
        """Pin what only the whole trace shows: shared parameters, and modules that did not run."""
        ledger, parameters_read = self.trace.ledger, self.trace.parameters_read
        for name in (*self.transposed, *self.norms, *self.opaque):
            reason = self.foreign_use(name)
            if reason is not None and name in ledger.sources:
                ledger.pin_source(name, name, reason)
            if reason is not None and name in self.input_labels:
                ledger.pin(self.input_labels[name], name, reason)
        for name, module in self.modules.items():
            parameters = {id(parameter) for parameter in own_parameters(module).values()}
            owners = {name, *(owner for parameter in parameters for owner in self.owners[parameter])}
            if not parameters or owners & self.executed or parameters & parameters_read.keys():
                continue
            ancestor = name
            while ancestor not in self.executed:
                ancestor = ancestor.rpartition(".")[0]
            reason = f"it did not run on the sample, and {ancestor or 'the model'} could hand it this tensor"
            for source in sorted(self.trace.scopes[ancestor]):
                ledger.pin_source(source, name, reason)

    def foreign_use(self, name: str) -> str | None:
        """Why the parameters of linear layer or norm `name` cannot be changed: something else uses them."""
        for parameter in own_parameters(self.modules[name]).values():
            others = [owner for owner in self.owners[id(parameter)] if owner != name]
            if others:
                return f"its parameter is shared with {others[0]}"
            if id(parameter) in self.trace.parameters_read:
                return f"its parameter is read by {self.trace.parameters_read[id(parameter)]}"
        return None
