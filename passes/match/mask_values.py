"""What a mask can mean: a step function of the offset ``j - i``, or positions along axes.

* ``StepFunction(((k1, v1), (k2, v2), ..., (inf, vn)))``: value v1 where offset ≤ k1, v2 where k1 < offset ≤ k2, ...
* a value may be ``Varies(axes, choices)``: not known when compiling, a function of the position along these axes alone
  (and of the batch element), such as which keys are padding.
* ``Position(coefficients, constant)``: an ``arange`` seen along the named axes (counted from the last one).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

Value = bool | int | float

INFINITE = math.inf
LAST, BEFORE = -1, -2
"""The two axes of a mask, counted from the last one: keys and queries, or the other way round."""
MANY = 64
"""Combinations of choices that are followed; of more, nothing is known."""


class Unprovable(Exception):
    """The mask is not provably any step function; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Varies:
    """A value that is not known when compiling: it depends on the batch element and on positions along some axes."""

    axes: frozenset[int]
    """Those that it may depend on, counted from the last one."""
    choices: frozenset[Value] | None = None
    """The values that it may have; None: any."""
    reason: str = dataclasses.field(default="", compare=False)
    """Why it is not known."""

    @staticmethod
    def of(dtype: torch.dtype, *axes: int, reason: str = "") -> Varies:
        """An unknown value of a tensor of this dtype."""
        return Varies(frozenset(axes), frozenset((False, True)) if dtype == torch.bool else None, reason)

    def moved(self, places: Callable[[int], int]) -> Varies:
        """The value with its axes in other places."""
        return dataclasses.replace(self, axes=frozenset(places(axis) for axis in self.axes))

    def __str__(self) -> str:
        known = "" if self.choices is None else f" ({' or '.join(sorted(map(str, self.choices)))})"
        return f"values of the run{known}"


@dataclasses.dataclass(frozen=True)
class StepFunction:
    """A function of the offset ``j - i`` (last axis minus the one before it), piecewise constant or unknown."""

    pieces: tuple[tuple[float, Value | Varies], ...]

    @staticmethod
    def constant(value: Value | Varies) -> StepFunction:
        """The step function with one value everywhere, or an unknown one that does not depend on the offset."""
        return StepFunction(((INFINITE, value),))

    def simplified(self) -> StepFunction:
        """The same function with neighbouring pieces of one value joined."""
        pieces: list[tuple[float, Value | Varies]] = []
        for bound, value in self.pieces:
            if pieces and _same(pieces[-1][1], value):
                pieces[-1] = (bound, value)
            else:
                pieces.append((bound, value))
        return StepFunction(tuple(pieces))

    def at(self, offset: float) -> Value | Varies:
        """The value at an offset ``j - i``."""
        return next(value for bound, value in self.pieces if offset <= bound)

    def transposed(self) -> StepFunction:
        """The same function with i and j exchanged (offset → -offset)."""
        bounds = [bound for bound, _ in self.pieces[:-1]]
        values = [_exchanged(value) for _, value in self.pieces]
        flipped = [-bound - 1 for bound in reversed(bounds)] + [INFINITE]
        return StepFunction(tuple(zip(flipped, reversed(values), strict=True)))

    def within(self, rows: Any, columns: Any) -> StepFunction:
        """The same function at the offsets that a mask of this size has; symbolic sizes restrict nothing."""
        low = 1 - rows if isinstance(rows, int) else -INFINITE
        high = columns - 1 if isinstance(columns, int) else INFINITE
        reached = [(bound, value) for bound, value in self.pieces if bound >= low]
        count = next((n for n, (bound, _) in enumerate(reached, start=1) if bound >= high), len(reached))
        return StepFunction((*reached[: count - 1], (INFINITE, reached[count - 1][1])))

    @property
    def everywhere(self) -> Value | None:
        """The value, where it is known and the same everywhere; else None."""
        value = self.pieces[0][1]
        return None if len(self.pieces) > 1 or isinstance(value, Varies) else value

    @property
    def is_constant(self) -> bool:
        """Whether the function has one value, which is known."""
        return self.everywhere is not None

    @property
    def varies(self) -> Varies | None:
        """The value, where it is one that is not known; else None."""
        value = self.pieces[0][1]
        return value if len(self.pieces) == 1 and isinstance(value, Varies) else None

    @property
    def unknown(self) -> str:
        """Why a value is not known; empty where all are, and where that was not said."""
        return next((value.reason for _, value in self.pieces if isinstance(value, Varies) and value.reason), "")

    @property
    def axes(self) -> frozenset[int]:
        """The axes that a value depends on, of ``LAST`` and ``BEFORE``."""
        if len(self.pieces) > 1:
            return frozenset((LAST, BEFORE))
        return frozenset() if self.varies is None else self.varies.axes & {LAST, BEFORE}


@dataclasses.dataclass(frozen=True)
class Position:
    """``sum(coefficient * position along axis) + constant``; axes are counted from the last one, -1, -2, ..."""

    coefficients: tuple[tuple[int, int], ...]
    constant: int = 0

    def plus(self, other: Position, sign: int) -> Position:
        """The sum of two positions (``sign`` 1) or their difference (-1)."""
        table = dict(self.coefficients)
        for axis, coefficient in other.coefficients:
            table[axis] = table.get(axis, 0) + sign * coefficient
        return Position(tuple(sorted((a, c) for a, c in table.items() if c)), self.constant + sign * other.constant)


Meaning = StepFunction | Position


def _exchanged(value: Value | Varies) -> Value | Varies:
    """A value after its two axes were exchanged."""
    swap = {LAST: BEFORE, BEFORE: LAST}
    return value.moved(lambda axis: swap.get(axis, axis)) if isinstance(value, Varies) else value


def _same(a: Value | Varies, b: Value | Varies) -> bool:
    """Whether two values are one; what is unknown may differ from piece to piece."""
    if isinstance(a, Varies) or isinstance(b, Varies):
        return False
    return type(a) is type(b) and (a == b or (a != a and b != b))


def pointwise(function: Callable[..., Value], *steps: StepFunction, dtype: torch.dtype | None = None) -> StepFunction:
    """Apply a scalar function piece by piece; of unknown values, to all that they may be.

    Args:
        dtype: of the result, by which it is known where operands are not.
    """
    bounds = sorted({bound for step in steps for bound, _ in step.pieces})
    made = ((bound, _applied(function, [step.at(bound) for step in steps], dtype)) for bound in bounds)
    return StepFunction(tuple(made)).simplified()


def _applied(function: Callable[..., Value], values: list[Value | Varies], dtype: torch.dtype | None) -> Value | Varies:
    unknown = [value for value in values if isinstance(value, Varies)]
    if not unknown:
        return function(*values)
    axes = frozenset[int]().union(*(value.axes for value in unknown))
    reason = next((value.reason for value in unknown if value.reason), "")
    every = [(value.choices if isinstance(value, Varies) else (value,)) for value in values]
    if any(choices is None for choices in every) or math.prod(len(choices or ()) for choices in every) > MANY:
        return Varies.of(dtype or torch.float64, *axes, reason=reason)
    results = frozenset(function(*some) for some in itertools.product(*(choices or () for choices in every)))
    return Varies(axes, results, reason) if len(results) > 1 else next(iter(results))


def select(condition: StepFunction, chosen: StepFunction, otherwise: StepFunction, dtype: torch.dtype) -> StepFunction:
    """One of two functions by a condition, of a tensor of this dtype."""
    bounds = sorted({bound for step in (condition, chosen, otherwise) for bound, _ in step.pieces})
    pieces: list[tuple[float, Value | Varies]] = []
    for bound in bounds:
        test, a, b = condition.at(bound), chosen.at(bound), otherwise.at(bound)
        if isinstance(test, Varies):
            made = _applied(lambda c, x, y: cast(x if c else y, dtype), [test, a, b], dtype)
        else:
            made = _applied(lambda x: cast(x, dtype), [a if test else b], dtype)
        pieces.append((bound, made))
    return StepFunction(tuple(pieces)).simplified()


@dataclasses.dataclass(frozen=True)
class Visible:
    """Which pairs of a query and a key a mask shows, as far as its structure tells."""

    causal: bool
    """It hides keys after their query."""
    keyed: bool = False
    """Beside that it may hide some keys from every query; which ones, its last row says."""
    padding: bool = False
    """Where ``keyed``, that it is nothing else: each of its values shows or hides, and none adds to the scores."""
    fill: float = -INFINITE
    """What it puts in the place of a score after its query, or adds to it."""


def visible(value: StepFunction, *, keep: Value, hidden: Callable[[Value], bool]) -> Visible | None:
    """What a mask shows (last axis: keys); None where it is known to be neither causal nor the same for all queries.

    Args:
        keep: the value of a pair that is shown.
        hidden: which values hide a pair.
    """
    pieces = value.simplified().pieces
    first = pieces[0][1]
    causal, fill = len(pieces) == 2 and pieces[0][0] == 0, -INFINITE
    if causal:
        after = pieces[1][1]
        choices = (after.choices or ()) if isinstance(after, Varies) else (after,)
        if not choices or not all(map(hidden, choices)):
            return None
        fills = {float(choice) for choice in choices} if not isinstance(keep, bool) else {-INFINITE}
        if len(fills) > 1:
            return None
        fill = fills.pop()
    elif len(pieces) > 1:
        return None
    if not isinstance(first, Varies):
        return Visible(causal, fill=fill) if _equal(first, keep) else None
    if BEFORE in first.axes:
        return None
    padding = first.choices is not None and all(hidden(choice) or _equal(choice, keep) for choice in first.choices)
    return Visible(causal, True, padding, fill)


def describe(value: StepFunction) -> str:
    """``1 where j - i <= 0, 0 elsewhere``: for reasons."""
    parts = [f"{v} where j - i <= {int(bound)}" for bound, v in value.pieces[:-1]]
    return ", ".join([*parts, f"{value.pieces[-1][1]} {'elsewhere' if parts else 'everywhere'}"])


def known(value: StepFunction) -> bool:
    """Whether all of its values are known when compiling."""
    return not any(isinstance(v, Varies) for _, v in value.pieces)


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
