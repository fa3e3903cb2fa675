"""The gate: no checkpoint is written unless the smoothed model computes the same function as the original.

What is compared. Original and smoothed model run in float32 on several batches. The change of an output is its largest
difference, relative to the original's largest value. It is measured on the logits and on every reader of every group.
In a mixture of experts, each token must choose the same experts as well; all experts run on all tokens, so that the
readers in each of them are compared.

The bound is measured, not tuned. An exact fold changes rounding and nothing else: (a) each product that it touches gets
at most ROUNDINGS more roundings of unit u = 2**-24, and (b) sums of rows that are divided by s are rounded on another
grid. The original model therefore runs again with both done to every parameter that the folding touches, in a way that
needs no graph to be right: (a) times 1 +- ROUNDINGS * u; (b) rows of linear layers times c, 1 <= c < 2, and their
output divided by c at once. The change that this causes is the floor: how far rounding alone moves the output.

    allowed = MARGIN * floor + 2 u               2 u, because both outputs are themselves rounded once

Before the gate refuses, it takes the largest of FLOORS floors. docs/method.md ("The bound of the gate") derives the
three numbers, and the probability of 1e-10 that an exact fold is refused.

Example (numbers invented). Rounding alone moves the logits by 1.0e-6, so 8.1e-6 is allowed. An exact fold moves them by
0.7e-6 and passes. A fold that forgets one reader moves that reader's output by 0.03: the gate refuses, and the error
names the group and the reader.

Memory. Parameters become float32 one decoder block at a time, while it runs; the model is left as it was, bit for bit.
"""

import zlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.trace import tensors_of
from ..running.forward import Batch, forward
from ..running.hooks import hooked
from ..running.modules import float_parameters, own_parameters, plain_kernels
from ..running.precision import Parameters, in_float32, plain_parameters
from ..running.products import chosen_experts, every_expert, expert_blocks
from .factors import Smoothing

UNIT = 2.0**-24
ROUNDINGS = 5
MARGIN = 8
FLOORS = 16
ROWS = 128  # rows of every reader's output that are compared; more would need much memory on big models
LOGITS = "logits"
CHOSEN = ": chosen experts"  # after the name of a block of experts
GATE_SHAPE = (4, 64)  # a few texts that are long enough for attention


@dataclass(frozen=True)
class Comparison:
    """Largest change of one tensor, relative to its largest value, and the bound for it."""

    change: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.change <= self.allowed

    @property
    def share(self) -> float:
        """How much of the bound the change uses."""
        return self.change / self.allowed


def check_equivalence(smoothing: Smoothing, batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare smoothed with original; returns the report for the manifest, or raises SmoothQuantError.

    batches: int64 [batch, tokens], or a sample with images, each. The error names the first group, in the order in
    which the model runs, whose fold changes the function, and the layer where the change first shows. The report:
    batches, `change` and `allowed` of the logits and of the reader of each group that comes nearest to its bound
    (relative to the output's maximum).
    """
    groups = [group for group in smoothing.graph.groups if group.source in smoothing.factors]
    readers = {reader.name for group in groups for reader in group.readers}
    worst: dict[str, Comparison] = {}
    with settled(smoothing.model):
        for batch in batches if groups else ():
            comparisons = _compare(smoothing, batch, readers)
            if not all(c.within for c in comparisons.values()):
                raise _refusal(smoothing, batch, comparisons)
            worst = {name: max(worst.get(name, c), c, key=lambda c: c.share) for name, c in comparisons.items()}
    nearest = {g.source: max((worst[r.name] for r in g.readers), key=lambda c: c.share) for g in groups if worst}
    return {
        "batches": len(batches),
        "logits": asdict(worst.get(LOGITS, Comparison(0.0, 0.0))),
        "groups": {source: asdict(comparison) for source, comparison in nearest.items()},
    }


def _compare(smoothing: Smoothing, batch: Batch, layers: Iterable[str], floors: int = FLOORS) -> dict[str, Comparison]:
    """Change of the logits and of the output of each of `layers` under `smoothing`, with its bound."""
    original = Original(smoothing.model, batch, layers)
    changes = original.change(smoothing.parameters, factor=smoothing.output_factor)
    floor = dict.fromkeys(changes, 0.0)
    for seed in range(floors):
        rounded = _Rounded(smoothing.model, smoothing.modules, smoothing.transposed, seed)
        rounding = original.change(rounded.parameters, rounded.hooks())
        floor = {name: max(floor[name], change) for name, change in rounding.items()}
        comparisons = {name: Comparison(c, MARGIN * floor[name] + 2 * UNIT) for name, c in changes.items()}
        if all(comparison.within for comparison in comparisons.values()):
            break
    return comparisons


def _refusal(smoothing: Smoothing, batch: Batch, comparisons: dict[str, Comparison]) -> SmoothQuantError:
    """Find the group to blame: the shortest run of groups, from the first, that changes the function ends with it."""
    graph = smoothing.graph
    sources = [group.source for group in graph.groups if group.source in smoothing.factors]
    readers = {group.source: [reader.name for reader in group.readers] for group in graph.groups}
    all_readers = {name for source in sources for name in readers[source]}

    def violations(some: Sequence[str], layers: Iterable[str]) -> dict[str, Comparison]:
        return {n: c for n, c in _compare(smoothing.only(some), batch, layers, floors=1).items() if not c.within}

    counts = range(1, len(sources))
    source = sources[bisect_left(counts, True, key=lambda count: bool(violations(sources[:count], all_readers)))]
    linears = [linear.name for linear in graph.linears]
    # This group without the others should violate a bound as well. If it does not, the first comparison is reported.
    wrong = violations([source], linears) or {name: c for name, c in comparisons.items() if not c.within}
    first = next(name for name in (*linears, *filter(_special, wrong)) if name in wrong)
    at = "one of its readers" if first in readers[source] else "it is not known to read the source"
    return SmoothQuantError(
        f"smoothing of {source} (read by {', '.join(readers[source])})",
        f"the same function: {first} may change by {wrong[first].allowed:.1e} of its largest value",
        f"{wrong[first].change:.1e} at {first} ({at})",
        "nothing was written; the trace did not see how the model reads that tensor: calibrate it without smoothing",
    )


def _special(name: str) -> bool:
    """Whether `name` is no layer."""
    return name == LOGITS or name.endswith(CHOSEN)


# --- Running in float32 ---


class Original:
    """The original model in float32 on `batch`: its outputs, and how far other parameters move them.

    outputs: name -> float32 [rows, features] for each time that the module ran, of `layers` and LOGITS.
    """

    def __init__(self, model: nn.Module, batch: Batch, layers: Iterable[str]) -> None:
        self.model, self.batch = model, batch
        self.outputs: dict[str, list[torch.Tensor]] = {}

        def store(name: str, rows: torch.Tensor) -> None:
            self.outputs.setdefault(name, []).append(rows.clone())

        self._run(set(layers), store, partial(plain_parameters, model))
        for name, runs in self.outputs.items():
            if any(rows.isnan().any() for rows in runs) or not any(rows.isfinite().any() for rows in runs):
                expected = "finite output of the original model"
                raise SmoothQuantError(name, expected, "NaN or infinity", "check the model")

    def change(
        self,
        parameters: Callable[[str], Parameters],
        hooks: Iterable[RemovableHandle] = (),
        factor: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> dict[str, float]:
        """max|other - original| / max|original| by name; other: the output under `parameters`, times `factor`.

        Infinite where other is not finite and the original is. Each output is compared when it is computed, so that
        only the original's are in memory.
        """
        uncompared = {name: list(runs) for name, runs in self.outputs.items()}
        largest = dict.fromkeys(self.outputs, 0.0)

        def compare(name: str, rows: torch.Tensor) -> None:
            scale = factor(name)
            b = rows if scale is None else rows * scale.to(rows.device)
            a = uncompared[name].pop(0) if uncompared[name] else None
            if a is None or a.shape != b.shape:
                largest[name] = torch.inf
                return
            # Equal infinities (masked logits) agree; NaN agrees with nothing.
            difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf).max()
            largest[name] = max(largest[name], float(difference))

        self._run([name for name in self.outputs if not _special(name)], compare, parameters, hooks)
        changes = {}
        for name, runs in self.outputs.items():
            difference = torch.inf if uncompared[name] else largest[name]
            size = max(float(rows[rows.isfinite()].abs().max()) for rows in runs if rows.isfinite().any())
            changes[name] = difference / size if size > 0 else (0.0 if difference == 0 else torch.inf)
        return changes

    def _run(
        self,
        layers: Iterable[str],
        receive: Callable[[str, torch.Tensor], None],
        parameters: Callable[[str], Parameters],
        hooks: Iterable[RemovableHandle] = (),
    ) -> None:
        """Run the model under `parameters` and `hooks`; `receive` gets the outputs of `layers`, then LOGITS."""

        def record(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
            rows = output.detach().float().reshape(-1, output.shape[-1])
            receive(name, rows[:: max(1, -(-len(rows) // ROWS))])

        def record_chosen(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            receive(name + CHOSEN, chosen_experts(args, kwargs).sort(dim=-1).values.float())

        def recorders() -> Iterator[RemovableHandle]:
            for name in layers:
                yield self.model.get_submodule(name).register_forward_hook(partial(record, name), prepend=True)
            for name in expert_blocks(self.model):
                block = self.model.get_submodule(name)
                yield block.register_forward_pre_hook(partial(record_chosen, name), with_kwargs=True)

        try:
            with (
                hooked(recorders()),
                every_expert(self.model),
                hooked(hooks),
                in_float32(self.model, parameters),
            ):
                output = forward(self.model, self.batch)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            fix = "load the model in float32"
            raise SmoothQuantError("gate", "a model whose blocks run in float32", error, fix) from error
        logits = next(tensor for tensor in tensors_of(output) if tensor.is_floating_point())
        receive(LOGITS, logits.float().reshape(-1, logits.shape[-1]))


class _Rounded:
    """The original model with other roundings in `modules` (module docstring, a and b), random by `seed`.

    transposed: linear layer -> whether its weight is [in, out].
    """

    def __init__(self, model: nn.Module, modules: Collection[str], transposed: Mapping[str, bool], seed: int) -> None:
        self.model, self.modules, self.transposed, self.seed = model, modules, transposed, seed

    def parameters(self, name: str) -> Parameters:
        """Float32 parameters of module `name`."""
        params = float_parameters(self.model.get_submodule(name))
        if name not in self.modules:
            return params
        generator = self._generator(name)
        for parameter, value in params.items():
            # The signs are an outer product, which costs one multiplication; within a row they are independent.
            step: torch.Tensor | float = ROUNDINGS * UNIT
            for dim, size in enumerate(value.shape):
                signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
                step = step * signs.to(value).reshape([-1 if d == dim else 1 for d in range(value.dim())])
            params[parameter] = value * (1 + step)
        if name in self.transposed:
            c = self._row_factors(name).to(params["weight"].device)
            rows = c if self.transposed[name] else c[:, None]
            params = {p: value * (rows if value.dim() == 2 else c) for p, value in params.items()}
        return params

    def hooks(self) -> Iterator[RemovableHandle]:
        """Divide the output of linear layers by c, before anything reads it."""
        for name in self.modules & self.transposed.keys():
            hook = partial(lambda c, module, args, output: output / c.to(output.device), self._row_factors(name))
            yield self.model.get_submodule(name).register_forward_hook(hook, prepend=True)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)

    def _row_factors(self, name: str) -> torch.Tensor:
        """c of linear layer `name`, float32 [out]."""
        weight = own_parameters(self.model.get_submodule(name))["weight"]
        return 1 + torch.rand(weight.shape[1 if self.transposed[name] else 0], generator=self._generator(name))


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, plain kernels, float32 products that are float32 (no TF32); all restored."""
    precision, training = torch.get_float32_matmul_precision(), model.training
    torch.set_float32_matmul_precision("highest")
    model.eval()
    try:
        with torch.no_grad(), plain_kernels(model):
            yield
    finally:
        model.train(training)
        torch.set_float32_matmul_precision(precision)
