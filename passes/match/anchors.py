"""Find attention by meaning: start at the anchor, walk outwards with named axes, check every constant.

Anchors: ``aten.softmax`` / ``aten._softmax`` and ``aten.scaled_dot_product_attention``. From a softmax the walk goes
forward
(casts, views, dropout that does nothing) to the contraction with the values, and backward (casts, views, scales,
masks) to the
contraction of queries and keys; the operands of the two contractions are q, k and v, whatever produced them. Every
softmax that feeds a contraction and every SDPA call yields a :class:`Site` or a :class:`Refusal` with reason and
source line.

Checked on the way, never assumed: the softmax runs over the axis that the values are contracted over; scales are Python
numbers; masks are provably causal (:mod:`polyattn.passes.match.masks`) and fill with -inf; no value on the way is used
elsewhere,
mutated, down-cast or detached; nothing crosses the border of a ``no_grad`` or autocast region.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable

import torch
import torch.fx as fx

from polyattn.passes.match import joint
from polyattn.passes.match.axes import CAST, NotAttention, packet, reaches, same_sizes, shape
from polyattn.passes.match.bias import describe, no_form, unsayable
from polyattn.passes.match.build import build_site
from polyattn.passes.match.context import Context
from polyattn.passes.match.groups import ungroup
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.match.owners import is_paper_form
from polyattn.passes.match.scores import (
    CARRIES,
    DROPOUT,
    FLOWS,
    OTHER_PRODUCTS,
    PRODUCT,
    ScoreWalk,
    carry,
    check_upcast,
    dropout_rate,
    name_of,
    users,
    walk_back,
)
from polyattn.passes.match.sdpa import SDPA, match_fused, match_sdpa
from polyattn.passes.match.site import Operand, Refusal, Site, named_shape, where
from polyattn.passes.replace.training import stays, unknowable

_aten = torch.ops.aten
SOFTMAX = {_aten.softmax, _aten._softmax, _aten._safe_softmax, _aten.special_softmax}
SEEN = {_aten.detach, _aten.nan_to_num, _aten.neg, _aten.clamp, _aten.pow, _aten.relu}
"""What weights may also pass through on their way to a product: refused, and told so."""
FUSED_LAYERS = {_aten._transformer_encoder_layer_fwd, _aten._native_multi_head_attention}


@dataclasses.dataclass(frozen=True)
class Matches:
    """All sites and refusals of one graph, in graph order."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def match(
    graph: fx.Graph,
    parameters: Iterable[fx.Node] = (),
    first_index: int = 0,
    training: bool = True,
    needs: Collection[fx.Node] | None = None,
    why_exact: Callable[[Site], str] = lambda site: "",
) -> Matches:
    """Sites and refusals of a normalised graph.

    Args:
        graph: as :func:`polyattn.passes.prepare.normalize.normalize` makes it; not changed.
        parameters: placeholders that hold parameters (the owners of a site are taken from them).
        first_index: index of the first site.
        training: whether gradients may be asked for.
        needs: see :func:`polyattn.passes.replace.training.stays`.
        why_exact: why a site is exact whatever its masks show; empty where it need not be.
    """
    context = Context(graph, frozenset(parameters))
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in graph.nodes:
        kind = packet(node)
        try:
            if kind in FUSED_LAYERS:
                raise NotAttention(
                    f"{name_of(node)} is one fused operator; torch.backends.mha.set_fastpath_enabled(False) opens it",
                    node,
                )
            if kind is SDPA:
                site = _looked_at(match_sdpa(context, node), why_exact, training, needs)
            elif kind in joint.FUSED:
                site = match_fused(context, node)
            elif kind in SOFTMAX and reaches(node, FLOWS | SEEN, PRODUCT | OTHER_PRODUCTS):
                site = _looked_at(_match_softmax(context, node), why_exact, training, needs)
                added = not site.kept and any(term.added for term in site.terms)
                left = (stays(site, needs) if training else _narrowed(site)) if added else ""
                if left:
                    exact = f"{site.exact}; in {'training' if training else 'inference'} it stays as it was: {left}"
                    site = dataclasses.replace(site, exact=exact, kept=True)
            else:
                continue
            if training and site.gradients is not None:
                raise NotAttention(joint.AGAIN, node)
        except NotAttention as refusal:
            refusals.append(Refusal(str(refusal), refusal.node.name, where(node)))
        else:
            asked = training or site.gradients is not None
            sites.append(dataclasses.replace(_grouped(site), index=first_index + len(sites), differentiated=asked))
    return Matches(tuple(sites), tuple(refusals))


# ---------------------------------------------------------------------------------------------------------------------
# softmax between two contractions


def _match_softmax(context: Context, softmax: fx.Node) -> Site:
    rank = len(shape(softmax))
    dim = int(argument(softmax, 1, "dim"))
    dim = dim - rank if dim >= 0 else dim
    if rank < 2 or dim < -2:
        raise NotAttention(f"the softmax runs over axis {dim} of {rank}, which is neither queries nor keys", softmax)
    path = [softmax]
    backward = joint.backward_of(softmax)
    if backward is None:
        product, weights_first, key_last, dropout = _forward(softmax, dim == -1, path)
    else:
        output = joint.output_of(softmax, backward, dim == -1, path)
        product, weights_first, key_last, dropout = output.user, output.left, output.way.key_last, 0.0
    if weights_first != key_last:
        raise NotAttention(
            f"the softmax runs over axis {dim}, but the product with the values sums over the other axis: "
            "the weights of a query do not add up to one",
            softmax,
        )
    left, right = _operands(product)
    v = Operand(right) if weights_first else Operand(left, transposed=True)
    walk = ScoreWalk(key_last=dim == -1)
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
    unknown = [term for term in terms if not term.causal]
    general = any(term.general for term in terms)
    looks = bool(terms) and not (walk.left or general or dropout or backward is not None)
    stays = walk.left or ("" if looks and all(term.padding for term in unknown) else unsayable(terms))
    looks = looks and not stays
    mask = ("causal + " if terms and walk.causal else "") + describe(unknown)
    mask = mask or ("causal" if walk.causal else "none")
    shown = "" if mask == "none" else " + causal mask" if mask == "causal" else f" + {mask}"
    spelling = "softmax(q @ kᵀ" + (" * s" if walk.scaled else "") + shown + ") @ v"
    exact = f"{stays}; it stays as it was" if stays else ""
    others = [term.node for term in unknown]
    reasons = [no_form(mask, walk.unproved[0] if walk.unproved else "", others)] if terms and not looks else []
    reasons += [f"dropout with p={dropout} on the weights"] if dropout else []
    exact = exact or "; ".join(reasons)
    if is_paper_form(q.node, k.node, v.node):
        spelling = spelling.replace("q @ kᵀ", "X W Xᵀ").replace("@ v", "X W_V")
    if context.autocast(product) is None:
        _check_precision(softmax, product, path)
    path.append(scores)
    causal = walk.causal and (not terms or looks)
    held = tuple(term.node for term in (*terms, *walk.factors))
    gradients = None
    if backward is not None and exact:
        stays = stays or joint.STANDS
        exact = exact if walk.left else f"{exact}; it stays as it was: {stays}"
    elif backward is not None:
        gradients = joint.gradients(softmax, backward, dim == -1, walk, (q, k, v))
        spelling += ", and its gradients"
    site = build_site(context, product, path, q, k, v, batch, score_batch, walk.scale, causal, spelling, False, held)
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
        gradients=gradients,
        scale=math.nan if walk.left else walk.scale,
        sizes=tuple(walk.sizes),
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


def _looked_at(site: Site, why_exact: Callable[[Site], str], training: bool, needs: Collection[fx.Node] | None) -> Site:
    """The site, made exact where there is no use in looking at its masks in each call, or where that cannot be."""
    site = dataclasses.replace(site, differentiated=training or site.gradients is not None)
    if not site.looks:
        return site
    reason = why_exact(site) or (unknowable(site, needs) if training else "")
    if not reason:
        return site
    unsaid = unsayable(site.terms)
    return site.made_exact(f"{unsaid}; it stays as it was" if unsaid else reason, stays=bool(unsaid))


def _narrowed(site: Site) -> str:
    """Why torch's fused attention would lose digits: autocast gives it a bias in the dtype of the queries."""
    wide = [term.node.meta["val"].dtype for term in site.terms if term.added]
    wide = [d for d in wide if site.cast is not None and d.is_floating_point and d.itemsize > site.cast.itemsize]
    return f"autocast would round the bias from {wide[0]} to {site.cast}" if wide else ""


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
    if site.exact or site.grouped or site.gradients or len(site.batch) != 2 or not same_sizes(site.q.batch, site.batch):
        return site
    found = ungroup(site.k, site.v) if same_sizes(site.score_batch, site.batch) else None
    if found is None:
        return site
    k, v = found
    kv_heads = named_shape(kv_heads=k.batch[-1])
    return dataclasses.replace(site, k=k, v=v, grouped=True, shape={**site.shape, **kv_heads})


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = product.args[0], product.args[1]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if len(shape(left)) < 2 or len(shape(right)) < 2:
        raise NotAttention("one side of the product is a vector", product)
    return left, right
