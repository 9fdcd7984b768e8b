"""Blocks of a Triton kernel: how axes are bound in them, their lines so far, what they have computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from polyattn.errors import EmitError
from polyattn.rewriter.planning.plan import Node


@dataclass(frozen=True)
class Binding:
    """How an axis is bound: the name of its index (vector or scalar), of its bounds check, and whether it is one."""

    index: str
    ok: str
    scalar: bool = False


@dataclass
class Scope:
    """A block of code: its bindings, its lines so far, what it has computed."""

    depth: int
    parent: Scope | None
    bindings: dict[str, Binding] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    memo: dict[Node, str] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)
    """Columns of tables that have been loaded here, by what they are."""

    def write(self, line: str) -> None:
        """Append a line at the depth of this block."""
        self.lines.append("    " * self.depth + line)

    def binding(self, letter: str) -> Binding:
        """How an axis is bound here, or in a block around this one.

        Raises:
            ScheduleError: it is bound nowhere.
        """
        if letter in self.bindings:
            return self.bindings[letter]
        if self.parent is None:
            raise EmitError(f"the axis {letter} is not bound here")
        return self.parent.binding(letter)
