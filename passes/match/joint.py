"""Attention that arrives already differentiated: its gradients stand in the same graph, and are replaced with it.

Where a compiled function calls ``torch.func.grad``, ``vjp`` or ``jacrev``, the graph holds, beside S = s·q kᵀ,
P = softmax(S) and O = P v, for the gradient g of O,

    dv = Pᵀ g;   dP = g vᵀ;   dS = softmax_backward(dP, P);   dq = s·dS k;   dk = s·dSᵀ q

or torch's fused operator and its backward. Products are told apart by the axis that they sum over (keys: O, dq;
queries: dv, dk); their other operand must be the very v, g, k or q of the forward, up to views that only regroup batch
axes; the scale between dS and the products must be the forward's, and masks there must be the forward's, where P is 0.

Not matched, because the operator's backward has no gradient itself: such a graph whose inputs require gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match import masks
from polyattn.passes.match.axes import (
    REGROUP,
    SAME,
    TRANSPOSE,
    NotAttention,
    keeps_pair,
    one,
    packet,
    reaches,
    same_sizes,
    shape,
    swaps_pair,
)
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.match.masks import Unprovable
from polyattn.passes.match.scores import CARRIES, DROPOUT, PRODUCT, ScoreWalk, carry, name_of, number, users
from polyattn.passes.match.site import Gradients, Operand
from polyattn.passes.replace.writer import ValuedWriter

_aten = torch.ops.aten
SOFTMAX_BACKWARD = {_aten._softmax_backward_data}
FUSED = {
    getattr(_aten, name): getattr(_aten, f"{name}_backward")
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}
"""What ``scaled_dot_product_attention`` is below autograd, and the backward of each."""
STANDS = "its gradients stand in the graph beside it"
AGAIN = (
    "it stands in one graph with gradients (torch.func), which may be differentiated again because an input of the "
    "graph requires a gradient; it is replaced under torch.no_grad() or with detached inputs"
)
_IDLE = {_aten.detach, _aten.alias}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a value of the axes (query, key) reaches a node."""

    key_last: bool
    path: tuple[fx.Node, ...]
    scale: float = 1.0
    sizes: tuple[tuple[fx.Node, int], ...] = ()
    """Dynamic sizes on the way, as :class:`polyattn.passes.match.scores.Walk` has them."""
    masks: tuple[tuple[fx.Node, bool], ...] = ()
    """Masks that set it to zero on the way, canonical (:func:`canonical`) and as (query, key)."""

    def scaled(self, factor: float | tuple[fx.Node, int]) -> Way:
        """The way with one more factor: a number, or a dynamic size and its power."""
        if isinstance(factor, tuple):
            return dataclasses.replace(self, sizes=(*self.sizes, factor))
        return dataclasses.replace(self, scale=self.scale * factor)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A call that reads a value of the axes (query, key), and how the value reaches it."""

    user: fx.Node
    source: fx.Node
    way: Way

    @property
    def left(self) -> bool:
        """Whether the value is the left operand of the product."""
        return self.user.args[0] is self.source

    @property
    def over_keys(self) -> bool:
        """Whether the product sums over the keys (else over the queries)."""
        return self.left is self.way.key_last

    @property
    def other(self) -> Operand:
        """The other operand, as [what is summed over, features]."""
        node = self.user.args[1 if self.left else 0]
        assert isinstance(node, fx.Node)
        return Operand(node, transposed=not self.left)

    @property
    def result(self) -> Operand:
        """The gradient that the last product of the way yields."""
        return Operand(self.user, transposed=not self.left)


def backward_of(softmax: fx.Node) -> fx.Node | None:
    """The backward of this softmax in its graph, or None."""
    if not reaches(softmax, CARRIES | _IDLE | {_aten.expand}, SOFTMAX_BACKWARD):
        return None
    return next((r.user for r in _readers(softmax, True) if packet(r.user) in SOFTMAX_BACKWARD), None)


def output_of(softmax: fx.Node, backward: fx.Node, key_last: bool, path: list[fx.Node]) -> Reader:
    """The product of the weights and the values; written into the graph where only the gradients are asked for.

    Raises:
        NotAttention: the weights are used for anything but the output and the gradients.
    """
    found = _readers(softmax, key_last)
    for reader in found:
        if reader.user is not backward and packet(reader.user) not in PRODUCT:
            raise NotAttention("the attention weights are used elsewhere", reader.user)
    made = [r for r in found if packet(r.user) in PRODUCT and r.over_keys]
    if len(made) > 1:
        raise NotAttention("the attention weights meet two values", softmax)
    if made and made[0].user.args[0] is made[0].user.args[1]:
        raise NotAttention("the attention weights are multiplied by themselves", made[0].user)
    if not made:
        made = [_write_output(softmax, backward, key_last)]
    path.extend(made[0].way.path)
    return made[0]


def gradients(
    softmax: fx.Node, backward: fx.Node, key_last: bool, walk: ScoreWalk, operands: tuple[Operand, Operand, Operand]
) -> Gradients:
    """The gradients of a matched attention.

    Args:
        key_last: whether the softmax runs over the last axis (else over the one before it).
        walk: the way from the scores' product to the softmax.
        operands: q, k and v of the forward.
    Raises:
        NotAttention: what stands there is not the gradient of this attention, or something else as well.
    """
    q, k, v = operands
    weights = _readers(softmax, key_last)
    if not any(r.user is backward and r.source is argument(backward, 1, "output") for r in weights):
        raise NotAttention("the gradient of another softmax", backward)
    if int(argument(backward, 2, "dim")) % len(shape(backward)) != len(shape(backward)) - (1 if key_last else 2):
        raise NotAttention("the gradient of a softmax over another axis", backward)
    g, values = _gradient_of_weights(backward, key_last)
    _check_same(values, v, "values", backward)
    found: dict[str, Operand] = {}
    for reader in weights:
        if packet(reader.user) in PRODUCT and not reader.over_keys:
            _check_same(reader.other, g, "gradient of the output", reader.user)
            _add(found, "dv", reader.result)
    hidden = {canonical(Operand(mask, transposed=swapped)) for mask, swapped in walk.masks}
    for reader in _readers(backward, key_last, gradient=True):
        if packet(reader.user) not in PRODUCT:
            raise NotAttention(f"the gradient of the scores goes through {name_of(reader.user)}", reader.user)
        result = _scaled(reader, walk)
        if not hidden.issuperset(reader.way.masks):
            raise NotAttention("the gradient has a mask that the scores have not", reader.user)
        _check_same(reader.other, k if reader.over_keys else q, "keys" if reader.over_keys else "queries", reader.user)
        _add(found, "dq" if reader.over_keys else "dk", result)
    return Gradients(Operand(*canonical(g)), found.get("dq"), found.get("dk"), found.get("dv"))


def _add(found: dict[str, Operand], name: str, result: Operand) -> None:
    if name in found:
        raise NotAttention(f"the gradient {name} is formed twice", result.node)
    found[name] = result


def _scaled(reader: Reader, walk: ScoreWalk) -> Operand:
    """The product of a gradient that is scaled like the scores, before the product or (baddbmm) after it."""
    result, way = reader.result, reader.way
    while not (math.isclose(way.scale, walk.scale, rel_tol=1e-12) and _names(way.sizes) == _names(walk.sizes)):
        node = result.node
        (user,) = users(node) if len(users(node)) == 1 else (None,)
        factor = _factor(user, node) if user is not None and packet(user) in (_aten.mul, _aten.div) else None
        if user is not None and packet(user) in REGROUP and keeps_pair(node, user):
            factor = 1.0
        if user is None or factor is None:
            raise NotAttention(f"the gradient is scaled by {_said(reader.way)}, the scores by {_said(walk)}", node)
        result, way = dataclasses.replace(result, node=user), way.scaled(factor)
    return result


def _names(sizes: Sequence[tuple[fx.Node, int]]) -> list[tuple[str, int]]:
    return sorted((str(node.meta["val"]), power) for node, power in sizes)


def _said(way: Way | ScoreWalk) -> str:
    return " ".join([f"{way.scale:g}", *(f"{'*' if power > 0 else '/'} {name}" for name, power in _names(way.sizes))])


def _gradient_of_weights(backward: fx.Node, key_last: bool) -> tuple[Operand, Operand]:
    """g and v of the product dP = g vᵀ, each as [tokens, features]."""
    node: Any = argument(backward, 0, "grad_output")
    user = backward
    while packet(node) not in PRODUCT:
        if (packet(node) not in CARRIES and packet(node) is not _aten.expand) or packet(node) in DROPOUT:
            what = name_of(node) if isinstance(node, fx.Node) and node.op == "call_function" else "an input"
            raise NotAttention(f"the gradient of the weights comes through {what}", user)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        key_last ^= carry(node, source, "weights' gradient")
        node, user = source, node
    if len(users(node)) != 1:
        raise NotAttention("the gradient of the attention weights is used elsewhere", node)
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rows, columns = Operand(left), Operand(right, transposed=True)
    return (rows, columns) if key_last else (columns, rows)


def _readers(start: fx.Node, key_last: bool, *, gradient: bool = False) -> list[Reader]:
    """Who reads a value of the axes (query, key), past views and casts; of gradients also past scales and masks."""
    found: list[Reader] = []
    stack = [(start, Way(key_last, (start,)))]
    while stack:
        node, way = stack.pop()
        for user in users(node):
            step = _step(node, user, way, gradient)
            if step is None:
                found.append(Reader(user, node, way))
            else:
                stack.append((user, dataclasses.replace(step, path=(*way.path, user))))
    order = {node: position for position, node in enumerate(start.graph.nodes)}
    return sorted(found, key=lambda reader: order[reader.user])


def _step(node: fx.Node, user: fx.Node, way: Way, gradient: bool) -> Way | None:
    """The way past one more call; None where the call does something with the value."""
    kind = packet(user)
    if kind in _IDLE:
        return way
    if kind in CARRIES - DROPOUT or kind is _aten.expand:
        if user.args[0] is not node or (kind is _aten.expand and _numel_changes(node, user)):
            return None
        return dataclasses.replace(way, key_last=way.key_last ^ _turned(user, node))
    if gradient and kind in (_aten.mul, _aten.div):
        factor = _factor(user, node)
        return None if factor is None else way.scaled(factor)
    if gradient and kind in (_aten.masked_fill, _aten.where):
        mask = _zeroed(user, node)
        if mask is not None:
            return dataclasses.replace(way, masks=(*way.masks, canonical(Operand(mask, transposed=not way.key_last))))
    return None


def _turned(user: fx.Node, node: fx.Node) -> bool:
    return carry(user, node, "weights") if packet(user) is not _aten.expand else False


def _numel_changes(source: fx.Node, result: fx.Node) -> bool:
    """Whether an expand does more than put axes of size one in front."""
    return not same_sizes(_trimmed(shape(source)), _trimmed(shape(result)))


def _trimmed(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without leading axes of size one, the last two excepted."""
    sizes = tuple(sizes)
    while len(sizes) > 2 and one(sizes[0]):
        sizes = sizes[1:]
    return sizes


def _factor(node: fx.Node, source: fx.Node) -> float | tuple[fx.Node, int] | None:
    """The number or dynamic size that a gradient is multiplied by; None where it is neither."""
    left, right = node.args[0], node.args[1]
    if packet(node) is _aten.mul and right is source:
        left, right = right, left
    if left is not source or node.kwargs.get("rounding_mode") is not None:
        return None
    if isinstance(right, fx.Node):
        power = 1 if packet(node) is _aten.mul else -1
        return None if isinstance(right.meta["val"], torch.Tensor) else (right, power)
    factor = number(right, node)
    return factor if packet(node) is _aten.mul else 1 / factor if factor else None


def _zeroed(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """The mask by which a gradient is set to zero; None where something else happens."""
    if packet(node) is _aten.masked_fill:
        kept, mask, value = node.args[:3]
    else:
        mask, kept, value = node.args[:3]
        if kept is not source:
            kept, value = value, kept
    if kept is not source or not isinstance(mask, fx.Node):
        return None
    if isinstance(value, fx.Node):
        try:
            constant = masks.step(value)
        except Unprovable:
            return None
        value = constant.everywhere
    return mask if isinstance(value, (int, float)) and value == 0 else None


def canonical(operand: Operand) -> tuple[fx.Node, bool]:
    """What an operand is a view of, past views that keep its pair of axes and only regroup the batch; and whether the
    pair is turned round."""
    node, turned = operand.node, operand.transposed
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        source, kind = node.args[0], packet(node)
        if kind in SAME | _IDLE:
            pass
        elif kind in TRANSPOSE:
            swaps = swaps_pair(node)
            if swaps is None:
                break
            turned ^= swaps
        elif kind in REGROUP:
            if not keeps_pair(source, node):
                break
        elif kind is not _aten.expand or _numel_changes(source, node):
            break
        node = source
    return node, turned


def _check_same(found: Operand, wanted: Operand, what: str, node: fx.Node) -> None:
    if canonical(found) != canonical(wanted):
        raise NotAttention(f"the gradient is formed with other {what} than the attention", node)


def _write_output(softmax: fx.Node, backward: fx.Node, key_last: bool) -> Reader:
    """The product P v where the graph lacks it because nobody reads it: the operator's backward does."""
    _, values = _gradient_of_weights(backward, key_last)
    first = next(r.user for r in _readers(softmax, key_last) if r.user is backward or packet(r.user) in PRODUCT)
    order = {node: position for position, node in enumerate(softmax.graph.nodes)}
    root, turned = canonical(values)
    if order[root] > order[first] or len(shape(softmax)) < 2:
        raise NotAttention("the values come after the gradient", backward)
    write = ValuedWriter(first)
    weights = softmax if key_last else write.call(_aten.transpose.int, softmax, -2, -1)
    v = write.call(_aten.transpose.int, root, -2, -1) if turned else root
    tokens, features = shape(v)[-2:]
    batch = shape(softmax)[:-2]
    if not same_sizes(_trimmed(shape(v))[:-2], _trimmed(shape(softmax))[:-2]):
        if not all(isinstance(size, int) for size in (*batch, tokens, features)):
            raise NotAttention("the values' batch axes are symbolic and grouped otherwise", backward)
        v = write.call(_aten.reshape.default, v, [*batch, tokens, features])
    if weights.meta["val"].dtype != v.meta["val"].dtype:
        weights = write.call(_aten.to.dtype, weights, v.meta["val"].dtype)
    made = write.call(_aten.matmul.default, weights, v)
    return Reader(made, weights, Way(True, (softmax,)))
