"""`smoothquant doctor`: what this machine can do with INT8, and what to do about it. Nothing is changed or loaded.

Kernels are those vllm_smoothquant/kernels/select.py would choose, asked of the very code that chooses. Advice is a
table: what must be so, and what to say then.
"""

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant import SUPPORTED_VLLM, supports
from vllm_smoothquant.format.config import QUANT_METHOD, Scheme
from vllm_smoothquant.format.errors import SmoothQuantError

from .options import ACTIVATIONS

# What an x86 CPU says of itself -> what that is to INT8.
INT8_FLAGS = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI"}
FLAGS = INT8_FLAGS | {"avx512f": "AVX-512", "avx2": "AVX2", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
SIZES = (4096, 4096)  # out and in of the layer that kernels are asked for: multiples of 16, as nearly all are
ALLOCATORS = ("tcmalloc", "jemalloc")
Facts = Mapping[str, Any]
# (what must be so, what to say then)
ADVICE: tuple[tuple[Callable[[Facts], bool], str], ...] = (
    (
        lambda f: f["vllm"]["version"] is None,
        "No vLLM here: this host can calibrate, smooth, verify and report. To serve, see the README's Install.",
    ),
    (
        lambda f: f["vllm"]["version"] is not None and not f["vllm"]["supported"],
        f"This vLLM is outside {SUPPORTED_VLLM}: SmoothQuant checkpoints will be refused. Install one of these.",
    ),
    (
        lambda f: f["vllm"]["version"] is not None and not f["vllm"]["plugin"],
        "vLLM will not load the plugin: it is not installed here, or VLLM_PLUGINS leaves smoothquant out.",
    ),
    (
        lambda f: f["x86"] and not f["gpus"] and not f["int8_instructions"],
        "This CPU has no INT8 instructions (VNNI or AMX). Stock vLLM's own INT8 product gives wrong sums here; the "
        "plugin's is right, and faster than floating point where a C++ compiler (g++) is at hand to build it. A CPU "
        "with VNNI, or a GPU, is faster still.",
    ),
    (
        lambda f: not f["gpus"] and "AMX" in f["int8_instructions"],
        "AMX: per-token scales run on vLLM's AMX kernel, static ones on oneDNN. Take the default scheme.",
    ),
    (
        lambda f: not f["gpus"] and not f["allocator"],
        "Preload an allocator before serving on a CPU: LD_PRELOAD=libtcmalloc_minimal.so.4 (and libiomp5.so, which "
        "lies in the environment's lib folder) is what vLLM asks for.",
    ),
    (
        lambda f: not f["gpus"] and f["cores"] <= 4,
        "Few cores: VLLM_CPU_OMP_THREADS_BIND=0-1 (your cores) gives vLLM all of them; by itself it keeps one free.",
    ),
    (
        lambda f: any(g["capability"] < 75 for g in f["gpus"]),
        "This GPU has no INT8 tensor cores (they begin with compute capability 7.5): vLLM will refuse the checkpoint.",
    ),
    (
        lambda f: any(g["capability"] >= 100 for g in f["gpus"]),
        "Blackwell (compute capability 10.0 and above) has no CUTLASS INT8 kernel in vLLM: Triton's is used, for O2 "
        "as well. FP8 is this GPU's fast path, so measure before choosing INT8.",
    ),
    (
        lambda f: any(75 <= g["capability"] < 100 for g in f["gpus"]),
        "INT8 helps where arithmetic is the limit: long prompts and large batches. At batch 1 a fast GPU waits for "
        "memory and launches, and INT8 may gain nothing; measure yours with `smoothquant evaluate --table`.",
    ),
    (
        lambda f: any(g["capability"] in (89, 90) for g in f["gpus"]),
        "This GPU multiplies FP8 as fast as INT8: take INT8 for checkpoints that must run on older GPUs as well.",
    ),
    (
        lambda f: True,
        "Scheme: the default (a scale per channel and per token) loses least. Static scales (O3) save a pass over the "
        "activations and break first: only with --alpha auto --max-fallback 10%, and look at the report.",
    ),
)


def examine() -> dict[str, Any]:
    """The machine, the vLLM found, the kernel of every scheme with why others were passed over, and advice."""
    flags = _cpu_flags()
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "x86": platform.machine() in ("x86_64", "AMD64"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "instructions": [name for flag, name in FLAGS.items() if flag in flags],
        "int8_instructions": [name for flag, name in INT8_FLAGS.items() if flag in flags],
        "memory_bytes": _memory(),
        "gpus": _gpus(),
        "allocator": next((a for a in ALLOCATORS if a in os.environ.get("LD_PRELOAD", "")), None),
        "vllm": _vllm(),
    }
    facts["kernels"] = _kernels() if facts["vllm"]["supported"] else {}
    return facts | {"advice": [text for applies, text in ADVICE if applies(facts)]}


def machine() -> str:
    """What a table of figures must say of where they come from."""
    gpus = ", ".join(gpu["name"] for gpu in _gpus())
    flags = [name for flag, name in FLAGS.items() if flag in _cpu_flags()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{gpus + ', ' if gpus else ''}{cores} cores of {_cpu_name()} ({', '.join(flags)}); torch {torch.__version__}"
    )


def format_report(facts: Facts) -> str:
    """`examine`'s facts for people."""
    memory = facts["memory_bytes"]
    vllm = facts["vllm"]
    instructions = ", ".join(facts["instructions"]) or "no known instructions"
    lines = [
        f"cpu      {facts['cpu']}, {facts['cores']} cores; {instructions}",
        f"memory   {memory['total'] / 2**30:.1f} GiB, {memory['available'] / 2**30:.1f} GiB of it available",
    ]
    for gpu in facts["gpus"]:
        major, minor = divmod(gpu["capability"], 10)
        lines.append(
            f"gpu      {gpu['name']}, compute capability {major}.{minor}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        )
    if not facts["gpus"]:
        lines.append("gpu      none that torch can use")
    said = "none installed" if vllm["version"] is None else f"{vllm['version']} on {vllm['platform'] or '?'}"
    lines.append(f"vllm     {said}{', plugin found' if vllm['plugin'] else ''}; supported: {SUPPORTED_VLLM}")
    for scheme, kernel in facts["kernels"].items():
        lines.append(f"kernel   {scheme}: {kernel['kernel'] or 'none'}")
        lines += [f"           not {name}: {why}" for name, why in kernel["passed_over"].items()]
    return "\n".join([*lines, "", *(f"- {text}" for text in facts["advice"])])


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_flags() -> frozenset[str]:
    lines = [line.partition(":")[2] for line in _cpu_info() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].split()) if lines else frozenset()


def _memory() -> dict[str, int]:
    pages = os.sysconf("SC_PAGE_SIZE")
    return {
        "total": pages * os.sysconf("SC_PHYS_PAGES"),
        "available": pages * os.sysconf("SC_AVPHYS_PAGES"),
    }


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {"name": about.name, "capability": about.major * 10 + about.minor, "memory_bytes": about.total_memory}
        )
    return found


def _vllm() -> dict[str, Any]:
    """version, whether that is one of ours, the platform it runs on, and whether it will load the plugin."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        return {"version": None, "supported": False, "platform": None, "plugin": False}
    supported = supports(found)
    names = {point.name for point in entry_points(group="vllm.general_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    plugin = QUANT_METHOD in names and (allowed is None or QUANT_METHOD in allowed.split(","))
    return {"version": found, "supported": supported, "platform": _platform() if supported else None, "plugin": plugin}


def _platform() -> str | None:
    try:
        from vllm.platforms import current_platform
    except Exception:  # A broken installation raises anything; that it is broken is what the doctor reports.
        return None
    return str(current_platform.device_name)


def _kernels() -> dict[str, dict[str, Any]]:
    """Scheme -> the kernel that would compute it here, and why each before it was passed over."""
    try:
        from vllm_smoothquant.kernels.base import request_here
        from vllm_smoothquant.kernels.select import explain_kernels
    except Exception as error:  # As above: the fault is the finding.
        raise SmoothQuantError(
            "vllm",
            "an installation that can be imported",
            error,
            "install it anew; see the README's Install",
        ) from error
    found = {}
    for name, activations in ACTIVATIONS.items():
        request = request_here("a linear layer", Scheme(input_activations=activations), True, torch.bfloat16, *SIZES)
        reasons = dict(explain_kernels(request))
        chosen = next((kernel for kernel, why in reasons.items() if why is None), None)
        passed = {kernel: why for kernel, why in reasons.items() if why is not None}
        # What comes after the chosen one was not needed; that is no reason to tell.
        before = list(reasons)[: list(reasons).index(chosen)] if chosen else list(reasons)
        found[f"--activations {name}"] = {"kernel": chosen, "passed_over": {k: passed[k] for k in before}}
    return found
