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

from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.interpret import take_part
from polyattn.rewriter.algebra.tensor import Kind
from polyattn.rewriter.notation.symbols import SUBSCRIPTS, TEXT, Style, Symbol, abs_

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
        return float(value.subs({s: self.scalars[s.name] for s in value.free_symbols}))


class Matrix:
    """A node of a formula; a column is an n × 1 matrix."""

    level = ATOM

    def write(self, style: Style) -> str:
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
        return style.name(self.symbol)

    def value(self, at: Dense) -> torch.Tensor:
        return at.names[self.symbol.text]


@dataclass(frozen=True)
class Ones(Matrix):
    """The column of ones over an axis."""

    kind: Kind = field(repr=False)

    def write(self, style: Style) -> str:
        return style.mark("1", r"\mathbf{1}")

    def value(self, at: Dense) -> torch.Tensor:
        return torch.ones(at.sizes[self.kind], 1, dtype=torch.float64)


@dataclass(frozen=True)
class AllOnes(Matrix):
    """The matrix of ones, 1 1ᵀ."""

    row: Kind = field(repr=False)
    column: Kind = field(repr=False)
    level = PRODUCT

    def write(self, style: Style) -> str:
        return style.mark("1 1ᵀ", r"\mathbf{1}\, \mathbf{1}^{\top}")

    def value(self, at: Dense) -> torch.Tensor:
        return torch.ones(at.sizes[self.row], at.sizes[self.column], dtype=torch.float64)


@dataclass(frozen=True)
class Transpose(Matrix):
    """Xᵀ; made by ``transpose``, which moves it inwards."""

    x: Matrix

    def write(self, style: Style) -> str:
        return self.x.inside(style, ATOM) + style.mark("ᵀ", r"^{\top}")

    def value(self, at: Dense) -> torch.Tensor:
        return self.x.value(at).t()


@dataclass(frozen=True)
class Product(Matrix):
    """left · right; a left factor that is itself a product is written without parentheses."""

    left: Matrix
    right: Matrix
    level = PRODUCT

    def write(self, style: Style) -> str:
        return f"{self.left.inside(style, PRODUCT)}{style.mark(' ', chr(92) + ', ')}{self.right.inside(style, ATOM)}"

    def value(self, at: Dense) -> torch.Tensor:
        return self.left.value(at) @ self.right.value(at)


@dataclass(frozen=True)
class Hadamard(Matrix):
    """The elementwise product ∘."""

    parts: tuple[Matrix, ...]
    level = ELEMENTWISE

    def write(self, style: Style) -> str:
        return style.join([part.inside(style, ATOM) for part in self.parts], "∘", r"\circ")

    def value(self, at: Dense) -> torch.Tensor:
        return functools.reduce(torch.mul, (part.value(at) for part in self.parts))


@dataclass(frozen=True)
class Kronecker(Matrix):
    """The row-wise Kronecker product ⊘: row i of U ⊘ V is U[i] ⊗ V[i]."""

    left: Matrix
    right: Matrix
    level = ELEMENTWISE

    def write(self, style: Style) -> str:
        return style.join([self.left.inside(style, PRODUCT), self.right.inside(style, PRODUCT)], "⊘", r"\oslash")

    def value(self, at: Dense) -> torch.Tensor:
        return (self.left.value(at).unsqueeze(2) * self.right.value(at).unsqueeze(1)).flatten(1)


@dataclass(frozen=True)
class Diag(Matrix):
    """The diagonal matrix of a column."""

    x: Matrix

    def write(self, style: Style) -> str:
        return style.mark("diag", r"\mathrm{diag}") + f"({self.x.write(style)})"

    def value(self, at: Dense) -> torch.Tensor:
        return torch.diag(self.x.value(at)[:, 0])


@dataclass(frozen=True)
class Ratio(Matrix):
    """Columns multiplied and divided elementwise: δ/D²."""

    above: tuple[Named, ...]
    below: tuple[Named, ...]
    level = ELEMENTWISE

    def write(self, style: Style) -> str:
        def side(names: tuple[Named, ...]) -> list[str]:
            return [style.power(n.write(style), names.count(n)) for n in dict.fromkeys(names)]

        above = style.join(side(self.above), "∘", r"\circ") or "1"
        below = style.join(side(self.below), "∘", r"\circ")
        above = f"({above})" if len(set(self.above)) > 1 and below else above
        return above + (f"/({below})" if len(set(self.below)) > 1 else f"/{below}" if below else "")

    def value(self, at: Dense) -> torch.Tensor:
        total = functools.reduce(torch.mul, (n.value(at) for n in self.above), torch.ones((), dtype=torch.float64))
        return functools.reduce(torch.div, (n.value(at) for n in self.below), total)


@dataclass(frozen=True)
class Apply(Matrix):
    """An elementwise function: exp, or a polynomial by its name."""

    function: Symbol
    x: Matrix
    coefficients: tuple[sympy.Expr, ...] | None = None

    def write(self, style: Style) -> str:
        return f"{style.name(self.function)}({self.x.write(style)})"

    def value(self, at: Dense) -> torch.Tensor:
        x = self.x.value(at)
        if self.coefficients is None:
            return {"exp": torch.exp, "1/": torch.reciprocal}[self.function.text](x)
        powers = [at.number(c) * x**m for m, c in enumerate(self.coefficients)]
        return functools.reduce(torch.add, powers)


@dataclass(frozen=True)
class Features(Matrix):
    """The monomials of degree at most g of every row: Φ_g(X)."""

    degree: int
    x: Matrix

    def write(self, style: Style) -> str:
        head = style.mark("Φ" + str(self.degree).translate(SUBSCRIPTS), rf"\Phi_{{{self.degree}}}")
        return f"{head}({self.x.write(style)})"

    def value(self, at: Dense) -> torch.Tensor:
        return monomials.generate(self.x.value(at), monomials.full(at.head, self.degree))


@dataclass(frozen=True)
class WeightColumn(Matrix):
    """w_α = c_|α| |α|!/α!, a column over the monomials."""

    coefficients: tuple[sympy.Expr, ...]

    def write(self, style: Style) -> str:
        sizes = style.mark("c_|α| · |α|!/α!", r"c_{|\alpha|} \cdot |\alpha|!/\alpha!")
        return f"[{sizes}]_α" if not style.latex else rf"[{sizes}]_\alpha"

    def value(self, at: Dense) -> torch.Tensor:
        numbers = [at.number(c) for c in self.coefficients]
        return torch.as_tensor(monomials.weights(numbers, monomials.full(at.head, len(numbers) - 1))).unsqueeze(1)


@dataclass(frozen=True)
class Selection(Matrix):
    """C[(β, α), a] = 1 where x^α = x^β x_a: (U ⊘ T) C picks columns of T, (·)[i, a] = Σ_β U[i, β] T[i, β·x_a]."""

    degree: int

    def write(self, style: Style) -> str:
        return style.mark("[x^α = x^β · x_a]", r"[x^\alpha = x^\beta \cdot x_a]")

    def value(self, at: Dense) -> torch.Tensor:
        basis = monomials.full(at.head, self.degree)
        sigma = torch.as_tensor(monomials.selection(basis))
        full = torch.zeros(*sigma.shape, monomials.rank(basis), dtype=torch.float64)
        return full.scatter(2, sigma.unsqueeze(2), 1.0).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Stacked(Matrix):
    """[U, V]: columns side by side."""

    parts: tuple[Matrix, ...]

    def write(self, style: Style) -> str:
        return "[" + ", ".join(part.write(style) for part in self.parts) + "]"

    def value(self, at: Dense) -> torch.Tensor:
        return torch.cat([part.value(at) for part in self.parts], dim=1)


@dataclass(frozen=True)
class Columns(Matrix):
    """Some columns of a stack, X[:, :e] or X[:, e]."""

    x: Matrix
    part: int
    widths: tuple[Kind | None, ...]

    def write(self, style: Style) -> str:
        sizes = [sympy.Integer(1) if kind is None else kind.size for kind in self.widths]
        start = sum(sizes[: self.part], sympy.Integer(0))
        stop = start + sizes[self.part]
        if self.widths[self.part] is None:
            which = str(start)
        else:
            which = ("" if start == 0 else str(start)) + ":" + ("" if self.part == len(sizes) - 1 else str(stop))
        return f"{self.x.inside(style, ATOM)}[:, {which}]"

    def value(self, at: Dense) -> torch.Tensor:
        taken = take_part(self.x.value(at), self.part, self.widths)
        return taken.unsqueeze(1) if taken.ndim == 1 else taken


@dataclass(frozen=True)
class Sum(Matrix):
    """A linear combination; the only node with coefficients."""

    parts: tuple[tuple[sympy.Expr, Matrix], ...]

    @property
    def level(self) -> int:  # type: ignore[override]
        return self.parts[0][1].level if len(self.parts) == 1 and self.parts[0][0] == 1 else SUM

    def write(self, style: Style) -> str:
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
        return functools.reduce(torch.add, (at.number(c) * part.value(at) for c, part in self.parts))


@dataclass(frozen=True)
class Einstein(Matrix):
    """A product that has no matrix form, with its indices: Σ_b G[i, b] T[i, a, b]."""

    parts: tuple[tuple[Matrix, tuple[str, ...]], ...]
    out: tuple[str, ...]
    level = PRODUCT

    def write(self, style: Style) -> str:
        summed = dict.fromkeys(letter for _, letters in self.parts for letter in letters if letter not in self.out)
        sigma = style.mark("Σ_", r"\sum_") + ("{" + ",".join(summed) + "}" if len(summed) > 1 else "".join(summed))
        factors = [f"{part.inside(style, ATOM)}[{','.join(letters)}]" for part, letters in self.parts]
        return (sigma + " " if summed else "") + " ".join(factors)

    def value(self, at: Dense) -> torch.Tensor:
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
