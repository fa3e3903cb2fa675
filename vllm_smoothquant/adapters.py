"""LoRA adapters on a checkpoint with folded factors: only those that `smoothquant adapter` made for it are loaded.

Smoothing is folded into norms and weights, so that a layer gets x / s where the source's layer got x. An adapter of the
source model would run on x / s as well and be silently wrong. `smoothquant adapter` writes one that fits, and marks it:

    adapter_config.json    "smoothquant": {"smoothing": the sha256 in the checkpoint's quantization_config.transforms}

vLLM gives a plugin no part in loading an adapter. But it opens adapter_config.json in each worker for each adapter, at
the start or at any later request, and Python reports every opened file to audit hooks (sys.addaudithook), which may
refuse it. The hook ignores all files except those that vLLM's LoRA code opens, and only while such a model is loaded.
"""

import json
import os
import sys
import threading
import weakref
from typing import Any

import torch

from .format.config import ADAPTER_CONFIG, QUANT_METHOD
from .format.errors import SmoothQuantError

# Layers that are loaded with LoRA -> (sha256 of their checkpoint's folded factors, the checkpoint).
_watched: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()
_installed = False
_inside = threading.local()  # the check opens the same file


def watch(layer: torch.nn.Module, smoothing: str, checkpoint: str) -> None:
    """Refuse adapters that were not made for `checkpoint`, as long as `layer` exists."""
    global _installed
    _watched[layer] = (smoothing, checkpoint)
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True


def check(path: str) -> None:
    """SmoothQuantError if the adapter_config.json at `path` is not of an adapter for a checkpoint that is loaded."""
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    mark = config.get(QUANT_METHOD) if isinstance(config, dict) else None
    made_for = mark.get("smoothing") if isinstance(mark, dict) else None
    loaded = dict(_watched.values())
    if loaded and made_for not in loaded:
        adapter, checkpoint = os.path.dirname(path), next(iter(loaded.values()))
        raise SmoothQuantError(
            path,
            f"an adapter made for {checkpoint}, whose weights have smoothing folded into them",
            "an adapter of the source model" if mark is None else "one made for another checkpoint",
            f"run `smoothquant adapter {adapter} --checkpoint {checkpoint} -o ADAPTED` and load ADAPTED",
        )


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not _watched or getattr(_inside, "check", False):
        return
    path = args[0]
    if isinstance(path, str) and os.path.basename(path) == ADAPTER_CONFIG and _opened_by_vllm():
        _inside.check = True
        try:
            check(path)
        except (OSError, ValueError) as error:
            if isinstance(error, SmoothQuantError):
                raise
            # vLLM reports a file that is missing or damaged itself.
        finally:
            _inside.check = False


def _opened_by_vllm() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("vllm.lora."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
