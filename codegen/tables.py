"""What is the same for every call: numbers of coefficients, weights of monomials, emitted files as modules."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import sympy
import torch

from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra import monomials

Scalars = Mapping[str, float | torch.Tensor]
"""Values of the symbols in coefficients: numbers, or one for each head, [heads]."""


def number(c: sympy.Expr, scalars: Scalars) -> float:
    """The value of a coefficient.

    Raises:
        ScheduleError: it differs from head to head, which only weights of monomials may.
    """
    found = value(c, scalars)
    if isinstance(found, torch.Tensor):
        raise ScheduleError(f"the coefficient {c} differs from head to head outside of weights of monomials")
    return found


def value(c: sympy.Expr, scalars: Scalars) -> float | torch.Tensor:
    """The value of a coefficient; one for each head, [heads], where a symbol in it has that."""
    c = sympy.sympify(c)
    used = {s.name: scalars[s.name] for s in c.free_symbols}
    if any(isinstance(x, torch.Tensor) for x in used.values()):
        made: torch.Tensor = _function(c, tuple(sorted(used)))(*(used[name] for name in sorted(used)))
        return made
    return _number(c, tuple(sorted(used.items())))


@functools.lru_cache(maxsize=1024)
def _function(c: sympy.Expr, names: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    by_name = {s.name: s for s in c.free_symbols}
    made: Callable[..., torch.Tensor] = sympy.lambdify([by_name[name] for name in names], c, modules="math")
    return made


@functools.lru_cache(maxsize=1024)
def _number(c: sympy.Expr, scalars: tuple[tuple[str, float], ...]) -> float:
    values = dict(scalars)
    return float(c.subs({s: values[s.name] for s in c.free_symbols}))


def weights(
    coefficients: Sequence[float | torch.Tensor], basis: monomials.Basis, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Weights of the monomials that a polynomial has coefficients for, [1, r]; [heads, r] where those differ."""
    basis = basis.below(len(coefficients) - 1)
    if not any(isinstance(c, torch.Tensor) for c in coefficients):
        return _weights(tuple(map(float, coefficients)), basis, dtype, device)
    ones = _weights((1.0,) * len(coefficients), basis, dtype, device)
    heads = next(c for c in coefficients if isinstance(c, torch.Tensor))
    by_degree = torch.stack([torch.as_tensor(c).to(heads).expand_as(heads) for c in coefficients], 1)
    degrees = torch.as_tensor(monomials.degrees(basis), device=device)
    return ones * by_degree.to(dtype)[:, degrees]


@functools.lru_cache(maxsize=64)
def _weights(
    coefficients: tuple[float, ...], basis: monomials.Basis, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.as_tensor(monomials.weights(coefficients, basis)).to(device=device, dtype=dtype)[None]


@functools.lru_cache(maxsize=64)
def module(name: str, text: str) -> ModuleType:
    """An emitted file as a module; it is kept in memory, and tracebacks and Triton read its source from linecache."""
    name = f"polyattn_{name}_{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    made = ModuleType(name)
    made.__file__ = f"<{name}>"
    linecache.cache[made.__file__] = (len(text), None, text.splitlines(keepends=True), made.__file__)
    exec(compile(text, made.__file__, "exec"), made.__dict__)
    return made
