"""The factors that smoothing folded into a checkpoint's weights, exactly, because LoRA adapters and drafts need them.

    input_factor   float32 [in]    the layer's columns were multiplied by it: its input arrives divided
    output_factor  float32 [out]   the layer's rows and bias, or the norm's parameters, were divided by it

Names are those of transformers' modules, as LoRA adapters have them. Factors at run time (`smoothing_factor`) are not
here, because the layer divides by them itself.
"""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_smoothquant.format.config import TRANSFORMS_FILE, Transforms
from vllm_smoothquant.format.errors import SmoothQuantError

from ..inputs.model import sha256
from ..smoothing.factors import Smoothing
from .export import save_tensors

KINDS = ("input_factor", "output_factor")
Factors = dict[str, dict[str, torch.Tensor]]


def factors(smoothing: Smoothing) -> Factors:
    """Module -> the KINDS of factors that were folded into it."""
    folded, found = smoothing.folded(), Factors()
    for name in sorted(folded.modules):
        each = (folded.input_factor(name), folded.factors.get(name))
        found[name] = {kind: factor for kind, factor in zip(KINDS, each, strict=True) if factor is not None}
    return found


def write(folder: Path, smoothing: Smoothing) -> Transforms | None:
    """Write TRANSFORMS_FILE into the checkpoint `folder`; None if nothing was folded."""
    tensors = {f"{name}.{kind}": factor for name, kinds in factors(smoothing).items() for kind, factor in kinds.items()}
    if not tensors:
        return None
    path = folder / TRANSFORMS_FILE
    path.parent.mkdir(mode=0o755)
    save_tensors(path, {name: factor.cpu().contiguous().clone() for name, factor in tensors.items()})
    return Transforms(sha256(path))


def read(folder: Path) -> Factors:
    """What `write` stored, empty without such a file. Errors (SmoothQuantError): a damaged file, a faulty factor."""
    path = folder / TRANSFORMS_FILE
    if not path.exists():
        return {}
    fix = "copy the checkpoint again"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SmoothQuantError(str(path), "a safetensors file", error, fix) from error
    found: Factors = defaultdict(dict)
    for key, factor in tensors.items():
        name, _, kind = key.rpartition(".")
        good = kind in KINDS and factor.dtype == torch.float32 and factor.dim() == 1
        if not good or not bool((torch.isfinite(factor) & (factor > 0)).all()):
            raise SmoothQuantError(f"{path}: {key}", "float32 factors above zero", str(factor.dtype), fix)
        found[name][kind] = factor
    return dict(found)
