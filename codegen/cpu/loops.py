"""How the loops of the CPU target walk tokens: headers, which rows a tile has, how sums are read and added to.

Every kind of loop is a class, chosen by what the mask says of its sums (:func:`walk`); nothing else asks for the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from polyattn.codegen.cpu.layout import Sizes, Value, einsum, group, matrices
from polyattn.codegen.spec import KernelSpec, Loop
from polyattn.rewriter.masks.mask import Sums


class LoopCode:
    """A loop over blocks of one token; what it sums up is complete when it ends."""

    span: ClassVar[str] = "block"
    """How many tokens a tile has at most."""
    kept: ClassVar[str] = ""
    """The first axis of the memory of a sum, where every step leaves one."""
    helpers: ClassVar[tuple[str, ...]] = ()
    """Functions of the emitted file that :meth:`finish` calls."""
    masks: ClassVar[str | None] = None
    """The call, on a tile of pairs, that hides those which the mask hides; None where it hides none."""

    def __init__(self, axis: str | None = None, descending: bool = False) -> None:
        self.axis, self.descending = axis, descending

    @property
    def title(self) -> str:
        """What is walked, for the header of the file."""
        return f"blocks of {'queries' if self.axis == 'i' else 'keys'}"

    def header(self) -> list[str]:
        """The line of the loop, and how many tokens its step has."""
        if self.axis == "i":
            return [
                "for start in range(0, n_q, block):",
                "    rows = min(block, n_q - start)",
                "    T_q = groups * rows",
            ]
        return ["for start in range(0, n_k, block):", "    T_k = min(block, n_k - start)"]

    def tokens(self, letter: str) -> str:
        """The tokens of a step, as an index."""
        return "start : start + block"

    def total(self, state: Value) -> Value:
        """What a step reads of a sum over other tokens."""
        return state

    def prologue(self, states: Iterable[Value], lines: Sequence[str], sizes: Sizes) -> list[str]:
        """Lines before those of a step, for what they read of sums."""
        return []

    def add(self, state: Value, operands: Sequence[Value]) -> str:
        """The line that adds what a step sums."""
        pair = matrices(operands, state.layout)
        if pair is None:
            return f"{state.name} += {einsum(operands, state.layout)}"
        return f"{group(state, pair[2])}.baddbmm_({pair[0]}, {pair[1]})"

    def finish(self, states: Iterable[Value]) -> list[str]:
        """Lines after the loop, for the sums that it has made."""
        return []


class Chunks(LoopCode):
    """A loop over chunks of queries and keys together: a step reads the sums of the chunks before it."""

    masks = ".unflatten(1, (groups, rows)).tril_()  # keys up to the query's own position"

    @property
    def title(self) -> str:
        """See :attr:`Walk.title`."""
        return "chunks, last to first" if self.descending else "chunks"

    def header(self) -> list[str]:
        """See :meth:`Walk.header`."""
        walked = "range(0, max(n_q, n_k), block)"
        return [
            f"for start in {f'reversed({walked})' if self.descending else walked}:",
            "    rows, T_k = max(0, min(block, n_q - start)), max(0, min(block, n_k - start))",
            "    T_q = groups * rows",
        ]


class ChunkSumsCode(LoopCode):
    """A loop over chunks of one token of which each leaves its own sum; when it ends, each has that of far chunks."""

    kept, helpers = "chunks", ("elsewhere",)

    @property
    def title(self) -> str:
        """See :attr:`Walk.title`."""
        return super().title.replace("blocks", "chunks")

    def add(self, state: Value, operands: Sequence[Value]) -> str:
        """See :meth:`Walk.add`."""
        part, pair = Value(f"{state.name}[start // block]", state.layout), matrices(operands, state.layout)
        if pair is None:
            return f"{part.name} = {einsum(operands, state.layout)}"
        return f"{group(part, pair[2])}.copy_(torch.bmm({pair[0]}, {pair[1]}))"

    def finish(self, states: Iterable[Value]) -> list[str]:
        """See :meth:`Walk.finish`."""
        return [f"elsewhere({state.name})" for state in states]


class NeighboursCode(ChunkSumsCode):
    """A loop over chunks of one token, with the same chunk of the other one and its neighbours: all pairs are near."""

    span = "3 * block"

    def header(self) -> list[str]:
        """See :meth:`Walk.header`."""
        own, other = ("n_q", "n_k") if self.axis == "i" else ("n_k", "n_q")
        tokens = (f"min(block, {own} - start)", "max(0, above - below)")
        return [
            f"for start in range(0, {own}, block):",
            f"    below, above = max(0, start - block), min({other}, start + 2 * block)",
            f"    rows, T_k = {', '.join(tokens if self.axis == 'i' else tokens[::-1])}",
            "    T_q = groups * rows",
        ]

    def tokens(self, letter: str) -> str:
        """See :meth:`Walk.tokens`."""
        return super().tokens(letter) if letter == self.axis else "below:above"

    def total(self, state: Value) -> Value:
        """See :meth:`Walk.total`."""
        return Value(f"far_{state.name}", state.layout)

    def prologue(self, states: Iterable[Value], lines: Sequence[str], sizes: Sizes) -> list[str]:
        """See :meth:`Walk.prologue`."""
        used = [state for state in states if any(self.total(state).name in line for line in lines)]
        return [f"far_{x.name} = {x.name}[start // block]  # {sizes.shape(x.layout)}" for x in used]


def walk(spec: KernelSpec, loop: Loop) -> LoopCode:
    """The kind of a loop."""
    kind: type[LoopCode]
    if spec.mask.sums is Sums.ELSEWHERE:
        kind = NeighboursCode if loop.stores else ChunkSumsCode
    else:
        kind = Chunks if spec.mask.sums is Sums.RUNNING else LoopCode
    return kind(None if loop.axis is None else loop.axis.letter, loop.descending)
