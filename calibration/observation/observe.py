"""Observe the calibration samples: block by block (blocks.py), or the whole model at once where that is not possible.

First, one batch passes the whole model. This pass finds the sink tokens and the list of decoder blocks, and it is the
reference with which the isolated blocks are compared.
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.graph import Graph
from ..discovery.linears import with_own_input
from ..inputs.images import together
from ..inputs.model import Source
from ..inputs.text import Samples
from ..options import Options
from ..rotation.rotation import Rotation
from ..running.forward import Batch, input_ids
from ..running.modules import LINEAR_TYPES, decoder_of, output_head, weight_shape
from ..running.precision import compute_dtype, fast_arithmetic
from ..running.progress import Progress
from .absmax import checked, needed_absmax, observed_layer, output_of, watching_absmax
from .block_outputs import BlockOutputs
from .blocks import BlockNotIsolated, Blocks, run, try_whole
from .experts import expert_load, idle_experts, with_idle_experts
from .observation import SEARCH_TOKENS, Observation, some_of
from .resume import ObservationStore
from .saved import START_OVER, Absmax, load_observation, save_observation
from .sensitivity import image_weights
from .sinks import SAMPLES, name_sinks, watching_peaks

# Samples that run together. This decides the shapes of products and so their rounding: the manifest names it.
BATCH_SIZE = 4
BY_BLOCKS = "block by block"
LIBRARIES = ("vllm-smoothquant", "torch", "transformers", "accelerate", "datasets", "safetensors")


def observe(
    options: Options, source: Source, samples: Samples, graph: Graph, layers: list[str], in_float: dict[str, str],
    store: ObservationStore, rotation: Rotation | None = None,
    rotated: dict[str, Any] | None = None,
) -> Observation:  # fmt: skip
    """The ranges of the inputs of `layers` and of every reader of a group in `graph`, over all `samples`.

    options: stats is a file to take the ranges from, save_stats a file to write them to. store: what an interrupted run
    observed; this run adds to it. rotation: that of the source's model; rotated: the manifest's entry.
    Errors (SmoothQuantError): a layer that no sample reached, a range that is not finite, a store or file of other
    inputs.
    """
    key = observation_key(source, samples, rotation)
    needed = needed_absmax(graph, layers)
    if options.stats is not None:
        where, fix = f"--stats {options.stats}", "observe again with --save-stats and the same model, data and seed"
        stats = Path(options.stats)
        absmax, findings = store.processes.from_first(lambda: load_observation(stats, key, where, fix))
        filled = with_idle_experts(source.model, absmax)
        if missing := [name for name in needed if name not in filled]:
            raise SmoothQuantError(where, f"the absmax of {missing[0]}", f"none of {len(missing)} layers", fix)
    else:
        absmax, findings = _observe_in_store(options.quiet, source, samples, graph, needed, key, store)
        filled = with_idle_experts(source.model, absmax)
    if options.save_stats is not None and store.processes.first:
        save_observation(Path(options.save_stats), absmax, key, findings)
    # What is saved names all layers, because a later run may have another --ignore.
    sinks = [sink | {"layers": [name for name in sink["layers"] if name in layers]} for sink in findings["sinks"]]
    findings["sinks"] = [sink for sink in sinks if sink["layers"]]
    weights: dict[str, float] = {}
    if samples.image_token is not None and options.modality_weights == "auto":
        weights = image_weights(source.model, together(samples.images, SEARCH_TOKENS), samples.image_token)
    # INT8 layers whose input nothing can smooth offline form groups of their own.
    return Observation(
        source,
        samples,
        graph.with_inputs(with_own_input(source.model, layers)),
        layers,
        checked(needed, filled),
        in_float,
        **findings,
        rotation=rotation,
        rotated=rotated or {},
        idle_experts=[name for name in idle_experts(source.model, absmax) if name in layers],
        expert_load=expert_load(source.model, some_of(samples.input_ids)),
        image_weights=weights,
    )


def observation_key(source: Source, samples: Samples, rotation: Rotation | None = None) -> dict[str, Any]:
    """Everything that the observation depends on and that another alpha or scheme leaves alone."""
    rows, seq_len = samples.input_ids.shape
    return {
        "source": source.hashes,
        "config": source.config_hash,
        "arithmetic": str(compute_dtype(source.model)).removeprefix("torch."),
        "tokens": {"sha256": samples.sha256, "samples": rows, "seq_len": seq_len},
        "rotation": {} if rotation is None else rotation.hashes(),
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _observe_in_store(
    quiet: bool, source: Source, samples: Samples, graph: Graph, needed: list[str], key: dict[str, Any],
    store: ObservationStore,
) -> tuple[Absmax, dict[str, Any]]:  # fmt: skip
    """(absmax of each layer that a sample reached, findings): `store` has them, or they are computed and recorded."""
    model, head, processes = source.model, output_head(source.model), store.processes
    # All linear layers, so that another --ignore needs no new pass; the head only on request, because it is expensive.
    linears = {name for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES) and m is not head}
    observed = sorted({*linears, *map(output_of, linears), *needed})
    # Sums are rounded differently on another device.
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    with_head = any(model.get_submodule(observed_layer(name)) is head for name in needed)
    machine = {"device": device, "processes": processes.size, "versions": versions()}
    if store.open(key | machine | {"output_head": with_head}) and processes.first and not quiet:
        print(f"{store.folder}: resuming an interrupted run", file=sys.stderr)
    if processes.from_first(store.observation.exists):
        where = str(store.observation)
        return processes.from_first(lambda: load_observation(store.observation, key, where, START_OVER))
    readers = {names[0]: list(names) for names in graph.shared_input_groups}
    absmax, peaks, passes = observe_samples(model, observed, list(readers), samples, store, quiet=quiet)
    sinks = name_sinks(peaks, readers, samples.input_ids[:SAMPLES], source.tokenizer)
    findings = {"sinks": sinks, "passes": passes, "batch_size": BATCH_SIZE}
    processes.from_first(lambda: save_observation(store.observation, absmax, key, findings))
    store.forget("outputs", "pass")  # gigabytes that no later run reads
    return absmax, findings


def observe_samples(
    model: nn.Module, names: Sequence[str], peaks_of: Sequence[str], samples: Samples, store: ObservationStore,
    *, quiet: bool = False,
) -> tuple[Absmax, Mapping[str, torch.Tensor], str]:  # fmt: skip
    """(absmax, peaks, passes) of `samples`.

    absmax: layer -> float32 [in] on the CPU, of those of `names` that a sample reached. peaks: layer -> float32
    [samples, tokens], of `peaks_of` and the first SAMPLES texts. passes: BY_BLOCKS, or why the whole model ran.
    """
    quiet = quiet or not store.processes.first
    decoder = decoder_of(model, map(observed_layer, names))
    batches = samples.batches(BATCH_SIZE)
    with torch.inference_mode():
        with watching_peaks(model, peaks_of) as peaks:
            text = try_whole(model, decoder, names, samples.input_ids[:BATCH_SIZE])
        # With images the decoder gets more than tokens: the stricter trial.
        trial = try_whole(model, decoder, names, batches[0]) if samples.images else text
        checked(trial.absmax, trial.absmax)
        try:
            absmax = _by_blocks(Blocks(model, decoder, trial, trial.towers(text)), names, batches, store, quiet)
            passes = BY_BLOCKS
        except BlockNotIsolated as reason:
            passes = f"whole model: {reason}"
            if not quiet:
                print(f"observe: not block by block but the {passes}", file=sys.stderr)
            store.begin_passes()
            absmax = _by_passes(model, decoder, names, batches, store, quiet)
    # Copied outside inference mode, because its tensors cannot be used everywhere.
    return checked(absmax, absmax), {name: peak.clone()[:SAMPLES] for name, peak in peaks.items()}, passes


def _by_blocks(
    blocks: Blocks, names: Sequence[str], batches: Sequence[Batch], store: ObservationStore, quiet: bool
) -> Absmax:
    absmax: Absmax = {}
    processes = store.processes
    last = len(blocks.names)  # the index of what follows the last block
    own_batches = processes.share(batches)
    outputs = BlockOutputs(store.outputs, store.run)
    finished = store.finished_blocks()
    first = len(finished)
    # All start at one block, where each has what the previous block returned: one may have another disk than before.
    while 0 < first <= last and processes.any(not all(outputs.has(first - 1, b) for b, _ in own_batches)):
        first -= 1
    if first < len(finished) and not quiet:
        print(f"observe: again from block {first + 1}, because what an earlier one returned is lost", file=sys.stderr)
    for part in finished[:first]:
        absmax |= part
    samples = sum(len(input_ids(batch)) for _, batch in own_batches)
    with Progress(last, samples, done=min(first, last), quiet=quiet) as progress:
        for index in range(first, last + 1):
            inside = blocks.layers(index, names)
            # After the last block there may be nothing to observe; one batch is enough for the equality check.
            todo = own_batches if index < last or inside else [(b, batch) for b, batch in own_batches if b == 0]
            reason: BlockNotIsolated | None = None
            with blocks.isolated(index) as block, watching_absmax(blocks.model, inside) as maxima:
                try:
                    for b, batch in todo:
                        returned = block(batch, outputs.read(index - 1, b) if index else None)
                        if b == 0:
                            block.check(returned, maxima)
                        if index < last:
                            outputs.write(index, b, returned[0])
                            progress.sample(len(input_ids(batch)))
                except BlockNotIsolated as error:
                    reason = error
            if processes.any(reason is not None):
                reason = reason or BlockNotIsolated("another process found that its blocks cannot run isolated")
                if index == first > 0 and not store.passes_began():
                    fix = f"resume on the same kind of machine with the same number of threads, or {START_OVER}"
                    raise SmoothQuantError(str(store.folder), "the rounding of the interrupted run", str(reason), fix)
                raise reason
            reduced = processes.largest(maxima, _channels(blocks.model, inside))
            absmax |= reduced
            store.save("block", index, reduced)
            # Wait: rank 0 must record this block before any rank overwrites the outputs it was computed from.
            processes.wait()
            if index < last:
                progress.block()
    return absmax


def _by_passes(
    model: nn.Module, decoder: nn.Module, names: Sequence[str], batches: Sequence[Batch],
    store: ObservationStore, quiet: bool,
) -> Absmax:  # fmt: skip
    absmax: Absmax = {}
    own_batches = store.processes.share(batches)
    bar = Progress(len(own_batches), len(input_ids(batches[-1])), quiet=quiet, unit="batch")
    with fast_arithmetic(model), bar as progress:
        for b, batch in own_batches:
            maxima = store.load("pass", b)
            if maxima is None:
                with watching_absmax(model, names) as maxima:
                    run(decoder, batch)
                store.save("pass", b, maxima)
            for name, value in maxima.items():  # on the CPU, where the stored ones are
                absmax[name] = torch.maximum(absmax[name], value.cpu()) if name in absmax else value.cpu()
            progress.block()
    return store.processes.largest(absmax, _channels(model, names))


def _channels(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Length of the absmax of each of `names`."""
    shapes = {name: weight_shape(model.get_submodule(observed_layer(name))) for name in names}
    return {name: shape[name == observed_layer(name)] for name, shape in shapes.items()}
