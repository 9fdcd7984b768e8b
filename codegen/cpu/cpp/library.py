"""Emitted C++ as a library: compiled once for a CPU, kept in the user's cache directory, called with tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from polyattn.codegen.cpu.cpp import runtime
from polyattn.errors import EmitError

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-pipe"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-ignored-attributes"),
)
"""No flag that lets the compiler assume that numbers are finite."""


class Library:
    """Functions of a compiled file, which take tensors, sizes and numbers.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))

    def __call__(
        self, name: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int], numbers: Sequence[float] = ()
    ) -> None:
        """Run a function on the memory of tensors, which must lie in one piece: float32, or int64 where they count."""
        for x in tensors:
            assert x.is_contiguous(), f"{name}: a tensor of shape {tuple(x.shape)} does not lie in one piece"
            assert x.dtype in (torch.float32, torch.int64), f"{name}: a tensor of {x.dtype}"
        pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
        integers = (ctypes.c_int64 * len(sizes))(*sizes)
        self._loaded[name](pointers, integers, (ctypes.c_double * len(numbers))(*numbers))


@functools.cache
def load(source: str) -> Library:
    """The library of a C++ file.

    Raises:
        EmitError: there is no compiler, it fails, or its output cannot be kept; the message says which.
    """
    compiler = _compiler()
    try:
        return Library(_compiled(source, compiler))
    except OSError as error:
        raise EmitError(f"the library cannot be kept or loaded: {error}") from error


def folder() -> Path:
    """Where libraries are kept: ``polyattn`` in the user's cache directory."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "polyattn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyattn"


def _compiler() -> str:
    """The compiler that inductor would use.

    Raises:
        EmitError: there is none.
    """
    from torch._inductor import cpp_builder, exc  # takes a second, which a process without tiles need not wait for

    if os.name != "posix":
        raise EmitError(f"C++ of tiles is not compiled on {os.name}")
    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise EmitError(f"there is no C++ compiler: {error}") from error


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=False, capture_output=True, text=True).stdout


@functools.cache
def _cpu() -> str:
    """What tells this CPU from others for which a compiler would choose other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.split("\t")[0].strip() in kinds})])


def _compiled(source: str, compiler: str) -> Path:
    """The path of the library, which is compiled if it is not there.

    It gets its name only when it is whole, so that no process sees half of one, and two may compile the same.
    """
    parts = (runtime.TEXT, source, compiler, *FLAGS, _version(compiler), _cpu())
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
    path = folder() / f"tiles-{digest}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=path.parent) as name:
        here = Path(name)
        (here / runtime.HEADER).write_text(runtime.TEXT)
        (here / "tiles.cpp").write_text(source)
        command = [compiler, *FLAGS, "tiles.cpp", "-o", path.name]
        env = {**os.environ, "TMPDIR": name}
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=here, env=env)
        if done.returncode:
            raise EmitError(f"{compiler} does not compile the C++ of tiles: {done.stderr.strip()[:1000]}")
        os.replace(here / path.name, path)
    return path
