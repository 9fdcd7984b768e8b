"""The order of passes, on one screen.

    Dynamo graph ─ normalize ─ softmaxes ─ products ─▶ aten graph ─ match ─▶ sites, refusals ─ splice ─▶ aten graph

Bodies of activation checkpointing are matched and spliced like the graph that calls them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.anchors import SOFTMAX, match
from polyattn.passes.match.joint import AGAIN
from polyattn.passes.match.scores import FLOWS
from polyattn.passes.match.site import Refusal, Site
from polyattn.passes.prepare.dead import drop_dead
from polyattn.passes.prepare.encoder_layer import open_fused_layers
from polyattn.passes.prepare.normalize import checkpoint_body, has_transforms, normalize
from polyattn.passes.prepare.products import unify_products
from polyattn.passes.prepare.softmaxes import unify_softmaxes
from polyattn.passes.prepare.views import tidy_views
from polyattn.passes.replace.splice import splice, splice_exact, splice_gradients
from polyattn.passes.replace.training import needing, needing_inputs


@dataclasses.dataclass(frozen=True)
class Result:
    """A graph after all passes."""

    graph: fx.GraphModule | None
    """The spliced graph; None when nothing was spliced (then the untouched graph is the one to run)."""
    sites: tuple[tuple[str, Site], ...]
    """Identifier and site."""
    refusals: tuple[Refusal, ...]


def run(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    op: Callable[..., Any],
    backward_op: Callable[..., Any],
    graph_id: str,
    options: str,
    version: str,
    masked_op: Callable[..., Any] | None = None,
    why_exact: Callable[[Site], str] = lambda site: "",
) -> Result:
    """All passes over a Dynamo graph, which is not changed.

    Arguments: see :func:`polyattn.passes.replace.splice.splice`, and ``splice_exact`` beside it for ``masked_op``;
    without it, attention with an added mask stays as it is written in training. ``why_exact``: see
    :func:`polyattn.passes.match.anchors.match`.
    """
    normal, transformed = normalize(gm, example_inputs), has_transforms(gm)
    training = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
    sites: list[tuple[str, Site]] = []
    refusals: list[Refusal] = []
    if not training:
        masked_op = None
    given = needing(normal, needing_inputs(normal, example_inputs)) if masked_op is not None else frozenset()
    for module, parameters in _graphs(normal, _parameters(normal, example_inputs)):
        if transformed:
            tidy_views(module.graph)
        drop_dead(module.graph)
        open_fused_layers(module.graph)
        unify_softmaxes(module.graph)
        unify_products(module.graph, FLOWS, SOFTMAX)
        needs = needing(module, given) if masked_op is not None else None
        found = match(
            module.graph, parameters, first_index=len(sites), training=training, needs=needs, why_exact=why_exact
        )
        refusals.extend(found.refusals)
        if training and transformed:  # traced below autograd: right, but not to be differentiated again
            refusals.extend(Refusal(AGAIN, site.out.name, site.where) for site in found.sites)
            continue
        for site in found.sites:
            sites.append((f"{graph_id}/{site.index}", site))
        # later sites first: an operand of a later site may be the output of an earlier one, which splicing replaces
        calls = {}
        for site in reversed(found.sites):
            if site.exact:
                if not site.kept:
                    splice_exact(site, masked_op, version)
            else:
                calls[site.index] = splice(site, op, f"{graph_id}/{site.index}", options, version)
        # and earlier ones first: what arrives at an earlier output comes from the gradients of a later site
        for site in found.sites:
            if site.gradients is not None:
                splice_gradients(site, calls[site.index], backward_op, version)
        module.graph.lint()
        module.recompile()
    changed = any(not site.kept for _, site in sites)
    return Result(normal if changed else None, tuple(sites), tuple(refusals))


def _parameters(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> frozenset[fx.Node]:
    """Nodes that hold parameters: inputs that are parameters or leaves that require grad, and attributes likewise."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    found = {node for node, value in zip(nodes, example_inputs, strict=True) if _is_parameter(value)}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), torch.nn.Parameter):
            found.add(node)
    return frozenset(found)


def _is_parameter(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter)


def _graphs(gm: fx.GraphModule, parameters: frozenset[fx.Node]) -> list[tuple[fx.GraphModule, frozenset[fx.Node]]]:
    """The graph and the checkpointed bodies in it, innermost last, each with the nodes that hold parameters."""
    found = [(gm, parameters)]
    for node in gm.graph.nodes:
        body = checkpoint_body(node)
        if body is not None:
            inner = [inside for inside in body.graph.nodes if inside.op == "placeholder"]
            held = {inside for inside, outside in zip(inner, node.args[1:], strict=False) if outside in parameters}
            found.extend(_graphs(body, frozenset(held)))
    return found
