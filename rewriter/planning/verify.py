"""The verifier of plans: it runs once on every plan that is made.

Axes of a node are what its operation makes of those of its arguments, and nothing has more than two token axes.
"""

from __future__ import annotations

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.planning.plan import Node, Plan, walk


def verify(plan: Plan) -> None:
    """Check that the nodes of a plan fit together.

    Raises:
        RewriteError: a node is broken; the message is a sentence that names it.
    """
    for n in walk(plan.outputs.values()):
        problem = _problem(n)
        if problem is not None:
            raise RewriteError(f"{n} {problem}")
    if plan.token_degree() > 2:
        raise RewriteError("the plan forms a value of more than two token axes")


def _problem(n: Node) -> str | None:
    """What is wrong with a node; None where nothing is."""
    if n.op == "contract":
        return _contraction(n)
    if n.op == "sum":
        return _sum(n)
    if n.op == "gather":
        return _gather(n)
    if n.op == "concat":
        return _concat(n)
    if n.op == "part":
        return _part(n)
    if n.op == "map":
        return None if [a.axes for a in n.args] == [n.axes] else f"is elementwise in values of axes {_axes(n)}"
    if n.op == "features":
        rows = len(n.args) == 1 and [k.token for k in n.args[0].axes] == [True, False]
        fits = rows and len(n.axes) == 2 and n.axes[0] == n.args[0].axes[0]
        return None if fits else f"is no features of the rows of a value of axes {_axes(n)}"
    if n.op in ("input", "mask", "weights"):
        return None if not n.args else "is given, and has arguments"
    return "is no operation of a plan"


def _axes(n: Node) -> list[tuple[Kind, ...]]:
    return [a.axes for a in n.args]


def _contraction(n: Node) -> str | None:
    patterns, result = n.attr
    kinds: dict[int, Kind] = {}
    if len(patterns) != len(n.args) or any(len(p) != len(a.axes) for p, a in zip(patterns, n.args, strict=True)):
        return f"has patterns {patterns} for arguments of axes {_axes(n)}"
    for pattern, argument in zip(patterns, n.args, strict=True):
        for number, kind in zip(pattern, argument.axes, strict=True):
            if kinds.setdefault(number, kind) != kind:
                return f"shares one index between axes {kinds[number]} and {kind}"
    missing = [number for number in result if number not in kinds]
    if missing:
        return f"has the index {missing[0]} that no argument has"
    if tuple(kinds[number] for number in result) != n.axes:
        return f"has axes {n.axes}, its pattern says {tuple(kinds[number] for number in result)}"
    return None


def _sum(n: Node) -> str | None:
    coefficients, orders = n.attr
    if not len(coefficients) == len(orders) == len(n.args):
        return f"adds {len(n.args)} values with {len(coefficients)} coefficients and {len(orders)} orders of axes"
    for argument, order in zip(n.args, orders, strict=True):
        own = [position for position in order if position is not None]
        if len(order) != len(n.axes) or sorted(own) != list(range(len(argument.axes))):
            return f"adds a value of axes {argument.axes} in the order {order}"
        if any(p is not None and argument.axes[p] != kind for p, kind in zip(order, n.axes, strict=True)):
            return f"adds a value of axes {argument.axes} in the order {order} to one of axes {n.axes}"
    return None


def _gather(n: Node) -> str | None:
    (argument,), (position, _) = n.args, n.attr
    kept = (*argument.axes[:position], *argument.axes[position + 1 :])
    if position >= len(argument.axes) or (*n.axes[:position], *n.axes[position + 2 :]) != kept:
        return f"has axes {n.axes}, two in place of axis {position} of {argument.axes}"
    return None


def _concat(n: Node) -> str | None:
    widths, constants = n.attr
    given = [width for width, c in zip(widths, constants, strict=True) if c is None]
    if len(given) != len(n.args):
        return f"stacks {len(given)} values, and has {len(n.args)}"
    for width, argument in zip(given, n.args, strict=True):
        if argument.axes != (n.axes[0], *(() if width is None else (width,))):
            return f"stacks a value of axes {argument.axes} as {width} columns for each {n.axes[0]}"
    return None


def _part(n: Node) -> str | None:
    (argument,), (part, widths) = n.args, n.attr
    width = widths[part]
    if n.axes != (*argument.axes[:-1], *(() if width is None else (width,))):
        return f"has axes {n.axes}, which are no columns of a value of axes {argument.axes}"
    return None
