"""Softmax written by hand becomes the softmax operator, which attention is found from.

    e = exp(x [- max x]);  e / Σ e              → softmax(x)
    e = exp(x [- max x]);  (e @ v) / Σ e        → softmax(x) @ v

Both are identities wherever the left side is finite; ``Σ`` must run over one axis and keep it (or be unsqueezed at its
place), and nothing else may read the exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import packet, reaches
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.match.scores import FLOWS, OTHER_PRODUCTS, PRODUCT
from polyattn.passes.replace.writer import ValuedWriter

_aten = torch.ops.aten
_MAXIMA = {_aten.amax, _aten.max}
_IDLE = {_aten.detach, _aten.alias}


def unify_softmaxes(graph: fx.Graph) -> None:
    """Rewrite every hand-written softmax of a normalised graph whose result is a product or meets one."""
    for node in list(graph.nodes):
        if packet(node) is _aten.exp and not node._erased:
            _exponential(node)


def _exponential(e: fx.Node) -> None:
    readers = list(e.users)
    sums = [user for user in readers if packet(user) is _aten.sum]
    others = [user for user in readers if user not in sums]
    if len(sums) != 1 or len(others) != 1:
        return
    found = _kept_axis(sums[0])
    if found is None:
        return
    total, dim = found
    user = others[0]
    rank = e.meta["val"].ndim
    if packet(user) is _aten.div and user.args[0] is e and user.args[1] is total and len(user.args) == 2:
        if not reaches(user, FLOWS, PRODUCT | OTHER_PRODUCTS):
            return
        write = ValuedWriter(user)
        write.replace(write.call(_aten.softmax.int, _argument(e, dim), dim))
        return
    if packet(user) not in PRODUCT or user.args[0] is not e or dim != rank - 1:
        return
    # The weights are normalised after they have met the values.
    if len(user.users) != 1:
        return
    (quotient,) = user.users
    if packet(quotient) is not _aten.div or quotient.args[0] is not user or quotient.args[1] is not total:
        return
    if len(quotient.args) != 2 or quotient.kwargs.get("rounding_mode") is not None:
        return
    write = ValuedWriter(quotient)
    weights = write.call(_aten.softmax.int, _argument(e, dim), dim)
    write.replace(write.call(_aten.matmul.default, weights, user.args[1]))


def _kept_axis(total: fx.Node) -> tuple[fx.Node, int] | None:
    """The node that holds the sums with their axis in place, and that axis; None for anything else."""
    dims, keep = argument(total, 1, "dim"), bool(argument(total, 2, "keepdim", False))
    if argument(total, 3, "dtype") is not None:
        return None
    source = total.args[0]
    assert isinstance(source, fx.Node)
    rank = source.meta["val"].ndim
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    dim = dims[0] % rank
    if keep:
        return (total, dim) if len(total.users) == 1 else None
    if len(total.users) != 1:
        return None
    (user,) = total.users
    if packet(user) is _aten.unsqueeze and int(argument(user, 1, "dim")) % rank == dim and len(user.users) == 1:
        return user, dim
    return None


def _argument(e: fx.Node, dim: int) -> fx.Node:
    """What is exponentiated, without the maximum that was taken off it (softmax takes it off again)."""
    x = e.args[0]
    assert isinstance(x, fx.Node)
    if packet(x) is not _aten.sub or len(x.users) != 1 or x.kwargs.get("alpha", 1) != 1:
        return x
    scores, shift = x.args[0], x.args[1]
    if not isinstance(scores, fx.Node) or not isinstance(shift, fx.Node):
        return x
    top: Any = shift
    while packet(top) in _IDLE or getattr(top.target, "__name__", "") == "getitem":
        top = top.args[0]
    if packet(top) not in _MAXIMA or not bool(argument(top, 2, "keepdim", False)):
        return x
    whose: Any = top.args[0]
    while packet(whose) in _IDLE:
        whose = whose.args[0]
    if whose is not scores:
        return x
    dims = argument(top, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    same = isinstance(dims, (list, tuple)) and len(dims) == 1 and dims[0] % scores.meta["val"].ndim == dim
    return scores if same else x
