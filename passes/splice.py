"""Put one ``polyattn::attention`` (or torch's own attention) in the place of each site.

Operands of any rank are brought to ``[B, H, tokens, features]`` by views (broadcast axes expanded, batch axes regrouped
in row-major order), and the output back to the shape of the node it replaces. Sizes that are symbolic stay so: they are
read from the graph by ``sym_size`` calls. The call stands where the site's last contraction stood, in the same grad and
autocast region; what only the old spelling needed is removed, everything else stays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.errors import PolyattnError
from polyattn.passes.axes import packet, same_sizes
from polyattn.passes.bias import attn_mask, place
from polyattn.passes.dead import remove_dead
from polyattn.passes.site import Operand, Site

_aten = torch.ops.aten
_META = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "from_node",
    "seq_nr",
    "custom",
    "recompute",
    "ac_graph_id",
)


class SpliceError(PolyattnError):
    """The sizes of a site cannot be expressed in its graph."""


class _Writer:
    """Adds calls before the site's output, with that node's source line, and finds sizes without specialising them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.graph = site.out.graph
        self.meta = {key: site.out.meta[key] for key in _META if key in site.out.meta}

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.site.out):
            node = self.graph.call_function(target, args)
        node.meta.update(self.meta)
        return node

    def size(self, size: Any) -> Any:
        """A number where the size is static, else a node that has it, else None."""
        if isinstance(size, int):
            return size
        for node in self.graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("val"), torch.SymInt) and same_sizes([node.meta["val"]], [size]):
                return node
        for operand in (self.site.q, self.site.k, self.site.v):
            for axis, mine in enumerate(operand.value.shape):
                if same_sizes([mine], [size]):
                    return self.call(_aten.sym_size.int, operand.node, axis)
        return None

    def sizes(self, sizes: Sequence[Any]) -> list[Any]:
        """Arguments of a reshape to these sizes; at most one of them may have no name in the graph (it becomes -1)."""
        found = [self.size(size) for size in sizes]
        if found.count(None) > 1:
            raise SpliceError(f"the sizes {tuple(map(str, sizes))} are not available in the graph")
        return [-1 if size is None else size for size in found]


def splice(site: Site, op: Callable[..., Any], identifier: str, options: str, version: str) -> fx.Node:
    """Replace a site in its graph; returns the call of ``op``.

    Args:
        site: a match of this very graph.
        op: ``torch.ops.polyattn.attention.default`` (q, k, v, owners, scale, causal, site, options, version) ->
        (out, ...).
        identifier: unique name of the site in this process.
        options: ``Options.key()``.
        version: hash of the package's sources.

    Raises:
        SpliceError: two or more symbolic sizes have no name in the graph.
    """
    write = _Writer(site)
    q, k, v = _operands(write, site)
    call = write.call(op, q, k, v, list(site.owners), site.scale, site.causal, identifier, options, version)
    _replace(write, site, write.call(operator.getitem, call, 0))
    return call


def splice_exact(site: Site) -> fx.Node:
    """Put ``scaled_dot_product_attention`` in the place of a site without a low-rank form; returns the call.

    Raises:
        SpliceError: as :func:`splice`.
    """
    write = _Writer(site)
    q, k, v = _operands(write, site)
    mask, boolean = attn_mask(write, site.terms, site.batch) if site.terms else (None, False)
    given = mask
    if mask is not None and not boolean:
        mask = given = write.call(_aten.to.dtype, mask, site.cast or site.q.value.dtype)
    call = write.call(_aten.scaled_dot_product_attention.default, q, k, v, given, site.dropout, site.causal)
    call.kwargs = {"scale": site.scale}
    result = call
    if mask is not None:
        # Torch's kernels return 0 for a row in which nothing is kept; the softmax that stood here did not.
        if boolean:
            none = write.call(_aten.logical_not.default, write.call(_aten.any.dim, mask, -1, True))
            lost: Any = site.terms[0].fill
            other = math.nan if lost == -math.inf else write.call(_aten.mean.dim, v, [-2], True)
        else:
            none = write.call(_aten.all.dim, write.call(_aten.eq.Scalar, mask, -math.inf), -1, True)
            other = math.nan
        where_ = _aten.where.ScalarSelf if isinstance(other, float) else _aten.where.self
        result = write.call(where_, none, other, call)
    _replace(write, site, result)
    return call


def _operands(write: _Writer, site: Site) -> tuple[fx.Node, fx.Node, fx.Node]:
    """q, k and v as [B, H, tokens, features]."""
    serving = site.k.batch if site.grouped else site.batch
    q = _four(write, site.q, site.score_batch, site.batch, site.cast)
    for term in site.factors:
        factor = write.call(_aten.to.dtype, place(write, term, site.batch), site.cast or site.q.value.dtype)
        q = write.call(_aten.mul.Tensor if term.factor > 0 else _aten.div.Tensor, q, factor)
    return (
        q,
        _four(write, site.k, site.k.batch if site.grouped else site.score_batch, serving, site.cast),
        _four(write, site.v, serving, serving, site.cast),
    )


def _replace(write: _Writer, site: Site, result: fx.Node) -> None:
    """The result [B, H, n_q, e] in the shape of the site's output, and in its place."""
    if site.out_transposed:
        result = write.call(_aten.transpose.int, result, -2, -1)
    if len(site.batch) != 2:
        pair = [site.q.tokens, site.v.features]
        pair = pair[::-1] if site.out_transposed else pair
        result = write.call(_aten.reshape.default, result, write.sizes([*site.batch, *pair]))
    if not site.out.meta["val"].is_contiguous():
        _relax_views(site.out)
    result.meta.update(val=site.out.meta["val"])
    site.out.replace_all_uses_with(result)
    remove_dead(site.out)


def _four(
    write: _Writer, operand: Operand, spread: tuple[Any, ...], batch: tuple[Any, ...], cast: torch.dtype | None
) -> fx.Node:
    """An operand as [B, H, tokens, features]: broadcast to the axes ``spread``, regrouped to ``batch``, folded to
    two."""
    node = operand.node
    if cast is not None:
        node = write.call(_aten.to.dtype, node, cast)
    if operand.transposed:
        node = write.call(_aten.transpose.int, node, -2, -1)
    if not same_sizes(operand.batch, spread):
        missing = len(spread) - len(operand.batch)
        own = [None] * missing + list(operand.batch)
        wide = [-1 if mine is not None and same_sizes([mine], [size]) else write.size(size)
                for mine, size in zip(own, spread, strict=True)]  # fmt: skip
        if None in wide:
            raise SpliceError(f"the size of the batch axes {tuple(map(str, spread))} is not available in the graph")
        node = write.call(_aten.expand.default, node, [*wide, -1, -1])
    if len(spread) == 2 and same_sizes(spread, batch):
        return node
    pair = [operand.tokens, operand.features]
    if len(batch) <= 2:
        lead = [*batch, *([1] * (2 - len(batch)))]
        return write.call(_aten.reshape.default, node, write.sizes([*lead, *pair]))
    return write.call(_aten.reshape.default, node, [-1, *write.sizes([batch[-1], *pair])])


_VIEWS = {_aten.view, _aten.transpose, _aten.permute, _aten.unsqueeze, _aten.squeeze, _aten.t, _aten.mT}


def _relax_views(out: fx.Node) -> None:
    """Views of an output whose strides may change: ``view`` becomes ``reshape``, which copies only where it must."""
    stack = list(out.users)
    while stack:
        node = stack.pop()
        if packet(node) not in _VIEWS:
            continue
        if node.target is _aten.view.default:
            node.target = _aten.reshape.default
        stack.extend(node.users)
