"""Specifications in tiles on CPUs: C++ in float32 where there is a compiler, torch code everywhere else."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Mapping

import torch

from polyattn.codegen import tables
from polyattn.codegen.cpu.cpp.library import Library, load
from polyattn.codegen.cpu.cpp.tiles import CppTileWriter
from polyattn.codegen.cpu.near_tiles import TileWriter
from polyattn.codegen.phases import Choose
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import PLAIN, TileCosts
from polyattn.errors import EmitError, ScheduleError

log = logging.getLogger("polyattn")
WIDER = 4
"""How many times as many tiles of queries C++ takes at a time as torch code, which has values for all of their keys in
memory."""


INFERENCE, TRAINING = TileCosts(0.75, 6.6, 1.0e7), TileCosts(0.77, 4.9, 7.6e6)
"""Costs of C++."""


@functools.cache
def _written(spec: KernelSpec) -> str | EmitError:
    try:
        return TileWriter(spec).text()
    except (EmitError, ScheduleError) as error:
        return EmitError(str(error))


@functools.cache
def cpp_text(spec: KernelSpec) -> str | None:
    """The file whose large values are C++; None where a value has none."""
    try:
        return CppTileWriter(spec).text()
    except (EmitError, ScheduleError) as error:
        log.info("%s in tiles has no C++: %s", spec.name, error)
        return None


def torch_text(spec: KernelSpec) -> str:
    """The file of torch calls alone.

    Raises:
        EmitError: there is no code for the specification.
    """
    written = _written(spec)
    if isinstance(written, EmitError):
        raise written
    return written


def text(spec: KernelSpec) -> str:
    """The file that runs in float32 where there is a compiler; see :func:`torch_text`."""
    written = torch_text(spec)
    return cpp_text(spec) or written


def unsupported(spec: KernelSpec) -> str | None:
    """Why there is no code for a specification, found by writing it, once; None where there is."""
    written = _written(spec)
    return str(written) if isinstance(written, EmitError) else None


def costs(differentiated: bool, dtype: torch.dtype) -> TileCosts:
    """See :meth:`polyattn.codegen.target.Target.tile_costs`."""
    if dtype != torch.float32 or _failures or not _compiler():
        return PLAIN
    return TRAINING if differentiated else INFERENCE


@functools.cache
def _compiler() -> bool:
    """Whether there seems to be a compiler; who compiles finds out."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return any(name and shutil.which(name) for name in names)


_failures: set[str] = set()
"""Why something was not compiled in this process."""


@functools.cache
def library(written: str) -> Library | None:
    """The compiled C++ of a file; None where it cannot be compiled, of which each reason is said once."""
    try:
        return load(tables.module("cpu_tiles", written).SOURCE)
    except EmitError as error:
        _say(str(error))
        return None


def _say(reason: str) -> None:
    if reason in _failures:
        return
    _failures.add(reason)
    log.warning("clustered attention runs as torch code on this CPU, which takes longer than C++: %s", reason)


def run(
    spec: KernelSpec, inputs: Mapping[str, torch.Tensor], scalars: Scalars, block: int, choose: Choose
) -> dict[str, torch.Tensor]:
    """Outputs of a specification by name; see :func:`polyattn.codegen.targets.run`."""
    written = cpp_text(spec) if all(x.dtype == torch.float32 for x in inputs.values()) else None
    compiled = None if written is None else library(written)
    made: dict[str, torch.Tensor]
    if written is None or compiled is None:
        made = tables.module(f"cpu_{spec.name}", torch_text(spec)).run(inputs, scalars, block, choose)
    else:
        made = tables.module("cpu_tiles", written).run(inputs, scalars, WIDER * block, choose, compiled)
    return made
