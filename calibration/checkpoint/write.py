"""The last stage: round the weights according to the plan and write the checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vllm_smoothquant.format import int4
from vllm_smoothquant.format.config import EXPERT, CheckpointConfig, Override, Scheme
from vllm_smoothquant.format.files import MANIFEST, read_headers

from ..inputs.unread import read_tensors
from ..observation.observation import Observation
from ..options import Options
from ..recipe import RECIPE, dump_recipe
from ..rounding.hessians import Hessians
from ..running.products import module_name
from ..smoothing.factors import Smoothing
from ..smoothing.plan import Plan
from ..smoothing.size import budget
from . import channel_statistics, export, model_card, transforms
from .manifest import manifest
from .quantize import quantize_linear
from .sizes import budget_faults, stored_sizes


def write_checkpoint(
    observation: Observation, plan: Plan, gate_report: dict[str, Any], options: Options, folder: Path | None = None
) -> dict[str, Any]:
    """Write the INT8 checkpoint into the new folder `options.output`; returns the manifest.

    folder: where the files are written before the folder is renamed to the output (export.staging).
    """
    source, groups = observation.source, observation.graph.shared_input_groups
    model, carried = source.model, export.unread(source)
    inputs = [[export.hub_module_name(model, name) for name in names if name in plan.schemes] for names in groups]
    fallbacks = {name: f"fell back: {to}" for name, to in plan.fallbacks.items() if name not in plan.schemes}
    in_float = observation.in_float | fallbacks
    with export.staging(Path(options.output), folder) as staged:
        with torch.inference_mode():
            hessians = _hessians(observation, plan, options.rounding)
            tensors = _tensors(model, plan.smoothing, plan.schemes, plan.input_ranges, hessians)
            export.write_tensors(staged, chain(tensors, read_tensors(source.folder, carried)))
            folded = transforms.write(staged, plan.smoothing, observation.rotation)
        config = replace(_config(model, plan, in_float, carried), transforms=folded).to_dict()
        export.write_config(staged, source, config)
        channel_statistics.write(staged, channel_statistics.collect(observation, plan))
        record = manifest(observation, staged, plan.smoothing, gate_report, carried) | {
            "inputs": [names for names in inputs if names],
            "kept": in_float,
            "quantized": list(plan.schemes),
            "quantization_config": config,
            "alphas": dict(plan.alphas),
            **({"learned": dict(plan.learned)} if plan.learned else {}),
            "fallen_back": dict(plan.fallbacks),
            **({"eight_bits": dict(plan.eight_bits)} if plan.eight_bits else {}),
            **_size(observation, plan, options, staged),
            "simulated_perplexity": dict(plan.perplexities),
            "errors": {} if plan.search is None else plan.search.errors,  # as search.py defines them
        }
        export.write_json(staged / MANIFEST, record)
        model_card.write(staged, record, source.name)
        # Not hashed by verify: recipe.yaml is the request, the manifest the result.
        (staged / RECIPE).write_text(dump_recipe(vars(options), published=True), encoding="utf-8")
    return record


def _size(observation: Observation, plan: Plan, options: Options, folder: Path) -> dict[str, Any]:
    """The manifest's entry for the files in `folder`, if there is a budget."""
    if options.budget_size is None:
        return {}
    stored = stored_sizes(observation.source.model, read_headers(folder), plan.fallbacks)
    size = stored | {"budget": budget(observation.model, observation.layers, options.budget_size)}
    for wrong in budget_faults(size, stored):  # a plan that does not count what is written
        raise wrong
    return {"size": size}


def write_smoothed(
    observation: Observation, smoothing: Smoothing, gate_report: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Write the smoothed floating-point model into the new folder `output`; returns the manifest."""
    source = observation.source
    carried = export.unread(source)
    with export.staging(output) as staged:
        with torch.inference_mode():
            tensors = _tensors(source.model, smoothing, {}, {})
            export.write_tensors(staged, chain(tensors, read_tensors(source.folder, carried)))
            transforms.write(staged, smoothing)
        export.write_config(staged, source, None)
        kept = dict.fromkeys(observation.layers, "smoothed, in floating point") | observation.in_float
        record = manifest(observation, staged, smoothing, gate_report, carried) | {"kept": kept}
        export.write_json(staged / MANIFEST, record)
    return record


def _config(model: PreTrainedModel, plan: Plan, in_float: Mapping[str, str], carried: list[str]) -> CheckpointConfig:
    file_name = partial(export.hub_module_name, model)
    modules = (module_name(model, name) for name in in_float)
    # Files may split or join a layer that stays in floating point.
    kept = {file.removesuffix(".weight") for name in in_float for file in export.file_names(model, f"{name}.weight")}
    experts = {name for name in plan.schemes if EXPERT.search(file_name(name))}
    expert = next((plan.schemes[name] for name in sorted(experts)), None)
    carried_layers = {name.removesuffix(".weight") for name in carried if name.endswith(".weight")}
    return CheckpointConfig(
        plan.scheme.weights,
        plan.scheme.input_activations,
        overrides={
            file_name(name): Override(s.input_activations, None if s.weights == plan.scheme.weights else s.weights)
            for name, s in plan.schemes.items()
            if s != plan.scheme and name not in experts
        },
        experts=expert.input_activations if expert else None,
        expert_weights=expert.weights if expert and expert.weights.num_bits == 4 else None,
        smoothed=frozenset(map(file_name, plan.smoothing.runtime)),
        # vLLM's own models use the names of the files; its Transformers backend uses the names of the modules.
        ignore=frozenset(filter(None, modules)) | kept | carried_layers,
    )


def _as_multiplied(owner: str, parts: Mapping[str, torch.Tensor], smoothing: Smoothing) -> torch.Tensor:
    """float32 [out, in]: the 4-bit weight of layer `owner` for its input and output as they are without smoothing."""
    weight = int4.dequantize(int4.unpack(parts["weight_packed"]), parts["weight_scale"])
    columns, rows = smoothing.input_factor(owner), smoothing.output_factor(owner)
    weight = weight if columns is None else weight / columns.to(weight.device)
    return weight if rows is None else weight * rows.to(weight.device)[:, None]


def _hessians(observation: Observation, plan: Plan, rounding: str | None) -> Hessians | None:
    """What GPTQ needs for the layers with 4-bit weights; None if weights are rounded to the nearest integers."""
    four_bits = [name for name, scheme in plan.schemes.items() if scheme.weights.num_bits == 4]
    return Hessians(observation, four_bits) if four_bits and rounding != "nearest" else None


def _tensors(
    model: PreTrainedModel, smoothing: Smoothing, schemes: Mapping[str, Scheme], ranges: Mapping[str, float],
    hessians: Hessians | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """Every tensor of the checkpoint, block by block: integers by `schemes`, the others smoothed or unchanged."""
    for block in export.source_tensors(model):
        in_float = {}
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
            smoothed = smoothing.parameters(owner).get(suffix) if owner in smoothing.modules else None
            if owner in schemes and suffix == "weight":
                linear, name = model.get_submodule(owner), export.hub_module_name(model, owner)
                weight = tensor.float() if smoothed is None else smoothed
                hessian = None
                if hessians is not None and schemes[owner].weights.num_bits == 4:
                    hessian, factor = hessians.of(owner), smoothing.input_factor(owner)
                    if factor is not None:
                        hessian = hessian / torch.outer(factor, factor).to(hessian.device)
                parts = quantize_linear(name, linear, weight, ranges[owner], schemes[owner], hessian)
                if hessians is not None and hessian is not None:
                    hessians.round(owner, _as_multiplied(owner, parts, smoothing))
                if owner in smoothing.runtime:
                    parts["smoothing_factor"] = smoothing.runtime[owner]
                for part, value in parts.items():
                    yield f"{name}.{part}", value
            else:
                in_float[key] = tensor if smoothed is None else smoothed.to(tensor.dtype)
        yield from export.hub_names(model, in_float).items()
