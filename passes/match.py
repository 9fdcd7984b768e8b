"""Find attention by meaning: start at the anchor, walk outwards with named axes, check every constant.

Anchors: ``aten.softmax`` / ``aten._softmax`` and ``aten.scaled_dot_product_attention``. From a softmax the walk goes
forward
(casts, views, dropout that does nothing) to the contraction with the values, and backward (casts, views, scales,
masks) to the
contraction of queries and keys; the operands of the two contractions are q, k and v, whatever produced them. Every
softmax that feeds a contraction and every SDPA call yields a :class:`Site` or a :class:`Refusal` with reason and
source line.

Checked on the way, never assumed: the softmax runs over the axis that the values are contracted over; scales are Python
numbers; masks are provably causal (:mod:`polyattn.passes.masks`) and fill with -inf; no value on the way is used
elsewhere,
mutated, down-cast or detached; nothing crosses the border of a ``no_grad`` or autocast region.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes import axes
from polyattn.passes.axes import CAST, NotAttention, packet, reaches, same_sizes, shape
from polyattn.passes.bias import describe, unsayable
from polyattn.passes.context import Context
from polyattn.passes.groups import ungroup
from polyattn.passes.masks import argument
from polyattn.passes.owners import is_paper_form, owners
from polyattn.passes.scores import (
    CARRIES,
    DROPOUT,
    FLOWS,
    OTHER_PRODUCTS,
    PRODUCT,
    Walk,
    carry,
    causal_mask,
    check_upcast,
    dropout_rate,
    name_of,
    number,
    users,
    walk_back,
)
from polyattn.passes.site import Operand, Refusal, Site, named_shape, where

_aten = torch.ops.aten
SOFTMAX = {_aten.softmax, _aten._softmax, _aten._safe_softmax, _aten.special_softmax}
SDPA = _aten.scaled_dot_product_attention
FUSED = {_aten._transformer_encoder_layer_fwd, _aten._native_multi_head_attention}
_ADDED = (
    "in training it stays as it was: where an added mask hides a whole row, the backward of torch's fused attention "
    "differs from that of softmax"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Matches:
    """All sites and refusals of one graph, in graph order."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def match(graph: fx.Graph, parameters: Iterable[fx.Node] = (), first_index: int = 0, training: bool = True) -> Matches:
    """Sites and refusals of a normalised graph.

    Args:
        graph: as :func:`polyattn.passes.normalize.normalize` makes it; not changed.
        parameters: placeholders that hold parameters (the owners of a site are taken from them).
        first_index: index of the first site.
        training: whether gradients may be asked for.
    """
    context = Context(graph, frozenset(parameters))
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in graph.nodes:
        kind = packet(node)
        try:
            if kind in FUSED:
                raise NotAttention(
                    f"{name_of(node)} is one fused operator; torch.backends.mha.set_fastpath_enabled(False) opens it",
                    node,
                )
            if kind is SDPA:
                site = _match_sdpa(context, node)
            elif kind in SOFTMAX and reaches(node, FLOWS, PRODUCT | OTHER_PRODUCTS):
                site = _match_softmax(context, node)
                if training and any(term.added for term in site.terms):
                    site = dataclasses.replace(site, exact=f"{site.exact}; {_ADDED}", kept=True)
            else:
                continue
        except NotAttention as refusal:
            refusals.append(Refusal(str(refusal), refusal.node.name, where(node)))
        else:
            sites.append(dataclasses.replace(_grouped(site), index=first_index + len(sites)))
    return Matches(tuple(sites), tuple(refusals))


# ---------------------------------------------------------------------------------------------------------------------
# scaled_dot_product_attention


def _match_sdpa(context: Context, node: fx.Node) -> Site:
    q, k, v = (Operand(argument(node, position, name)) for position, name in enumerate(("query", "key", "value")))
    scale: Any = node.kwargs.get("scale")
    exact = ""
    if scale is None:
        if isinstance(q.features, int):
            scale = 1 / math.sqrt(q.features)
        else:
            scale, exact = math.nan, "the default scale 1/sqrt(head_dim) depends on a dynamic head dim"
    elif isinstance(scale, fx.Node):
        scale, exact = math.nan, "the scale depends on a dynamic size"
    causal = bool(argument(node, 5, "is_causal", False))
    mask = argument(node, 3, "attn_mask")
    dropout = number(argument(node, 4, "dropout_p", 0.0), node)
    if dropout:
        exact = f"dropout with p={dropout} on the weights"
    kind = "causal" if causal else "none"
    if mask is not None:
        boolean = isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool
        keep, drop = (True, False) if boolean else (0.0, -math.inf)
        try:
            causal = causal_mask(context, mask, (q.tokens, k.tokens), True, keep, drop, node) or causal
            kind = "causal" if causal else kind
        except NotAttention as reason:
            exact, kind = str(reason), "mask" if boolean else "bias"
    grouped = False
    batch = axes.broadcast(axes.broadcast(q.batch, k.batch) or (), v.batch)
    if node.kwargs.get("enable_gqa"):
        grouped = len(q.batch) > 0 and not same_sizes(q.batch[-1:], k.batch[-1:])
        batch = q.batch
        if grouped and not (same_sizes(q.batch[:-1], k.batch[:-1]) and same_sizes(k.batch, v.batch)):
            raise NotAttention("grouped queries with broadcast batch axes", node)
    name = "scaled_dot_product_attention"
    site = _site(context, node, [], q, k, v, batch, batch, float(scale), causal, name, grouped)
    return dataclasses.replace(site, mask=kind, dropout=dropout, exact=exact, kept=bool(exact))


# ---------------------------------------------------------------------------------------------------------------------
# softmax between two contractions


def _match_softmax(context: Context, softmax: fx.Node) -> Site:
    rank = len(shape(softmax))
    dim = int(argument(softmax, 1, "dim"))
    dim = dim - rank if dim >= 0 else dim
    if rank < 2 or dim < -2:
        raise NotAttention(f"the softmax runs over axis {dim} of {rank}, which is neither queries nor keys", softmax)
    path = [softmax]
    product, weights_first, key_last, dropout = _forward(softmax, dim == -1, path)
    if weights_first != key_last:
        raise NotAttention(
            f"the softmax runs over axis {dim}, but the product with the values sums over the other axis: "
            "the weights of a query do not add up to one",
            softmax,
        )
    left, right = _operands(product)
    v = Operand(right) if weights_first else Operand(left, transposed=True)
    walk = Walk(key_last=dim == -1)
    scores = walk_back(context, softmax, walk, path)
    first, second = _operands(scores)
    rows, columns = Operand(first), Operand(second, transposed=True)
    q, k = (rows, columns) if walk.key_last else (columns, rows)
    score_batch = tuple(shape(scores)[:-2])
    batch = tuple(shape(product)[:-2])
    weights = product.args[0 if weights_first else 1]
    assert isinstance(weights, fx.Node)
    if not same_sizes(tuple(shape(weights)[:-2]), batch):
        raise NotAttention("the attention weights are broadcast over the values", product)
    terms = () if all(term.causal for term in walk.terms) else tuple(walk.terms)
    stays = walk.left or unsayable(terms)
    mask = ("causal + " if terms and walk.causal else "") + describe([t for t in terms if not t.causal])
    mask = mask or ("causal" if walk.causal else "none")
    shown = "" if mask == "none" else " + causal mask" if mask == "causal" else f" + {mask}"
    spelling = "softmax(q @ kᵀ" + (" * s" if walk.scaled else "") + shown + ") @ v"
    exact = f"{stays}; it stays as it was" if stays else ""
    exact = exact or (f"no low-rank form for a {mask} that is not provably causal" if terms else "")
    exact = exact or (f"dropout with p={dropout} on the weights" if dropout else "")
    if is_paper_form(q.node, k.node, v.node):
        spelling = spelling.replace("q @ kᵀ", "X W Xᵀ").replace("@ v", "X W_V")
    if context.autocast(product) is None:
        _check_precision(softmax, product, path)
    path.append(scores)
    causal = walk.causal and not terms
    held = tuple(term.node for term in (*terms, *walk.factors))
    site = _site(context, product, path, q, k, v, batch, score_batch, walk.scale, causal, spelling, False, held)
    return dataclasses.replace(
        site,
        out_transposed=not weights_first,
        where=where(softmax),
        terms=terms,
        factors=tuple(walk.factors),
        dropout=dropout,
        mask=mask,
        exact=exact,
        kept=bool(stays),
        scale=math.nan if walk.left else walk.scale,
    )


def _forward(softmax: fx.Node, key_last: bool, path: list[fx.Node]) -> tuple[fx.Node, bool, bool, float]:
    """From the softmax to the contraction with the values: (contraction, weights are its left operand, key axis is
    last, dropout)."""
    node, dropout = softmax, 0.0
    while True:
        readers = users(node)
        if len(readers) != 1:
            raise NotAttention("the attention weights are used elsewhere", node)
        user = readers[0]
        kind = packet(user)
        if kind in PRODUCT:
            if user.args[0] is user.args[1]:
                raise NotAttention("the attention weights are multiplied by themselves", user)
            return user, user.args[0] is node, key_last, dropout
        if kind in OTHER_PRODUCTS:
            raise NotAttention(f"the weights meet the values in {name_of(user)}, which is not matched yet", user)
        if (kind not in CARRIES and kind is not _aten.expand) or user.args[0] is not node:
            raise NotAttention(f"the attention weights pass through {name_of(user)} before they meet the values", user)
        if kind in CAST and not user.meta["val"].dtype.is_floating_point:
            raise NotAttention(f"the attention weights are cast to {user.meta['val'].dtype}", user)
        if kind in DROPOUT:
            if kind is not _aten.dropout or dropout:
                raise NotAttention(f"{name_of(user)} on the attention weights", user)
            dropout = dropout_rate(user)
        else:
            key_last ^= carry(user, node, "weights")
        path.append(user)
        node = user


def _check_precision(softmax: fx.Node, product: fx.Node, path: list[fx.Node]) -> None:
    """The softmax is at least as precise as the scores, and the weights as the output."""
    source = softmax.args[0]
    assert isinstance(source, fx.Node)
    check_upcast(source, softmax)
    for node in path[path.index(softmax) :]:
        if packet(node) in CAST and node.meta["val"].dtype.itemsize < product.meta["val"].dtype.itemsize:
            raise NotAttention(f"the attention weights are rounded to {node.meta['val'].dtype}", node)


# ---------------------------------------------------------------------------------------------------------------------
# shared


def _grouped(site: Site) -> Site:
    """The site with its keys and values before they were repeated for groups of queries."""
    if site.exact or site.grouped or len(site.batch) != 2 or not same_sizes(site.q.batch, site.batch):
        return site
    found = ungroup(site.k, site.v) if same_sizes(site.score_batch, site.batch) else None
    if found is None:
        return site
    k, v = found
    kv_heads = named_shape(kv_heads=k.batch[-1])
    return dataclasses.replace(site, k=k, v=v, grouped=True, shape={**site.shape, **kv_heads})


def _site(
    context: Context,
    out: fx.Node,
    path: list[fx.Node],
    q: Operand,
    k: Operand,
    v: Operand,
    batch: tuple[Any, ...] | None,
    score_batch: tuple[Any, ...] | None,
    scale: float,
    causal: bool,
    spelling: str,
    grouped: bool,
    held: tuple[fx.Node, ...] = (),
) -> Site:
    """The last checks (dtypes, regions, mutation), then the site."""
    if batch is None or score_batch is None:
        raise NotAttention("the batch axes of q, k and v do not broadcast in a way that is known when compiling", out)
    context.check_one_region([*path, out], out)
    context.check_stable(path, (q.node, k.node, v.node, *held), out)
    cast = context.autocast(out)
    dtypes = [operand.value.dtype for operand in (q, k, v)] + [out.meta["val"].dtype]
    if any(dtype not in DTYPES for dtype in dtypes):
        raise NotAttention(f"attention in {', '.join(sorted({str(d) for d in dtypes}))}", out)
    if cast is None and len(set(dtypes)) != 1:
        raise NotAttention(f"q, k, v and the output have different dtypes: {', '.join(map(str, dtypes))}", out)
    heads = batch[-1] if batch else 1
    rest = batch[:-1]
    whole = (
        rest[0]
        if len(rest) == 1
        else math.prod(rest)
        if all(isinstance(s, int) for s in rest)
        else "*".join(map(str, rest))
    )
    sizes = named_shape(
        batch=whole,
        heads=heads,
        kv_heads=k.batch[-1] if grouped else heads,
        n_q=q.tokens,
        n_k=k.tokens,
        d=q.features,
        e=v.features,
    )
    return Site(
        index=0,
        q=q,
        k=k,
        v=v,
        out=out,
        out_transposed=False,
        batch=batch,
        score_batch=score_batch,
        grouped=grouped,
        scale=scale,
        causal=causal,
        mask="causal" if causal else "none",
        where=where(out),
        spelling=spelling,
        owners=owners(q.node, k.node, context.parameters),
        shape=sizes,
        cast=cast,
    )


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = product.args[0], product.args[1]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if len(shape(left)) < 2 or len(shape(right)) < 2:
        raise NotAttention("one side of the product is a vector", product)
    return left, right
