"""Matrix expressions: what people read of the algebra (math.md §1, §2).

A tree of products, Hadamard products (∘), row-wise Kronecker products (⊘), diagonals and columns of ones.  Every node
has a text, a LaTeX form (as far as matplotlib's mathtext goes) and a dense value that is computed from the *printed*
names with matrix operations alone, so that a formula can be checked against the program that it stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch

from polyattn.rewriter.algebra.tensor import Kind
from polyattn.rewriter.notation.symbols import TEXT, Style, Symbol, abs_

SUM, ELEMENTWISE, PRODUCT, ATOM = range(4)
"""How tightly a formula binds: a + b, then a ∘ b and a ⊘ b, then a b, then a name."""


@dataclass
class Dense:
    """What the printed names stand for: matrices by text (columns are n × 1), scalars, and sizes of axes."""

    names: dict[str, torch.Tensor]
    scalars: Mapping[str, float]
    sizes: Mapping[Kind, int]
    head: int
    """Width of the tensors that features are made of."""

    def number(self, value: sympy.Expr) -> float:
        """A coefficient as a number."""
        return float(value.subs({s: self.scalars[s.name] for s in value.free_symbols}))


class Matrix:
    """A node of a formula; a column is an n × 1 matrix."""

    level = ATOM

    def write(self, style: Style) -> str:
        """The formula as text or as LaTeX."""
        raise NotImplementedError

    def value(self, at: Dense) -> torch.Tensor:
        """The dense value, two axes; a pair of axes that is one (row-wise Kronecker) is flattened."""
        raise NotImplementedError

    def inside(self, style: Style, level: int) -> str:
        """The formula as an operand of something that binds at ``level``."""
        written = self.write(style)
        return written if self.level >= level else f"({written})"

    def __str__(self) -> str:
        return self.write(TEXT)


@dataclass(frozen=True)
class Named(Matrix):
    """A tensor by its name."""

    symbol: Symbol

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.name(self.symbol)

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return at.names[self.symbol.text]


@dataclass(frozen=True)
class Ones(Matrix):
    """The column of ones over an axis."""

    kind: Kind = field(repr=False)

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.mark("1", r"\mathbf{1}")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return torch.ones(at.sizes[self.kind], 1, dtype=torch.float64)


@dataclass(frozen=True)
class AllOnes(Matrix):
    """The matrix of ones, 1 1ᵀ."""

    row: Kind = field(repr=False)
    column: Kind = field(repr=False)
    level = PRODUCT

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.mark("1 1ᵀ", r"\mathbf{1}\, \mathbf{1}^{\top}")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return torch.ones(at.sizes[self.row], at.sizes[self.column], dtype=torch.float64)


@dataclass(frozen=True)
class Transpose(Matrix):
    """Xᵀ; made by ``transpose``, which moves it inwards."""

    x: Matrix

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return self.x.inside(style, ATOM) + style.mark("ᵀ", r"^{\top}")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return self.x.value(at).t()


@dataclass(frozen=True)
class Product(Matrix):
    """left · right; a left factor that is itself a product is written without parentheses."""

    left: Matrix
    right: Matrix
    level = PRODUCT

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return f"{self.left.inside(style, PRODUCT)}{style.mark(' ', chr(92) + ', ')}{self.right.inside(style, ATOM)}"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return self.left.value(at) @ self.right.value(at)


@dataclass(frozen=True)
class Hadamard(Matrix):
    """The elementwise product ∘."""

    parts: tuple[Matrix, ...]
    level = ELEMENTWISE

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.join([part.inside(style, ATOM) for part in self.parts], "∘", r"\circ")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return functools.reduce(torch.mul, (part.value(at) for part in self.parts))


@dataclass(frozen=True)
class Kronecker(Matrix):
    """The row-wise Kronecker product ⊘: row i of U ⊘ V is U[i] ⊗ V[i]."""

    left: Matrix
    right: Matrix
    level = ELEMENTWISE

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.join([self.left.inside(style, PRODUCT), self.right.inside(style, PRODUCT)], "⊘", r"\oslash")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return (self.left.value(at).unsqueeze(2) * self.right.value(at).unsqueeze(1)).flatten(1)


@dataclass(frozen=True)
class Diag(Matrix):
    """The diagonal matrix of a column."""

    x: Matrix

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.mark("diag", r"\mathrm{diag}") + f"({self.x.write(style)})"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return torch.diag(self.x.value(at)[:, 0])


@dataclass(frozen=True)
class Ratio(Matrix):
    """Columns multiplied and divided elementwise: δ/D²."""

    above: tuple[Named, ...]
    below: tuple[Named, ...]
    level = ELEMENTWISE

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""

        def side(names: tuple[Named, ...]) -> list[str]:
            return [style.power(n.write(style), names.count(n)) for n in dict.fromkeys(names)]

        above = style.join(side(self.above), "∘", r"\circ") or "1"
        below = style.join(side(self.below), "∘", r"\circ")
        above = f"({above})" if len(set(self.above)) > 1 and below else above
        return above + (f"/({below})" if len(set(self.below)) > 1 else f"/{below}" if below else "")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        total = functools.reduce(torch.mul, (n.value(at) for n in self.above), torch.ones((), dtype=torch.float64))
        return functools.reduce(torch.div, (n.value(at) for n in self.below), total)


@dataclass(frozen=True)
class Sum(Matrix):
    """A linear combination; the only node with coefficients."""

    parts: tuple[tuple[sympy.Expr, Matrix], ...]

    @property
    def level(self) -> int:  # type: ignore[override]
        """How tightly the combination binds: one part alone binds as it does by itself."""
        return self.parts[0][1].level if len(self.parts) == 1 and self.parts[0][0] == 1 else SUM

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        text = ""
        for coefficient, part in self.parts:
            minus = coefficient.could_extract_minus_sign()
            sign = (style.mark("−", "-") if minus else "") if not text else style.mark(" − ", " - ") if minus else " + "
            size = abs_(coefficient)
            if size == 1:
                text += sign + part.inside(style, ELEMENTWISE)
            else:
                text += f"{sign}{style.coefficient(size)} {part.inside(style, PRODUCT)}"
        return text or "0"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return functools.reduce(torch.add, (at.number(c) * part.value(at) for c, part in self.parts))


@dataclass(frozen=True)
class Einstein(Matrix):
    """A product that has no matrix form, with its indices: Σ_b G[i, b] T[i, a, b]."""

    parts: tuple[tuple[Matrix, tuple[str, ...]], ...]
    out: tuple[str, ...]
    level = PRODUCT

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        summed = dict.fromkeys(letter for _, letters in self.parts for letter in letters if letter not in self.out)
        sigma = style.mark("Σ_", r"\sum_") + ("{" + ",".join(summed) + "}" if len(summed) > 1 else "".join(summed))
        factors = [f"{part.inside(style, ATOM)}[{','.join(letters)}]" for part, letters in self.parts]
        return (sigma + " " if summed else "") + " ".join(factors)

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        dense = [(part.value(at), letters) for part, letters in self.parts]
        sizes: dict[str, int] = {}
        for value, letters in dense:
            if len(letters) < 3:
                sizes.update(zip(letters, value.shape, strict=False))
        number = {letter: place for place, letter in enumerate(dict.fromkeys(x for _, ls in dense for x in ls))}
        operands: list[torch.Tensor | list[int]] = []
        for value, letters in dense:
            operands += [value.reshape([sizes.get(x, -1) for x in letters]), [number[x] for x in letters]]
        made: torch.Tensor = torch.einsum(*operands, [number[letter] for letter in self.out])
        return made if made.ndim == 2 else made.reshape(-1, 1) if made.ndim < 2 else made.flatten(1)


def transpose(x: Matrix) -> Matrix:
    """Xᵀ with the transpose moved to the names: (A B)ᵀ = Bᵀ Aᵀ."""
    if isinstance(x, Transpose):
        return x.x
    if isinstance(x, Diag):
        return x
    if isinstance(x, AllOnes):
        return AllOnes(x.column, x.row)
    if isinstance(x, Product):
        return times(transpose(x.right), transpose(x.left))
    return Transpose(x)


def times(*factors: Matrix) -> Matrix:
    """The product of the factors from left to right; a scaling is no reason for parentheses."""
    return functools.reduce(_product, factors)


def _product(left: Matrix, right: Matrix) -> Matrix:
    if isinstance(right, Product) and (isinstance(left, Diag) or isinstance(right.left, Diag)):
        return Product(_product(left, right.left), right.right)
    return Product(left, right)
