"""Named axes of a value between the score contraction and the value contraction.

A value there has the axes ``(*batch, query, key)`` in some arrangement: ``key_last`` says whether the last two axes are
(query, key) or (key, query). Views may regroup the batch axes (row-major order is what any view keeps); transposes may
exchange the last two. Everything else has no meaning here.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from polyattn.passes.match.mask_nodes import argument

_aten = torch.ops.aten
REGROUP = {
    _aten.view,
    _aten.reshape,
    _aten._unsafe_view,
    _aten.unsqueeze,
    _aten.squeeze,
    _aten.flatten,
    _aten.unflatten,
}
SAME = {_aten.contiguous, _aten.clone, _aten.alias}
TRANSPOSE = {_aten.transpose, _aten.permute, _aten.t, _aten.mT, _aten.numpy_T}
CAST = {_aten.to, _aten._to_copy, _aten.type_as}


class NotAttention(Exception):
    """A value on the way has no place in an attention; the message is the reason."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


def packet(node: Any) -> Any:
    """The aten operator of a node (without its overload), or None."""
    if isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket
    return None


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes are equal for every value of their symbols; adds no guard."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def one(size: Any) -> bool:
    """Whether a size is known to be 1 when compiling; adds no guard."""
    return bool(statically_known_true(size == 1))


def positive(number: Any) -> bool:
    """Whether a symbolic number is greater than zero for all sizes; adds no guard."""
    return _positive(number.node.expr, number.node.shape_env.bound_sympy)


def _positive(value: sympy.Expr, bounds: Callable[[sympy.Expr], Any]) -> bool:
    if value.is_Symbol or value.is_number:
        return bool(bounds(value).lower > 0)
    name = type(value).__name__
    if name in ("Pow", "FloatPow", "PowByNatural", "ToFloat", "OpaqueUnaryFn_sqrt"):
        return _positive(value.args[0], bounds)
    if name in ("Mul", "Add", "IntTrueDiv", "FloatTrueDiv"):
        return all(_positive(argument, bounds) for argument in value.args)
    return False


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's value, sizes possibly symbolic."""
    return tuple(node.meta["val"].shape)


def keeps_pair(source: fx.Node, result: fx.Node) -> bool:
    """Whether a view keeps the last two axes (it then only regroups the batch axes)."""
    old, new = shape(source), shape(result)
    return len(old) >= 2 and len(new) >= 2 and same_sizes(old[-2:], new[-2:])


def swaps_pair(node: fx.Node) -> bool | None:
    """True: exchanges the last two axes; False: leaves all axes in place; None: moves other axes."""
    rank = len(shape(node))
    kind = packet(node)
    if kind is _aten.permute:
        order = [int(dim) % rank for dim in argument(node, 1, "dims")]
    elif kind is _aten.transpose:
        first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
    elif kind is _aten.mT:
        order = [*range(rank - 2), rank - 1, rank - 2]
    else:
        order = list(reversed(range(rank)))
    if order == list(range(rank)):
        return False
    if rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]:
        return True
    return None


def broadcast(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The common shape of two batches, or None when that cannot be known without a guard."""
    rank = max(len(a), len(b))
    padded = [(1,) * (rank - len(x)) + tuple(x) for x in (a, b)]
    result = []
    for x, y in zip(*padded, strict=True):
        if one(x):
            result.append(y)
        elif one(y) or statically_known_true(x == y):
            result.append(x)
        else:
            return None
    return tuple(result)


def reaches(node: fx.Node, through: Set[Any], targets: Set[Any], forward: bool = True) -> bool:
    """Whether an operator of ``targets`` lies behind a node (or before it), past operators of ``through`` only."""
    seen: set[fx.Node] = set()
    stack = list(node.users) if forward else list(node.all_input_nodes)
    while stack:
        other = stack.pop()
        if other in seen:
            continue
        seen.add(other)
        if packet(other) in targets:
            return True
        if packet(other) in through:
            stack.extend(other.users if forward else other.all_input_nodes)
    return False
