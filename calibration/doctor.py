"""`smoothquant doctor`: what this machine can do with INT8, and advice. It changes nothing and loads no model.

The advice on schemes is the table that docs/which_scheme.md has (advice/table.py).
The kernels are those that vllm_smoothquant/kernels/select.py chooses here, because that code is called.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import torch

from vllm_smoothquant import SUPPORTED_VLLM, supports
from vllm_smoothquant.format.config import QUANT_METHOD, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.int4 import GROUP_SIZES

from .advice.table import HARDWARE, TAKE, USES, hardware_of
from .options import ACTIVATIONS

# Flag of an x86 CPU in /proc/cpuinfo -> name of the instructions.
INT8_FLAGS = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI"}
FLAGS = INT8_FLAGS | {"avx512f": "AVX-512", "avx2": "AVX2", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
SIZES = (4096, 4096)  # out and in of the layer that the kernel is chosen for: multiples of 16, as in nearly all models
ALLOCATORS = ("tcmalloc", "jemalloc")
Facts = Mapping[str, Any]


def examine() -> dict[str, Any]:
    """The machine, the installed vLLM, the kernel of every scheme with the reasons against others, and the advice."""
    cpu, flags = _cpu()
    facts: dict[str, Any] = {
        "cpu": cpu,
        "x86": platform.machine() in ("x86_64", "AMD64"),
        "cores": _cores(),
        "instructions": [name for flag, name in FLAGS.items() if flag in flags],
        "int8_instructions": [name for flag, name in INT8_FLAGS.items() if flag in flags],
        "memory_bytes": {key: getattr(psutil.virtual_memory(), key) for key in ("total", "available")},
        "gpus": _gpus(),
        "allocator": next((a for a in ALLOCATORS if a in os.environ.get("LD_PRELOAD", "")), None),
        "vllm": _vllm(),
    }
    facts["kernels"] = _kernels() if facts["vllm"]["supported"] else {}
    return facts | {"advice": list(advise(facts))}


def advise(facts: Facts) -> Iterator[str]:
    """The advice for a machine with these facts."""
    vllm = facts["vllm"]
    if vllm["version"] is None:
        yield "No vLLM here: this host can calibrate, smooth, verify and report. To serve, see Install in the README."
    elif not vllm["supported"]:
        yield f"This vLLM is outside {SUPPORTED_VLLM}: it will refuse SmoothQuant checkpoints. Install one of these."
    if vllm["version"] is not None and not vllm["plugin"]:
        yield "vLLM will not load the plugin: it is not installed here, or VLLM_PLUGINS does not name smoothquant."
    if not facts["gpus"] and not facts["allocator"]:
        yield (
            "Preload an allocator before serving on a CPU: vLLM recommends LD_PRELOAD=libtcmalloc_minimal.so.4 (and "
            "libiomp5.so, which is in the environment's lib folder)."
        )
    if not facts["gpus"] and facts["cores"] <= 4:
        yield "Few cores: VLLM_CPU_OMP_THREADS_BIND=0-1 (your cores) gives vLLM all cores; by default one is reserved."
    if not facts["gpus"] and facts["cores"] == 1:
        yield (
            "One core: `VLLM_ENABLE_V1_MULTIPROCESSING=0 vllm serve OUT --distributed-executor-backend uni` has one "
            "process less, which answers one stream faster (docs/cpu.md)."
        )
    for key in hardware_of(facts):
        row = HARDWARE[key]
        yield row.note
        for use, name in USES.items():
            yield f"{name}: {TAKE[row.uses[use].take][0]}, because {row.uses[use].why}"
    yield "For a model, `smoothquant doctor MODEL` says the same with sizes, sources and what to type."


def machine() -> str:
    """The machine in one line, for a table of measured figures: GPUs, cores, CPU, instructions, torch."""
    cpu, flags = _cpu()
    gpus = "".join(f"{gpu['name']}, " for gpu in _gpus())
    instructions = ", ".join(name for flag, name in FLAGS.items() if flag in flags)
    return f"{gpus}{_cores()} cores of {cpu} ({instructions}); torch {torch.__version__}"


def format_report(facts: Facts) -> str:
    """The facts of `examine` as text."""
    memory, vllm = facts["memory_bytes"], facts["vllm"]
    instructions = ", ".join(facts["instructions"]) or "no known instructions"
    lines = [
        f"cpu      {facts['cpu']}, {facts['cores']} cores; {instructions}",
        f"memory   {memory['total'] / 2**30:.1f} GiB, {memory['available'] / 2**30:.1f} GiB of it available",
    ]
    for gpu in facts["gpus"]:
        capability = ".".join(map(str, divmod(gpu["capability"], 10)))
        lines.append(f"gpu      {gpu['name']}, compute capability {capability}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    if not facts["gpus"]:
        lines.append("gpu      none that torch can use")
    installed = "none installed" if vllm["version"] is None else f"{vllm['version']} on {vllm['platform'] or '?'}"
    lines.append(f"vllm     {installed}{', plugin found' if vllm['plugin'] else ''}; supported: {SUPPORTED_VLLM}")
    for scheme, kernel in facts["kernels"].items():
        lines.append(f"kernel   {scheme}: {kernel['kernel'] or 'none'}")
        lines += [f"           not {name}: {reason}" for name, reason in kernel["passed_over"].items()]
    return "\n".join([*lines, "", *(f"- {text}" for text in facts["advice"])])


def _cpu() -> tuple[str, frozenset[str]]:
    """The CPU's name and instruction flags, from /proc/cpuinfo if the system has it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags") or entries.get("Features", "")  # x86, ARM
    return entries.get("model name") or platform.processor() or platform.machine(), frozenset(flags.split())


def _cores() -> int:
    """Cores that this process may use, where the system restricts them; else all cores."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def _gpus() -> list[dict[str, Any]]:
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": p.major * 10 + p.minor, "memory_bytes": p.total_memory} for p in properties]


def _vllm() -> dict[str, Any]:
    """version, whether we support it, the platform it runs on, and whether it will load the plugin."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        return {"version": None, "supported": False, "platform": None, "plugin": False}
    names, allowed = {p.name for p in entry_points(group="vllm.general_plugins")}, os.environ.get("VLLM_PLUGINS")
    return {
        "version": installed,
        "supported": supports(installed),
        "platform": _platform() if supports(installed) else None,
        "plugin": QUANT_METHOD in names and (allowed is None or QUANT_METHOD in allowed.split(",")),
    }


def _platform() -> str | None:
    try:
        from vllm.platforms import current_platform
    except Exception:  # a broken installation raises any error; the report then shows "?"
        return None
    return str(current_platform.device_name)


def _kernels() -> dict[str, dict[str, Any]]:
    """Scheme -> the kernel that would compute it here, and the reason against each kernel that comes before it."""
    try:
        from vllm_smoothquant.kernels.base import request_here
        from vllm_smoothquant.kernels.cpu import why_not_experts
        from vllm_smoothquant.kernels.select import explain_kernels
    except Exception as error:  # a broken installation raises any error
        fix = "install it again; see Install in the README"
        raise SmoothQuantError("vllm", "an installation that can be imported", error, fix) from error
    kernels = {}
    schemes = {f"--activations {name}": Scheme(input_activations=a) for name, a in ACTIVATIONS.items() if a.rounded}
    grouped = Weights("group", GROUP_SIZES[0], num_bits=4)
    schemes |= {f"--bits 4 --activations {name}": Scheme(grouped, ACTIVATIONS[name]) for name in ("none", "token")}
    for name, scheme in schemes.items():
        request = request_here("a linear layer", scheme, True, torch.bfloat16, *SIZES)
        reasons = explain_kernels(request)
        chosen = next((kernel for kernel, reason in reasons if reason is None), None)
        passed_over = dict(takewhile(lambda pair: pair[1] is not None, reasons))  # those before the chosen kernel
        kernels[name] = {"kernel": chosen, "passed_over": passed_over}
    ours = "int8-experts"
    reason = why_not_experts() if request.platform == "cpu" else "it is for CPUs"
    passed_over = {} if reason is None else {ours: reason}
    kernels["routed experts"] = {"kernel": ours if reason is None else "vLLM's choice", "passed_over": passed_over}
    kernels["routed experts, 4 bits"] = kernels["routed experts"] | ({"kernel": "int4"} if reason is None else {})
    return kernels
