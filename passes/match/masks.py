"""What a mask built inside the graph means, found from its structure: no value is computed, no size is specialised.

A mask over (query i, key j) that depends on ``j - i`` alone is a step function of the *offset* ``j - i``. ``tril``,
``triu``, ``ones``, ``full``, comparisons of ``arange``\\ s, logic, arithmetic, casts and views of these are evaluated
exactly in the domain of :mod:`polyattn.passes.match.mask_values`. Everything else has no meaning here and raises
:class:`Unprovable` with the reason, in words for a report. Contents of buffers and inputs are never looked at: they may
change after compilation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.mask_nodes import argument, dtype_of, is_one, rank_of, same_statically
from polyattn.passes.match.mask_values import (
    INFINITE,
    Index,
    Meaning,
    Step,
    Unprovable,
    Value,
    cast,
    causal,
    describe,
    pointwise,
)

__all__ = ["Index", "Meaning", "Step", "Unprovable", "Value", "argument", "causal", "describe", "meaning", "step"]


def meaning(node: Any) -> Meaning:
    """The meaning of a node (or of a Python number).

    Raises:
        Unprovable: with the reason.
    """
    if isinstance(node, (bool, int, float)):
        return Step.constant(node)
    if not isinstance(node, fx.Node):
        raise Unprovable("the mask depends on a symbolic number")
    if node.op in ("placeholder", "get_attr"):
        raise Unprovable("the mask is an input or a buffer: its contents are not known when compiling")
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        raise Unprovable(f"the mask is built with {_name(node)}, which is not understood")
    handler = _HANDLERS.get(node.target.overloadpacket)
    if handler is None:
        raise Unprovable(f"the mask is built with {_name(node)}, which is not understood")
    return handler(node)


def step(node: Any) -> Step:
    """The meaning of a node that must be a function of the offset alone; see :func:`meaning`."""
    value = meaning(node)
    if isinstance(value, Index):
        if not value.coefficients:
            return Step.constant(value.constant)
        raise Unprovable("the mask is a position, not a comparison of positions")
    return value


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


# ---------------------------------------------------------------------------------------------------------------------
# What each operator does


def _filled(position: int, name: str, value: Value | None = None) -> Callable[[fx.Node], Meaning]:
    def handler(node: fx.Node) -> Meaning:
        fill = value if value is not None else argument(node, position, name)
        if not isinstance(fill, (bool, int, float)):
            raise Unprovable("the mask is filled with a value that is not a number")
        return Step.constant(cast(fill, dtype_of(node)))

    return handler


def _arange(node: fx.Node) -> Meaning:
    numbers = [value for value in node.args if not isinstance(value, torch.dtype)]
    overload = node.target._overloadname  # type: ignore[union-attr]
    start = 0 if overload == "default" else numbers[0]
    if not isinstance(start, int) or (len(numbers) > 2 and numbers[2] != 1):
        raise Unprovable("arange does not count up by one from a known start")
    return Index(((-1, 1),), start)


def _view(node: fx.Node) -> Meaning:
    """Views that only add or drop axes of size one, and expand: the trailing axes keep their places."""
    source = node.args[0]
    value = meaning(source)
    if isinstance(value, Step) and value.is_constant:
        return value
    old, new = list(source.meta["val"].shape), list(node.meta["val"].shape)  # type: ignore[union-attr]
    if isinstance(value, Step):
        if len(new) >= 2 and same_statically(old[-2:], new[-2:]):
            return value
        raise Unprovable("the query and key axes of the mask are reshaped")
    wide_old = [axis for axis in range(-len(old), 0) if not is_one(old[axis])]
    wide_new = [axis for axis in range(-len(new), 0) if not is_one(new[axis])]
    if len(wide_old) != len(wide_new) or not same_statically([old[a] for a in wide_old], [new[a] for a in wide_new]):
        raise Unprovable("positions are reshaped")
    moved = dict(zip(wide_old, wide_new, strict=True))
    if any(axis not in moved for axis, _ in value.coefficients):
        raise Unprovable("positions lie along an axis of size one")
    return Index(tuple(sorted((moved[axis], c) for axis, c in value.coefficients)), value.constant)


def _operand(source: Any, node: fx.Node) -> Meaning:
    """The meaning of an operand that is broadcast to the shape of ``node``: no axis that it depends on may grow."""
    value = meaning(source)
    if isinstance(value, Step) and value.is_constant:
        return value
    old, new = list(source.meta["val"].shape), list(node.meta["val"].shape)
    axes = [-2, -1] if isinstance(value, Step) else [axis for axis, _ in value.coefficients]
    if axes and (-min(axes) > len(old) or not same_statically([old[a] for a in axes], [new[a] for a in axes])):
        raise Unprovable("the mask is broadcast along its query or key axis")
    return value


def _offset_operand(source: Any, node: fx.Node) -> Step:
    value = _operand(source, node)
    return value if isinstance(value, Step) else step(source)


def _expand(node: fx.Node) -> Meaning:
    return _operand(node.args[0], node)


def _unsqueeze(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    rank = rank_of(node)
    dim = int(argument(node, 1, "dim"))
    axis = dim - rank if dim >= 0 else dim
    if isinstance(value, Step):
        if value.is_constant or axis < -2:
            return value
        raise Unprovable("the mask gets a new trailing axis")
    return Index(tuple((a if a > axis else a - 1, c) for a, c in value.coefficients), value.constant)


def _transpose(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    rank = rank_of(node)
    pair = (0, 1) if len(node.args) < 3 else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
    if node.target.overloadpacket in (torch.ops.aten.mT, torch.ops.aten.numpy_T):  # type: ignore[union-attr]
        pair = (-2, -1)
        if node.target.overloadpacket is torch.ops.aten.numpy_T and rank != 2:  # type: ignore[union-attr]
            raise Unprovable("the axes of the mask are reversed")
    first, second = sorted(dim - rank if dim >= 0 else dim for dim in pair)
    if isinstance(value, Index):
        swap = {first: second, second: first}
        return Index(tuple(sorted((swap.get(a, a), c) for a, c in value.coefficients)), value.constant)
    if value.is_constant or second < -2 or first == second:
        return value
    if (first, second) == (-2, -1):
        return value.transposed()
    raise Unprovable("the axes of the mask are permuted")


def _slice(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    start, stride = argument(node, 2, "start"), argument(node, 4, "step", 1)
    if isinstance(value, Step) and value.is_constant:
        return value
    if start not in (0, None) or stride != 1:
        raise Unprovable("the mask is a slice that does not start at 0")
    return value


def _band(lower: bool) -> Callable[[fx.Node], Meaning]:
    def handler(node: fx.Node) -> Meaning:
        diagonal = argument(node, 1, "diagonal", 0)
        if not isinstance(diagonal, int):
            raise Unprovable("the diagonal of the mask is symbolic")
        zero = cast(0, dtype_of(node))
        bound = diagonal if lower else diagonal - 1
        inside = Step(((bound, lower), (INFINITE, not lower)))
        return pointwise(lambda keep, value: value if keep else zero, inside, step(node.args[0]))

    return handler


def _same_meaning(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    if isinstance(value, Index):
        return value
    dtype = dtype_of(node)
    return pointwise(lambda v: cast(v, dtype), value)


def _elementwise(function: Callable[..., Value]) -> Callable[[fx.Node], Meaning]:
    def handler(node: fx.Node) -> Meaning:
        if any(node.kwargs.get(name, 1) != 1 for name in ("alpha",)) or node.kwargs.get("rounding_mode") is not None:
            raise Unprovable(f"the mask is built with {_name(node)} and options that are not understood")
        dtype = dtype_of(node)
        values = [_offset_operand(value, node) for value in node.args]
        try:
            return pointwise(lambda *v: cast(function(*v), dtype), *values)
        except (ZeroDivisionError, TypeError, ValueError) as error:
            raise Unprovable(f"the mask is built with {_name(node)}: {error}") from None

    return handler


def _additive(sign: int) -> Callable[[fx.Node], Meaning]:
    plain = _elementwise(operator.add if sign > 0 else operator.sub)

    def handler(node: fx.Node) -> Meaning:
        left, right = _operand(node.args[0], node), _operand(node.args[1], node)
        if isinstance(left, Step) and isinstance(right, Step):
            return plain(node)
        pair = _index(left), _index(right)
        if node.kwargs.get("alpha", 1) != 1:
            raise Unprovable("positions are added with a factor")
        return pair[0].plus(pair[1], sign)

    return handler


def _index(value: Meaning) -> Index:
    if isinstance(value, Index):
        return value
    if value.is_constant and isinstance(value.pieces[0][1], int):
        return Index((), int(value.pieces[0][1]))
    raise Unprovable("positions are combined with a mask")


def _compare(function: Callable[[Any, Any], bool]) -> Callable[[fx.Node], Meaning]:
    plain = _elementwise(function)

    def handler(node: fx.Node) -> Meaning:
        left, right = _operand(node.args[0], node), _operand(node.args[1], node)
        if isinstance(left, Step) and isinstance(right, Step):
            return plain(node)
        difference = _index(left).plus(_index(right), -1)
        table = dict(difference.coefficients)
        sign = table.get(-1, 0)
        if set(table) != {-1, -2} or sign not in (1, -1) or table[-2] != -sign:
            raise Unprovable("the mask does not compare query positions with key positions")
        # the difference is sign * offset + constant: it changes sign at one offset
        centre = -sign * difference.constant
        sides = [bool(function(sign * (centre + side), sign * centre)) for side in (-1, 0, 1)]
        return Step(((centre - 1, sides[0]), (centre, sides[1]), (INFINITE, sides[2]))).simplified()

    return handler


def _where(node: fx.Node) -> Meaning:
    if len(node.args) < 3:
        raise Unprovable("where() without values")
    dtype = dtype_of(node)
    return pointwise(lambda c, a, b: cast(a if c else b, dtype), *(_offset_operand(value, node) for value in node.args))


def _masked_fill(node: fx.Node) -> Meaning:
    dtype = dtype_of(node)
    return pointwise(lambda x, m, v: cast(v if m else x, dtype), *(_offset_operand(value, node) for value in node.args))


def _diff(node: fx.Node) -> Meaning:
    """Differences of positions along their axis: 1 everywhere, where what is prepended continues the count."""
    source = node.args[0]
    value, prepend = meaning(source), argument(node, 3, "prepend")
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        raise Unprovable("diff of a higher order, or with something appended")
    if not isinstance(value, Index):
        raise Unprovable("diff of something that is not a position")
    dim = int(argument(node, 2, "dim", -1))
    axis = dim - rank_of(source) if dim >= 0 else dim
    slope = dict(value.coefficients).get(axis, 0)
    if prepend is not None:
        before = meaning(prepend)
        rest = {a: c for a, c in value.coefficients if a != axis}
        if not isinstance(before, Index) or not is_one(prepend.meta["val"].shape[axis]):
            raise Unprovable("diff with something prepended that is not one position")
        if {a: c for a, c in before.coefficients if a != axis} != rest or value.constant - before.constant != slope:
            raise Unprovable("diff with something prepended that does not continue the count")
    return Step.constant(slope)


def _cumsum(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    if not isinstance(value, Step) or not value.is_constant or not isinstance(value.pieces[0][1], int):
        raise Unprovable("cumsum of anything but one integer")
    each = int(value.pieces[0][1])
    if each == 0:
        return Step.constant(cast(0, dtype_of(node)))
    dim = int(argument(node, 1, "dim"))
    axis = dim - rank_of(node) if dim >= 0 else dim
    return Index(((axis, each),), each)


def _indexed(node: fx.Node) -> Meaning:
    """x[i, j, …] with a position for every axis: the positions take the places of the axes."""
    source, indices = node.args[0], node.args[1]
    value = meaning(source)
    assert isinstance(indices, (list, tuple))
    if isinstance(value, Step) and value.is_constant:
        return value
    rank = rank_of(source)
    if not isinstance(value, Index) or len(indices) != rank or any(index is None for index in indices):
        raise Unprovable("the mask is indexed in a way that is not understood")
    result = Index((), value.constant)
    for axis, coefficient in value.coefficients:
        position = _index(_operand(indices[rank + axis], node))
        if position.constant < 0 or any(c < 0 for _, c in position.coefficients):
            raise Unprovable("positions are indexed from the end")
        scaled = Index(tuple((a, c * coefficient) for a, c in position.coefficients), position.constant * coefficient)
        result = result.plus(scaled, 1)
    return result


def _literal(node: fx.Node) -> Meaning:
    """torch.tensor of a number inside the model: tracing holds it as a constant of the graph, and copies it."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.op == "get_attr" and str(source.target).startswith("_tensor_constant"):
        held = getattr(source.graph.owning_module, str(source.target), None)
        if isinstance(held, torch.Tensor) and held.dim() == 0 and not held.is_complex():
            return Step.constant(held.item())
    return meaning(source)


_aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[[fx.Node], Meaning]] = {
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
    _aten.tril: _band(True),
    _aten.triu: _band(False),
    _aten.view: _view,
    _aten.reshape: _view,
    _aten.expand: _expand,
    _aten.unsqueeze: _unsqueeze,
    _aten.transpose: _transpose,
    _aten.t: _transpose,
    _aten.mT: _transpose,
    _aten.numpy_T: _transpose,
    _aten.slice: _slice,
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
    _aten.index: _indexed,
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
