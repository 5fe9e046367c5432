"""Where does the CPU's attention kernel come from? From ``paged_attention.cpp``, compiled once on each machine.

The library lies in ``engine.compile_cache`` under a name made of all that it depends on: the source, the flags and what
the processor can do, for it is compiled for this one. Processes that want it at one time compile it twice and the later
one wins (a rename). A machine without a compiler and without the file has no kernel, and says why.

The OpenMP runtime that it names is the one that torch has loaded already, so both compute on the same threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("paged_attention.cpp")
_FUNCTION = "prfaas_paged_attention"
_COMPILERS = ("g++", "c++", "clang++")
# Without -ffast-math, which would have the whole process flush denormal numbers to zero.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 300.0
_P, _N = ctypes.c_void_p, ctypes.c_int64
# As in the source: q, pages, out, table, its width, ends, sequences, kv_heads, group, key_dim, value_dim, page_size,
# window, scaling, softcap, sinks, is_bfloat16, threads.
_ARGUMENTS = (
    *(_P, _P, _P, _P, _N, _P, _N, _N, _N, _N, _N, _N, _N),
    *(ctypes.c_float, ctypes.c_float, _P, ctypes.c_int32, ctypes.c_int32),
)

# Limits of arrays on the stack in the source.
MAX_GROUP, MAX_DIM, MAX_PAGE_SIZE = 32, 512, 512

Kernel = Callable[..., None]


class KernelMissing(Exception):
    """There is no kernel on this machine; the text says why."""


def compiler() -> str | None:
    """The C++ compiler's path; None if there is none."""
    return next((path for path in map(shutil.which, _COMPILERS) if path), None)


def missing(folder: str) -> str | None:
    """Why there is no kernel; None if there is one. May compile it, into ``folder``, in seconds."""
    try:
        load_kernel(folder)
    except KernelMissing as error:
        return str(error)
    return None


@cache
def load_kernel(folder: str) -> Kernel:
    """The function of the source, to be called with pointers and numbers. Raises ``KernelMissing``."""
    try:
        library = ctypes.CDLL(str(_library(Path(folder).expanduser() / "kernels")))
    except OSError as error:
        raise KernelMissing(f"its kernel cannot be loaded: {error}") from error
    kernel = getattr(library, _FUNCTION)
    kernel.argtypes, kernel.restype = _ARGUMENTS, None
    found: Kernel = kernel
    return found


def _library(folder: Path) -> Path:
    path = folder / f"paged_attention-{_digest()}.so"
    if path.is_file():
        return path
    compile_with = compiler()
    if compile_with is None:
        raise KernelMissing(f"its kernel is not compiled, and no C++ compiler ({', '.join(_COMPILERS)}) is installed")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        command = [compile_with, *_FLAGS, "-o", partial, str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise KernelMissing(f"{compile_with} cannot compile its kernel: {(done.stderr.splitlines() or ['?'])[0]}")
        Path(partial).rename(path)
    except subprocess.TimeoutExpired as error:
        raise KernelMissing(f"{compile_with} took more than {_COMPILE_TIMEOUT_S:.0f} s for its kernel") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    logger.info("compiled the attention kernel for this processor to %s", path)
    return path


def _digest() -> str:
    digest = hashlib.blake2b(_SOURCE.read_bytes(), digest_size=8)
    digest.update(" ".join((*_FLAGS, platform.machine(), _processor())).encode())
    return digest.hexdigest()


def _processor() -> str:
    """What it can do, as Linux lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
