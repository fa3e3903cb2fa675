"""int8_linear.cpp, compiled once on the machine that runs it and kept below vLLM's cache folder.

torch.compile on a CPU, which is how vLLM runs, needs a C++ compiler for what Inductor writes; this asks for no more.
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
FLAGS = ("-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC", "-shared", "-std=c++17")


@functools.cache
def int8_linear() -> Callable[..., None] | str:
    """smoothquant_int8_linear of int8_linear.cpp, or why it cannot be had here."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs an x86 CPU with AVX2"
    try:
        library = ctypes.CDLL(str(_library()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        return f"could not compile {SOURCE.name}: {said}"
    function = library.smoothquant_int8_linear
    pointer, number = ctypes.c_void_p, ctypes.c_long
    function.argtypes = [*[pointer] * 5, ctypes.c_int32, *[pointer] * 4, *[number] * 3]
    function.restype = None
    return function


def _library() -> Path:
    """The shared library of this source, compiler and flags, written beside, then renamed: workers start at once."""
    from vllm import envs

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on PATH (c++, g++, or what CXX names); apt install g++")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    path = Path(envs.VLLM_CACHE_ROOT, "smoothquant", f"int8_linear-{key}.so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder, path.name)
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            built.rename(path)
    return path
