"""The result of observing a model: all later stages decide from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.graph import Graph
from ..inputs.images import together
from ..inputs.model import Source
from ..inputs.text import Samples
from ..rotation.rotation import Rotation
from ..running.forward import Batch

# Tokens that searches and simulations run on: enough for a mean over tokens, few compared with calibration itself.
SEARCH_TOKENS = 4096


@dataclass(frozen=True)
class Observation:
    """The model, which layers read which tensor in it, and the ranges of those tensors.

    graph: groups and linear layers. layers: those that become INT8, in the model's order. in_float: name -> reason for
    every linear layer or other matrix that stays in floating point. absmax: layer -> max|X_j| over all calibration
    tokens, float32 [in] on the CPU, of `layers` and of every reader of a group. sinks: see sinks.py. passes: "block by
    block", or the reason why not. batch_size: samples that ran together. rotation: what the model was rotated by;
    rotated: the manifest's entry. idle_experts: layers of experts that no token reached; their absmax is that of the
    others. expert_load: block of experts -> how many of `search_ids` each gets. image_weights: decoder block -> weight
    of an image token in a search, beside 1 of a text token; 1 where it is not named (sensitivity.py).
    """

    source: Source
    samples: Samples
    graph: Graph
    layers: list[str]
    absmax: Mapping[str, torch.Tensor]
    in_float: dict[str, str] = field(default_factory=dict)
    sinks: list[dict[str, Any]] = field(default_factory=list)
    passes: str = ""
    batch_size: int = 0
    rotation: Rotation | None = None
    rotated: dict[str, Any] = field(default_factory=dict)
    idle_experts: list[str] = field(default_factory=list)
    expert_load: dict[str, list[int]] = field(default_factory=dict)
    image_weights: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def search_ids(self) -> torch.Tensor:
        """int64 [samples, tokens]: about SEARCH_TOKENS tokens of the calibration samples."""
        return some_of(self.samples.input_ids)

    @property
    def search_batch(self) -> Batch:
        """`search_ids`, or about as many tokens of the samples with images."""
        images = self.samples.images
        return together(images, SEARCH_TOKENS) if images else self.search_ids


def some_of(ids: torch.Tensor) -> torch.Tensor:
    """About SEARCH_TOKENS of `ids` [samples, tokens]."""
    return ids[: max(1, SEARCH_TOKENS // ids.shape[1])]


def input_range(absmax: torch.Tensor, factor: torch.Tensor | None) -> float:
    """The range of a smoothed input, max_j |X_j| / s_j, from absmax float32 [in] and s [in] (None: all ones)."""
    return float((absmax if factor is None else absmax / factor).max())
