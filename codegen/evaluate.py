"""What a kernel specification means, in plain torch, block by block: no n × n and no n × r tensor is ever made.

All targets are tested against this, and it runs on any device and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.codegen.operations import Operations
from polyattn.codegen.spec import QUERY_SIDE, KernelSpec, Loop, accumulates, is_state
from polyattn.codegen.tables import Scalars
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.expr import D, E
from polyattn.rewriter.algebra.monomials import rank_symbol
from polyattn.rewriter.algebra.tensor import D1
from polyattn.rewriter.masks.mask import Sums
from polyattn.rewriter.planning.plan import Node

Parts = dict[Node, list[torch.Tensor]]
"""For each sum, what every chunk adds to it."""


class Walk:
    """A loop as it runs: the tokens that a step sees, what it reads of sums over others, what it has summed.

    Args:
        loop: the loop.
        block: tokens per step.
    """

    def __init__(self, loop: Loop, block: int) -> None:
        self.axis = None if loop.axis is None else loop.axis.letter
        self.block = block
        self.sums: dict[Node, torch.Tensor] = {}

    def tokens(self, letter: str, start: int) -> slice:
        """The tokens of a step, of queries (``i``) or keys (``j``)."""
        return slice(start, start + self.block)

    def total(self, state: Node, start: int) -> torch.Tensor | None:
        """What a step reads of a running sum; None where nothing has been added."""
        return self.sums.get(state)

    def add(self, state: Node, part: torch.Tensor) -> None:
        """Add what a step finds to a sum."""
        self.sums[state] = self.sums[state].add_(part) if state in self.sums else part

    def near(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Which of the pairs that a step meets are near: positions in the chunk, [rows] and [columns]."""
        return j[None, :] <= i[:, None]


class ChunkSums(Walk):
    """A loop over chunks of one token, each of which leaves its own sum."""

    def __init__(self, loop: Loop, block: int, parts: Parts) -> None:
        super().__init__(loop, block)
        self.parts = parts

    def add(self, state: Node, part: torch.Tensor) -> None:
        """See :meth:`Walk.add`."""
        self.parts.setdefault(state, []).append(part)


class Neighbours(ChunkSums):
    """A loop over chunks of one token that sees of the other the same chunk and its neighbours, all of them near, and
    reads of sums what the other chunks have left."""

    def __init__(self, loop: Loop, block: int, parts: Parts) -> None:
        super().__init__(loop, block, parts)
        self.whole = {state: torch.stack(found).sum(0) for state, found in parts.items()}

    def tokens(self, letter: str, start: int) -> slice:
        """See :meth:`Walk.tokens`."""
        if letter == self.axis:
            return super().tokens(letter, start)
        return slice(max(0, start - self.block), start + 2 * self.block)

    def total(self, state: Node, start: int) -> torch.Tensor:
        """See :meth:`Walk.total`."""
        at = start // self.block
        near = self.parts[state][max(0, at - 1) : at + 2]
        return self.whole[state] - torch.stack(near).sum(0) if near else self.whole[state]

    def near(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """See :meth:`Walk.near`."""
        return torch.ones(len(i), len(j), dtype=torch.bool, device=i.device)


class Evaluation(Operations):
    """Runs a specification on inputs of one batch of heads.

    Args:
        inputs: name → tensor. Query-side ones are [heads, groups, n_q, ·] (or without the last axis), key-side ones
            [heads, n_k, ·]; states as they were returned by an earlier kernel.
        scalars: values of the symbols in coefficients; those of polynomials may differ from head to head, [heads].
        basis: the monomials that the specification's features are.
        block: tokens per block; under a causal mask the chunk length.
    """

    def __init__(
        self,
        spec: KernelSpec,
        inputs: Mapping[str, torch.Tensor],
        scalars: Scalars,
        basis: monomials.Basis,
        block: int,
    ) -> None:
        super().__init__(inputs, scalars, basis)
        self.spec, self.block = spec, block
        self.states: dict[Node, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.parts: Parts = {}
        self.tiles: dict[Node, torch.Tensor] = {}
        """Those of the present step."""

    def run(self) -> dict[str, torch.Tensor]:
        """Execute every loop; returns outputs and returned states by name."""
        for loop in self.spec.loops:
            self._loop(loop, self._walk(loop))
        for name, n in self.spec.states:
            self.outputs[name] = self._state(n)
        return self.outputs

    # -- loops ---------------------------------------------------------------------------------------------------

    def _walk(self, loop: Loop) -> Walk:
        if self.spec.mask.sums is not Sums.ELSEWHERE:
            return Walk(loop, self.block)
        return (Neighbours if loop.stores else ChunkSums)(loop, self.block, self.parts)

    def _count(self, letter: str) -> int:
        return self.inputs["Q"].shape[2] if letter == "i" else self.inputs["K"].shape[1]

    def _loop(self, loop: Loop, walk: Walk) -> None:
        n = max(self._count(letter) for letter in ("ij" if walk.axis is None else walk.axis))
        starts = range(0, n, self.block)
        for start in reversed(starts) if loop.descending else starts:
            self.tiles = {}
            for tile in loop.tiles:
                self.tiles[tile] = self._tile(tile, walk, start)
            for name, n_out in loop.stores:
                if n_out.tokens:
                    self._store(name, self._value(n_out, walk, start), start)
            for state in loop.accumulate:
                values = [self._value(a, walk, start) for a in state.args]
                if all(x.shape[-len(a.axes)] for a, x in zip(state.args, values, strict=True) if a.tokens):
                    walk.add(state, self.contract(state, values))
        self.states |= {state: value for state, value in walk.sums.items() if not state.scanned}

    def _value(self, n: Node, walk: Walk, start: int) -> torch.Tensor:
        if n in self.tiles:
            return self.tiles[n]
        if accumulates(n) and n.scanned:
            found = walk.total(n, start)
            # Nothing lies before the first chunk: a running sum starts at zero.
            return self._zeros(n) if found is None else found
        if is_state(n):
            return self._state(n)
        return self._tile(n, walk, start)

    def _zeros(self, n: Node) -> torch.Tensor:
        """A running sum to which nothing has been added."""
        top = self.basis.degree
        ranks = {rank_symbol(lower): monomials.rank(self.basis.below(top - lower)) for lower in range(top + 1)}
        sizes = {D: self.basis.d, E: self.inputs["V"].shape[-1], **ranks}
        for leaf in self.spec.leaves:
            extents = zip(leaf.axes, self.inputs[leaf.name].shape[1:], strict=True)
            sizes |= {kind.size: extent for kind, extent in extents if kind.feature}
        sizes[D1] = next((self.inputs[name].shape[-1] for name in ("QP", "KP") if name in self.inputs), 0)
        heads = self.inputs["Q"].shape[0]
        return torch.zeros(heads, *(int(k.size.subs(sizes)) for k in n.axes), dtype=self.dtype, device=self.device)

    def _state(self, n: Node) -> torch.Tensor:
        if n not in self.states:
            if n.op == "input":
                return self.inputs[n.attr]
            self.states[n] = self.apply(n, [self._state(a) if is_state(a) else self.constant(a) for a in n.args])
        return self.states[n]

    # -- tiles ---------------------------------------------------------------------------------------------------

    def _tile(self, n: Node, walk: Walk, start: int) -> torch.Tensor:
        if n.op == "input":
            return self._rows(n.attr, walk, start)
        if n.op == "weights":
            return self.constant(n)
        if n.op == "mask":
            groups = self.inputs["Q"].shape[1]
            i, j = (
                torch.arange(len(range(self._count(x))[walk.tokens(x, start)]), device=self.device) for x in ("i", "j")
            )
            return walk.near(i.repeat(groups), j).to(self.dtype)
        return self.apply(n, [self._value(a, walk, start) for a in n.args])

    def _rows(self, name: str, walk: Walk, start: int) -> torch.Tensor:
        x = self.inputs[name]
        rows = walk.tokens("i" if name in QUERY_SIDE else "j", start)
        if name in QUERY_SIDE:
            part = x[:, :, rows]
            return part.reshape(x.shape[0], part.shape[1] * part.shape[2], *x.shape[3:])
        return x[:, rows]

    def _store(self, name: str, value: torch.Tensor, start: int) -> None:
        query = name in QUERY_SIDE
        like = self.inputs["Q" if query else "K"]
        if name not in self.outputs:
            shape = (*like.shape[:-1], *value.shape[2:])
            self.outputs[name] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        target = self.outputs[name]
        if query:
            rows = target[:, :, start : start + self.block]
            rows.copy_(value.reshape(rows.shape))
        else:
            target[:, start : start + self.block] = value
