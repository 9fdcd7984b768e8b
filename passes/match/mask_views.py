"""What views do to the meaning of a mask: see :mod:`polyattn.passes.match.mask_meaning`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.fx as fx

from polyattn.passes.match.mask_meaning import HANDLERS, index_of, meaning, offset_operand, operand, wide_axes
from polyattn.passes.match.mask_nodes import argument, dtype_of, is_one, rank_of, same_statically
from polyattn.passes.match.mask_values import INFINITE, Meaning, Position, StepFunction, Unprovable, select

_aten = torch.ops.aten


def _view(node: fx.Node) -> Meaning:
    """Views that only add or drop axes of size one, and expand: the trailing axes keep their places."""
    source = node.args[0]
    value = meaning(source)
    if isinstance(value, StepFunction) and value.is_constant:
        return value
    old, new = list(source.meta["val"].shape), list(node.meta["val"].shape)  # type: ignore[union-attr]
    if isinstance(value, StepFunction) and value.varies is None:
        if len(new) >= 2 and same_statically(old[-2:], new[-2:]):
            return value
        raise Unprovable(value.unknown or "the query and key axes of the mask are reshaped")
    wide_old = [axis for axis in range(-len(old), 0) if not is_one(old[axis])]
    wide_new = [axis for axis in range(-len(new), 0) if not is_one(new[axis])]
    if len(wide_old) != len(wide_new) or not same_statically([old[a] for a in wide_old], [new[a] for a in wide_new]):
        raise Unprovable("positions are reshaped" if isinstance(value, Position) else value.unknown)
    moved = dict(zip(wide_old, wide_new, strict=True))
    if isinstance(value, StepFunction):
        assert value.varies is not None
        return StepFunction.constant(value.varies.moved(lambda axis: moved[axis]))
    if any(axis not in moved for axis, _ in value.coefficients):
        raise Unprovable("positions lie along an axis of size one")
    return Position(tuple(sorted((moved[axis], c) for axis, c in value.coefficients)), value.constant)


def _expand(node: fx.Node) -> Meaning:
    return operand(node.args[0], node)


def _unsqueeze(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    rank = rank_of(node)
    dim = int(argument(node, 1, "dim"))
    axis = dim - rank if dim >= 0 else dim
    if isinstance(value, StepFunction):
        if value.varies is not None:
            return StepFunction.constant(value.varies.moved(lambda a: a if a > axis else a - 1))
        if value.is_constant or axis < -2:
            return value
        raise Unprovable(value.unknown or "the mask gets a new trailing axis")
    return Position(tuple((a if a > axis else a - 1, c) for a, c in value.coefficients), value.constant)


def _transpose(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    rank = rank_of(node)
    pair = (0, 1) if len(node.args) < 3 else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
    if node.target.overloadpacket in (torch.ops.aten.mT, torch.ops.aten.numpy_T):  # type: ignore[union-attr]
        pair = (-2, -1)
        if node.target.overloadpacket is torch.ops.aten.numpy_T and rank != 2:  # type: ignore[union-attr]
            raise Unprovable("the axes of the mask are reversed")
    first, second = sorted(dim - rank if dim >= 0 else dim for dim in pair)
    swap = {first: second, second: first}
    if isinstance(value, StepFunction) and value.varies is not None:
        return StepFunction.constant(value.varies.moved(lambda a: swap.get(a, a)))
    if isinstance(value, Position):
        return Position(tuple(sorted((swap.get(a, a), c) for a, c in value.coefficients)), value.constant)
    if value.is_constant or second < -2 or first == second:
        return value
    if (first, second) == (-2, -1):
        return value.transposed()
    raise Unprovable(value.unknown or "the axes of the mask are permuted")


def _slice(node: fx.Node) -> Meaning:
    value = meaning(node.args[0])
    start, stride = argument(node, 2, "start"), argument(node, 4, "step", 1)
    if isinstance(value, StepFunction) and (value.is_constant or value.varies is not None):
        return value
    if start not in (0, None) or stride != 1:
        raise Unprovable("the mask is a slice that does not start at 0")
    return value


def _band(lower: bool) -> Callable[[fx.Node], Meaning]:
    def handler(node: fx.Node) -> Meaning:
        diagonal = argument(node, 1, "diagonal", 0)
        if not isinstance(diagonal, int):
            raise Unprovable("the diagonal of the mask is symbolic")
        bound = diagonal if lower else diagonal - 1
        inside = StepFunction(((bound, lower), (INFINITE, not lower)))
        return select(inside, offset_operand(node.args[0], node), StepFunction.constant(0), dtype_of(node))

    return handler


def _indexed(node: fx.Node) -> Meaning:
    """x[i, j, …] with a position for every axis: the positions take the places of the axes."""
    source, indices = node.args[0], node.args[1]
    value = meaning(source)
    assert isinstance(indices, (list, tuple))
    if isinstance(value, StepFunction) and value.is_constant:
        return value
    if isinstance(value, StepFunction) and value.varies is not None:  # some of its values, wherever they come from
        return StepFunction.constant(dataclasses.replace(value.varies, axes=frozenset(wide_axes(node))))
    rank = rank_of(source)
    if not isinstance(value, Position) or len(indices) != rank or any(index is None for index in indices):
        raise Unprovable("the mask is indexed in a way that is not understood")
    result = Position((), value.constant)
    for axis, coefficient in value.coefficients:
        position = index_of(operand(indices[rank + axis], node))
        if position.constant < 0 or any(c < 0 for _, c in position.coefficients):
            raise Unprovable("positions are indexed from the end")
        scaled = Position(
            tuple((a, c * coefficient) for a, c in position.coefficients), position.constant * coefficient
        )
        result = result.plus(scaled, 1)
    return result


HANDLERS.update(
    {
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
        _aten.index: _indexed,
    }
)
