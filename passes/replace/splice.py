"""Put one ``polyattn::attention`` (or torch's own attention) in the place of each site.

Operands of any rank are brought to ``[B, H, tokens, features]`` by views (broadcast axes expanded, batch axes regrouped
in row-major order), and the output back to the shape of the node it replaces. Sizes that are symbolic stay so: they are
read from the graph by ``sym_size`` calls. The call stands where the site's last contraction stood, in the same grad and
autocast region; what only the old spelling needed is removed, everything else stays.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from polyattn.codegen import targets
from polyattn.passes.match import bias
from polyattn.passes.match.axes import packet, same_sizes, shape
from polyattn.passes.match.bias import attn_mask, place
from polyattn.passes.match.site import Operand, Site
from polyattn.passes.replace.writer import SizedWriter

_aten = torch.ops.aten
OUTPUTS = 6
"""Tensors that the operator returns, all of which its backward takes."""


def splice(site: Site, op: Callable[..., Any], identifier: str, options: str, version: str) -> fx.Node:
    """Replace a site in its graph; returns the call of ``op``.

    Args:
        site: a match of this very graph.
        op: ``torch.ops.polyattn.attention.default`` (q, k, v, masks, owners, scale, causal, changes, differentiated,
        site, options, version) -> (out, …).
        identifier: unique name of the site in this process.
        options: ``Options.key()``.
        version: hash of the package's sources.

    Raises:
        SpliceError: two or more symbolic sizes have no name in the graph.
    """
    write = SizedWriter(site.out, (site.q.node, site.k.node, site.v.node))
    q, k, v = _operands(write, site)
    masks, changes = bias.operands(write, site.terms, site.batch, site.zero_rows)
    owners, scale = list(site.owners), _scale(write, site)
    said = scale, site.causal, changes.text(), site.differentiated
    call = write.call(op, q, k, v, masks, owners, *said, identifier, options, version)
    _replace(write, site, write.call(operator.getitem, call, 0))
    return call


def splice_gradients(site: Site, call: fx.Node, backward: Callable[..., Any], version: str) -> None:
    """Put the operator's backward in the place of the gradients that stand in the graph, before the first of them.

    Args:
        site: a site with gradients, spliced by now; those that ``g`` may come from, later sites, not yet.
        call: what :func:`splice` returned.
        backward: ``torch.ops.polyattn.attention_backward.default`` (g, q, k, v, masks, *what the forward returned,
        scale, causal, changes, version, needs) -> (dq, dk, dv).

    Raises:
        SpliceError: as :func:`splice`.
    """
    assert site.gradients is not None
    given = [gradient.node for gradient in site.gradients.given if gradient is not None]
    if not given:
        return
    order = {node: position for position, node in enumerate(call.graph.nodes)}
    write = SizedWriter(min(given, key=lambda node: order[node]), (site.gradients.g.node,))
    g = site.gradients.g.node
    if site.gradients.g.transposed:
        g = write.call(_aten.transpose.int, g, -2, -1)
    g = write.fold(g, site.batch, [site.gradients.g.tokens, site.gradients.g.features])
    q, k, v, masks, _, scale, causal, changes, *_ = call.args
    saved = [write.call(operator.getitem, call, at) for at in range(OUTPUTS)]
    needs = [gradient is not None for gradient in site.gradients.given]
    made = write.call(backward, g, q, k, v, masks, *saved, scale, causal, changes, version, needs)
    for at, gradient in enumerate(site.gradients.given):
        if gradient is None:
            continue
        write = SizedWriter(gradient.node, (site.gradients.g.node,))
        result = write.call(operator.getitem, made, at)
        if gradient.transposed:
            result = write.call(_aten.transpose.int, result, -2, -1)
        result = write.call(_aten.reshape.default, result, write.sizes(shape(gradient.node)))
        if not gradient.value.is_contiguous():
            _relax_views(gradient.node)
        result.meta.update(val=gradient.value)
        write.replace(result)


def splice_exact(site: Site, masked: Callable[..., Any] | None = None, version: str = "") -> fx.Node:
    """Put ``scaled_dot_product_attention`` in the place of a site without a low-rank form; returns the call.

    Args:
        site: a match of this very graph.
        masked: what takes its place where something is added to the scores, when training:
        ``torch.ops.polyattn.masked_attention.default`` (q, k, v, mask, kept, fill, scale, version) -> (out, lse).
        version: as for :func:`splice`.

    Raises:
        SpliceError: as :func:`splice`.
    """
    write = SizedWriter(site.out, (site.q.node, site.k.node, site.v.node))
    q, k, v = _operands(write, site)
    if masked is not None and any(term.added for term in site.terms):
        call = write.call(masked, q, k, v, *_apart(write, site), _scale(write, site), version)
        _replace(write, site, write.call(operator.getitem, call, 0))
        return call
    mask, boolean = attn_mask(write, site.terms, site.batch) if site.terms else (None, False)
    given = mask
    if mask is not None and not boolean:
        mask = given = _in_dtype(write, mask, site)
    scale = _scale(write, site)
    call = write.call(_aten.scaled_dot_product_attention.default, q, k, v, given, site.dropout, site.causal)
    call.kwargs = {"scale": scale}
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


def _apart(write: SizedWriter, site: Site) -> tuple[fx.Node, fx.Node | None, float]:
    """What is added to the scores; where they are kept, or None; and what the others become then."""
    added, _ = attn_mask(write, [term for term in site.terms if term.added], site.batch)
    filled = [term for term in site.terms if not term.added]
    if not filled:
        return added, None, 0.0
    kept, _ = attn_mask(write, filled, site.batch)
    return added, kept, filled[0].fill


def _in_dtype(write: SizedWriter, mask: fx.Node, site: Site) -> fx.Node:
    """An added mask in a dtype that torch's attention takes beside q; a smallest number stays one, and no -inf."""
    dtype = site.cast or site.q.value.dtype
    given = functools.reduce(torch.promote_types, (term.node.meta["val"].dtype for term in site.terms if term.added))
    if given.is_floating_point and torch.finfo(given).max > torch.finfo(dtype).max:
        # Where float32 is taken beside half precision, autocast and dropout cast it all the same.
        wide = targets.of_device(site.q.value.device).added_masks
        if dtype.itemsize == 2 and wide and site.cast is None and not site.dropout:
            dtype = torch.float32
        limits = torch.finfo(dtype)
        if torch.finfo(given).max > limits.max:
            near = write.call(_aten.clamp.default, mask, limits.min, limits.max)
            mask = write.call(_aten.where.self, write.call(_aten.isinf.default, mask), mask, near)
    return write.call(_aten.to.dtype, mask, dtype)


def _scale(write: SizedWriter, site: Site) -> Any:
    """The scale: a number, or a node where it depends on a dynamic size."""
    scale: Any = site.scale
    for node, power in site.sizes:
        scale = write.call(operator.mul if power > 0 else operator.truediv, scale, node)
    if site.by_head_dim:
        scale = write.call(operator.mul, scale, write.call(operator.pow, write.size(site.q.features), -0.5))
    return scale


def _operands(write: SizedWriter, site: Site) -> tuple[fx.Node, fx.Node, fx.Node]:
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


def _replace(write: SizedWriter, site: Site, result: fx.Node) -> None:
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
    write.replace(result)


def _four(
    write: SizedWriter, operand: Operand, spread: tuple[Any, ...], batch: tuple[Any, ...], cast: torch.dtype | None
) -> fx.Node:
    """An operand as [B, H, tokens, features]: broadcast to the axes ``spread``, regrouped to ``batch``, folded to
    two."""
    node = operand.node
    if cast is not None:
        node = write.call(_aten.to.dtype, node, cast)
    if operand.transposed:
        node = write.call(_aten.transpose.int, node, -2, -1)
    if not same_sizes(operand.batch, spread):
        node = write.spread(node, operand.batch, spread)
    if len(spread) == 2 and same_sizes(spread, batch):
        return node
    return write.fold(node, batch, [operand.tokens, operand.features])


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
