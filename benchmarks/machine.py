"""What a table must say about where its figures come from."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch.backends.cpu import get_cpu_capability


def describe() -> str:
    """One sentence: cores, CPU and its instructions, or the GPU; versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    where = f"{len(os.sched_getaffinity(0))} cores of {model} ({get_cpu_capability()})"
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, {where}"
    return f"{where}; vLLM {version('vllm')}, torch {version('torch')}, transformers {version('transformers')}."
