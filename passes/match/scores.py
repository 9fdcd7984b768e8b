"""The walk from a softmax back to the product of queries and keys: scales and masks are read on the way.

Scales must be Python numbers and casts upward; masks and biases are kept as terms (:mod:`polyattn.passes.match.bias`),
with the proof that one is causal where there is one; whatever else stands there is refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from polyattn.passes.match import axes, masks
from polyattn.passes.match.axes import CAST, REGROUP, SAME, TRANSPOSE, NotAttention, packet, same_sizes, shape
from polyattn.passes.match.bias import FILL, MaskTerm
from polyattn.passes.match.context import Context
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.match.masks import StepFunction, Unprovable, Varies, Visible

_aten = torch.ops.aten
PRODUCT = {_aten.matmul, _aten.mm, _aten.bmm}
OTHER_PRODUCTS = {
    _aten.einsum,
    _aten.baddbmm,
    _aten.addmm,
    _aten.addbmm,
    _aten.linear,
    _aten.mv,
    _aten.tensordot,
    _aten.dot,
}
DROPOUT = {_aten.dropout, _aten.native_dropout, _aten.dropout_, _aten.feature_dropout, _aten.alpha_dropout}
CARRIES = SAME | CAST | REGROUP | TRANSPOSE | DROPOUT
FLOWS = CARRIES | {
    _aten.expand,
    _aten.mul,
    _aten.div,
    _aten.add,
    _aten.sub,
    _aten.masked_fill,
    _aten.where,
    _aten.slice,
    _aten.tanh,
}


@dataclasses.dataclass
class ScoreWalk:
    """State of the walk from the softmax back to the scores."""

    key_last: bool
    scale: float = 1.0
    sizes: list[tuple[fx.Node, int]] = dataclasses.field(default_factory=list)
    """Dynamic sizes that the scores are multiplied by (1) or divided by (-1) beside ``scale``."""
    scaled: bool = False
    causal: bool = False
    terms: list[MaskTerm] = dataclasses.field(default_factory=list)
    """Masks and biases, from the softmax back to the product; those that are provably causal are marked so."""
    factors: list[MaskTerm] = dataclasses.field(default_factory=list)
    """Tensors that scale whole rows of scores: they go to the queries."""
    masks: list[tuple[fx.Node, bool]] = dataclasses.field(default_factory=list)
    """What filled or was added, even where it hides nothing; and whether its last axes are (key, query)."""
    unproved: list[str] = dataclasses.field(default_factory=list)
    """Why a mask or bias is not known to be causal."""
    left: str = ""
    """Why the attention, although it is one, must stay as it is written."""


def walk_back(context: Context, softmax: fx.Node, walk: ScoreWalk, path: list[fx.Node]) -> fx.Node:
    """From the softmax to the contraction of queries and keys; scale and mask are collected in ``walk``."""
    node, user = softmax.args[0], softmax
    while True:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            raise NotAttention("the scores are an input, not a product of queries and keys", user)
        if len(users(node)) != 1:
            raise NotAttention("the attention scores are used elsewhere", node)
        kind = packet(node)
        if kind in PRODUCT:
            return node
        if kind in OTHER_PRODUCTS:
            raise NotAttention(f"the scores are made by {name_of(node)}, which is not matched yet", node)
        path.append(node)
        user = node
        if kind in CARRIES or kind is _aten.expand:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if kind in CAST and context.autocast(node) is None:
                check_upcast(source, node)
            walk.key_last ^= carry(node, source, "scores")
            node = source
        elif kind is _aten.tanh and isinstance(node.args[0], fx.Node):
            walk.left = "the logits are capped by tanh, which neither a low-rank form nor torch's fused kernel has"
            node = node.args[0]
        elif kind in (_aten.mul, _aten.div):
            node = _scale(node, walk)
        elif kind in (_aten.add, _aten.sub):
            node = _added(context, node, walk)
        elif kind in (_aten.masked_fill, _aten.where):
            node = _filled(context, node, walk)
        else:
            raise NotAttention(f"the scores pass through {name_of(node)}, which is not part of softmax attention", node)


def carry(node: fx.Node, source: fx.Node, what: str) -> bool:
    """Whether a view, cast or idle dropout exchanges the query and key axes; refuses everything that moves them
    otherwise."""
    kind = packet(node)
    if kind in TRANSPOSE:
        swapped = axes.swaps_pair(node)
        if swapped is None:
            raise NotAttention(f"the axes of the attention {what} are permuted, as where heads are mixed", node)
        return swapped
    if kind in REGROUP and not axes.keeps_pair(source, node):
        raise NotAttention(f"a view mixes the query and key axes of the attention {what}", node)
    if kind is _aten.expand and not same_sizes(shape(source), shape(node)):
        raise NotAttention(f"the attention {what} are expanded", node)
    if kind in DROPOUT and dropout_rate(node) != 0:
        raise NotAttention(f"dropout with p={dropout_rate(node)} on the attention {what}", node)
    return False


def dropout_rate(node: fx.Node) -> float:
    """The probability with which a dropout zeroes: 0 outside training."""
    rate, train = argument(node, 1, "p"), argument(node, 2, "train")
    return number(rate, node) if train or train is None else 0.0


def check_upcast(source: fx.Node, node: fx.Node) -> None:
    """Refuse a cast of the scores to a dtype that holds fewer digits.

    Raises:
        NotAttention: the dtype is narrower than, or another one as wide as, that of the source.
    """
    old, new = source.meta["val"].dtype, node.meta["val"].dtype
    if not new.is_floating_point or new.itemsize < old.itemsize or (new.itemsize == old.itemsize and new != old):
        raise NotAttention(f"the scores are cast from {old} to {new}", node)


def _scale(node: fx.Node, walk: ScoreWalk) -> fx.Node:
    left, right = node.args[0], node.args[1]
    if packet(node) is _aten.mul and not isinstance(left, fx.Node):
        left, right = right, left
    if len(node.args) > 2 or node.kwargs.get("rounding_mode") is not None:
        raise NotAttention("the scores are divided with rounding", node)
    if isinstance(right, fx.Node) and torch.is_tensor(right.meta.get("val")):
        return _scale_by_tensor(node, walk, left, right)
    if not isinstance(left, fx.Node):
        raise NotAttention("a number is divided by the scores", node)
    if isinstance(right, fx.Node):
        if not axes.positive(right.meta["val"]):
            raise NotAttention("the scale is a dynamic number that may not be positive", node)
        walk.sizes.append((right, 1 if packet(node) is _aten.mul else -1))
        walk.scaled = True
        return left
    factor = number(right, node)
    if packet(node) is _aten.div and factor == 0:
        raise NotAttention("the scores are divided by zero", node)
    walk.scale = walk.scale * factor if packet(node) is _aten.mul else walk.scale / factor
    walk.scaled = True
    return left


def _scale_by_tensor(node: fx.Node, walk: ScoreWalk, left: Any, right: fx.Node) -> fx.Node:
    """A learned temperature, one number or one per head or query: it scales the queries as well."""
    divided = packet(node) is _aten.div
    if not divided and _makes_scores(right) and not _makes_scores(left):
        left, right = right, left
    if not isinstance(left, fx.Node):
        raise NotAttention("a number is divided by the scores", node)
    sizes = shape(right)
    keys = sizes[-1:] if walk.key_last else sizes[-2:-1]
    if not all(axes.one(size) for size in keys) or not right.meta["val"].dtype.is_floating_point:
        raise NotAttention("the scores are scaled by a tensor that varies along the keys", node)
    if not same_sizes(shape(left), shape(node)):
        raise NotAttention("the scale broadcasts the scores", node)
    walk.factors.append(
        MaskTerm(right, tuple(shape(left)[:-2]), not walk.key_last, added=False, factor=-1.0 if divided else 1.0)
    )
    walk.scaled = True
    return left


def number(value: Any, node: fx.Node) -> float:
    """A finite Python number as a float; anything else is refused."""
    if isinstance(value, fx.Node):
        raise NotAttention("the scale depends on a dynamic size", node)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise NotAttention(f"the scale is {value}", node)
    return float(value)


def _added(context: Context, node: fx.Node, walk: ScoreWalk) -> fx.Node:
    left, right = node.args[0], node.args[1]
    if node.kwargs.get("alpha", 1) != 1:
        raise NotAttention(f"the scores pass through {name_of(node)} with alpha={node.kwargs['alpha']}", node)
    minus = packet(node) is _aten.sub
    scores, other = (right, left) if _makes_scores(right) and not _makes_scores(left) else (left, right)
    if minus and scores is right:
        raise NotAttention("the scores are subtracted from something", node)
    if not isinstance(scores, fx.Node) or not isinstance(other, fx.Node):
        raise NotAttention("a number is added to the scores", node)
    if not torch.is_tensor(other.meta.get("val")):
        raise NotAttention("a dynamic size is added to the scores", node)
    proof = Proof() if minus else _proved(context, other, node, scores, walk, 0.0)
    factor = -walk.scale if minus else walk.scale
    if not proof.plain and not other.meta["val"].dtype.is_floating_point:
        raise NotAttention(f"a tensor of {other.meta['val'].dtype} is added to the scores", node)
    _keep(walk, node, scores, other, proof, added=True, factor=factor)
    return scores


def _filled(context: Context, node: fx.Node, walk: ScoreWalk) -> fx.Node:
    if packet(node) is _aten.masked_fill:
        scores, mask, value, keep = node.args[0], node.args[1], node.args[2], False
    else:
        mask, scores, value = node.args[0], node.args[1], node.args[2]
        keep = True
        if not _makes_scores(scores):
            scores, value, keep = value, scores, False
    if isinstance(value, fx.Node):
        try:
            constant = masks.step(value)
        except Unprovable:
            constant = None
        context.check_unmutated(value, node)
        number = None if constant is None else constant.everywhere
        value = "a tensor" if number is None else number
    if not isinstance(scores, fx.Node):
        raise NotAttention("where() does not choose between the scores and a number", node)
    if not isinstance(value, (int, float)) or not value <= _least(walk):
        scaled = f" and multiplied by {walk.scale}" if walk.scale != 1 else ""
        raise NotAttention(f"scores are set to {value}{scaled}: that replaces them, it does not mask them", node)
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        kind = mask.meta["val"].dtype if isinstance(mask, fx.Node) else type(mask).__name__
        raise NotAttention(f"the mask is {kind}, not bool", node)
    proof = _proved(context, mask, node, scores, walk, keep)
    _keep(walk, node, scores, mask, proof, added=False, keep=keep, fill=_rounded(float(value) * walk.scale, node))
    return scores


def _rounded(value: float, node: fx.Node) -> float:
    """A number as the scores hold it: the smallest one, multiplied, is -inf."""
    return float(torch.tensor(value, dtype=node.meta["val"].dtype))


def _proved(context: Context, mask: fx.Node, node: fx.Node, scores: fx.Node, walk: ScoreWalk, keep: Any) -> Proof:
    proof = prove(context, mask, tuple(shape(scores)[-2:]), walk.key_last, keep, _least(walk))
    if not proof.plain:
        walk.unproved.append(proof.reason)
    return proof


def _least(walk: ScoreWalk) -> float:
    """What masks a score here: FILL, once the scales that follow have been applied."""
    if walk.sizes:
        return -math.inf
    return FILL / walk.scale if walk.scale > 0 else FILL


def _keep(walk: ScoreWalk, node: fx.Node, scores: fx.Node, other: fx.Node, proof: Proof, **how: Any) -> None:
    """Record a mask or bias; one that hides nothing is dropped."""
    if walk.scale <= 0:
        raise NotAttention(f"a mask is multiplied by {walk.scale}", node)
    if (walk.factors or walk.sizes) and (proof.visible is None or how["added"] or how["fill"] != -math.inf):
        by = "a tensor" if walk.factors else "a dynamic size"
        raise NotAttention(f"a mask or bias is multiplied by {by}", node)
    if not same_sizes(shape(scores), shape(node)):
        raise NotAttention("the mask broadcasts the scores", node)
    visible = proof.visible
    walk.causal |= visible is not None and visible.causal
    walk.masks.append((other, not walk.key_last))
    if visible is None or visible.causal or visible.keyed:
        batch = tuple(shape(scores)[:-2])
        walk.terms.append(MaskTerm(other, batch, not walk.key_last, visible=visible, general=proof.general, **how))


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the structure of a mask tells."""

    visible: Visible | None = None
    """The pairs that it shows, as far as they are known; None where they are not, or where no such words say it."""
    general: bool = False
    """It is known to be neither causal nor the same for all queries."""
    reason: str = "the bias is subtracted"
    """Why it is not known to be causal, in words for a report."""

    @property
    def plain(self) -> bool:
        """Whether it is known whole: causal, or hiding nothing."""
        return self.visible is not None and not self.visible.keyed


def prove(
    context: Context, mask: Any, pair: tuple[Any, ...], key_last: bool, keep: Any, least: float = -math.inf
) -> Proof:
    """What a mask for scores with these last axes shows.

    Args:
        keep: its value where a pair is shown: True or False of a bool mask, 0.0 of one that is added.
        least: of the latter, up to which value it hides a pair.
    """
    try:
        value = masks.step(mask)
        context.check_unmutated(mask, mask)
    except (Unprovable, NotAttention) as reason:
        return Proof(reason=str(reason))
    dtype = mask.meta["val"].dtype if isinstance(mask, fx.Node) else torch.bool
    if isinstance(keep, bool) and dtype != torch.bool:
        return Proof(reason=f"the mask is {dtype}, not bool")
    placed = _of_pairs(value, mask, pair)
    if placed is None:
        return Proof(reason="the mask is broadcast along its query or key axis")
    reached = placed.within(*pair)
    reached = reached if key_last else reached.transposed()
    found = masks.visible(
        reached, keep=keep, hidden=lambda v: v is (not keep) if isinstance(keep, bool) else v <= least
    )
    if found is not None and not found.keyed:
        return Proof(found, reason="")
    return Proof(found, found is None and masks.known(value), f"the mask is not causal: {masks.describe(value)}")


def _of_pairs(value: StepFunction, mask: Any, pair: tuple[Any, ...]) -> StepFunction | None:
    """The meaning of a mask for scores of this size: a mask with one row, say, is the same for all queries; None where
    it is broadcast otherwise."""
    if not value.axes:
        return value
    sizes = shape(mask)[-2:]
    grows = [axis for axis in (-2, -1) if len(sizes) < -axis or not same_sizes([sizes[axis]], [pair[axis]])]
    if not grows:
        return value
    if any(axis in value.axes and len(sizes) >= -axis and not axes.one(sizes[axis]) for axis in grows):
        return None
    known = [v.choices if isinstance(v, Varies) else frozenset((v,)) for _, v in value.pieces]
    choices = None if any(some is None for some in known) else frozenset[Any]().union(*(some or () for some in known))
    return StepFunction.constant(Varies(value.axes - frozenset(grows), choices))


def _makes_scores(node: Any) -> bool:
    """Whether a value comes from a contraction through operators that carry scores."""
    while isinstance(node, fx.Node):
        kind = packet(node)
        if kind in PRODUCT or kind in OTHER_PRODUCTS:
            return True
        if kind not in FLOWS:
            return False
        sources = [value for value in node.args if isinstance(value, fx.Node)]
        if kind is _aten.where:
            return any(_makes_scores(value) for value in sources[1:])
        if len(sources) > 1 and kind in (_aten.add, _aten.mul):
            return any(_makes_scores(value) for value in sources)
        node = sources[0] if sources else None
    return False


_SIZE_QUERIES = {_aten.sym_size, _aten.sym_stride, _aten.sym_numel, _aten.sym_storage_offset}


def users(node: fx.Node) -> list[fx.Node]:
    """Who reads a node; queries of its size do not count."""
    return [user for user in node.users if packet(user) not in _SIZE_QUERIES]


def name_of(node: fx.Node) -> str:
    """The operator of a node, for reasons."""
    kind = packet(node)
    return str(kind).removeprefix("aten.") if kind is not None else str(getattr(node.target, "__name__", node.target))
