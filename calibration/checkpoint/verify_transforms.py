"""`smoothquant verify --source MODEL`: what the checkpoint says of its rotation and its factors, against the source."""

from functools import partial

import torch
from transformers import PreTrainedModel

from vllm_smoothquant.format.config import STREAM, TRANSFORMS_FILE

from ..discovery.rotations import find_rotations
from ..inputs.model import untie_head
from ..rotation.rotation import Rotation
from ..smoothing.rotation_gate import check_rotation
from .architecture import Faults, fault
from .transforms import Folded

_fault = partial(fault, fix="check --source, or calibrate the model again")


def rotated(source: str, model: PreTrainedModel, trace_ids: torch.Tensor, claims: Folded) -> Rotation:
    """Rotate `model` by the matrices of the checkpoint, where it can be rotated."""
    graph = find_rotations(model, trace_ids)
    sizes = {name: len(matrix) for name, matrix in claims.matrices.items()}
    if sizes != graph.sizes:
        raise _fault(TRANSFORMS_FILE, f"matrices of the sizes {graph.sizes}", str(sizes))
    if STREAM in sizes:
        untie_head(source, model)
    rotation = Rotation(model, graph, claims.matrices)
    check_rotation(rotation, [trace_ids])
    rotation.apply_()
    return rotation


def folded_faults(expected: Folded, got: Folded, width: float) -> Faults:
    """The factors that the checkpoint says were folded against those that were. A missing factor is 1."""
    for name in sorted(expected.modules.keys() | got.modules.keys()):
        a, b = (folded.modules.get(name, {}) for folded in (expected, got))
        for kind in sorted(a.keys() | b.keys()):
            some = a.get(kind, b.get(kind))
            assert some is not None
            x, y = (each.get(kind, torch.ones_like(some)).double() for each in (a, b))
            if x.shape != y.shape or not torch.allclose(x, y, rtol=width + 1e-5, atol=0):
                yield _fault(f"{TRANSFORMS_FILE}: {name}.{kind}", "what was folded into the weights", "another value")
