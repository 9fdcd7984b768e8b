"""Assemble: a product of factors with shared indices → one matrix formula (math.md §2, "In index notation").

The factors are a graph: an index is a vertex, a matrix an edge between its two indices, a column a label of its vertex.
Each reduction is a rule of matrix algebra, and the formula is what the graph reduces to:

    two edges between i and j                          A[i,j] B[i,j]                →  A ∘ B
    a summed vertex on two edges                       Σ_x A[i,x] w[x] B[x,k]       →  A diag(w) B
    a summed vertex on one edge                        Σ_x A[i,x]                   →  A 1
    two links between the same two tokens              U[i,α] G[i,b] W[j,α] V[j,b]  →  (U ⊘ G) (W ⊘ V)ᵀ over (α, b)
    a tensor over (x, y | a), both links of one token  U[t,x] T[t,y] C[(x,y),a]     →  (U ⊘ T) C

A graph that these do not reduce to one edge has no matrix form; it is written with its indices (``Einstein``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from polyattn.rewriter.algebra.tensor import Index
from polyattn.rewriter.notation.atoms import Apply, Features
from polyattn.rewriter.notation.matrix import (
    AllOnes,
    Diag,
    Einstein,
    Hadamard,
    Kronecker,
    Matrix,
    Named,
    Ones,
    Ratio,
    times,
    transpose,
)

Vertex = tuple[Index, ...]
"""One index, or several that a row-wise Kronecker product has made one."""


@dataclass(frozen=True)
class Piece:
    """A factor as a matrix whose rows and columns lie over these vertices; a column has one, a scalar none."""

    tree: Matrix
    ends: tuple[Vertex, ...]


def assemble(pieces: Sequence[Piece], out: Sequence[Vertex]) -> Matrix:
    """The formula of a product of pieces, rows and columns as in ``out``; what is not in ``out`` is summed."""
    return _Graph(pieces, tuple(out)).run() or einstein(pieces, out)


def einstein(pieces: Sequence[Piece], out: Sequence[Vertex]) -> Einstein:
    """The product with its indices, for what has no matrix form."""

    def letters(vertices: Sequence[Vertex]) -> tuple[str, ...]:
        return tuple(repr(index) for vertex in vertices for index in vertex)

    return Einstein(tuple((piece.tree, letters(piece.ends)) for piece in pieces), letters(out))


@dataclass(frozen=True)
class _Edge:
    tree: Matrix
    u: Vertex
    v: Vertex

    def other(self, vertex: Vertex) -> Vertex:
        return self.v if vertex == self.u else self.u

    def towards(self, row: Vertex, column: Vertex) -> Matrix:
        """The matrix with these rows and columns."""
        return self.tree if (self.u, self.v) == (row, column) else transpose(self.tree)


def _plain(tree: Matrix) -> int:
    kinds = (Named, Apply, Hadamard)
    return next((place for place, kind in enumerate(kinds) if isinstance(tree, kind)), len(kinds))


def _token(vertex: Vertex) -> bool:
    return len(vertex) == 1 and vertex[0].kind.token


def _order(vertex: Vertex) -> tuple[bool, str]:
    return not _token(vertex), repr(vertex)


class _Graph:
    def __init__(self, pieces: Sequence[Piece], out: tuple[Vertex, ...]) -> None:
        self.out = out
        self.edges: list[_Edge] = []
        self.columns: dict[Vertex, list[Matrix]] = {}
        self.vertices: dict[Vertex, None] = dict.fromkeys(out)
        self.reducible = True
        for piece in pieces:
            self.vertices.update(dict.fromkeys(piece.ends))
            if len(piece.ends) == 1:
                self.columns.setdefault(piece.ends[0], []).append(piece.tree)
            elif len(piece.ends) == 2 and piece.ends[0] != piece.ends[1]:
                self.edges.append(_Edge(piece.tree, *piece.ends))
            else:  # a scalar, or a diagonal that is read out of a matrix
                self.reducible = False

    def run(self) -> Matrix | None:
        if not self.reducible:
            return None
        while self._parallel() or self._group() or self._links() or self._sum():
            pass
        return self._finish()

    def _at(self, vertex: Vertex) -> list[_Edge]:
        return [edge for edge in self.edges if vertex in (edge.u, edge.v)]

    def _groups(self) -> list[Vertex]:
        return [vertex for vertex in self.vertices if len(vertex) > 1]

    def _held(self) -> set[Vertex]:
        """Single indices that are to become part of a group: they are not summed by themselves."""
        return {(index,) for group in self._groups() for index in group}

    def _bound(self) -> list[Vertex]:
        held = self._held()
        return sorted((v for v in self.vertices if v not in self.out and v not in held), key=_order)

    def _replace(self, gone: Sequence[_Edge], new: _Edge | None, vertices: Sequence[Vertex] = ()) -> bool:
        place = min(self.edges.index(edge) for edge in gone)
        self.edges = [edge for edge in self.edges if edge not in gone]
        if new is not None:
            self.edges.insert(place, new)
        for vertex in vertices:
            self.columns.pop(vertex, None)
            self.vertices.pop(vertex, None)
        return True

    def _parallel(self) -> bool:
        for edge in self.edges:
            same = [other for other in self.edges if {other.u, other.v} == {edge.u, edge.v}]
            if len(same) > 1:
                # names first, the way round of the first: A ∘ (G Vᵀ) rather than (V Gᵀ) ∘ Aᵀ
                ranked = sorted(same, key=lambda e: _plain(e.tree))
                first = ranked[0]
                parts: list[Matrix] = []
                for other in ranked:
                    tree = other.towards(first.u, first.v)
                    parts += tree.parts if isinstance(tree, Hadamard) else (tree,)
                parts = [part for part in parts if not isinstance(part, AllOnes)] or parts[:1]
                tree = parts[0] if len(parts) == 1 else Hadamard(tuple(parts))
                return self._replace(same, _Edge(tree, first.u, first.v))
        return False

    def _scaled(self, edge: _Edge, row: Vertex, column: Vertex) -> Matrix:
        """The edge's matrix with what labels its column multiplied in."""
        labels = self.columns.get(column, [])
        return times(edge.towards(row, column), *(Diag(x) for x in combine(labels)))

    def _group(self) -> bool:
        """A tensor over a pair of indices that both belong to one token: the pair becomes one index."""
        for group in self._groups():
            singles: list[Vertex] = [(index,) for index in group]
            if any(single not in self.vertices for single in singles):
                continue
            lists = {single: self._at(single) for single in singles}
            edges = [edge for found in lists.values() for edge in found]
            owners = {edge.other(single) for single, found in lists.items() for edge in found}
            if len(owners) != 1 or any(len(lists[s]) > 1 or not (lists[s] or s in self.columns) for s in singles):
                continue
            (owner,) = owners
            trees = [self._scaled(lists[s][0], owner, s) if lists[s] else self._repeated(owner, s) for s in singles]
            return self._replace(edges, _Edge(self._kronecker(trees), owner, group), singles)
        return False

    def _repeated(self, owner: Vertex, column: Vertex) -> Matrix:
        """What only labels the column, the same in every row: 1 xᵀ."""
        *scales, last = combine(self.columns[column])
        return times(Ones(owner[0].kind), transpose(times(*(Diag(x) for x in scales), last)))

    @staticmethod
    def _kronecker(trees: Sequence[Matrix]) -> Matrix:
        total = trees[0]
        for tree in trees[1:]:
            total = Kronecker(total, tree)
        return total

    def _links(self) -> bool:
        """Two summed indices between the same two tokens: (U W1ᵀ) ∘ (G Vᵀ) = (U ⊘ G) (W ⊘ V)ᵀ."""
        links = [v for v in self._bound() if not _token(v)]
        links.sort(key=lambda v: not any(isinstance(e.tree, (Features, Kronecker)) for e in self._at(v)))
        for x, y in itertools.combinations(links, 2):
            ends = [sorted((e.other(v) for e in self._at(v)), key=_order) for v in (x, y)]
            if ends[0] != ends[1] or len(ends[0]) != 2 or not all(_token(v) for v in ends[0]):
                continue
            # weights go to the rows of the result
            near, far = sorted(ends[0], key=lambda v: (v not in self.out, _order(v)))
            group = x + y
            edges = {(v, t): next(e for e in self._at(v) if t in (e.u, e.v)) for v in (x, y) for t in (near, far)}
            left = Kronecker(*(self._scaled(edges[v, near], near, v) for v in (x, y)))
            right = Kronecker(*(edges[v, far].towards(far, v) for v in (x, y)))
            self._replace([edges[x, near], edges[y, near]], _Edge(left, near, group), ())
            self.vertices[group] = None
            return self._replace([edges[x, far], edges[y, far]], _Edge(right, far, group), (x, y))
        return False

    def _sum(self) -> bool:
        """Sum over a vertex that lies on two edges or one; tokens first, so that what is left is small.

        A token of an n × n factor comes last: what that factor masks or multiplies is complete then.
        """

        def order(vertex: Vertex) -> int:
            pair = any(_token(edge.u) and _token(edge.v) for edge in self._at(vertex))
            return 2 if _token(vertex) and pair else 0 if _token(vertex) else 1

        for vertex in sorted(self._bound(), key=order):
            edges = self._at(vertex)
            if len(edges) == 2:
                first, second = sorted(edges, key=lambda e: _order(e.other(vertex)))
                row, column = first.other(vertex), second.other(vertex)
                tree = times(self._scaled(first, row, vertex), second.towards(vertex, column))
                return self._replace(edges, _Edge(tree, row, column), (vertex,))
            if len(edges) == 1 and (len(vertex) == 1 or self.columns.get(vertex)):
                (edge,) = edges
                row = edge.other(vertex)
                *scales, last = combine(self.columns.get(vertex, [])) or [Ones(vertex[0].kind)]
                tree = times(edge.towards(row, vertex), *(Diag(x) for x in scales), last)
                self.columns.setdefault(row, []).append(tree)
                return self._replace(edges, None, (vertex,))
        return False

    def _finish(self) -> Matrix | None:
        if set(self.vertices) != set(self.out) or not self.out or len(set(self.out)) != len(self.out):
            return None
        sides = [combine(self.columns.get(vertex, [])) for vertex in self.out]
        if len(self.out) == 1:
            *scales, last = sides[0] or [Ones(self.out[0][0].kind)]
            return times(*(Diag(x) for x in scales), last) if not self.edges else None
        if len(self.out) != 2 or len(self.edges) > 1:
            return None
        left, right = sides
        if self.edges:
            core = self.edges[0].towards(*self.out)
            return times(*(Diag(x) for x in left), core, *(Diag(x) for x in right))
        (*scales, row), (*more, column) = (
            side or [Ones(vertex[0].kind)] for side, vertex in zip(sides, self.out, strict=True)
        )
        return times(*(Diag(x) for x in scales), row, transpose(times(*(Diag(x) for x in more), column)))


def combine(columns: Sequence[Matrix]) -> list[Matrix]:
    """Columns that are multiplied elementwise: named ones as one quotient, weights apart, what is computed last."""
    above: list[Named] = []
    below: list[Named] = []
    others: list[Matrix] = []
    for column in columns:
        if isinstance(column, Ratio):
            above += column.above
            below += column.below
        elif isinstance(column, Named):
            above.append(column)
        else:
            others.append(column)
    made: list[Matrix] = []
    if above or below:
        made.append(above[0] if len(above) == 1 and not below else Ratio(tuple(above), tuple(below)))
    if len(others) > 1:
        made.append(Hadamard(tuple(others)))
    return made + (others if len(others) == 1 else [])
