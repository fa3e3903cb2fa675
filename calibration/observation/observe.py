"""Observe the calibration samples: block by block (blocks.py), or by passes over the whole model where that fails.

A pass over the first batch comes first: it names the sink tokens, shows which the blocks are, and is what the blocks,
run alone, are compared with.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.modules import decoder_of, weight_shape
from ..running.precision import fast_arithmetic
from ..running.progress import Progress
from .absmax import checked, watching_absmax
from .block_outputs import BlockOutputs
from .blocks import BlockNotIsolated, Blocks, run, try_whole
from .processes import Processes
from .resume import State
from .sinks import SAMPLES, watching_peaks

# How many samples run together. It decides the shapes of products, and so their rounding: the manifest names it.
BATCH_SIZE = 4
BY_BLOCKS = "block by block"

Absmax = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Observed:
    """absmax: layer -> float32 [in]. peaks: layer -> float32 [samples, tokens] of the first SAMPLES samples.

    passes: BY_BLOCKS, or why the whole model was run.
    """

    absmax: Absmax
    peaks: Mapping[str, torch.Tensor]
    passes: str


def observe_samples(
    model: nn.Module, names: Sequence[str], peaks_of: Sequence[str], input_ids: torch.Tensor, *,
    state: State | None = None, ranks: Processes | None = None, quiet: bool = False,
) -> Observed:  # fmt: skip
    """The inputs of the layers `names` over `input_ids` [samples, seq_len], and the peaks of `peaks_of`.

    state: goes on from what it holds, and keeps in it what is done.
    Errors (SmoothQuantError): a layer no sample reached, or NaN / infinity in its input.
    """
    ranks = ranks or Processes()
    quiet = quiet or not ranks.first
    decoder = decoder_of(model, names)
    batches = input_ids.split(BATCH_SIZE)
    with torch.inference_mode():
        with watching_peaks(model, peaks_of) as peaks:
            trial = try_whole(model, decoder, names, batches[0])
        checked(trial.absmax, trial.absmax)
        try:
            absmax = _by_blocks(Blocks(model, decoder, trial), names, batches, state, ranks, quiet)
            passes = BY_BLOCKS
        except BlockNotIsolated as reason:
            passes = f"whole model: {reason}"
            if not quiet:
                print(f"observe: not block by block but the {passes}", file=sys.stderr)
            absmax = _by_passes(model, decoder, names, batches, state, ranks, quiet)
    # Outside, because what inference mode makes cannot be used everywhere.
    found = checked(names, {name: tensor.clone() for name, tensor in absmax.items()})
    return Observed(found, {name: peak.clone()[:SAMPLES] for name, peak in peaks.items()}, passes)


def _by_blocks(
    blocks: Blocks, names: Sequence[str], batches: Sequence[torch.Tensor], state: State | None, ranks: Processes,
    quiet: bool,
) -> Absmax:  # fmt: skip
    absmax: Absmax = {}
    last = len(blocks.names)
    first = 0
    while state is not None and first <= last and (done := state.done("block", first)) is not None:
        absmax |= done
        first += 1
    mine = ranks.mine(batches)
    samples = sum(len(batch) for _, batch in mine)
    progress = Progress(last, samples, done=min(first, last), quiet=quiet)
    kept = BlockOutputs(None if state is None else state.activations(ranks.rank))
    try:
        for index in range(first, last + 1):
            inside = blocks.layers(index, names)
            # Behind the last block there may be nothing to observe; the first batch shows that all went well.
            todo = mine if index < last or inside else [(b, batch) for b, batch in mine if b == 0]
            reason: BlockNotIsolated | None = None
            with blocks.alone(index) as alone, watching_absmax(blocks.model, inside) as found:
                try:
                    for b, batch in todo:
                        given = alone(batch, _read(kept, index - 1, b, state) if index else None)
                        if b == 0:
                            alone.check(given, found)
                        if index < last:
                            kept.write(index, b, given[0])
                            progress.sample(len(batch))
                except BlockNotIsolated as error:
                    reason = error
            if ranks.any(reason is not None):
                raise reason or BlockNotIsolated("another process found that its blocks cannot be run alone")
            absmax |= (reduced := ranks.largest(found, {n: _channels(blocks.model, n) for n in inside}))
            if state is not None and ranks.first:
                state.save("block", index, reduced)
            # Nobody overwrites what block - 1 gave before it is on record that nobody needs it.
            ranks.wait()
            if index < last:
                progress.block()
    finally:
        kept.close()
        progress.close()
    return absmax


def _by_passes(
    model: nn.Module, decoder: nn.Module, names: Sequence[str], batches: Sequence[torch.Tensor], state: State | None,
    ranks: Processes, quiet: bool,
) -> Absmax:  # fmt: skip
    absmax: Absmax = {}
    mine = ranks.mine(batches)
    progress = Progress(len(mine), len(batches[0]), quiet=quiet, unit="batch")
    try:
        with fast_arithmetic(model):
            for b, batch in mine:
                found = None if state is None else state.done("pass", b)
                if found is None:
                    with watching_absmax(model, names) as watched:
                        run(decoder, batch)
                    found = dict(watched)
                    if state is not None:
                        state.save("pass", b, found)
                for name, value in found.items():
                    absmax[name] = torch.maximum(absmax[name], value) if name in absmax else value
                progress.block()
    finally:
        progress.close()
    return ranks.largest(absmax, {name: _channels(model, name) for name in names})


def _channels(model: nn.Module, name: str) -> int:
    return weight_shape(model.get_submodule(name))[1]


def _read(kept: BlockOutputs, block: int, batch: int, state: State | None) -> torch.Tensor:
    try:
        return kept.read(block, batch)
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(
            str(kept.folder), expected=f"what block {block} gave for batch {batch}", got=str(error),
            do="remove the state folder to begin anew" if state is not None else "look after the disk",
        ) from error  # fmt: skip
