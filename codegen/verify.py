"""The verifier of specifications: it runs once on every one that is scheduled.

What a loop computes, adds up and stores is there before it is read: tiles of the loop, states of loops before it.
"""

from __future__ import annotations

from polyattn.codegen.spec import KernelSpec, Loop, accumulates, is_state
from polyattn.errors import ScheduleError
from polyattn.rewriter.planning.plan import Node


def verify(spec: KernelSpec) -> None:
    """Check that a specification can run in the order in which it is written.

    Raises:
        ScheduleError: something is read before it is there; the message is a sentence that names it.
    """
    complete: set[Node] = set()
    """States of the loops so far."""
    for loop in spec.loops:
        _loop(spec, loop, complete)
        complete.update(loop.accumulate)
    for name, n in spec.states:
        problem = _missing(n, complete)
        if n.tokens or problem is not None:
            raise ScheduleError(f"{spec.name} returns {name} = {n}, {problem or 'which is no state'}")


def _loop(spec: KernelSpec, loop: Loop, complete: set[Node]) -> None:
    tiles: set[Node] = set()

    def read(reader: str, n: Node) -> None:
        if n in tiles:
            return
        if accumulates(n) and n.scanned:
            if n not in complete and n not in loop.accumulate:
                raise ScheduleError(f"{spec.name}: {reader} reads the running sum {n}, which no loop adds up")
        elif is_state(n):
            problem = _missing(n, complete)
            if problem is not None:
                raise ScheduleError(f"{spec.name}: {reader} reads {n}, {problem}")
        else:
            raise ScheduleError(f"{spec.name}: {reader} reads {n} before it is computed")

    for tile in loop.tiles:
        for argument in tile.args:
            read(f"the tile {tile}", argument)
        tiles.add(tile)
    for state in loop.accumulate:
        if not accumulates(state):
            raise ScheduleError(f"{spec.name}: {state} is added up, and is no sum over tokens")
        for argument in state.args:
            read(f"the state {state}", argument)
    for name, n in loop.stores:
        if n.tokens != 1:
            raise ScheduleError(f"{spec.name} stores {name} = {n}, which has {n.tokens} token axes, not one")
        if n not in tiles:
            raise ScheduleError(f"{spec.name} stores {name} = {n} before it is computed")


def _missing(n: Node, complete: set[Node]) -> str | None:
    """What a state lacks after some loops: the sum over tokens that none of them has added up; None for nothing."""
    if n in complete or n.op in ("input", "weights"):
        return None
    if accumulates(n) or not n.args:
        return f"of which {n} is not added up before" if accumulates(n) else f"of which {n} is no state"
    return next((problem for a in n.args if (problem := _missing(a, complete)) is not None), None)
