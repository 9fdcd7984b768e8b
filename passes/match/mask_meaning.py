r"""What a mask built inside the graph means, found from its structure: no value is computed, no size is specialised.

A mask over (query i, key j) that depends on ``j - i`` alone is a step function of the *offset* ``j - i``. ``tril``,
``triu``, ``ones``, ``full``, comparisons of ``arange``\ s, logic, arithmetic, casts and views of these are evaluated
exactly in the domain of :mod:`polyattn.passes.match.mask_values`. Whatever else a mask is made of is unknown, but not
which axes it can depend on: a value with one row is the same for all queries, such as which keys are padding. What
depends on queries and keys in an unknown way is no mask that :func:`step` has words for; it raises :class:`Unprovable`
with the reason, in words for a report.
Contents of buffers and inputs are never looked at: they may change after compilation.

What each operator does stands in ``mask_views.py`` and ``mask_arithmetic.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.mask_nodes import is_one, same_statically
from polyattn.passes.match.mask_values import Meaning, Position, StepFunction, Unprovable, Varies

HANDLERS: dict[Any, Callable[[fx.Node], Meaning]] = {}
"""By aten operator; the modules of handlers fill it."""


def meaning(node: Any) -> Meaning:
    """The meaning of a node (or of a Python number).

    Raises:
        Unprovable: with the reason.
    """
    if isinstance(node, (bool, int, float)):
        return StepFunction.constant(node)
    if not isinstance(node, fx.Node):
        raise Unprovable("the mask depends on a symbolic number")
    try:
        return _by_structure(node)
    except Unprovable as reason:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype.is_complex:
            raise
        return StepFunction.constant(Varies.of(value.dtype, *wide_axes(node), reason=str(reason)))


def wide_axes(node: fx.Node) -> list[int]:
    """The axes of a node's value that are not known to have size one, counted from the last one."""
    sizes = node.meta["val"].shape
    return [axis for axis in range(-len(sizes), 0) if not is_one(sizes[axis])]


def _by_structure(node: fx.Node) -> Meaning:
    if node.op in ("placeholder", "get_attr"):
        raise Unprovable("the mask is an input or a buffer: its contents are not known when compiling")
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        raise Unprovable(f"the mask is built with {name_of(node)}, which is not understood")
    handler = HANDLERS.get(node.target.overloadpacket)
    if handler is None:
        raise Unprovable(f"the mask is built with {name_of(node)}, which is not understood")
    return handler(node)


def step(node: Any) -> StepFunction:
    """The meaning of a node that must be a function of the offset alone; see :func:`meaning`."""
    value = meaning(node)
    if isinstance(value, Position):
        if not value.coefficients:
            return StepFunction.constant(value.constant)
        raise Unprovable("the mask is a position, not a comparison of positions")
    if value.varies is not None and len(value.axes) == 2:
        raise Unprovable(value.unknown or "the mask depends on queries and keys in a way that is not known")
    return value


def operand(source: Any, node: fx.Node) -> Meaning:
    """The meaning of an operand that is broadcast to the shape of ``node``: no axis that it depends on may grow."""
    value = meaning(source)
    if isinstance(value, StepFunction) and not value.axes:
        return value
    old, new = list(source.meta["val"].shape), list(node.meta["val"].shape)
    axes = sorted(value.axes) if isinstance(value, StepFunction) else [axis for axis, _ in value.coefficients]
    if axes and (-min(axes) > len(old) or not same_statically([old[a] for a in axes], [new[a] for a in axes])):
        raise Unprovable("the mask is broadcast along its query or key axis")
    return value


def offset_operand(source: Any, node: fx.Node) -> StepFunction:
    """The meaning of an operand (:func:`operand`) that must be a function of the offset."""
    value = operand(source, node)
    if isinstance(value, StepFunction):
        return value
    if not value.coefficients:
        return StepFunction.constant(value.constant)
    raise Unprovable("the mask is a position, not a comparison of positions")


def index_of(value: Meaning) -> Position:
    """A value as a position: a known integer is one that depends on no axis.

    Raises:
        Unprovable: it is neither.
    """
    if isinstance(value, Position):
        return value
    number = value.everywhere
    if number is not None and isinstance(number, int):
        return Position((), int(number))
    raise Unprovable(value.unknown or "positions are combined with a mask")


def name_of(node: fx.Node) -> str:
    """The operator of a node, for reasons."""
    return str(getattr(node.target, "__name__", node.target))
