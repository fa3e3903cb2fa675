"""smoothquant.json: how a checkpoint was made, with enough detail to make the same bytes again."""

from pathlib import Path
from typing import Any

from ..observation.observation import Observation
from ..observation.observe import versions
from ..options import public_name
from ..running.precision import compute_dtype
from ..running.products import expert_blocks
from ..smoothing.factors import Smoothing
from .export import file_hashes

FORMAT_VERSION = 1


def manifest(
    observation: Observation, folder: Path, smoothing: Smoothing, gate_report: dict[str, Any], carried: list[str]
) -> dict:
    """The manifest of the files in `folder`, without the entries that rounding adds."""
    samples, source = observation.samples, observation.source
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "model": source.public_name,
            "dtype": str(source.model.dtype).removeprefix("torch."),
            "sha256": source.hashes | {"config.json": source.config_hash},
        },
        "calibration": {
            "arithmetic": str(compute_dtype(source.model)).removeprefix("torch."),
            "dataset": public_name(samples.dataset),
            "tokens_sha256": samples.sha256,
            "samples": len(samples.input_ids),
            "seq_len": samples.input_ids.shape[1],
            **({"images": len(samples.images)} if samples.images else {}),
            "seed": samples.seed,
            # The shape of a matrix product may change the order of its sums, and so its rounding.
            "batch_size": observation.batch_size,
            "passes": observation.passes,
        },
        "rotation": observation.rotated,
        "groups": [smoothing.describe(group) for group in observation.graph.groups],
        "not_folded": [str(refusal) for refusal in observation.graph.refusals],
        "sinks": observation.sinks,
        **({"experts": experts} if (experts := _experts(observation)) else {}),
        "gate": gate_report,
        "quantized": [],
        "kept": observation.in_float,
        "carried": carried,
        "versions": versions(),
        "files": file_hashes(folder),
    }


def _experts(observation: Observation) -> dict[str, Any]:
    """Block of experts -> its layers by expert, the tokens that each got in a sample of the text, those that got none.

    `idle` is about the whole calibration text, `load` about a part of it.
    """
    idle = set(observation.idle_experts)
    return {
        block: {
            "layers": experts,
            "load": observation.expert_load.get(block, []),
            "idle": [number for number, layers in enumerate(experts) if idle & set(layers)],
        }
        for block, experts in expert_blocks(observation.source.model).items()
    }
