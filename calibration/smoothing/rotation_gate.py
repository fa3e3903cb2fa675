"""The gate of a rotation: nothing is rotated unless the rotated model computes the same function.

Both models run in float32. Compared are the logits and the outputs of all linear layers that read a rotated vector and
return one that is not. A rotation moves the rounding, other than a fold: a channel that is m times the others is spread
over all of them, and its rounding with it. So the bound cannot be the rounding of the original model. It is

    BOUND = 1e-4        of the largest value. float32 has 6e-8, a sum over 10,000 channels 100 times that, and massive
                        activations (1000 times the median, after the norm 10 times) take up the rest. What a forgotten
                        reader or writer changes is of the order of 1.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.config import STREAM
from vllm_smoothquant.format.errors import SmoothQuantError

from ..rotation.rotation import Rotation
from ..running.forward import Batch
from ..running.precision import stays
from .gate import LOGITS, Original, settled

BOUND = 1e-4


def check_rotation(rotation: Rotation, batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare the rotated model with the original, which `rotation` still describes; returns the manifest's report.

    batches: int64 [batch, tokens] each. Errors (SmoothQuantError): the layer where the function first changes.
    """
    layers = [name for name in rotation.graph.inputs if name not in rotation.graph.outputs]
    worst: dict[str, float] = {}
    with settled(rotation.model):
        for batch in batches:
            original = Original(rotation.model, batch, layers)
            for name, change in original.change(rotation.parameters, _rotated_rows(rotation)).items():
                worst[name] = max(worst.get(name, 0.0), change)
    for name in (*layers, LOGITS):
        if not worst[name] <= BOUND:
            expected = f"the same function: {name} may change by {BOUND:.0e} of its largest value"
            raise SmoothQuantError(
                "rotation", expected, f"{worst[name]:.1e}", "nothing was written: use --rotation none"
            )
    return {"batches": len(batches), "allowed": BOUND, "logits": worst[LOGITS], "layers": max(worst.values())}


def _rotated_rows(rotation: Rotation) -> Iterator[RemovableHandle]:
    """Rotate what embeddings return, whose tables stay as they are in float32 (running/precision.py)."""

    def hook(matrix: torch.Tensor, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float() @ matrix.to(output.device)

    for name in rotation.graph.embeddings:
        module = rotation.model.get_submodule(name)
        if stays(module):
            matrix = rotation.matrices[STREAM].float()
            yield module.register_forward_hook(partial(hook, matrix))
