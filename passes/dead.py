"""Nodes whose values nobody uses: what a rewrite leaves behind, and what a model computes and throws away."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx


def remove_dead(node: fx.Node) -> None:
    """Remove a node that nothing uses, then what only it used; never inputs, attributes or calls with effects."""
    stack = [node]
    while stack:
        candidate = stack.pop()
        for user in list(candidate.users):
            if user.target is operator.getitem and not user.users:
                candidate.graph.erase_node(user)
        if candidate.users or candidate.op != "call_function" or candidate._erased or _effects(candidate):
            continue
        sources = list(candidate.all_input_nodes)
        candidate.graph.erase_node(candidate)
        stack.extend(sources)


def _effects(node: fx.Node) -> bool:
    """Whether a node must stay although nobody uses it. fx counts torch's attention among these for its dropout."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(rate != 0.0)
    return bool(node.is_impure())


def drop_dead(graph: fx.Graph) -> None:
    """Remove every unused value of a normalised graph, so that it does not count as a use of what it reads.

    Operators that write, or that draw random numbers (a later draw would change), stay.
    """
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload)
            and not node.target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and not _draws(node)
            and not node.is_impure()
        ):
            graph.erase_node(node)


def _draws(node: fx.Node) -> bool:
    """Composite operators that draw without saying so in their tags."""
    name = str(node.target)
    return any(
        word in name for word in ("dropout", "rand", "bernoulli", "normal", "multinomial", "attention", "assert")
    )
