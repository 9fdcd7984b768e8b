"""What is added to the scores, or put in their place, before the softmax, and the attn_mask that means the same.

A causal mask that is proved from its structure is not kept here; every other mask or bias is a :class:`MaskTerm`. One
that may be key padding, or that is not known, is looked at in each call (:func:`operands`); any other, and those of a
site that cannot be low rank anyway, make it exact: ``scaled_dot_product_attention`` takes it as its ``attn_mask``.

    softmax(s + m) V                     → attn_mask = m
    softmax(s.masked_fill(x, f)) V       → attn_mask = ¬x,  for f = -inf or f ≤ FILL: the weight of the rest is 0

A row in which nothing is kept has no softmax of its own scores: for f = -inf it is NaN, for a finite f it is the mean
of the values. That is put back, because torch's kernels return 0 there.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import one, same_sizes, shape
from polyattn.passes.match.changes import Change, Changes
from polyattn.passes.match.mask_values import Visible
from polyattn.passes.replace.writer import SizedWriter

_aten = torch.ops.aten
FILL = -1e4
"""Scores set to this or less are masked: beside a kept score of the same row their weight is 0 in every dtype."""


@dataclasses.dataclass(frozen=True)
class MaskTerm:
    """One mask or bias, as it stands in the graph.

    ``added``: a tensor added to the scores, times ``factor``. Otherwise a bool tensor that replaces scores by ``fill``
    where it is not ``keep``. ``batch`` are the scores' batch axes there; ``swapped``: its last axes are (key, query).
    ``visible``: what its structure tells of the pairs that it shows, None where that is nothing; ``general``: it is
    known to be neither causal nor the same for all queries.
    """

    node: fx.Node
    batch: tuple[Any, ...]
    swapped: bool
    added: bool
    factor: float = 1.0
    keep: bool = True
    fill: float = 0.0
    visible: Visible | None = None
    general: bool = False

    @property
    def causal(self) -> bool:
        """Whether it is known to be causal and nothing else."""
        return self.visible is not None and self.visible.causal and not self.visible.keyed

    @property
    def padding(self) -> bool:
        """Whether it is known to hide the same keys from all queries, beside those after them, and nothing else."""
        return self.visible is not None and self.visible.keyed and self.visible.padding

    @property
    def word(self) -> str:
        """``key padding``, ``mask`` or ``bias``."""
        return "key padding" if self.padding else "bias" if self.added else "mask"

    def change(self, rows: str) -> Change:
        """What it does to the scores, as an operator gets it.

        Args:
            rows: ``none`` where it is causal alone, ``last`` where its last row says all that it does to keys up to
                their query, ``all`` where its tensor is given whole.
        """
        causal = rows != "all" and self.visible is not None and self.visible.causal
        fill = self.visible.fill * self.factor if self.visible is not None and causal else -math.inf
        return Change("add" if self.added else "replace", fill if self.added else self.fill, causal, rows != "none")


def unsayable(terms: Sequence[MaskTerm]) -> str:
    """Why no attn_mask means the same: replaced scores that do not all take one value, or are added to afterwards."""
    fills = {term.fill for term in terms if not term.added}
    if len(fills) > 1:
        return f"masks set scores to different values ({', '.join(map(str, sorted(fills)))})"
    kinds = [term.added for term in terms]  # from the softmax back to the product
    if fills and any(kinds) and kinds != sorted(kinds):
        return "something is added to scores that a mask has already replaced"
    return ""


def describe(terms: Sequence[MaskTerm]) -> str:
    """``key padding``, ``mask``, ``bias``, or several: for reports."""
    said = {term.word for term in terms}
    return " + ".join(word for word in ("key padding", "mask", "bias") if word in said)


def no_form(kind: str, why: str, nodes: Sequence[fx.Node]) -> str:
    """Why a site with this mask or bias is exact, and whether the mask itself is as large as the scores of a head."""
    large = any(len(shape(node)) > 1 and not any(one(size) for size in shape(node)[-2:]) for node in nodes)
    proof = f" ({why})" if why else ""
    costs = "; the mask alone holds n_q × n_k numbers" if large else ""
    return f"no low-rank form for a {kind} that is not provably causal{proof}{costs}"


def operands(
    write: SizedWriter, terms: Sequence[MaskTerm], batch: tuple[Any, ...], zero: bool
) -> tuple[list[fx.Node], Changes]:
    """The tensors of the terms as an operator takes them, [B|1, H|1, n_q|1, n_k|1], and what they do to the scores.

    Args:
        batch: leading axes of the output.
        zero: see :class:`polyattn.passes.match.changes.Changes`.
    """
    tensors, steps = [], []
    for term in reversed(terms):  # in the order in which they are applied
        rows = "none" if term.causal else "last" if term.visible is not None else "all"
        steps.append(term.change(rows))
        if rows == "none":
            continue
        node = place(write, term, batch)
        sizes = shape(term.node)[::-1]
        tall = len(sizes) > 1 and not one(sizes[0 if term.swapped else 1])
        if rows == "last" and tall:
            node = write.call(_aten.slice.Tensor, node, -2, -1, sys.maxsize)
        if term.added and term.factor != 1:
            node = write.call(_aten.mul.Tensor, node, term.factor)
        if not term.added and not term.keep:
            node = write.call(_aten.logical_not.default, node)
        tensors.append(node)
    return tensors, Changes(tuple(steps), zero)


def attn_mask(write: SizedWriter, terms: Sequence[MaskTerm], batch: tuple[Any, ...]) -> tuple[fx.Node, bool]:
    """The mask of a site in its graph, with at most four axes [B, H, n_q, n_k], and whether it is bool (True: kept).

    Args:
        batch: leading axes of the output.
    """
    placed = [(place(write, term, batch), term) for term in terms]
    kept: fx.Node | None = None
    for node, term in placed:
        if not term.added:
            keeps = node if term.keep else write.call(_aten.logical_not.default, node)
            kept = keeps if kept is None else write.call(_aten.logical_and.default, kept, keeps)
    total: fx.Node | None = None
    for node, term in reversed(placed):  # in the order in which they are added
        if term.added:
            part = node if term.factor == 1 else write.call(_aten.mul.Tensor, node, term.factor)
            total = part if total is None else write.call(_aten.add.Tensor, total, part)
    if total is None:
        assert kept is not None
        return kept, True
    if kept is not None:
        fill = next(term.fill for term in terms if not term.added)
        total = write.call(_aten.where.ScalarOther, kept, total, fill)
    return total, False


def place(write: SizedWriter, term: MaskTerm, batch: tuple[Any, ...]) -> fx.Node:
    """A term's tensor as [B, H, n_q, n_k], or what broadcasts to it; the batch is folded as splicing folds it."""
    node, sizes = term.node, list(shape(term.node))
    while len(sizes) < 2:
        node, sizes = write.call(_aten.unsqueeze.default, node, 0), [1, *sizes]
    if term.swapped:
        node, sizes = write.call(_aten.transpose.int, node, -2, -1), [*sizes[:-2], sizes[-1], sizes[-2]]
    lead, pair = sizes[:-2], sizes[-2:]
    if all(one(size) for size in lead):
        return node if len(lead) <= 2 else write.call(_aten.reshape.default, node, [1, 1, *write.sizes(pair)])
    if len(batch) == 2 and same_sizes(term.batch, batch):
        return node
    return write.fold(write.spread(node, lead, term.batch), batch, pair)
