"""Compile our products for x86 once on the machine that runs them.

The library stays below vLLM's cache folder.

vLLM on a CPU needs a C++ compiler anyway, because torch.compile writes C++ there.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ..format.errors import SmoothQuantError

SOURCE = Path(__file__).with_name("int8_linear.cpp")
EXPERTS = SOURCE.with_name("int8_experts.cpp")
FOUR_BITS = SOURCE.with_name("int4_linear.cpp")
OPERATORS = SOURCE.with_name("operators.cpp")
PROGRAMS = (SOURCE, EXPERTS, FOUR_BITS, OPERATORS)
SOURCES = (*PROGRAMS, *(SOURCE.with_name(name) for name in ("rows.h", "int8_tile.h", "int4_tile.h")))
FLAGS = ("-O3", "-fopenmp", "-fPIC", "-shared", "-std=c++17")
# Instruction sets that int8_tile.h supports, best first -> the compiler flags that enable them.
TARGETS = {
    "vnni": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}
# int32 holds the sum of 2**31 / (255 * 128) = 65,793 products. Few layers are wider: Nemotron-4-340B has 73,728 inputs
# (4 * 18,432), Falcon-180B 59,392, BLOOM 57,344. Each tensor-parallel rank has a part of them.
MAX_IN_FEATURES = 2**16


def target() -> str | None:
    """The best of TARGETS that this CPU can run; None if it can run none."""
    if torch.cpu._is_vnni_supported():
        return "vnni"
    return "avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None


@functools.cache
def why_not() -> str | None:
    """Why our products are not available here; None: they are, and run the operators int8_linear and others of ops.py.

    A first call compiles them, which takes seconds.
    """
    best = target()
    if best is None:
        return "needs an x86 CPU with AVX2"
    reason = ""
    for _ in range(2):  # again if the library is cut off, or from another system that shares the folder
        try:
            path = build(best)
        except SmoothQuantError as error:
            return str(error)
        except (OSError, subprocess.SubprocessError) as error:
            return f"could not compile {SOURCE.name}: {getattr(error, 'stderr', None) or error}"
        try:
            _register(path)
            return None
        except (OSError, AttributeError) as error:
            reason = f"could not load {path}: {error}"
            with contextlib.suppress(OSError):
                path.unlink()
    return reason


_registered: ctypes.CDLL | None = None


def _register(path: Path) -> None:
    """Let the library run the operators, in place of the one that did."""
    global _registered
    library = ctypes.CDLL(str(path))
    register = library.smoothquant_register
    if _registered is not None:
        _registered.smoothquant_unregister()
    register()
    _registered = library


def build(target: str) -> Path:
    """The path of the compiled library. Its name has a hash of the sources, the compiler and the flags.

    It is written to a temporary folder and then renamed, because several workers may start at the same time. Raises
    SmoothQuantError if another user could have put it there, and what subprocess.run raises if it does not compile.
    """
    from vllm import envs

    torch_folder = Path(torch.__file__).parent
    command = [*_compiler(), *FLAGS, *TARGETS[target], f"-I{torch_folder / 'include'}"]
    sources = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(sources + repr([command, torch.__version__]).encode()).hexdigest()[:16]
    path = Path(envs.VLLM_CACHE_ROOT, "smoothquant", f"int8_linear-{key}.so")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(path.parent)
    if path.exists():
        _refuse_others(path)
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        command += [*map(str, PROGRAMS), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        temporary.chmod(0o700)
        temporary.rename(path)
    return path


def _compiler() -> list[str]:
    """The program and its first arguments. As in make, CXX may have arguments or a wrapper: "ccache g++ -m64"."""
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise SmoothQuantError(
            "CXX", "a command in the syntax of a shell", f"{named!r}: {error}", "correct it"
        ) from None
    found = shutil.which("c++") or shutil.which("g++")
    if not words and found is None:
        raise FileNotFoundError("no C++ compiler on PATH (c++, g++, or what CXX names); apt install g++")
    return words or [str(found)]


def _refuse_others(path: Path) -> None:
    """Raise SmoothQuantError if another user owns `path` or may write it: a library that is loaded runs at once."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise SmoothQuantError(
            str(path),
            f"a file or folder of user {os.geteuid()} that nobody else may write, because its code is run",
            f"user {status.st_uid}, mode {status.st_mode & 0o7777:04o}",
            "remove it, or set VLLM_CACHE_ROOT to a folder of your own",
        )
