"""What the CPU target computes in which order: products by letters, gathers as gradients, who reads what in a loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sympy

from polyattn.codegen.cpu.layout import Layout, Value, large, long, ordered
from polyattn.codegen.cpu.loops import LoopCode
from polyattn.codegen.spec import FEATURES, TOKENS, WIDTHS, accumulates, letters
from polyattn.errors import EmitError
from polyattn.rewriter.planning.plan import Node, walk

SIDES = {"i": "q", "j": "k"}
_NAMES = {"O": "out", "D": "denominators", "B": "key_weights"}


@dataclass(frozen=True)
class LetterProduct:
    """A contraction by letters: operands, what they share, what is left; ``scale`` are weights taken out of a sum."""

    operands: tuple[Node, ...]
    result: Layout
    scale: Node | None = None

    def key(self) -> tuple[tuple[Node, ...], Layout]:
        """Products with equal keys have equal values, up to ``scale``."""
        return tuple(sorted(self.operands, key=lambda n: n.serial)), ordered(self.result)


def product(n: Node) -> LetterProduct:
    """A contraction, with weights taken out of a sum over tokens: Σ_i w_α φ_iα g_ib = w_α Σ_i φ_iα g_ib.

    Raises:
        EmitError: two indices of one kind, or not one or two operands.
    """
    patterns, _ = n.attr
    kinds = {
        p: kind.letter
        for a, pattern in zip(n.args, patterns, strict=True)
        for p, kind in zip(pattern, a.axes, strict=True)
    }
    if len(set(kinds.values())) != len(kinds) or len(n.args) > 2:
        raise EmitError(f"the CPU target has no code for the contraction {n.attr} of {n.args}")
    result = letters(n)
    if accumulates(n):
        for k, operand in enumerate(n.args):
            weights, rest = weighted(operand)
            if weights is not None and set(letters(weights)) <= set(result):
                return LetterProduct((*n.args[:k], rest, *n.args[k + 1 :]), result, weights)
    return LetterProduct(n.args, result)


def weighted(n: Node) -> tuple[Node | None, Node]:
    """A value as weights of monomials times another value; without weights where it is not that."""
    if n.op == "contract" and len(n.args) == 2:
        for weights, rest in (n.args, n.args[::-1]):
            if weights.op == "weights" and set(letters(rest)) == set(letters(n)):
                return weights, rest
    return None, n


@dataclass(frozen=True)
class Gradient:
    """Σ_β f_β t_σ(β,a) with f = w' ∘ ``low``, weighted monomials of x: the gradient of Σ_α w_α x^α t_α by x_a.

    w are the weights of the antiderivative of the polynomial whose weights are w'.
    """

    rows: Node
    low: Node
    coefficients: tuple[sympy.Expr, ...]


def gradient(n: Node) -> Gradient | None:
    """What a contraction with a gather computes; None for other nodes.

    Raises:
        EmitError: a gather that is used in any other way.
    """
    gathers = [a for a in n.args if a.op == "gather"]
    if not gathers:
        return None
    others = [a for a in n.args if a.op != "gather"]
    if n.op == "contract" and len(others) == 1 and gathers[0].args[0].tokens == 1:
        (rows,), (_, degree) = gathers[0].args, gathers[0].attr
        weights, low = weighted(others[0])
        if weights is not None and low.op == "features" and low.attr == degree - 1:
            summed = set(letters(gathers[0])) - set(letters(n))
            if summed == set(letters(low)) & set(FEATURES) and set(letters(n)) <= {"a", *TOKENS}:
                coefficients = (sympy.Integer(0), *(c / (m + 1) for m, c in enumerate(weights.attr)))
                return Gradient(rows, low, coefficients)
    raise EmitError(f"{n}: the CPU target gathers only to multiply with weighted features of the degree below and sum")


def state_key(n: Node) -> object:
    """Sums with equal keys are one state, up to weights."""
    return product(n).key(), n.scan


@dataclass
class Body:
    """One loop as it is written: its lines, what has a value, which memory is whose, and until when."""

    walk: LoopCode
    outputs: dict[Node, str] = field(default_factory=dict)
    chunked: bool = False
    degree: int = 0
    readers: dict[Node, int] = field(default_factory=dict)
    tallest: dict[Node, Node] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: dict[Node, Value] = field(default_factory=dict)
    weighted: dict[tuple[str, str], Value] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    memory: dict[Node, str] = field(default_factory=dict)
    last: dict[Node, int] = field(default_factory=dict)
    at: int = 0

    def unused(self, base: str) -> str:
        """A name that is not used yet in this loop."""
        count = self.names[base] = self.names.get(base, 0) + 1
        return base if count == 1 else f"{base}_{count}"

    def name(self, n: Node) -> str:
        """A name for a tile that is not used yet in this loop."""
        return self.unused(self.base(n))

    def base(self, n: Node) -> str:
        """What a tile is called: after what it computes where that is known, else after its axes."""
        if n in self.outputs:
            return _NAMES.get(self.outputs[n], self.outputs[n].lower())
        if n.op == "input":
            return _NAMES.get(str(n.attr), str(n.attr).lower())
        found, read = letters(n), {str(m.attr) for m in walk([n]) if m.op in ("input", "map")}
        side = "".join(SIDES[x] for x in found if x in TOKENS)
        if n.op == "features":
            return f"phi_{side}" + ("" if n.attr == self.degree else f"_{n.attr}")
        if n.op == "concat":
            return "g_hat" if side == "q" else "v_hat"
        if n.op == "map":
            return "inverse" if n.attr == "reciprocal" else "attention" if n.tokens == 2 else f"phi_{side}"
        if n.tokens == 2:
            return "d_scores" if {"exp", "G"} <= read else "d_attention" if "G" in read else "scores"
        if any(map(long, found)):
            return f"rows_{side}"
        widths = [x for x in found if x in WIDTHS]
        if len(widths) > 1:
            return f"pairs_{side}"
        if not widths:
            return "delta" if {"G", "O"} <= read else f"row_{side}"
        if widths == ["b"] and side == "q" and "Q" not in read:
            return "g_scaled" if "G" in read else "numerator"
        if widths == ["b"] and side == "k" and "G" not in read:
            return "v_weighted"
        if widths == ["c"]:  # of queries or keys in coordinates, or their gradients
            return f"d{side}" + self._field(n)
        stem = {"aq": "dq", "ak": "dk", "bq": "numerator", "bk": "dv", "b̂q": "sums", "b̂k": "dv_hat"}[widths[0] + side]
        return stem + self._field(n)

    def _field(self, n: Node) -> str:
        """With chunks: whether a value comes from the chunk itself, from the others, or from both."""
        while n.op == "part":
            (n,) = n.args
        if not self.chunked or n.op == "sum":
            return ""
        return "_near" if any(a.tokens == 2 for a in n.args) else "_far"

    def owner(self, n: Node) -> Node:
        """The node in whose memory a value lies: low degrees are a prefix of the highest one."""
        return self.tallest.get(n.args[0], n) if n.op == "features" else n

    def absorbs(self, n: Node) -> bool:
        """Whether a node is a matrix product that its only reader computes as its own first step."""
        return n.op == "contract" and not accumulates(n) and self.readers.get(n) == 1 and n not in self.outputs

    def multiplied(self, n: Node) -> Node | None:
        """The matrix product, read by nothing else, that a sum is computed together with: scores, of which it is a
        multiple, and rows of a rule's features, to which it adds what differs between tokens or features only."""
        if n.op != "sum" or len(n.args) > 2 or (n.tokens == 2) != (len(n.args) == 1):
            return None
        found = [a for a in n.args if len(a.axes) == len(n.axes)]
        if len(found) != 1 or not self.absorbs(found[0]) or any(a.op in ("gather", "mask") for a in found[0].args):
            return None
        sums = set(letters(found[0])) != {x for a in found[0].args for x in letters(a)}
        return found[0] if sums and large(ordered(letters(n))) else None

    def reads(self, n: Node) -> tuple[Node, ...]:
        """The nodes from whose values this target computes a node."""
        if accumulates(n):
            return product(n).operands
        found = gradient(n)
        if found is not None:
            rows = found.rows.args if self.absorbs(found.rows) else (found.rows,)
            return (*rows, *((found.low,) if found.low.attr > 0 else ()))
        if n.op == "features" and self.owner(n) is not n:
            return (self.owner(n),)
        inner = self.multiplied(n)
        return n.args if inner is None else (*inner.args, *(a for a in n.args if a is not inner))

    def dies(self, n: Node) -> bool:
        """Whether the present step is the last that reads the memory of a node."""
        return n in self.memory and self.last[n] == self.at


def steps(body: Body, stores: Iterable[Node], sums: Sequence[Node]) -> list[Node]:
    """Tiles of a loop in order of computation, results first; each sum as soon as its old value is no longer read."""
    tiles: dict[Node, None] = {}

    def visit(n: Node) -> None:
        if n in tiles or n.tokens == 0 or accumulates(n) or n.op == "mask":
            return
        for a in body.reads(n):
            visit(a)
        tiles[n] = None

    ready: dict[Node, int] = {}
    for n in stores:
        visit(n)
    for n in sums:
        for a in body.reads(n):
            visit(a)
        ready[n] = len(tiles)
    steps = list(tiles)
    for n in sums:
        for at in range(ready[n], len(steps)):
            read = walk([m for m in body.reads(steps[at]) if m.tokens == 0])
            if any(accumulates(m) and state_key(m) == state_key(n) for m in read):
                ready[n] = at + 1
    made: list[Node] = []
    for at in range(len(steps) + 1):
        made += [n for n in sums if ready[n] == at]
        made += steps[at : at + 1]
    return made
