"""Some queries against some keys, exactly: a rectangle of the pairs of tokens, all of it at once.

What is computed are nodes of the exact plan of a form, its traced autograd graph included. A row's output and
denominator are read where gradients need them: a rectangle may hold but a few of the keys that a row attends to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.codegen.operations import Operations
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.planning.plan import Node


class Rectangle(Operations):
    """Values of nodes.

    Args:
        inputs: Q [..., rows, d], K [..., columns, d], V [..., columns, e]; G, O [..., rows, e] and D [..., rows] for
            gradients; M [..., rows, columns] of zeros and ones where the form has a mask.
        scale: of the logits.
        top: what is subtracted from logits before exp is taken, of a shape that broadcasts to [..., rows, columns];
            None: the largest of each row that the mask allows.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor], scale: float, top: torch.Tensor | None = None) -> None:
        super().__init__(inputs, {"s": scale}, monomials.full(inputs["Q"].shape[-1], 0))
        self.top = top
        self._values: dict[Node, torch.Tensor] = {}

    def read(self, **values: torch.Tensor) -> None:
        """Further inputs, by name."""
        self.inputs = {**self.inputs, **values}

    def value(self, n: Node) -> torch.Tensor:
        """The value of a node of the exact plan, computed once."""
        if n not in self._values:
            self._values[n] = self._made(n)
        return self._values[n]

    def _made(self, n: Node) -> torch.Tensor:
        if n.op == "input":
            return self.inputs[n.attr]
        if n.op == "mask":
            return self.inputs["M"]
        if n.op == "map" and n.attr == "exp":
            score = self.value(n.args[0])
            if "M" in self.inputs:
                score = score.masked_fill(self.inputs["M"] == 0, -torch.inf)
            return (score - (score.amax(-1, keepdim=True) if self.top is None else self.top)).exp()
        return self.apply(n, [self.value(a) for a in n.args])
