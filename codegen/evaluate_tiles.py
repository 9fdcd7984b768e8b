"""What a specification in tiles means, in plain torch: head by head, block by block of tiles of queries.

Values over pairs of places are made for all pairs of tiles of a block, so that a block is small; the targets make those
of near pairs alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.codegen.operations import Operations
from polyattn.codegen.phases import Choose, of_queries, reduces_queries
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.planning.plan import Node

ELEMENTS = 1 << 22
"""Pairs of tokens that are looked at together."""


class TileEvaluation(Operations):
    """Runs a specification in tiles.

    Args:
        inputs: name → tensor, [heads, tiles, ...]; those that the choice yields are not among them.
        scalars: values of the symbols in coefficients.
        choose: which pairs are near.
        block: tiles of queries at a time, at most.
    """

    def __init__(
        self, spec: KernelSpec, inputs: Mapping[str, torch.Tensor], scalars: Scalars, choose: Choose, block: int
    ) -> None:
        super().__init__(inputs, scalars, monomials.full(inputs["Q"].shape[-1], 0))
        self.spec, self.choose = spec, choose
        self.reads = [(name, n) for name, n in spec.names if name in spec.reads]
        pairs = inputs["Q"].shape[2] * inputs["K"].shape[1] * inputs["K"].shape[2]
        self.block = max(1, min(block, ELEMENTS // pairs))
        self.values: dict[Node, torch.Tensor] = {}
        self.chosen: Mapping[str, torch.Tensor] = {}

    def run(self) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        made: dict[str, list[torch.Tensor]] = {}
        for head in range(len(self.inputs["Q"])):
            for name, value in self._head(head).items():
                made.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in made.items()}

    def _head(self, head: int) -> dict[str, torch.Tensor]:
        keys, queries, end = self.spec.loops
        self.values, sums = {}, dict[Node, torch.Tensor]()
        for n in keys.tiles:
            self.values[n] = self._value(n, head, slice(None))
        parts: dict[str, list[torch.Tensor]] = {}
        of_keys = dict(self.values)
        for start in range(0, self.inputs["Q"].shape[1], self.block):
            tiles = slice(start, start + self.block)
            self.values, self.chosen = dict(of_keys), {}
            for name, n in self.reads:
                self._read(n, head, tiles, name)
            self.chosen = self.choose(head, tiles, {name: self.values[n] for name, n in self.reads})
            for n in queries.tiles:
                if n not in self.values:
                    self.values[n] = self._value(n, head, tiles)
            for n in queries.accumulate:
                part = self.contract(n, [self.values[a] for a in n.args])
                sums[n] = sums[n] + part if n in sums else part
            for name, n in queries.stores:
                parts.setdefault(name, []).append(self.values[n])
        self.values = of_keys | sums
        for n in end.tiles:
            self.values[n] = self._value(n, head, slice(None))
        out = {name: torch.cat(values) for name, values in parts.items()}
        return out | {name: self.values[n] for name, n in end.stores}

    def _read(self, n: Node, head: int, tiles: slice, name: str) -> None:
        """Compute a value and all that it needs."""
        if n in self.values:
            return
        if n.op == "mask" or reduces_queries(n):
            raise ScheduleError(f"the choice of near pairs reads {name}, which needs {n}")
        for a in n.args:
            self._read(a, head, tiles, name)
        self.values[n] = self._value(n, head, tiles)

    def _value(self, n: Node, head: int, tiles: slice) -> torch.Tensor:
        if n.op == "input":
            if n.attr in self.chosen:
                return self.chosen[n.attr]
            x = self.inputs[n.attr][head]
            return x[tiles] if of_queries(n) else x
        if n.op == "mask":
            return self.chosen["M_" + n.attr].to(self.dtype)
        return self.apply(n, [self.values[a] for a in n.args])

    def contract(self, n: Node, args: list[torch.Tensor]) -> torch.Tensor:
        """A sum of products; what a mask hides is 0, whatever stands there."""
        for position, a in enumerate(n.args):
            patterns, _ = n.attr
            if a.op == "mask" and len(args) == 2 and set(patterns[position]) <= set(patterns[1 - position]):
                other = args[1 - position]
                hidden = args[position] == 0
                shape = [1] * other.ndim
                order = [patterns[1 - position].index(p) for p in patterns[position]]
                hidden = hidden if order == sorted(order) else hidden.T
                for at, size in zip(sorted(order), hidden.shape, strict=True):
                    shape[at] = size
                args[1 - position] = other.masked_fill(hidden.reshape(shape), 0)
        return super().contract(n, args)
