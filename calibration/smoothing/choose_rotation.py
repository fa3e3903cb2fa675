"""Whether the model is rotated: by the error of the model as it will be served, with the rotation and without.

    rotated if   KL(rotated, as served) <= (1 - MARGIN) * KL(as served)         KL from the model in floating point

Both are planned as the checkpoint will be, from the ranges of a few samples, and compared on others. A rotation pays
where channels are far apart; it costs a head of its own where head and embeddings were tied.
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vllm_smoothquant.format.config import STREAM, TIED_IN_VLLM
from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.discover import TRACE_SHAPE, discover
from ..discovery.linears import choose_layers, with_own_input
from ..discovery.rotations import RotationGraph, find_rotations
from ..inputs.model import Source, untie_head
from ..inputs.text import Samples
from ..observation.absmax import needed_absmax, observe_absmax
from ..observation.observation import Observation
from ..options import ALPHAS, Options
from ..rotation.orthogonal import rotation_matrix
from ..rotation.rotation import Rotation
from ..running.modules import output_head
from ..running.offload import mapped, offload_folder
from . import simulate
from .gate import GATE_SHAPE
from .plan import make_plan
from .rotation_gate import check_rotation

MARGIN = 0.1
SEED = 0
# Samples for the ranges, and others for the comparison: about 2000 and 1000 tokens.
RANGE_SAMPLES, COMPARED_SAMPLES = 4, 2


def rotation_of(graph: RotationGraph, model: torch.nn.Module, kind: str = "hadamard", seed: int = SEED) -> Rotation:
    """The rotation of all that `graph` found. kind, seed: see rotation_matrix."""
    matrices = {
        name: rotation_matrix(n, seed, centred=graph.centred and name == STREAM, kind=kind)
        for name, n in graph.sizes.items()
    }
    return Rotation(model, graph, matrices)


def choose_rotation(
    options: Options, source: Source, samples: Samples, carried: list[str], *, quiet: bool
) -> tuple[Rotation | None, dict[str, Any]]:
    """Rotate the model of `source` if `options` say so; returns what was done and the manifest's entry.

    carried: tensors that the model does not read. Errors (SmoothQuantError): "always" where that is not possible.
    """
    if reason := _unwanted(options):
        return None, {"rotated": False, "reason": reason}
    model, ids = source.model, samples.input_ids
    graph = find_rotations(model, ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]])
    obstacle = _obstacle(graph, carried, model)
    if obstacle and not quiet:
        print(f"hidden states are not rotated: {obstacle}", file=sys.stderr)
    if obstacle and options.rotation == "always":
        fix = "use --rotation auto or none"
        raise SmoothQuantError("--rotation always", "hidden states that can be rotated", obstacle, fix)
    if not graph.sizes or carried or output_head(model) is None or (obstacle and STREAM in graph.sizes):
        return None, {"rotated": False, "reason": obstacle}
    tie = untie_head(source.name, model) if STREAM in graph.sizes else lambda: None
    rotation = rotation_of(graph, model)
    batches = [*samples.images[:1], *ids[: GATE_SHAPE[0], : GATE_SHAPE[1]].split(2)]
    report = {"gate": check_rotation(rotation, batches)}
    compare = options.rotation == "auto"
    if compare:
        reference = simulate.log_probabilities(model, ids[-COMPARED_SAMPLES:], {})
        plain = _divergence(options, source, samples, reference)
    with offload_folder() as folder:
        undo = rotation.apply_(lambda tensor: mapped(tensor, Path(folder)) if tensor.device.type == "cpu" else tensor)
    if compare:
        rotated = _divergence(options, source, samples, reference, rotation)
        report |= {"simulated_kl": {"as it is": plain, "rotated": rotated}}
        if not quiet:
            print(f"simulated KL {plain:.4f}, rotated {rotated:.4f}", file=sys.stderr)
        if not rotated <= (1 - MARGIN) * plain:
            undo()
            tie()
            reason = "it does not lower the simulated error by a tenth"
            return None, {"rotated": False, "reason": reason} | report
    return rotation, {"rotated": True, **rotation.describe(), **report}


def _unwanted(options: Options) -> str:
    """Why `options` leave the model as it is, whatever it is; "" if they do not."""
    if options.rotation == "none":
        return "--rotation none"
    if options.rotation == "auto" and options.no_smoothing:
        return "--no-smoothing is the baseline"
    if options.rotation == "auto" and options.learned and options.scheme.input_activations.dynamic:
        # The comparison below knows the searched factors only, and learned ones are better without a rotation.
        return "learned factors are better without (docs/learned.md)"
    return ""


def _obstacle(graph: RotationGraph, carried: list[str], model: PreTrainedModel) -> str:
    """Why the stream is not rotated; "" if it can be."""
    if output_head(model) is None:
        return "the model has no output head, so that others read them"
    if model.config.get_text_config().model_type in TIED_IN_VLLM:
        return "vLLM computes the output head of this architecture with the embeddings, which a rotation separates"
    if carried:
        return f"{carried[0]}: transformers does not read it, but something that reads hidden states may"
    if STREAM in graph.sizes:
        return ""
    return next(map(str, graph.refusals), "no norm reads them")


def _divergence(
    options: Options, source: Source, samples: Samples, reference: list[torch.Tensor], rotation: Rotation | None = None
) -> float:
    """Mean KL in nats of the model, planned from some of `samples` and as it will be served, from `reference`."""
    alpha = "auto" if options.alpha in ALPHAS else options.alpha
    options = replace(options, alpha=alpha, max_fallback=0.0, budget_ppl=None, budget_size=None, quiet=True)
    ranges = replace(samples, input_ids=samples.input_ids[:RANGE_SAMPLES])
    observation = observe_at_once(options, source, ranges, rotation)
    layers = make_plan(observation, options).layers()
    found = simulate.log_probabilities(source.model, samples.input_ids[-COMPARED_SAMPLES:], layers)
    return statistics.fmean(simulate.divergences(reference, found))


def observe_at_once(options: Options, source: Source, samples: Samples, rotation: Rotation | None) -> Observation:
    """The observation of a few `samples`, in one pass and without a store; sinks are not looked for."""
    model, ids = source.model, samples.input_ids
    found = discover(model, ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]])
    layers, in_float = choose_layers(model, found, frozenset(options.ignore), lm_head=options.quantize_lm_head)
    graph = found.keeping(in_float)
    absmax = observe_absmax(model, needed_absmax(graph, layers), ids)
    graph = graph.with_inputs(with_own_input(model, layers))
    return Observation(source, samples, graph, layers, absmax, in_float, rotation=rotation)
