"""What is the same for every call: numbers of coefficients, weights of monomials, emitted files as modules."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Mapping
from types import ModuleType

import sympy
import torch

from polyattn.rewriter import features


def number(c: sympy.Expr, scalars: Mapping[str, float]) -> float:
    """The value of a coefficient."""
    return _number(sympy.sympify(c), tuple(sorted(scalars.items())))


@functools.lru_cache(maxsize=1024)
def _number(c: sympy.Expr, scalars: tuple[tuple[str, float], ...]) -> float:
    values = dict(scalars)
    return float(c.subs({s: values[s.name] for s in c.free_symbols}))


@functools.lru_cache(maxsize=64)
def weights(coefficients: tuple[float, ...], d: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Weights of all monomials, [r]."""
    return torch.as_tensor(features.weights(coefficients, d)).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=64)
def module(name: str, text: str) -> ModuleType:
    """An emitted file as a module; it is kept in memory, and tracebacks and Triton read its source from linecache."""
    name = f"polyattn_{name}_{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    made = ModuleType(name)
    made.__file__ = f"<{name}>"
    linecache.cache[made.__file__] = (len(text), None, text.splitlines(keepends=True), made.__file__)
    exec(compile(text, made.__file__, "exec"), made.__dict__)
    return made
