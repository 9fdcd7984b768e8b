"""Plans: a program whose every product has been given an order of contraction.

Nodes are hash-consed, so that common subexpressions (the state Ψ(K)ᵀ V̂ of forward and backward, R of dK and dV) are
one object.  A node's axes are kinds; how indices are shared stands in ``pattern`` as numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy

from polyattn.rewriter.algebra.expr import CHUNK, N_Q, Kind
from polyattn.rewriter.algebra.tensor import KEY_PLACE, NEAR_SHARE, QUERY_PLACE

_lock = threading.Lock()
_nodes: dict[Any, Node] = {}
_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a plan.

    ``op`` is one of ``input`` (attr: name), ``features`` (degree), ``weights`` (coefficients), ``mask`` (which),
    ``map`` (function), ``concat`` (widths), ``part`` (part, widths), ``gather`` (position, degree: the axis α becomes
    β, a by σ), ``contract`` (patterns of the arguments and of the result, and which masked sum it is), ``sum``
    (coefficients and the axes' order of each argument).
    """

    op: str
    args: tuple[Node, ...]
    axes: tuple[Kind, ...]
    attr: Any = None
    scan: str | None = None
    """For a contraction over tokens under M_far: the token axis that it is a running sum along."""
    serial: int = field(default_factory=lambda: next(_serial))
    structure: str = ""
    """A digest of what the node computes: an order that does not depend on what was derived before."""

    @property
    def tokens(self) -> int:
        """The number of token axes."""
        return sum(kind.token for kind in self.axes)

    @property
    def scanned(self) -> bool:
        """Whether the value is a running sum (it differs from chunk to chunk)."""
        return self.scan is not None

    def __repr__(self) -> str:
        return f"{self.op}#{self.serial}[{''.join(kind.letter for kind in self.axes)}]"


def node(op: str, args: tuple[Node, ...], axes: tuple[Kind, ...], attr: Any = None, scan: str | None = None) -> Node:
    """The one node with these properties."""
    key = (op, tuple(a.serial for a in args), axes, attr, scan)
    with _lock:
        if key not in _nodes:
            text = repr((op, [a.structure for a in args], axes, attr, scan))
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            _nodes[key] = Node(op, args, axes, attr, scan, structure=digest)
        return _nodes[key]


def walk(roots: Iterable[Node], known: Iterable[Node] = ()) -> Iterator[Node]:
    """Every node that the roots need, arguments first; nodes in ``known`` are taken as given (not entered)."""
    seen: set[Node] = set(known)

    def visit(n: Node) -> Iterator[Node]:
        if n in seen:
            return
        seen.add(n)
        for argument in n.args:
            yield from visit(argument)
        yield n

    for root in roots:
        yield from visit(root)


def in_near_tiles(kinds: Iterable[Kind]) -> bool:
    """Whether values over these axes are there for near pairs of tiles alone: a place of a query and one of a key."""
    return {QUERY_PLACE, KEY_PLACE} <= set(kinds)


def volume(kinds: Iterable[Kind], near: int) -> sympy.Expr:
    """Number of elements over these axes; where pairs of tokens are near ones, n·C for each of ``near`` chunks, and
    where pairs of tiles are, their share of all."""
    kinds = list(kinds)
    tokens = [k.size for k in kinds if k.token]
    total = sympy.Integer(1)
    for kind in kinds:
        if not kind.token:
            total *= kind.size
    if len(tokens) == 2 and near:
        return total * tokens[0] * CHUNK * near
    for size in tokens:
        total *= size
    return total * NEAR_SHARE if in_near_tiles(kinds) else total


def flops(n: Node, near: int) -> sympy.Expr:
    """Floating point operations of one node (a multiplication and an addition count as two)."""
    if n.op == "contract":
        patterns, result = n.attr
        kinds = {
            name: kind for a, p in zip(n.args, patterns, strict=True) for name, kind in zip(p, a.axes, strict=True)
        }
        reduces = set(kinds) - set(result)
        once = volume(kinds.values(), near) * (2 if reduces and len(n.args) == 2 else 1)
        per_chunk = n.scanned and not any(a.tokens for a in n.args)
        return once * N_Q / CHUNK if per_chunk else once
    if n.op in ("features", "map"):
        return volume(n.axes, near)
    if n.op == "sum":
        coefficients, _ = n.attr
        scaled = sum(1 for c in coefficients if c not in (1, -1))
        return volume(n.axes, near) * (len(n.args) - 1 + scaled)
    return sympy.Integer(0)


def cost(roots: Iterable[Node], near: int, known: Iterable[Node] = ()) -> sympy.Expr:
    """Floating point operations of everything the roots need, as a polynomial; ``known`` values cost nothing."""
    return sympy.expand(sum((flops(n, near) for n in walk(roots, known)), sympy.Integer(0)))


@dataclass(frozen=True)
class Plan:
    """Outputs of a program as nodes.

    ``near``: how many chunks the partners of a token lie in, where pairs are near ones: 1 under a causal mask, 3 in a
    band; 0 where there are no near pairs.
    """

    outputs: dict[str, Node]
    near: int

    def cost(self, names: Iterable[str] | None = None, known: Iterable[Node] = ()) -> sympy.Expr:
        """FLOPs of some outputs (all by default), in the symbols n, d, e, r, r', C."""
        roots = [self.outputs[name] for name in (self.outputs if names is None else names)]
        return cost(roots, self.near, known)

    def token_degree(self) -> int:
        """The highest degree in n of the size of any intermediate: 1 for a plan that never forms n × n."""
        return max((n.tokens - (n.tokens == 2 and self.near > 0) for n in walk(self.outputs.values())), default=0)
