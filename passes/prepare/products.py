"""Products of scores and values in one spelling: einsum and baddbmm near a softmax become matmul with permutes.

    einsum('bqhd,bkhd->bhqk', q, k)   → permute(q), permute(k) ─ matmul ─ permute
    baddbmm(x, q, k, beta=b, alpha=a) → b·x + a·(q @ k);  x itself goes when beta = 0

Both are how torch computes them, up to rounding.  Only products that a softmax reads or that read a softmax are
touched; an equation with a sum inside one operand, a diagonal, or more than one contracted axis stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx

from polyattn.passes.match.axes import packet, reaches
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.replace.writer import ValuedWriter

_aten = torch.ops.aten


def unify_products(graph: fx.Graph, carries: Set[Any], softmax: Set[Any]) -> None:
    """Rewrite the products near every softmax of a normalised graph.

    Args:
        carries: operators through which scores and weights pass.
        softmax: the anchors.
    """
    for node in list(graph.nodes):
        kind = packet(node)
        if kind not in (_aten.einsum, _aten.baddbmm):
            continue
        makes_scores = reaches(node, carries, softmax)
        if not makes_scores and not reaches(node, carries, softmax, forward=False):
            continue
        if kind is _aten.baddbmm:
            _baddbmm(node)
        else:
            _einsum(node, makes_scores)


def _baddbmm(node: fx.Node) -> None:
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not all(isinstance(c, (int, float)) for c in (beta, alpha)):
        return
    write = ValuedWriter(node)
    made = write.call(_aten.matmul.default, node.args[1], node.args[2])
    if alpha != 1:
        made = write.call(_aten.mul.Tensor, made, alpha)
    if beta != 0:
        bias: Any = node.args[0]
        bias = bias if beta == 1 else write.call(_aten.mul.Tensor, bias, beta)
        made = write.call(_aten.add.Tensor, made, bias)
    write.replace(made)


def letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]] | None:
    """The axes of every operand and of the result, ``...`` spelt out; None for an implicit or repeated one."""
    text = equation.replace(" ", "")
    if "->" not in text:
        return None
    left, right = text.split("->")
    operands = left.split(",")
    if len(operands) != len(ranks):
        return None
    lengths = [rank - len(term.replace("...", "")) for term, rank in zip(operands, ranks, strict=True) if "..." in term]
    hidden = [f".{n}" for n in range(max(lengths, default=0))]

    def spell(term: str, rank: int | None) -> list[str]:
        if "..." not in term:
            return list(term)
        before, after = term.split("...")
        count = len(hidden) if rank is None else rank - len(before) - len(after)
        return [*before, *hidden[len(hidden) - count :], *after]

    spelt = [spell(term, rank) for term, rank in zip(operands, ranks, strict=True)]
    result = spell(right, None)
    if any(len(set(axes)) != len(axes) for axes in [*spelt, result]):
        return None
    return spelt, result


def _einsum(node: fx.Node, makes_scores: bool) -> None:
    equation, operands = node.args[0], argument(node, 1, "tensors")
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return
    a, b = operands
    found = letters(equation, [a.meta["val"].ndim, b.meta["val"].ndim])
    if found is None:
        return
    (first, second), result = found
    shared = [x for x in first if x in second]
    summed = [x for x in shared if x not in result]
    if len(summed) != 1 or any(x not in result for x in {*first, *second} - set(summed)):
        return
    # An operand may have several axes that the other one lacks (heads, where one key head serves all). The last one,
    # as the scores or the weights have them, is its tokens or features; the others are batch axes.
    rows = [x for x in (result if makes_scores else first) if x in first and x not in second]
    columns = [x for x in (result if makes_scores else second) if x in second and x not in first]
    if not rows or not columns:
        return
    row, column = rows[-1], columns[-1]
    batch = [x for x in result if x not in (row, column)]
    write = ValuedWriter(node)
    left = _arrange(write, a, first, [*batch, row, summed[0]])
    right = _arrange(write, b, second, [*batch, summed[0], column])
    made = write.call(_aten.matmul.default, left, right)
    order = [*batch, row, column]
    write.replace(write.permute(made, [order.index(x) for x in result]))


def _arrange(write: ValuedWriter, node: fx.Node, have: list[str], want: list[str]) -> fx.Node:
    """The operand with its axes in a given order, size 1 where it lacks one."""
    present = [x for x in want if x in have]
    made = write.permute(node, [have.index(x) for x in present])
    for position, axis in enumerate(want):
        if axis not in have:
            made = write.call(_aten.unsqueeze.default, made, position)
    return made
