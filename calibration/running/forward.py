"""One forward pass over a batch: token ids, or what a processor makes of a text with images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# input_ids int64 [samples, tokens], alone or among the tensors of a sample with images, by the processor's names.
Batch = torch.Tensor | Mapping[str, torch.Tensor]


def forward(module: nn.Module, batch: Batch) -> Any:
    """What `module`, a model or its decoder, returns for `batch`."""
    tensors = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
    device = next(module.parameters()).device
    return module(**{name: tensor.to(device) for name, tensor in tensors.items()}, use_cache=False)


def input_ids(batch: Batch) -> torch.Tensor:
    """int64 [samples, tokens] of `batch`."""
    return batch if isinstance(batch, torch.Tensor) else batch["input_ids"]
