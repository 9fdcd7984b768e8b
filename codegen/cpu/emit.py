"""Python source of the loops of a specification: every tile, sum and result of a loop in its order of computation."""

from __future__ import annotations

from polyattn.codegen.cpu.draft import Draft
from polyattn.codegen.cpu.layout import Value, ordered
from polyattn.codegen.cpu.loops import LoopCode, walk
from polyattn.codegen.cpu.plan import Body, product, state_key, steps
from polyattn.codegen.cpu.states import States
from polyattn.codegen.cpu.tiles import Tiles
from polyattn.codegen.spec import QUERY_SIDE, TOKENS, KernelSpec, Loop, accumulates, letters
from polyattn.rewriter.planning.plan import Node


class LoopWriter:
    """Writes the loops of a specification: ``lines``, and in ``draft`` what they need beside them.

    Raises:
        EmitError: a node of the plan that this target has no code for; the message says which.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.lines: list[str] = []
        self.draft = Draft(spec)
        self.walks = [walk(spec, loop) for loop in spec.loops]
        self._states = States(self.draft)
        self._tiles = Tiles(self.draft, self._states)
        self._write()

    def _write(self) -> None:
        """Every loop, and the line that returns the results."""
        results = []
        for loop, walked in zip(self.spec.loops, self.walks, strict=True):
            self._loop(loop, walked)
            results += [f'"{name}": {name}' for name, n in loop.stores if n.tokens]
        for name, n in self.spec.states:
            body = Body(LoopCode())
            value = self._states.state(n, body)
            self.lines += body.before
            order = [str(value.layout.index(x) + 1) for x in letters(n)]
            results.append(f'"{name}": {value.name}.permute(0, {", ".join(order)})')
        self.lines.append(f"return {{{', '.join(results)}}}")

    def _loop(self, loop: Loop, walked: LoopCode) -> None:
        stores = {n: name for name, n in loop.stores if n.tokens}
        sums = self._sums(loop)
        body = Body(walked, stores, self.spec.chunked, max(self.draft.ranks.values(), default=0))
        for n in (*loop.tiles, *loop.accumulate):
            for a in n.args:
                body.readers[a] = body.readers.get(a, 0) + 1
        for n in steps(body, stores, sums):
            if n.op == "features":
                body.tallest[n.args[0]] = max(body.tallest.get(n.args[0], n), n, key=lambda f: int(f.attr))
        order = steps(body, stores, sums)
        for at, n in enumerate(order):
            for read in (n, *body.reads(n)):
                body.last[body.owner(read)] = at
        for at, n in enumerate(order):
            body.at = at
            if accumulates(n):
                operands = [self._states.value(a, body) for a in product(n).operands]
                body.lines.append(walked.add(self.draft.states[state_key(n)], operands))
            else:
                body.values[n] = self._tiles.tile(n, body)
            if n in stores:
                self._store(stores[n], body.values[n], body)
            for dead in [m for m in body.memory if body.last[m] <= at]:
                self.draft.release(body.memory.pop(dead))
        first = walked.prologue(self.draft.states.values(), body.lines, self.draft.sizes)
        self.lines += [*body.before, *walked.header(), *("    " + line for line in (*first, *body.lines))]
        if sums:
            self.draft.helpers.update(walked.helpers)
            self.lines += walked.finish(self.draft.states[state_key(n)] for n in sums)
        self.lines.append("")

    def _sums(self, loop: Loop) -> list[Node]:
        """The sums of a loop, once where several differ in weights only."""
        made = []
        for n in loop.accumulate:
            if state_key(n) not in self.draft.states:
                self.draft.states[state_key(n)] = Value(f"state_{len(self.draft.states) + 1}", ordered(letters(n)))
                made.append(n)
        return made

    def _store(self, name: str, value: Value, body: Body) -> None:
        token = next(x for x in value.layout if x in TOKENS)
        rows = value.spread((token, *(x for x in value.layout if x != token)))
        if name in QUERY_SIDE:
            body.lines.append(f"{name}[:, :, start : start + block] = {rows}.unflatten(1, (groups, rows))")
        else:
            body.lines.append(f"{name}[:, start : start + block] = {rows}")
