"""What a mask can mean: a step function of the offset ``j - i``, or positions along axes.

* ``Step(((k1, v1), (k2, v2), ..., (inf, vn)))``: value v1 where offset ≤ k1, v2 where k1 < offset ≤ k2, ...
* ``Index(coefficients, constant)``: an ``arange`` seen along the named axes (counted from the last one).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

Value = bool | int | float

INFINITE = math.inf


class Unprovable(Exception):
    """The mask is not provably any step function; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A function of the offset ``j - i`` (last axis minus the one before it), piecewise constant."""

    pieces: tuple[tuple[float, Value], ...]

    @staticmethod
    def constant(value: Value) -> Step:
        """The step function with one value everywhere."""
        return Step(((INFINITE, value),))

    def simplified(self) -> Step:
        """The same function with neighbouring pieces of one value joined."""
        pieces: list[tuple[float, Value]] = []
        for bound, value in self.pieces:
            if pieces and _same(pieces[-1][1], value):
                pieces[-1] = (bound, value)
            else:
                pieces.append((bound, value))
        return Step(tuple(pieces))

    def at(self, offset: float) -> Value:
        """The value at an offset ``j - i``."""
        return next(value for bound, value in self.pieces if offset <= bound)

    def transposed(self) -> Step:
        """The same function with i and j exchanged (offset → -offset)."""
        bounds = [bound for bound, _ in self.pieces[:-1]]
        values = [value for _, value in self.pieces]
        flipped = [-bound - 1 for bound in reversed(bounds)] + [INFINITE]
        return Step(tuple(zip(flipped, reversed(values), strict=True)))

    def within(self, rows: Any, columns: Any) -> Step:
        """The same function at the offsets that a mask of this size has; symbolic sizes restrict nothing."""
        low = 1 - rows if isinstance(rows, int) else -INFINITE
        high = columns - 1 if isinstance(columns, int) else INFINITE
        reached = [(bound, value) for bound, value in self.pieces if bound >= low]
        count = next((n for n, (bound, _) in enumerate(reached, start=1) if bound >= high), len(reached))
        return Step((*reached[: count - 1], (INFINITE, reached[count - 1][1])))

    @property
    def is_constant(self) -> bool:
        """Whether the function has one piece."""
        return len(self.pieces) == 1


@dataclasses.dataclass(frozen=True)
class Index:
    """``sum(coefficient * position along axis) + constant``; axes are counted from the last one, -1, -2, ..."""

    coefficients: tuple[tuple[int, int], ...]
    constant: int = 0

    def plus(self, other: Index, sign: int) -> Index:
        """The sum of two positions (``sign`` 1) or their difference (-1)."""
        table = dict(self.coefficients)
        for axis, coefficient in other.coefficients:
            table[axis] = table.get(axis, 0) + sign * coefficient
        return Index(tuple(sorted((a, c) for a, c in table.items() if c)), self.constant + sign * other.constant)


Meaning = Step | Index


def _same(a: Value, b: Value) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


def pointwise(function: Callable[..., Value], *steps: Step) -> Step:
    """Apply a scalar function piece by piece."""
    bounds = sorted({bound for step in steps for bound, _ in step.pieces})
    return Step(tuple((bound, function(*(step.at(bound) for step in steps))) for bound in bounds)).simplified()


def causal(value: Step, *, keep: Value, drop: Value) -> bool | None:
    """True when the mask keeps exactly ``j <= i``, False when it keeps everything, None when it does neither."""
    value = value.simplified()
    if value.is_constant:
        return False if _equal(value.pieces[0][1], keep) else None
    if len(value.pieces) == 2 and value.pieces[0][0] == 0:
        return True if _equal(value.pieces[0][1], keep) and _equal(value.pieces[1][1], drop) else None
    return None


def describe(value: Step) -> str:
    """``1 where j - i <= 0, 0 elsewhere``: for reasons."""
    parts = [f"{v} where j - i <= {int(bound)}" for bound, v in value.pieces[:-1]]
    return ", ".join([*parts, f"{value.pieces[-1][1]} {'elsewhere' if parts else 'everywhere'}"])


def _equal(a: Value, b: Value) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def cast(value: Value, dtype: torch.dtype) -> Value:
    """A mask value as its tensor holds it."""
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise Unprovable("an infinite mask value is cast to an integer")
    if dtype.is_complex:
        raise Unprovable("the mask is complex")
    return int(value)
