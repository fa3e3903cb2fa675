"""SmoothQuant, in the paper's order: load, observe, plan (smooth), prove, quantize, export.

    s_j = max|X_j|^alpha / max|W_j|^(1-alpha)        Y = (X diag(s)^-1) (diag(s) W)        (Xiao et al., 2022, eq. 3-4)

`calibrate` writes an INT8 checkpoint, `smooth` the smoothed floating-point model. Each stage is one function of the
module of its name; nothing is written before the gate has shown that smoothing kept the function.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.checkpoint import (
    MANIFEST,
    InputActivations,
    QuantizationConfig,
    Scheme,
    SmoothQuantError,
    Weights,
)

from . import card, channels, data, export, gate, quantize
from .arithmetic import compute_dtype
from .graph import discover
from .load import Source, check_source, load, untie_head
from .observers import observe
from .plan import Choice, Plan, Watched, make_plan
from .sinks import find_sinks
from .smooth import Smoothing, smooth_groups

# The paper's three levels (table 2): weights, activations.
LEVELS = {"O1": ("tensor", "token"), "O2": ("tensor", "tensor"), "O3": ("tensor", "static")}
ACTIVATIONS = {
    "token": InputActivations("token", dynamic=True),
    "tensor": InputActivations("tensor", dynamic=True),
    "static": InputActivations("tensor", dynamic=False),
}
LIBRARIES = ("vllm-smoothquant", "torch", "transformers", "accelerate", "datasets", "safetensors")
# Discovery needs the shape of the computation, not its statistics; the gate a few texts long enough for attention.
TRACE_SHAPE = (2, 16)
GATE_SHAPE = (4, 64)


@dataclass(frozen=True)
class Prepared:
    """A model that was loaded and watched. kept: layer -> why it stays in floating point. sinks: as sinks.py finds."""

    source: Source
    samples: data.Samples
    kept: dict[str, str]
    watched: Watched
    sinks: list[dict[str, Any]]


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
    dataset: str = data.DEFAULT_DATASET,
    text_column: str = "text",
    samples: int = 512,
    seq_len: int = 512,
    seed: int = 0,
    ignore: frozenset[str] = frozenset(),
    quantize_lm_head: bool = False,
    device_map: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a smoothed INT8 checkpoint of `model` (folder or hub id) into the new folder `output`; return its manifest.

    weights: "channel" or "tensor"; activations: "token", "tensor" (both dynamic) or "static". alpha, max_fallback,
    budget_ppl, static_range: see plan.Choice; smoothing=False rounds the model as it is, the baseline to compare with.
    quantize_lm_head unties a tied head first. Errors are SmoothQuantError, and leave nothing behind.
    """
    scheme = as_scheme(weights, activations)
    choice = Choice(alpha if smoothing else None, max_fallback, budget_ppl, static_range)
    choice.check()
    export.check_output(Path(output))
    ready = prepare(
        model, dataset=dataset, text_column=text_column, samples=samples, seq_len=seq_len, seed=seed, ignore=ignore,
        quantize_lm_head=quantize_lm_head, device_map=device_map, quiet=quiet,
    )  # fmt: skip
    lap = _stopwatch(quiet)
    plan = make_plan(ready.watched, scheme, choice, quiet=quiet)
    lap("plan")
    proof = prove(ready, plan.smoothing)
    lap("gate")
    manifest = write_checkpoint(ready, plan, proof, Path(output))
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
    dataset: str = data.DEFAULT_DATASET,
    text_column: str = "text",
    samples: int = 512,
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
    device_map: str, quiet: bool, quantize_lm_head: bool = False,
) -> Prepared:  # fmt: skip
    """Load and observe: all that calibrate does before it decides anything, with the same arguments.

    One preparation serves any number of plans.
    """
    lap = _stopwatch(quiet)
    check_source(model)
    source = load(model, device_map)
    if quantize_lm_head:
        untie_head(model, source.model)
    names, kept = quantize.choose_linears(source.model, ignore, lm_head=quantize_lm_head)
    lap("load")
    drawn = data.load_samples(
        dataset, source.tokenizer, text_column=text_column, samples=samples, seq_len=seq_len, seed=seed
    )
    check_positions(source, seq_len)
    lap("read data")
    graph = discover(source.model, drawn.input_ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]], keep=set(kept))
    lap("discover")
    readers = {reader.name for group in graph.groups for reader in group.readers}
    absmax = observe(source.model, sorted({*names, *readers}), drawn.input_ids, quiet=quiet)
    sinks = find_sinks(
        source.model,
        ([name for name in reading if name in names] for reading in graph.inputs), drawn.input_ids, source.tokenizer,
    )  # fmt: skip
    lap("observe")
    watched = Watched(source.model, graph.with_inputs(names), names, absmax, drawn.input_ids)
    return Prepared(source, drawn, kept, watched, sinks)


def prove(ready: Prepared, smoothing: Smoothing) -> dict[str, Any]:
    """The gate's report; SmoothQuantError where `smoothing` changes the function."""
    batches = ready.samples.input_ids[: GATE_SHAPE[0], : GATE_SHAPE[1]].split(2)
    model = ready.source.model
    # What a layer divides at run time it multiplies by the same factor: nothing before or beside it is touched.
    return gate.check(model, smoothing.folded(model), ready.watched.graph, list(batches))


def write_checkpoint(ready: Prepared, plan: Plan, proof: dict[str, Any], output: Path) -> dict[str, Any]:
    """Round by `plan`, whose smoothing has its `proof`, into the new folder `output`; returns the manifest."""
    model = ready.source.model
    kept = ready.kept | {name: f"fell back: {why}" for name, why in plan.fallen.items() if name not in plan.schemes}
    with export.staging(output) as folder:
        with torch.inference_mode():
            export.write_tensors(folder, _quantized_tensors(ready, plan))
        config = QuantizationConfig(
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
        channels.write(folder, channels.collect(ready.watched, plan))
        manifest = _manifest(ready, folder, plan.smoothing, proof) | {
            "inputs": [
                [export.hub_module_name(model, name) for name in reading if name in plan.schemes]
                for reading in ready.watched.graph.inputs
                if any(name in plan.schemes for name in reading)
            ],
            "kept": kept, "quantized": list(plan.schemes), "quantization_config": config.to_dict(), **_measured(plan),
        }  # fmt: skip
        export.write_json(folder / MANIFEST, manifest)
        card.write(folder, manifest)
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


def _quantized_tensors(ready: Prepared, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, block by block: INT8 where planned, smoothed or untouched elsewhere."""
    model, smoothing = ready.source.model, plan.smoothing
    for block in export.source_tensors(model):
        plain = {}
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
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
        },
        "groups": [smoothing.describe(group) for group in ready.watched.graph.groups],
        "not_folded": [str(refusal) for refusal in ready.watched.graph.refusals],
        "sinks": ready.sinks,
        "gate": proof,
        "quantized": [],
        "kept": ready.kept,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
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
