"""What a kernel specification means, in plain torch, block by block: no n × n and no n × r tensor is ever made.

Both targets are tested against this, and it runs on any device and dtype.
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
from polyattn.rewriter.planning.plan import Node


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
        self.parts: dict[Node, list[torch.Tensor]] = {}
        self.totals: dict[Node, torch.Tensor] = {}
        self.own: str | None = None
        """With a local window, the token that a loop walks; of the other one it sees neighbouring chunks as well."""

    def run(self) -> dict[str, torch.Tensor]:
        """Execute every loop; returns outputs and returned states by name."""
        for loop in self.spec.loops:
            self._loop(loop)
        for name, n in self.spec.states:
            self.outputs[name] = self._state(n)
        return self.outputs

    # -- loops ---------------------------------------------------------------------------------------------------

    def _tokens(self, letter: str) -> int:
        return self.inputs["Q"].shape[2] if letter == "i" else self.inputs["K"].shape[1]

    def _loop(self, loop: Loop) -> None:
        n = self._tokens(loop.axis.letter) if loop.axis is not None else max(self._tokens("i"), self._tokens("j"))
        starts = range(0, n, self.block)
        if self.spec.elsewhere and loop.accumulate:
            self._parts(loop, starts)
            return
        self.own = loop.axis.letter if self.spec.elsewhere and loop.axis is not None else None
        running: dict[Node, torch.Tensor] = {}
        for start in reversed(starts) if loop.descending else starts:
            tiles: dict[Node, torch.Tensor] = {}
            for tile in loop.tiles:
                tiles[tile] = self._tile(tile, tiles, running, start)
            for name, n_out in loop.stores:
                if n_out.tokens:
                    self._store(name, self._value(n_out, tiles, running, start), start)
            for state in loop.accumulate:
                if any(a.tokens and self._value(a, tiles, running, start).shape[-len(a.axes)] == 0 for a in state.args):
                    continue
                part = self.contract(state, [self._value(a, tiles, running, start) for a in state.args])
                running[state] = running[state].add_(part) if state in running else part
        for state, value in running.items():
            if not state.scanned:
                self.states[state] = value

    def _parts(self, loop: Loop, starts: range) -> None:
        """What each chunk adds to a state, of which :meth:`_elsewhere` adds up those of far chunks."""
        self.own = None
        for start in starts:
            tiles: dict[Node, torch.Tensor] = {}
            for tile in loop.tiles:
                tiles[tile] = self._tile(tile, tiles, {}, start)
            for state in loop.accumulate:
                values = [self._value(a, tiles, {}, start) for a in state.args]
                self.parts.setdefault(state, []).append(self.contract(state, values))

    def _elsewhere(self, state: Node, start: int) -> torch.Tensor:
        """The sum over all chunks but the one at ``start`` and its neighbours."""
        if state not in self.totals:
            self.totals[state] = torch.stack(self.parts[state]).sum(0)
        at = start // self.block
        near = self.parts[state][max(0, at - 1) : at + 2]
        return self.totals[state] - torch.stack(near).sum(0) if near else self.totals[state]

    def _value(
        self, n: Node, tiles: dict[Node, torch.Tensor], running: dict[Node, torch.Tensor], start: int
    ) -> torch.Tensor:
        if n in tiles:
            return tiles[n]
        if accumulates(n) and n.scanned:
            if self.spec.elsewhere:
                return self._elsewhere(n, start)
            if n in running:
                return running[n]
            # Nothing lies before the first chunk: a running sum starts at zero.
            return self._zeros(n)
        if is_state(n):
            return self._state(n)
        return self._tile(n, tiles, running, start)

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

    def _rows(self, name: str, start: int) -> torch.Tensor:
        x = self.inputs[name]
        rows = self._slice("i" if name in QUERY_SIDE else "j", start)
        if name in QUERY_SIDE:
            part = x[:, :, rows]
            return part.reshape(x.shape[0], part.shape[1] * part.shape[2], *x.shape[3:])
        return x[:, rows]

    def _slice(self, letter: str, start: int) -> slice:
        """The tokens of a loop's step."""
        if self.own in (None, letter):
            return slice(start, start + self.block)
        return slice(max(0, start - self.block), start + 2 * self.block)

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

    def _tile(
        self, n: Node, tiles: dict[Node, torch.Tensor], running: dict[Node, torch.Tensor], start: int
    ) -> torch.Tensor:
        if n.op == "input":
            return self._rows(n.attr, start)
        if n.op == "weights":
            return self.constant(n)
        if n.op == "mask":
            groups = self.inputs["Q"].shape[1]
            if self.spec.elsewhere:
                sizes = [len(range(self._tokens(x))[self._slice(x, start)]) for x in "ij"]
                return torch.ones(groups * sizes[0], sizes[1], dtype=self.dtype, device=self.device)
            rows = max(0, min(self.block, self.inputs["Q"].shape[2] - start))
            columns = max(0, min(self.block, self.inputs["K"].shape[1] - start))
            i = torch.arange(rows, device=self.device).repeat(groups)
            j = torch.arange(columns, device=self.device)
            return (j[None, :] <= i[:, None]).to(self.dtype)
        return self.apply(n, [self._value(a, tiles, running, start) for a in n.args])
