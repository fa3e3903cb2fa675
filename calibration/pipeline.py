"""SmoothQuant, in the paper's order: load, observe, plan (smooth), prove, quantize, export.

    s_j = max|X_j|^alpha / max|W_j|^(1-alpha)        Y = (X diag(s)^-1) (diag(s) W)        (Xiao et al., 2022, eq. 3-4)

`calibrate` writes an INT8 checkpoint, `smooth` the smoothed floating-point model. Each stage is one function of the
module of its name; nothing is written before the gate has shown that smoothing kept the function.
"""

import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

from .checkpoint import channel_statistics, export, model_card, quantize
from .discovery import linears
from .discovery.discover import TRACE_SHAPE, discover
from .inputs import text
from .inputs.model import Source, load, untie_head
from .observation.observe import BATCH_SIZE, observe_samples
from .observation.processes import Processes
from .observation.resume import State
from .observation.saved import load_statistics, save_statistics
from .observation.sinks import SAMPLES, first_readers, name_sinks
from .running.precision import compute_dtype
from .smoothing import gate
from .smoothing.factors import Smoothing, smooth_groups
from .smoothing.plan import Choice, Plan, Watched, make_plan

# The paper's three levels (table 2): weights, activations.
LEVELS = {"O1": ("tensor", "token"), "O2": ("tensor", "tensor"), "O3": ("tensor", "static")}
ACTIVATIONS = {
    "token": InputActivations("token", dynamic=True),
    "tensor": InputActivations("tensor", dynamic=True),
    "static": InputActivations("tensor", dynamic=False),
}
LIBRARIES = ("vllm-smoothquant", "torch", "transformers", "accelerate", "datasets", "safetensors")
# A few texts long enough for attention.
GATE_SHAPE = (4, 64)


@dataclass(frozen=True)
class Prepared:
    """A model that was loaded and watched. kept: layer -> why it stays in floating point. sinks: as sinks.py finds.

    passes: block by block, or why not (passes.py). batch_size: of the samples it was watched on.
    """

    source: Source
    samples: text.Samples
    kept: dict[str, str]
    watched: Watched
    sinks: list[dict[str, Any]]
    passes: str
    batch_size: int


def calibrate(
    model: str,
    output: str | Path,
    *,
    weights: str = "channel",
    activations: str = "token",
    alpha: float | str = 0.5,
    smoothing: bool = True,
    max_fallback: float = 0.0,
    budget_ppl: float | None = None,
    static_range: str = "absmax",
    dataset: str = text.DEFAULT_DATASET,
    text_column: str = "text",
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    ignore: frozenset[str] = frozenset(),
    quantize_lm_head: bool = False,
    device_map: str = "auto",
    stats: str | Path | None = None,
    save_stats: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a smoothed INT8 checkpoint of `model` (folder or hub id) into the new folder `output`; return its manifest.

    weights: "channel" or "tensor"; activations: "token", "tensor" (both dynamic) or "static". alpha, max_fallback,
    budget_ppl, static_range: see plan.Choice; smoothing=False rounds the model as it is, the baseline to compare with.
    quantize_lm_head unties a tied head first. save_stats: a file to write what was observed to; stats: one to take it
    from, instead of observing the same samples again. Errors are SmoothQuantError, and leave nothing behind.

    What ends a run in another way (SIGKILL, a full disk) leaves state.py's folder; the same call goes on from there.
    Under `accelerate launch` or torchrun the samples are shared; all processes but the first return {} when observed.
    """
    asked = {
        "model": str(model), "weights": weights, "activations": activations, "alpha": alpha, "smoothing": smoothing,
        "max_fallback": max_fallback, "budget_ppl": budget_ppl, "static_range": static_range, "dataset": str(dataset),
        "text_column": text_column, "samples": samples, "seq_len": seq_len, "seed": seed, "ignore": sorted(ignore),
        "quantize_lm_head": quantize_lm_head, "device_map": device_map, "stats": None if stats is None else str(stats),
    }  # fmt: skip
    scheme = as_scheme(weights, activations)
    choice = Choice(alpha if smoothing else None, max_fallback, budget_ppl, static_range)
    choice.check()
    ranks = Processes.of_launcher()
    state = State(Path(output), asked)
    finished = state.finished() if ranks.first else None
    if ranks.any(finished is not None):
        return finished or {}
    if ranks.first:
        export.check_output(Path(output))
    with state.kept() if ranks.first else nullcontext():
        ready = prepare(
            model, dataset=dataset, text_column=text_column, samples=samples, seq_len=seq_len, seed=seed,
            ignore=ignore, quantize_lm_head=quantize_lm_head, device_map=device_map, quiet=quiet, state=state,
            ranks=ranks, stats=stats, save_stats=save_stats,
        )  # fmt: skip
        if not ranks.first:
            return {}
        lap = _stopwatch(quiet)
        plan = make_plan(ready.watched, scheme, choice, quiet=quiet)
        lap("plan")
        proof = prove(ready, plan.smoothing)
        lap("gate")
        manifest = write_checkpoint(ready, plan, proof, Path(output), state)
        lap("quantize and export")
    return manifest


def as_scheme(weights: str, activations: str) -> Scheme:
    """The scheme of the command line's words."""
    if activations not in ACTIVATIONS:
        raise SmoothQuantError(
            "--activations", expected=" or ".join(ACTIVATIONS), got=repr(activations), do="choose one"
        )
    return Scheme(Weights.from_dict({"num_bits": 8, "strategy": weights}, "--weights"), ACTIVATIONS[activations])


def smooth(
    model: str,
    output: str | Path,
    *,
    alpha: float = 0.5,
    dataset: str = text.DEFAULT_DATASET,
    text_column: str = "text",
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    device_map: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the smoothed floating-point `model`, same function, own dtype, into the new folder `output`."""
    if not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise SmoothQuantError("--alpha", expected="a number in [0, 1]", got=str(alpha), do="0.5 is the paper's")
    export.check_output(Path(output))
    ready = prepare(
        model, dataset=dataset, text_column=text_column, samples=samples, seq_len=seq_len, seed=seed,
        ignore=frozenset(), device_map=device_map, quiet=quiet,
    )  # fmt: skip
    watched = ready.watched
    # Powers of two: the model's own 16-bit weights stay exact, bit for bit.
    alphas = {group.source: alpha for group in watched.graph.groups if group.kind != "input"}
    smoothing = smooth_groups(watched.model, watched.graph, watched.absmax, alphas, power_of_two=True)
    proof = prove(ready, smoothing)
    with export.staging(Path(output)) as folder:
        smoothing.apply_(ready.source.model)
        ready.source.model.save_pretrained(folder)
        ready.source.tokenizer.save_pretrained(folder)
        manifest = _manifest(ready, folder, smoothing, proof)
        export.write_json(folder / MANIFEST, manifest)
    return manifest


def prepare(
    model: str, *, dataset: str, text_column: str, samples: int, seq_len: int, seed: int, ignore: frozenset[str],
    device_map: str, quiet: bool, quantize_lm_head: bool = False, state: State | None = None,
    ranks: Processes | None = None, stats: str | Path | None = None, save_stats: str | Path | None = None,
) -> Prepared:  # fmt: skip
    """Load and observe: all that calibrate does before it decides anything, with the same arguments.

    One preparation serves any number of plans. state: where to go on from. ranks: who shares the samples.
    """
    ranks = ranks or Processes()
    lap = _stopwatch(quiet or not ranks.first)
    source = load(model, ranks.placement(device_map))
    if quantize_lm_head:
        untie_head(model, source.model)
    names, kept = linears.choose_linears(source.model, ignore, lm_head=quantize_lm_head)
    lap("load")
    drawn = text.load_samples(
        dataset, source.tokenizer, text_column=text_column, samples=samples, seq_len=seq_len, seed=seed
    )
    check_positions(source, seq_len)
    lap("read data")
    observed_on = {
        "source": source.hashes,
        "arithmetic": str(compute_dtype(source.model)).removeprefix("torch."),
        "tokens": {"sha256": drawn.sha256, "samples": samples, "seq_len": seq_len},
    }
    if state is not None and ranks.first:
        resumed = state.open({**observed_on, "processes": ranks.size, "versions": _versions()})
        if resumed and not quiet:
            print(f"{state.folder}: going on with an interrupted run", file=sys.stderr)
    ranks.wait()
    graph = discover(source.model, drawn.input_ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]], keep=set(kept))
    lap("discover")
    watched = sorted({*names, *(reader.name for group in graph.groups for reader in group.readers)})
    if stats is not None:
        absmax, found = load_statistics(Path(stats), watched, observed_on)
    else:
        readers = first_readers([name for name in reading if name in names] for reading in graph.inputs)
        observed = observe_samples(
            source.model, watched, list(readers), drawn.input_ids, state=state, ranks=ranks, quiet=quiet
        )
        absmax = observed.absmax
        sinks = name_sinks(observed.peaks, readers, drawn.input_ids[:SAMPLES], source.tokenizer)
        found = {"sinks": sinks, "passes": observed.passes, "batch_size": BATCH_SIZE}
        lap("observe")
    if save_stats is not None and ranks.first:
        save_statistics(Path(save_stats), absmax, observed_on, found)
    return Prepared(
        source, drawn, kept, Watched(source.model, graph.with_inputs(names), names, absmax, drawn.input_ids), **found
    )


def prove(ready: Prepared, smoothing: Smoothing) -> dict[str, Any]:
    """The gate's report; SmoothQuantError where `smoothing` changes the function."""
    batches = ready.samples.input_ids[: GATE_SHAPE[0], : GATE_SHAPE[1]].split(2)
    model = ready.source.model
    # What a layer divides at run time it multiplies by the same factor: nothing before or beside it is touched.
    return gate.check(model, smoothing.folded(model), ready.watched.graph, list(batches))


def write_checkpoint(
    ready: Prepared, plan: Plan, proof: dict[str, Any], output: Path, state: State | None = None
) -> dict[str, Any]:
    """Round by `plan`, whose smoothing has its `proof`, into the new folder `output`; returns the manifest.

    state: where shards that an interrupted run finished are found, and kept.
    """
    model = ready.source.model
    kept = ready.kept | {name: f"fell back: {why}" for name, why in plan.fallen.items() if name not in plan.schemes}
    with export.staging(output, state) as folder:
        before = {name for names in export.written_tensors(folder) for name in names}
        with torch.inference_mode():
            export.write_tensors(folder, _quantized_tensors(ready, plan, before))
        config = CheckpointConfig(
            plan.scheme.weights,
            plan.scheme.input_activations,
            overrides={
                export.hub_module_name(model, name): scheme.input_activations
                for name, scheme in plan.schemes.items()
                if scheme != plan.scheme
            },
            smoothed=frozenset(export.hub_module_name(model, name) for name in plan.smoothing.runtime),
            # vLLM's own models go by the file's names, its Transformers backend by the module's; mostly they are one.
            ignore=frozenset(n for name in kept for n in (name, export.hub_module_name(model, name))),
        )
        export.write_config(folder, model, ready.source.tokenizer, config.to_dict())
        channel_statistics.write(folder, channel_statistics.collect(ready.watched, plan))
        manifest = _manifest(ready, folder, plan.smoothing, proof) | {
            "inputs": [
                [export.hub_module_name(model, name) for name in reading if name in plan.schemes]
                for reading in ready.watched.graph.inputs
                if any(name in plan.schemes for name in reading)
            ],
            "kept": kept, "quantized": list(plan.schemes), "quantization_config": config.to_dict(), **_measured(plan),
        }  # fmt: skip
        export.write_json(folder / MANIFEST, manifest)
        model_card.write(folder, manifest)
    return manifest


def _stopwatch(quiet: bool) -> Callable[[str], None]:
    """Tells on stderr how long each stage took. Not in the manifest: the same inputs shall give the same bytes."""
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        if not quiet:
            print(f"{stage}: {time.perf_counter() - clock:.1f} s", file=sys.stderr)
        clock = time.perf_counter()

    return lap


def check_positions(source: Source, seq_len: int) -> None:
    limit = getattr(source.model.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise SmoothQuantError(
            "--seq-len", expected=f"at most {limit}, the model's positions", got=str(seq_len), do="use shorter samples"
        )


def _quantized_tensors(ready: Prepared, plan: Plan, before: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, block by block: INT8 where planned, smoothed or untouched elsewhere.

    Layers whose tensors are all in `before` are left out: rounding them anew would be work for nothing.
    """
    model, smoothing = ready.source.model, plan.smoothing
    for block in export.source_tensors(model):
        plain = {}
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
            if owner in plan.schemes and suffix == "weight" and _last_tensor(ready, plan, owner) in before:
                continue
            smoothed = smoothing.parameters(model, owner).get(suffix) if owner in smoothing.modules else None
            if owner in plan.schemes and suffix == "weight":
                linear = model.get_submodule(owner)
                weight = tensor.float() if smoothed is None else smoothed
                name = export.hub_module_name(model, owner)
                parts = quantize.quantize_linear(name, linear, weight, plan.input_ranges[owner], plan.schemes[owner])
                if owner in smoothing.runtime:
                    parts["smoothing_factor"] = smoothing.runtime[owner]
                for part, value in parts.items():
                    yield f"{name}.{part}", value
            else:
                plain[key] = tensor if smoothed is None else smoothed.to(tensor.dtype)
        yield from export.hub_names(model, plain).items()


def _last_tensor(ready: Prepared, plan: Plan, owner: str) -> str:
    """Name of the tensor of layer `owner` that is written after its others."""
    static = not plan.schemes[owner].input_activations.dynamic
    last = "smoothing_factor" if owner in plan.smoothing.runtime else "input_scale" if static else "weight_scale"
    return f"{export.hub_module_name(ready.source.model, owner)}.{last}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _manifest(ready: Prepared, folder: Path, smoothing: Smoothing, proof: dict[str, Any]) -> dict[str, Any]:
    """What made this checkpoint: enough to make the same bytes again."""
    return {
        "format_version": 1,
        "source": {
            "model": ready.source.name,
            "dtype": str(ready.source.model.dtype).removeprefix("torch."),
            "sha256": ready.source.hashes,
        },
        "calibration": {
            "arithmetic": str(compute_dtype(ready.source.model)).removeprefix("torch."),
            "dataset": ready.samples.dataset,
            "tokens_sha256": ready.samples.sha256,
            "samples": len(ready.samples.input_ids),
            "seq_len": ready.samples.input_ids.shape[1],
            "seed": ready.samples.seed,
            # Products of another shape may be rounded in another order.
            "batch_size": ready.batch_size,
            "passes": ready.passes,
        },
        "groups": [smoothing.describe(group) for group in ready.watched.graph.groups],
        "not_folded": [str(refusal) for refusal in ready.watched.graph.refusals],
        "sinks": ready.sinks,
        "gate": proof,
        "quantized": [],
        "kept": ready.kept,
        "versions": _versions(),
        "files": export.file_hashes(folder),
    }


def _measured(plan: Plan) -> dict[str, Any]:
    """What decided: alphas, fallbacks, errors. Errors as search.py defines them."""
    found = plan.found
    return {
        "alphas": dict(plan.alphas),
        "fallen_back": dict(plan.fallen),
        "simulated_perplexity": plan.perplexities,
        "errors": {} if found is None else found.errors,
    }
