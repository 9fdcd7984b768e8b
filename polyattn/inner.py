"""The compiler of everything around the attention: inductor, or nothing at all."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch.fx as fx

from polyattn.errors import OptionValueError
from polyattn.options import Options

log = logging.getLogger("polyattn")
_warn_lock = threading.Lock()
_warned: set[str] = set()


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Hand a graph to the inner compiler, which takes ownership of it.

    Raises:
        OptionValueError: ``inner_options`` holds a name or a mode that inductor does not have.
    """
    patches = inductor_patches(options.inner_options)
    if options.inner == "eager":
        return gm.forward
    problem = toolchain_problem(os.environ.get("CXX"))
    if problem is not None:
        warn_once("toolchain", f"{problem}: polyattn runs without inductor (options={{'inner': 'eager'}} is the same)")
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return cast("Callable[..., Any]", compiled)


def inductor_patches(inner_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inductor's configuration for ``inner_options``: ``mode`` is expanded as torch.compile does it, the rest wins
    over it."""
    if not inner_options:
        return {}
    import torch._inductor
    from torch._inductor import config

    given = {str(name).replace("-", "_"): value for name, value in inner_options.items()}
    mode = given.pop("mode", None)
    try:
        patches = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    except RuntimeError as error:
        raise OptionValueError(f"polyattn option inner_options={dict(inner_options)!r}: {error}") from None
    known = config.get_config_copy()
    for name in given:
        if name not in known:
            raise OptionValueError(
                f"polyattn option inner_options: inductor has no option {name!r}; "
                "see torch._inductor.list_options() and torch._inductor.list_mode_options()"
            )
    return {**patches, **given}


@functools.lru_cache(maxsize=8)
def toolchain_problem(cxx: str | None) -> str | None:
    """Why inductor cannot build C++ here, or None when it can. Tried once per process and value of CXX.

    Args:
        cxx: the environment variable CXX; None lets inductor choose.
    """
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(include, "Python.h")):
        return f"Python.h is missing in {include}"
    try:
        compiler = cxx or _inductor_compiler()
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write("#include <Python.h>\n#include <vector>\nint probe(std::vector<int> x) { return x[0]; }\n")
            command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", source]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return f"no working C++ compiler ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _inductor_compiler() -> str:
    from torch._inductor import cpp_builder

    return str(cpp_builder.get_cpp_compiler())


def warn_once(key: str, message: str) -> None:
    """One warning per key and process, however many threads compile."""
    with _warn_lock:
        if key in _warned:
            return
        _warned.add(key)
    log.warning(message)
