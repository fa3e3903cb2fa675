"""The gate: nothing is written unless the smoothed model computes the same function, in float32, on several batches.

Compared are the logits and the output of every reader of every group, each relative to its own largest value. The
bound is not tuned. An exact fold changes rounding and nothing else: (a) every product it touches sees at most ROUNDINGS
more roundings of unit u = 2**-24, and (b) sums of rows that are divided by s are rounded on another grid, so that their
errors are drawn anew. So the original model is run once more with both done to every parameter that the plan touches,
in a way that needs no graph to be right: (a) times 1 +- ROUNDINGS * u, (b) rows of linear layers times c, 1 <= c < 2,
and their output divided by c at once. What that changes is the floor: how far rounding alone moves this number.

    allowed = MARGIN * floor + 2 u

ROUNDINGS = 5: the norm's factor read back (w / stored), its power behind a squared ReLU, the column's product (W * s),
    the row's quotient (W / s), and the product of activation and weight, which rounds anew.
MARGIN = 8, FLOORS = 16: change and floor are draws of one error, the floor's of a wider one, since 5 u at every weight
    is the worst case and an exact fold the average. At worst that error has a single direction (one channel that dwarfs
    all others) and a draw is one normal number a. Before it refuses, the gate takes the largest of FLOORS floors; that
    |a| exceeds MARGIN of it has probability E[(2 Phi(|a| / 8) - 1)**16], about 2e-10. It also settles choices that hang
    on the last bit (two experts tie in a router), which rounding flips in one run and not in another.
2 u: both outputs are themselves rounded once.
A wrong fold moves logits by the factor it got wrong, percents at least; the floor is about 1e-6.

Parameters become float32 one decoder block at a time, while it runs; the model is left as it was, bit for bit.
"""

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.hooks import hooked
from ..running.modules import float_parameters, own_parameters, plain_kernels
from ..running.precision import Parameters, in_float32, plain_parameters
from .factors import Smoothing

UNIT = 2.0**-24
ROUNDINGS = 5
MARGIN = 8
FLOORS = 16
ROWS = 128  # of every reader's output that are compared: memory, on big models
LOGITS = "logits"

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Change:
    """Largest change of one tensor, relative to its largest value, and the bound for it."""

    measured: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.measured <= self.allowed

    def worse(self, other: "Change") -> "Change":
        """Whichever uses more of its bound."""
        return max(self, other, key=lambda c: c.measured / c.allowed)


def check_equivalence(smoothing: Smoothing, batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Compare smoothed with original; returns the report for the manifest, or raises SmoothQuantError.

    batches: int64 [batch, tokens] each. The error names the first group, in the order in which the model runs, whose
    fold changes the function, and the layer where the change first shows. The report: batches, `change` and `allowed`
    of the logits and of the reader of each group that comes nearest to its bound (relative to the output's maximum).
    """
    groups = [group for group in smoothing.graph.groups if group.source in smoothing.factors]
    readers = {reader.name for group in groups for reader in group.readers}
    worst: dict[str, Change] = {}
    with _settled(smoothing.model):
        for batch in batches if groups else ():
            changes = _compare(smoothing, batch, readers)
            if not all(change.within for change in changes.values()):
                raise _refusal(smoothing, batch, changes)
            worst = {name: worst[name].worse(c) if name in worst else c for name, c in changes.items()}
    nearest = {
        group.source: max((worst[r.name] for r in group.readers), key=lambda c: c.measured / c.allowed)
        for group in groups
        if worst
    }
    return {
        "batches": len(batches),
        "logits": _entry(worst.get(LOGITS, Change(0.0, 0.0))),
        "groups": {source: _entry(change) for source, change in nearest.items()},
    }


def _entry(change: Change) -> dict[str, float]:
    return {"change": change.measured, "allowed": change.allowed}


def _compare(
    smoothing: Smoothing, batch: torch.Tensor, layers: Iterable[str], floors: int = FLOORS
) -> dict[str, Change]:
    """Change of the logits and of the output of each of `layers` under `smoothing`, with its bound."""
    model = smoothing.model
    plain = _run(model, batch, set(layers), partial(plain_parameters, model))
    for name, value in plain.items():
        if torch.isnan(value).any() or not torch.isfinite(value).any():
            raise SmoothQuantError(name, "finite output of the original model", "NaN or infinity", "check the model")
    measured = _change(model, batch, plain, smoothing.parameters, factor=smoothing.output_factor)
    floor = dict.fromkeys(measured, 0.0)
    for seed in range(floors):
        rounded = _Rounded(model, smoothing.modules, smoothing.transposed, seed)
        moved = _change(model, batch, plain, rounded.parameters, rounded.hooks)
        floor = {name: max(floor[name], change) for name, change in moved.items()}
        changes = {name: Change(measured[name], MARGIN * floor[name] + 2 * UNIT) for name in measured}
        if all(change.within for change in changes.values()):
            break
    return changes


def _change(
    model: nn.Module,
    batch: torch.Tensor,
    plain: Outputs,
    change: Callable[[str], Parameters],
    correct: Callable[[], list[RemovableHandle]] = list,
    factor: Callable[[str], torch.Tensor | None] = lambda name: None,
) -> dict[str, float]:
    """max|other - plain| / max|plain| by name, where `other` is what _run gives, times `factor`.

    Infinite where `other` is not finite and `plain` is. Each output is compared as it comes: of the two runs' outputs
    only those of `plain` are held.
    """
    compared = dict.fromkeys(plain, 0)  # rows so far: a module may run twice
    largest = dict.fromkeys(plain, 0.0)

    def compare(name: str, rows: torch.Tensor) -> None:
        by = factor(name)
        b = rows if by is None else rows * by.to(rows.device)
        a = plain[name][compared[name] : compared[name] + len(b)]
        compared[name] += len(b)
        if a.shape != b.shape:
            largest[name] = torch.inf
            return
        # Equal infinities (masked logits) agree; NaN agrees with nothing.
        moved = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf).max()
        largest[name] = max(largest[name], float(moved))

    _run(model, batch, plain.keys() - {LOGITS}, change, correct, compare)
    result = {}
    for name, a in plain.items():
        finite = float(a[torch.isfinite(a)].abs().max())
        moved = largest[name] if compared[name] == len(a) else torch.inf
        result[name] = moved / finite if finite > 0 else (0.0 if moved == 0 else torch.inf)
    return result


def _refusal(smoothing: Smoothing, batch: torch.Tensor, changes: dict[str, Change]) -> SmoothQuantError:
    """Find the group to blame: the shortest run of groups, from the first, that changes the function ends with it."""
    graph = smoothing.graph
    sources = [group.source for group in graph.groups if group.source in smoothing.factors]
    readers = {group.source: [r.name for r in group.readers] for group in graph.groups}
    all_readers = {name for source in sources for name in readers[source]}

    def violations(some: Sequence[str], layers: Iterable[str]) -> dict[str, Change]:
        changes = _compare(smoothing.only(some), batch, layers, floors=1)
        return {name: change for name, change in changes.items() if not change.within}

    good, bad = 0, len(sources)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if violations(sources[:middle], all_readers) else (middle, bad)
    source = sources[bad - 1]
    linears = [linear.name for linear in graph.linears]
    # Alone it should show as well; where only the whole plan does, what was measured first has to do.
    wrong = violations([source], linears) or {name: c for name, c in changes.items() if not c.within}
    first = next(name for name in (*linears, LOGITS) if name in wrong)
    change = wrong[first]
    at = "one of its readers" if first in readers[source] else "it is not known to read the source"
    return SmoothQuantError(
        f"smoothing of {source} (read by {', '.join(readers[source])})",
        f"the same function: {first} may change by {change.allowed:.1e} of its largest value",
        f"{change.measured:.1e} at {first} ({at})",
        "nothing was written; this model reads that tensor in a way we did not see: calibrate it without smoothing",
    )


# --- Running in float32 ---


def _signs(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1


class _Rounded:
    """The original model with its roundings drawn anew in `modules` (module docstring, a and b)."""

    def __init__(self, model: nn.Module, modules: Collection[str], transposed: Mapping[str, bool], seed: int) -> None:
        """transposed: linear layer -> whether its weight is [in, out]."""
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
                shape = [-1 if d == dim else 1 for d in range(value.dim())]
                step = step * _signs(size, generator).to(value).reshape(shape)
            params[parameter] = value * (1 + step)
        if name in self.transposed:
            c = self._grid(name).to(params["weight"].device)
            params = {
                p: v * (c.unsqueeze(1) if v.dim() == 2 and not self.transposed[name] else c) for p, v in params.items()
            }
        return params

    def hooks(self) -> list[RemovableHandle]:
        """Divide the output of linear layers by c, before anything reads it."""

        def divide(c: torch.Tensor, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output / c.to(output.device)

        return [
            self.model.get_submodule(name).register_forward_hook(partial(divide, self._grid(name)), prepend=True)
            for name in self.modules
            if name in self.transposed
        ]

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)

    def _grid(self, name: str) -> torch.Tensor:
        weight = own_parameters(self.model.get_submodule(name))["weight"]
        return 1 + torch.rand(weight.shape[1 if self.transposed[name] else 0], generator=self._generator(name))


@contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
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


def _run(
    model: nn.Module,
    batch: torch.Tensor,
    layers: Iterable[str],
    change: Callable[[str], Parameters],
    correct: Callable[[], list[RemovableHandle]] = list,
    compare: Callable[[str, torch.Tensor], None] | None = None,
) -> Outputs:
    """Logits and the outputs of `layers`, float32 [rows, features], with the parameters that `change` gives.

    compare: gets each output instead, and nothing is returned.
    """
    outputs: Outputs = {}

    def record(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        rows = output.detach().float().reshape(-1, output.shape[-1])
        rows = rows[:: max(1, -(-len(rows) // ROWS))]
        if compare is not None:
            compare(name, rows)
            return
        # A module that runs twice is compared in both runs.
        outputs[name] = torch.cat([outputs[name], rows]) if name in outputs else rows.clone()

    recorders = (
        model.get_submodule(name).register_forward_hook(partial(record, name), prepend=True) for name in layers
    )
    try:
        with hooked(recorders), hooked(correct()), in_float32(model, change):
            result = model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise SmoothQuantError(
            "gate", "a model whose blocks run in float32", error, "load the model in float32"
        ) from error
    leaves = tree_leaves(dict(result) if isinstance(result, dict) else result)
    logits = next(t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point())
    logits = logits.float().reshape(-1, logits.shape[-1])
    if compare is not None:
        compare(LOGITS, logits)
        return {}
    return outputs | {LOGITS: logits}
