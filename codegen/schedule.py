"""Schedule: a plan → loops over tokens.

Without a mask every sum over tokens is a state that is complete when its loop ends, so that loops form stages.  Under
a causal mask chunks are walked in order (running sums before a query's chunk) or in reverse (after a key's chunk).
With a local window a first loop leaves the sum of every chunk, and a second one takes those of far chunks.
Tiles are computed again in every loop that needs them; nothing with a feature axis ever leaves a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from polyattn.codegen.spec import KernelSpec, Loop, accumulates, is_state
from polyattn.codegen.verify import verify
from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.masks.mask import NONE, Mask, Sums
from polyattn.rewriter.planning.plan import Node, node, walk
from polyattn.rewriter.rules.rule import ApproximateRule


def substitute(root: Node, known: Mapping[Node, Node]) -> Node:
    """The node with given subexpressions replaced."""
    cache: dict[Node, Node] = dict(known)

    def visit(n: Node) -> Node:
        if n not in cache:
            args = tuple(visit(a) for a in n.args)
            cache[n] = n if args == n.args else node(n.op, args, n.axes, n.attr, n.scan)
        return cache[n]

    return visit(root)


def schedule(
    name: str, outputs: Mapping[str, Node], mask: Mask = NONE, rule: ApproximateRule | None = None
) -> KernelSpec:
    """Lay outputs (token-level nodes, or states to be returned) out as loops; ``mask`` and ``rule`` as in
    :class:`KernelSpec`.

    Raises:
        ScheduleError: a tile with two token axes outside of a chunk, or a result that needs sums of both directions.
    """
    loops = _LOOPS[mask.sums](outputs)
    inputs = sorted({str(n.attr) for n in walk(outputs.values()) if n.op == "input"})
    states = tuple((key, n) for key, n in outputs.items() if n.tokens == 0)
    made = KernelSpec(name, tuple(loops), states, tuple(inputs), mask, rule)
    verify(made)
    return made


def _tiles(roots: Iterable[Node]) -> tuple[Node, ...]:
    """Token-level nodes (and constants) that the roots need inside one loop, arguments first."""
    seen: dict[Node, None] = {}

    def visit(n: Node) -> None:
        if n in seen or (is_state(n) and not n.scanned) or accumulates(n):
            return
        for a in n.args:
            visit(a)
        seen[n] = None

    for root in roots:
        visit(root)
    return tuple(seen)


def _stage_loops(outputs: Mapping[str, Node]) -> list[Loop]:
    stages: dict[Node, int] = {}
    for n in walk(outputs.values()):
        if n.tokens == 2:
            raise ScheduleError(f"{n} has two token axes")
        stage = 0
        for a in n.args:
            stage = max(stage, stages[a] + (1 if accumulates(a) else 0))
        stages[n] = stage
    plan: dict[tuple[int, Kind], tuple[list[Node], list[tuple[str, Node]]]] = {}
    for n in walk(outputs.values()):
        if accumulates(n):
            axis = next(kind for a in n.args for kind in a.axes if kind.token)
            plan.setdefault((stages[n], axis), ([], []))[0].append(n)
    for name, n in outputs.items():
        if n.tokens == 1:
            axis = next(kind for kind in n.axes if kind.token)
            plan.setdefault((stages[n], axis), ([], []))[1].append((name, n))
    loops = []
    for (_, axis), (sums, stores) in sorted(plan.items(), key=lambda item: (item[0][0], item[0][1].letter)):
        roots = [a for n in sums for a in n.args] + [n for _, n in stores]
        loops.append(Loop(axis, False, _tiles(roots), tuple(sums), tuple(stores)))
    return loops


def _chunk_loops(outputs: Mapping[str, Node]) -> list[Loop]:
    plan: dict[bool, dict[str, Node]] = {}
    for name, n in outputs.items():
        ways = {m.scan for m in walk([n]) if m.scan is not None}
        if len(ways) > 1:
            raise ScheduleError(f"{name} needs running sums of both directions; give it as two results")
        plan.setdefault("j" in ways, {})[name] = n
    loops = []
    for descending, wanted in sorted(plan.items()):
        sums = tuple(m for m in walk(wanted.values()) if accumulates(m))
        roots = [a for m in sums for a in m.args] + list(wanted.values())
        loops.append(Loop(None, descending, _tiles(roots), sums, tuple(wanted.items())))
    return loops


def _window_loops(outputs: Mapping[str, Node]) -> list[Loop]:
    sums: dict[Kind, list[Node]] = {}
    for n in walk(outputs.values()):
        if accumulates(n):
            axis = next(kind for a in n.args for kind in a.axes if kind.token)
            sums.setdefault(axis, []).append(n)
    loops = []
    for axis, found in sorted(sums.items(), key=lambda item: item[0].letter):
        loops.append(Loop(axis, False, _tiles(a for n in found for a in n.args), tuple(found), ()))
    stores: dict[Kind, dict[str, Node]] = {}
    for name, n in outputs.items():
        if n.tokens != 1:
            raise ScheduleError(f"{name} is no value of a token, which a local window has no loop for")
        stores.setdefault(next(kind for kind in n.axes if kind.token), {})[name] = n
    for axis, wanted in sorted(stores.items(), key=lambda item: item[0].letter):
        loops.append(Loop(axis, False, _tiles(wanted.values()), (), tuple(wanted.items())))
    return loops


_LOOPS: Mapping[Sums, Callable[[Mapping[str, Node]], list[Loop]]] = {
    Sums.TOTAL: _stage_loops,
    Sums.RUNNING: _chunk_loops,
    Sums.ELSEWHERE: _window_loops,
}
