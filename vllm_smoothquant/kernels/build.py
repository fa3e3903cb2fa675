"""Compile int8_linear.cpp once on the machine that runs it; the library stays below vLLM's cache folder.

vLLM on a CPU needs a C++ compiler anyway, because torch.compile writes C++ there.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("int8_linear.cpp")
SOURCES = (SOURCE, SOURCE.with_name("int8_tile.h"))
FLAGS = ("-O3", "-fopenmp", "-fPIC", "-shared", "-std=c++17")
# Instruction sets that int8_tile.h supports, best first -> the compiler flags that enable them.
TARGETS = {
    "vnni": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
    "avx2": ("-mavx2", "-mfma"),
}
# int32 holds the sum of 2**31 / (255 * 128) products. The widest layer that we know of has 53,248 inputs (Llama 405B).
MAX_IN_FEATURES = 2**16


def target() -> str | None:
    """The best of TARGETS that this CPU can run; None if it can run none."""
    if torch.cpu._is_vnni_supported():
        return "vnni"
    return "avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None


@functools.cache
def int8_linear() -> Callable[..., bool] | str:
    """smoothquant_int8_linear of int8_linear.cpp for `target()`, or the reason why it is not available here."""
    best = target()
    if best is None:
        return "needs an x86 CPU with AVX2"
    try:
        library = ctypes.CDLL(str(build(best)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"could not compile {SOURCE.name}: {getattr(error, 'stderr', None) or error}"
    function = library.smoothquant_int8_linear
    pointer, number, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_bool
    function.argtypes = [flag, *[pointer] * 6, flag, pointer, *[number] * 3]
    function.restype = flag
    return function


def build(target: str) -> Path:
    """The path of the compiled library. Its name has a hash of the sources, the compiler and the flags.

    It is written to a temporary folder and then renamed, because several workers may start at the same time.
    """
    from vllm import envs

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on PATH (c++, g++, or what CXX names); apt install g++")
    flags = (*FLAGS, *TARGETS[target])
    sources = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(sources + repr((compiler, flags)).encode()).hexdigest()[:16]
    path = Path(envs.VLLM_CACHE_ROOT, "smoothquant", f"int8_linear-{key}.so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            command = [compiler, *flags, str(SOURCE), "-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            temporary.rename(path)
    return path
