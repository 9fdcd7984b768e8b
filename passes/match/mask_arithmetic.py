"""What arithmetic, comparisons and constants do to the meaning of a mask: see
:mod:`polyattn.passes.match.mask_meaning`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.mask_meaning import HANDLERS, index_of, meaning, name_of, offset_operand, operand
from polyattn.passes.match.mask_nodes import argument, dtype_of, is_one, rank_of
from polyattn.passes.match.mask_values import (
    BEFORE,
    INFINITE,
    LAST,
    Meaning,
    Position,
    StepFunction,
    Unprovable,
    Value,
    Varies,
    cast,
    pointwise,
    select,
)

_aten = torch.ops.aten


def _filled(position: int, name: str, value: Value | None = None) -> Callable[[fx.Node], Meaning]:
    def handler(node: fx.Node) -> Meaning:
        fill = value if value is not None else argument(node, position, name)
        if not isinstance(fill, (bool, int, float)):
            raise Unprovable("the mask is filled with a value that is not a number")
        return StepFunction.constant(cast(fill, dtype_of(node)))

    return handler


def _arange(node: fx.Node) -> Meaning:
    numbers = [value for value in node.args if not isinstance(value, torch.dtype)]
    overload = node.target._overloadname  # type: ignore[union-attr]
    start = 0 if overload == "default" else numbers[0]
    if not isinstance(start, int) or (len(numbers) > 2 and numbers[2] != 1):
        raise Unprovable("arange does not count up by one from a known start")
    return Position(((-1, 1),), start)


def _same_meaning(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    if isinstance(value, Position):
        return value
    dtype = dtype_of(node)
    return pointwise(lambda v: cast(v, dtype), value, dtype=dtype)


def _elementwise(function: Callable[..., Value]) -> Callable[[fx.Node], Meaning]:
    def handler(node: fx.Node) -> Meaning:
        if any(node.kwargs.get(name, 1) != 1 for name in ("alpha",)) or node.kwargs.get("rounding_mode") is not None:
            raise Unprovable(f"the mask is built with {name_of(node)} and options that are not understood")
        dtype = dtype_of(node)
        values = [offset_operand(value, node) for value in node.args]
        try:
            return pointwise(lambda *v: cast(function(*v), dtype), *values, dtype=dtype)
        except (ZeroDivisionError, TypeError, ValueError) as error:
            raise Unprovable(f"the mask is built with {name_of(node)}: {error}") from None

    return handler


def _additive(sign: int) -> Callable[[fx.Node], Meaning]:
    plain = _elementwise(operator.add if sign > 0 else operator.sub)

    def handler(node: fx.Node) -> Meaning:
        left, right = operand(node.args[0], node), operand(node.args[1], node)
        if isinstance(left, StepFunction) and isinstance(right, StepFunction):
            return plain(node)
        pair = index_of(left), index_of(right)
        if node.kwargs.get("alpha", 1) != 1:
            raise Unprovable("positions are added with a factor")
        return pair[0].plus(pair[1], sign)

    return handler


def _compare(function: Callable[[Any, Any], bool]) -> Callable[[fx.Node], Meaning]:
    plain = _elementwise(function)

    def handler(node: fx.Node) -> Meaning:
        left, right = operand(node.args[0], node), operand(node.args[1], node)
        if isinstance(left, StepFunction) and isinstance(right, StepFunction):
            return plain(node)
        difference = index_of(left).plus(index_of(right), -1)
        table = dict(difference.coefficients)
        if len({LAST, BEFORE} & set(table)) < 2:
            return StepFunction.constant(_along(function, difference, node))
        sign = table.get(-1, 0)
        if set(table) != {-1, -2} or sign not in (1, -1) or table[-2] != -sign:
            raise Unprovable("the mask does not compare query positions with key positions")
        # the difference is sign * offset + constant: it changes sign at one offset
        centre = -sign * difference.constant
        sides = [bool(function(sign * (centre + side), sign * centre)) for side in (-1, 0, 1)]
        return StepFunction(((centre - 1, sides[0]), (centre, sides[1]), (INFINITE, sides[2]))).simplified()

    return handler


def _along(function: Callable[[Any, Any], bool], difference: Position, node: fx.Node) -> Value | Varies:
    """A comparison of positions along at most one of the two axes with 0: known where it is the same for all."""
    low = high = float(difference.constant)
    for axis, coefficient in difference.coefficients:
        size = node.meta["val"].shape[axis]
        reach = coefficient * (size - 1) if isinstance(size, int) else math.copysign(INFINITE, coefficient)
        low, high = low + min(reach, 0), high + max(reach, 0)
    signs = {-1: low < 0, 0: low <= 0 <= high, 1: high > 0}  # those that the difference can have
    results = {bool(function(sign, 0)) for sign, reached in signs.items() if reached}
    if len(results) == 1:
        return results.pop()
    return Varies.of(torch.bool, *(axis for axis, _ in difference.coefficients))


def _where(node: fx.Node) -> Meaning:
    if len(node.args) < 3:
        raise Unprovable("where() without values")
    condition, chosen, otherwise = (offset_operand(value, node) for value in node.args)
    return select(condition, chosen, otherwise, dtype_of(node))


def _masked_fill(node: fx.Node) -> Meaning:
    otherwise, mask, value = (offset_operand(operand, node) for operand in node.args)
    return select(mask, value, otherwise, dtype_of(node))


def _diff(node: fx.Node) -> Meaning:
    """Differences of positions along their axis: 1 everywhere, where what is prepended continues the count."""
    source = node.args[0]
    value, prepend = meaning(source), argument(node, 3, "prepend")
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        raise Unprovable("diff of a higher order, or with something appended")
    if not isinstance(value, Position):
        raise Unprovable("diff of something that is not a position")
    dim = int(argument(node, 2, "dim", -1))
    axis = dim - rank_of(source) if dim >= 0 else dim
    slope = dict(value.coefficients).get(axis, 0)
    if prepend is not None:
        before = meaning(prepend)
        rest = {a: c for a, c in value.coefficients if a != axis}
        if not isinstance(before, Position) or not is_one(prepend.meta["val"].shape[axis]):
            raise Unprovable("diff with something prepended that is not one position")
        if {a: c for a, c in before.coefficients if a != axis} != rest or value.constant - before.constant != slope:
            raise Unprovable("diff with something prepended that does not continue the count")
    return StepFunction.constant(slope)


def _cumsum(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    number = value.everywhere if isinstance(value, StepFunction) else None
    if number is None or not isinstance(number, int):
        raise Unprovable("cumsum of anything but one integer")
    each = int(number)
    if each == 0:
        return StepFunction.constant(cast(0, dtype_of(node)))
    dim = int(argument(node, 1, "dim"))
    axis = dim - rank_of(node) if dim >= 0 else dim
    return Position(((axis, each),), each)


def _literal(node: fx.Node) -> Meaning:
    """torch.tensor of a number inside the model: tracing holds it as a constant of the graph, and copies it."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.op == "get_attr" and str(source.target).startswith("_tensor_constant"):
        held = getattr(source.graph.owning_module, str(source.target), None)
        if isinstance(held, torch.Tensor) and held.dim() == 0 and not held.is_complex():
            return StepFunction.constant(held.item())
    return meaning(source)


HANDLERS.update(
    {
        _aten.ones: _filled(0, "", 1),
        _aten.zeros: _filled(0, "", 0),
        _aten.ones_like: _filled(0, "", 1),
        _aten.zeros_like: _filled(0, "", 0),
        _aten.new_ones: _filled(0, "", 1),
        _aten.new_zeros: _filled(0, "", 0),
        _aten.full: _filled(1, "fill_value"),
        _aten.full_like: _filled(1, "fill_value"),
        _aten.new_full: _filled(2, "fill_value"),
        _aten.scalar_tensor: _filled(0, "s"),
        _aten.arange: _arange,
        _aten.to: _same_meaning,
        _aten._to_copy: _same_meaning,
        _aten.clone: _same_meaning,
        _aten.contiguous: _same_meaning,
        _aten.alias: _same_meaning,
        _aten.detach: _same_meaning,
        _aten.detach_: _same_meaning,
        _aten.lift_fresh_copy: _literal,
        _aten.diff: _diff,
        _aten.cumsum: _cumsum,
        _aten.type_as: _same_meaning,
        _aten.add: _additive(1),
        _aten.sub: _additive(-1),
        _aten.rsub: _elementwise(lambda a, b: b - a),
        _aten.mul: _elementwise(operator.mul),
        _aten.div: _elementwise(operator.truediv),
        _aten.neg: _elementwise(operator.neg),
        _aten.eq: _compare(operator.eq),
        _aten.ne: _compare(operator.ne),
        _aten.lt: _compare(operator.lt),
        _aten.le: _compare(operator.le),
        _aten.gt: _compare(operator.gt),
        _aten.ge: _compare(operator.ge),
        _aten.logical_not: _elementwise(operator.not_),
        _aten.bitwise_not: _elementwise(lambda a: (not a) if isinstance(a, bool) else ~a),
        _aten.logical_and: _elementwise(lambda a, b: bool(a and b)),
        _aten.logical_or: _elementwise(lambda a, b: bool(a or b)),
        _aten.bitwise_and: _elementwise(operator.and_),
        _aten.bitwise_or: _elementwise(operator.or_),
        _aten.__and__: _elementwise(operator.and_),
        _aten.__or__: _elementwise(operator.or_),
        _aten.where: _where,
        _aten.masked_fill: _masked_fill,
    }
)
