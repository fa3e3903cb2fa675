"""SmoothQuant, in the paper's order: load, observe, smooth, prove, quantize, export.

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

from . import data, export, gate, quantize
from .arithmetic import compute_dtype
from .graph import Graph, discover
from .load import Source, check_source, load
from .observers import observe
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
    """A model that was watched: what calibrate and smooth have in common."""

    source: Source
    samples: data.Samples
    names: list[str]
    kept: dict[str, str]
    graph: Graph
    absmax: dict[str, torch.Tensor]
    smoothing: Smoothing
    gate: dict[str, Any]


def calibrate(
    model: str,
    output: str | Path,
    *,
    weights: str = "channel",
    activations: str = "token",
    alpha: float = 0.5,
    smoothing: bool = True,
    dataset: str = data.DEFAULT_DATASET,
    text_column: str = "text",
    samples: int = 512,
    seq_len: int = 512,
    seed: int = 0,
    ignore: frozenset[str] = frozenset(),
    device_map: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a smoothed INT8 checkpoint of `model` (folder or hub id) into the new folder `output`; return its manifest.

    weights: "channel" or "tensor"; activations: "token", "tensor" (both dynamic) or "static"; alpha in [0, 1] is the
    migration strength of eq. 4; smoothing=False rounds the model as it is, the baseline to compare with.
    Errors are SmoothQuantError, and leave nothing behind.
    """
    if activations not in ACTIVATIONS:
        raise SmoothQuantError(
            "--activations", expected=" or ".join(ACTIVATIONS), got=repr(activations), do="choose one"
        )
    scheme = Scheme(Weights.from_dict({"num_bits": 8, "strategy": weights}, "--weights"), ACTIVATIONS[activations])
    export.check_output(Path(output))
    ready = prepare(
        model, alpha=alpha if smoothing else None, dataset=dataset, text_column=text_column, samples=samples,
        seq_len=seq_len, seed=seed, ignore=ignore, device_map=device_map, quiet=quiet,
    )  # fmt: skip
    return write_checkpoint(ready, scheme, Path(output), quiet=quiet)


def write_checkpoint(ready: Prepared, scheme: Scheme, output: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Round what `prepare` made under `scheme` into the new folder `output`; returns the manifest.

    One preparation serves any number of schemes: they differ only in how they round.
    """
    lap = _stopwatch(quiet)
    model = ready.source.model
    with export.staging(output) as folder:
        with torch.inference_mode():
            export.write_tensors(folder, _quantized_tensors(ready, scheme))
        config = QuantizationConfig(
            scheme.weights,
            scheme.input_activations,
            # vLLM's own models go by the file's names, its Transformers backend by the module's; mostly they are one.
            ignore=frozenset(n for name in ready.kept for n in (name, export.hub_module_name(model, name))),
        )
        export.write_config(folder, model, ready.source.tokenizer, config.to_dict())
        manifest = _manifest(ready, folder, quantization_config=config.to_dict())
        export.write_json(folder / MANIFEST, manifest)
    lap("quantize and export")
    return manifest


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
    export.check_output(Path(output))
    ready = prepare(
        model, alpha=alpha, dataset=dataset, text_column=text_column, samples=samples, seq_len=seq_len, seed=seed,
        ignore=frozenset(), device_map=device_map, quiet=quiet, power_of_two=True,
    )  # fmt: skip
    with export.staging(Path(output)) as folder:
        ready.smoothing.apply_(ready.source.model)
        ready.source.model.save_pretrained(folder)
        ready.source.tokenizer.save_pretrained(folder)
        manifest = _manifest(ready, folder)
        export.write_json(folder / MANIFEST, manifest)
    return manifest


def prepare(
    model: str, *, alpha: float | None, dataset: str, text_column: str, samples: int, seq_len: int, seed: int,
    ignore: frozenset[str], device_map: str, quiet: bool, power_of_two: bool = False,
) -> Prepared:  # fmt: skip
    """Load, observe, smooth, prove: all that calibrate does before it rounds, with the same arguments.

    alpha None means no smoothing: every factor is 1. power_of_two: factors rounded so that floating point is exact.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise SmoothQuantError("--alpha", expected="a number in [0, 1]", got=str(alpha), do="0.5 is the paper's")
    lap = _stopwatch(quiet)

    check_source(model)
    source = load(model, device_map)
    names, kept = quantize.choose_linears(source.model, ignore)
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
    lap("observe")
    smoothing = smooth_groups(source.model, graph, absmax, alpha, power_of_two=power_of_two)
    lap("smooth")
    batches = drawn.input_ids[: GATE_SHAPE[0], : GATE_SHAPE[1]].split(2)
    report = gate.check(source.model, smoothing, graph, list(batches))
    lap("gate")
    return Prepared(source, drawn, names, kept, graph, absmax, smoothing, report)


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


def _quantized_tensors(ready: Prepared, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, block by block: INT8 where chosen, smoothed or untouched elsewhere."""
    model, smoothing = ready.source.model, ready.smoothing
    names = set(ready.names)
    for block in export.source_tensors(model):
        plain = {}
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
            smoothed = smoothing.parameters(model, owner).get(suffix) if owner in smoothing.modules else None
            if owner in names and suffix == "weight":
                linear = model.get_submodule(owner)
                weight = tensor.float() if smoothed is None else smoothed
                factor = smoothing.input_factor(owner)
                absmax = ready.absmax[owner] if factor is None else ready.absmax[owner] / factor
                name = export.hub_module_name(model, owner)
                for part, value in quantize.quantize_linear(name, linear, weight, absmax, scheme).items():
                    yield f"{name}.{part}", value
            else:
                plain[key] = tensor if smoothed is None else smoothed.to(tensor.dtype)
        yield from export.hub_names(model, plain).items()


def _manifest(ready: Prepared, folder: Path, **more: Any) -> dict[str, Any]:
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
        "groups": [ready.smoothing.describe(group) for group in ready.graph.groups],
        "not_folded": [str(refusal) for refusal in ready.graph.refusals],
        "gate": ready.gate,
        "quantized": ready.names if "quantization_config" in more else [],
        "kept": ready.kept,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "files": export.file_hashes(folder),
        **more,
    }
