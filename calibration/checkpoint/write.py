"""The last stage: round the weights by the plan and write the checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.files import MANIFEST

from ..observation.observation import Observation
from ..options import RECIPE, Options, dump_recipe
from ..smoothing.factors import Smoothing
from ..smoothing.plan import Plan
from . import channel_statistics, export, model_card
from .manifest import manifest, measurements
from .quantize import quantize_linear


def write_checkpoint(
    observation: Observation, plan: Plan, gate_report: dict[str, Any], options: Options, folder: Path | None = None
) -> dict[str, Any]:
    """Write the INT8 checkpoint into the new folder `options.output`; returns the manifest.

    folder: where it is written before it becomes the output (export.staging).
    """
    model, graph = observation.model, observation.graph
    in_float = observation.in_float | {
        name: f"fell back: {to}" for name, to in plan.fallbacks.items() if name not in plan.schemes
    }
    with export.staging(Path(options.output), folder) as staged:
        with torch.inference_mode():
            export.write_tensors(staged, _quantized_tensors(observation, plan))
        config = _config(observation, plan, in_float).to_dict()
        export.write_config(staged, model, observation.source.tokenizer, config)
        channel_statistics.write(staged, channel_statistics.collect(observation, plan))
        record = manifest(observation, staged, plan.smoothing, gate_report) | {
            "inputs": [
                [export.hub_module_name(model, name) for name in names if name in plan.schemes]
                for names in graph.shared_input_groups
                if any(name in plan.schemes for name in names)
            ],
            "kept": in_float, "quantized": list(plan.schemes), "quantization_config": config, **measurements(plan),
        }  # fmt: skip
        export.write_json(staged / MANIFEST, record)
        model_card.write(staged, record)
        # Not hashed by verify: recipe.yaml is the request, the manifest the result.
        (staged / RECIPE).write_text(dump_recipe(vars(options)), encoding="utf-8")
    return record


def write_smoothed(
    observation: Observation, smoothing: Smoothing, gate_report: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Write the smoothed floating-point model into the new folder `output`; returns the manifest."""
    with export.staging(output) as staged:
        smoothing.apply_()
        observation.model.save_pretrained(staged)
        observation.source.tokenizer.save_pretrained(staged)
        record = manifest(observation, staged, smoothing, gate_report)
        export.write_json(staged / MANIFEST, record)
    return record


def _config(observation: Observation, plan: Plan, in_float: dict[str, str]) -> CheckpointConfig:
    model = observation.model
    return CheckpointConfig(
        plan.scheme.weights,
        plan.scheme.input_activations,
        overrides={
            export.hub_module_name(model, name): scheme.input_activations
            for name, scheme in plan.schemes.items()
            if scheme != plan.scheme
        },
        smoothed=frozenset(export.hub_module_name(model, name) for name in plan.smoothing.runtime),
        # vLLM's own models use the names of the files, its Transformers backend those of the modules.
        ignore=frozenset(n for name in in_float for n in (name, export.hub_module_name(model, name))),
    )


def _quantized_tensors(observation: Observation, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, block by block: INT8 where planned, elsewhere smoothed or as it was."""
    model, smoothing = observation.model, plan.smoothing
    for block in export.source_tensors(model):
        in_float = {}
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
            smoothed = smoothing.parameters(owner).get(suffix) if owner in smoothing.modules else None
            if owner in plan.schemes and suffix == "weight":
                linear, name = model.get_submodule(owner), export.hub_module_name(model, owner)
                weight = tensor.float() if smoothed is None else smoothed
                parts = quantize_linear(name, linear, weight, plan.input_ranges[owner], plan.schemes[owner])
                if owner in smoothing.runtime:
                    parts["smoothing_factor"] = smoothing.runtime[owner]
                for part, value in parts.items():
                    yield f"{name}.{part}", value
            else:
                in_float[key] = tensor if smoothed is None else smoothed.to(tensor.dtype)
        yield from export.hub_names(model, in_float).items()
