"""What training asks of a graph: the values that need gradients, and the attention that must stay as it is written."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.codegen import targets
from polyattn.passes.match.axes import packet
from polyattn.passes.match.site import Site
from polyattn.passes.prepare.normalize import checkpoint_body, mutated_arguments, roots

_aten = torch.ops.aten
_FREE = {
    _aten.detach,
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.empty_like,
    _aten.rand_like,
    _aten.randn_like,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
    _aten.new_empty,
}
"""Operators that read a tensor and pass no gradient to it."""


def needing(gm: fx.GraphModule, given: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Nodes of a normalised graph, and of the checkpointed bodies in it, whose values may need gradients.

    Fake values do not tell: they are kept detached. Errs on one side: a value outside does not need one.

    Args:
        given: nodes that are known to need one, such as placeholders; parameters held by the module are added.
    """
    table, on = roots(gm.graph), True
    found, written = set(given), set[fx.Node]()
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            on = bool(node.args[0])
        if node.op == "get_attr" and getattr(_attribute(gm, node), "requires_grad", False):
            found.add(node)
        if not on or node.op != "call_function" or packet(node) in _FREE or _whole(node):
            continue
        body = checkpoint_body(node)
        if body is not None:
            inner = [inside for inside in body.graph.nodes if inside.op == "placeholder"]
            pairs = zip(inner, node.args[1:], strict=False)
            found |= needing(body, {inside for inside, outside in pairs if outside in found})
        if any(source in found or table[source] in written for source in node.all_input_nodes):
            found.add(node)
            written.update(table[target] for target in mutated_arguments(node))
    return frozenset(found | {node for node in table if table[node] in written})


def needing_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> frozenset[fx.Node]:
    """The placeholders whose example inputs require gradients."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return frozenset(
        node for node, value in zip(nodes, example_inputs, strict=True) if getattr(value, "requires_grad", False)
    )


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(gm)


def _whole(node: fx.Node) -> bool:
    """A tensor of integers or truth values, which has no gradient."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


def stays(site: Site, needs: Collection[fx.Node] | None) -> str:
    """Why a site with an added mask or bias must stay as it is written in training; empty where it need not.

    Torch's fused backward is wrong for rows that such a mask hides, so that an operator of our own takes its place.

    Args:
        needs: what :func:`needing` found; None where there is no such operator.
    """
    device = site.q.value.device
    if needs is None:
        return "where an added mask hides a whole row, the backward of torch's fused attention differs from softmax's"
    if site.dropout:
        return "the operator for added masks does not drop weights"
    if any(term.added and term.node in needs for term in site.terms):
        return "the bias needs a gradient, which torch's fused attention forms as a matrix of all scores"
    if _written_later(site):
        return "the mask is changed in place later, and the backward would need it as it is now"
    if not targets.of_device(device).added_masks:
        return (
            "where an added mask hides a whole row, the backward of torch's fused attention differs from softmax's; "
            f"such rows are computed apart on CPUs, which is not verified on {device.type}"
        )
    return ""


def unknowable(site: Site, needs: Collection[fx.Node] | None) -> str:
    """Why a call in training cannot look at the masks of a site; empty where it can.

    Args:
        needs: what :func:`needing` found; None where that was not asked.
    """
    if any(term.added and (needs is None or term.node in needs) for term in site.terms):
        return "no low-rank form for a bias that needs a gradient"
    if _written_later(site):
        return "the mask is changed in place later, and the backward would need it as it is now"
    return ""


def _written_later(site: Site) -> bool:
    table, after = roots(site.out.graph), False
    held = {table[term.node] for term in site.terms}
    for node in site.out.graph.nodes:
        if after and any(table[target] in held for target in mutated_arguments(node)):
            return True
        after |= node is site.out
    return False
