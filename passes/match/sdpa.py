"""Attention that is written as torch's own call: ``scaled_dot_product_attention``, or, below autograd, the fused
operator of a device, with its backward where that stands in the graph."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match import axes, joint
from polyattn.passes.match.axes import NotAttention, packet, same_sizes
from polyattn.passes.match.bias import FILL, MaskTerm, no_form
from polyattn.passes.match.build import build_site
from polyattn.passes.match.context import Context
from polyattn.passes.match.scores import name_of, number, prove, users
from polyattn.passes.match.site import Gradients, Operand, Site

SDPA = torch.ops.aten.scaled_dot_product_attention
_SAVED = ("query", "key", "value", "out", "logsumexp")
_SETTING = ("is_causal", "scale", "dropout_p")


@dataclasses.dataclass(frozen=True)
class _Form:
    """What a call computes, as far as it can be told when compiling."""

    scale: float
    causal: bool
    mask: str
    exact: str
    dropout: float
    sizes: tuple[tuple[fx.Node, int], ...] = ()
    by_head_dim: bool = False
    terms: tuple[MaskTerm, ...] = ()

    def without_looks(self) -> _Form:
        """The form of a call whose masks cannot be looked at in each run: it is exact, where it has any."""
        if not self.terms or self.exact:
            return self
        return dataclasses.replace(self, exact=no_form(self.mask, "", [term.node for term in self.terms]))

    def of(self, site: Site, exact: str, gradients: Gradients | None = None) -> Site:
        return dataclasses.replace(
            site,
            mask=self.mask,
            dropout=self.dropout,
            sizes=self.sizes,
            by_head_dim=self.by_head_dim,
            terms=self.terms,
            zero_rows=True,
            exact=exact,
            kept=bool(exact),
            gradients=gradients,
        )


def match_sdpa(context: Context, node: fx.Node) -> Site:
    """The site of a call of ``scaled_dot_product_attention``."""
    given = _arguments(node)
    q, k, v = (Operand(given[name]) for name in ("query", "key", "value"))
    form = _form(context, node, given, q, k)
    grouped = False
    batch = axes.broadcast(axes.broadcast(q.batch, k.batch) or (), v.batch)
    if given["enable_gqa"]:
        grouped = len(q.batch) > 0 and not same_sizes(q.batch[-1:], k.batch[-1:])
        batch = q.batch
        if grouped and not (same_sizes(q.batch[:-1], k.batch[:-1]) and same_sizes(k.batch, v.batch)):
            raise NotAttention("grouped queries with broadcast batch axes", node)
    name = "scaled_dot_product_attention"
    if batch is not None:  # the batch axes of the scores
        form = dataclasses.replace(form, terms=tuple(dataclasses.replace(t, batch=tuple(batch)) for t in form.terms))
    held = tuple(term.node for term in form.terms)
    site = build_site(context, node, [], q, k, v, batch, batch, form.scale, form.causal, name, grouped, held)
    return form.of(site, form.exact)


def match_fused(context: Context, node: fx.Node) -> Site:
    """The site of a device's fused operator and, if it stands there, of its backward."""
    given = _arguments(node)
    q, k, v = (Operand(given[name]) for name in ("query", "key", "value"))
    if not (same_sizes(q.batch, k.batch) and same_sizes(k.batch, v.batch)):
        raise NotAttention(f"{name_of(node)} with heads that are grouped", node)
    form = _form(context, node, given, q, k).without_looks()
    results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if 0 not in results or len(results) != len(node.users):
        raise NotAttention(f"the results of {name_of(node)} are used as a whole", node)
    backward = next((u for u in users(results[0]) if packet(u) is joint.FUSED[packet(node)]), None)
    if any(user is not backward for at, result in results.items() if at for user in users(result)):
        raise NotAttention("the log-sum-exp of the attention is used elsewhere", node)
    exact = form.exact and f"{form.exact}; it stays as it was: {joint.STANDS}" if backward is not None else form.exact
    name = "scaled_dot_product_attention" + ("" if backward is None or exact else ", and its gradients")
    out = results[0]
    site = build_site(context, out, [node], q, k, v, q.batch, q.batch, form.scale, form.causal, name, False)
    gradients = None if backward is None or exact else _gradients(backward, given, results)
    return form.of(site, exact, gradients)


def _gradients(backward: fx.Node, forward: dict[str, Any], results: dict[Any, fx.Node]) -> Gradients:
    given = _arguments(backward)
    saved = {**forward, "out": results[0], "logsumexp": results.get(1)}
    if any(given[name] is not saved[name] for name in _SAVED) or any(given[n] != saved[n] for n in _SETTING):
        raise NotAttention("the gradient is that of another attention", backward)
    found: dict[Any, Operand] = {}
    for user in backward.users:
        if user.target is not operator.getitem or user.args[1] not in (0, 1, 2) or user.args[1] in found:
            raise NotAttention(f"the results of {name_of(backward)} are used as a whole", backward)
        found[user.args[1]] = Operand(user)
    g = given["grad_out"] if "grad_out" in given else given["grad_out_"]
    return Gradients(Operand(*joint.canonical(Operand(g))), *(found.get(at) for at in range(3)))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, defaults included."""
    given: dict[str, Any] = {}
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
        given[argument.name] = value
    return given


def _form(context: Context, node: fx.Node, given: dict[str, Any], q: Operand, k: Operand) -> _Form:
    scale, exact = given["scale"], ""
    by_head_dim = scale is None and not isinstance(q.features, int)
    sizes = ((scale, 1),) if isinstance(scale, fx.Node) else ()
    if scale is None or sizes:
        scale = 1.0 if by_head_dim or sizes else 1 / math.sqrt(q.features)
    causal = bool(given["is_causal"])
    dropout = number(given["dropout_p"], node)
    if dropout:
        exact = f"dropout with p={dropout} on the weights"
    kind = "causal" if causal else "none"
    mask = given.get("attn_mask", given.get("attn_bias"))
    terms: tuple[MaskTerm, ...] = ()
    if mask is not None:
        boolean = isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool
        proof = prove(context, mask, (q.tokens, k.tokens), True, True if boolean else 0.0, FILL)
        if proof.visible is not None and not proof.visible.keyed:
            causal = proof.visible.causal or causal
            kind = "causal" if causal else kind
        else:
            term = MaskTerm(mask, q.batch, False, added=not boolean, fill=-math.inf)
            term = dataclasses.replace(term, visible=proof.visible, general=proof.general)
            kind = ("causal + " if proof.visible is not None and proof.visible.causal else "") + term.word
            if term.general or dropout or causal:
                exact = "; ".join([no_form(kind, proof.reason, [mask]), *([exact] if exact else [])])
            terms = (term,)
    return _Form(float(scale), causal, kind, exact, dropout, sizes, by_head_dim, terms)
