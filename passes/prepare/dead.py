"""Nodes whose values nobody uses: what a rewrite leaves behind, and what a model computes and throws away."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx


def remove_dead(node: fx.Node) -> None:
    """Remove a replaced node, then what only it used, draws of random numbers too: what replaces it draws its own.

    Inputs, attributes and calls that write stay.
    """
    stack = [node]
    while stack:
        candidate = stack.pop()
        for user in list(candidate.users):
            if user.target is operator.getitem and not user.users:
                candidate.graph.erase_node(user)
        if candidate.users or candidate.op != "call_function" or candidate._erased:
            continue
        if candidate.is_impure(impure_random=False):
            continue
        sources = list(candidate.all_input_nodes)
        candidate.graph.erase_node(candidate)
        stack.extend(sources)


def drop_dead(graph: fx.Graph) -> None:
    """Remove every unused value of a normalised graph, so that it does not count as a use of what it reads.

    Operators that write, that draw random numbers (a later draw would change) or that return nothing (assertions) stay.
    """
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users or node.is_impure():
            continue
        if node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns
        ):
            graph.erase_node(node)
