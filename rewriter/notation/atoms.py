"""What formulas are made of beside names and products: functions, features, weights, selections, stacks and columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch

from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.interpret import take_part
from polyattn.rewriter.algebra.tensor import Kind
from polyattn.rewriter.notation.matrix import ATOM, Dense, Matrix
from polyattn.rewriter.notation.symbols import SUBSCRIPTS, Style, Symbol


@dataclass(frozen=True)
class Apply(Matrix):
    """An elementwise function: exp, or a polynomial by its name."""

    function: Symbol
    x: Matrix
    coefficients: tuple[sympy.Expr, ...] | None = None

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return f"{style.name(self.function)}({self.x.write(style)})"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
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
        """See :meth:`Matrix.write`."""
        head = style.mark("Φ" + str(self.degree).translate(SUBSCRIPTS), rf"\Phi_{{{self.degree}}}")
        return f"{head}({self.x.write(style)})"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return monomials.generate(self.x.value(at), monomials.full(at.head, self.degree))


@dataclass(frozen=True)
class WeightColumn(Matrix):
    """w_α = c_|α| |α|!/α!, a column over the monomials."""

    coefficients: tuple[sympy.Expr, ...]

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        sizes = style.mark("c_|α| · |α|!/α!", r"c_{|\alpha|} \cdot |\alpha|!/\alpha!")
        return f"[{sizes}]_α" if not style.latex else rf"[{sizes}]_\alpha"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        numbers = [at.number(c) for c in self.coefficients]
        return torch.as_tensor(monomials.weights(numbers, monomials.full(at.head, len(numbers) - 1))).unsqueeze(1)


@dataclass(frozen=True)
class Selection(Matrix):
    """C[(β, α), a] = 1 where x^α = x^β x_a: (U ⊘ T) C picks columns of T, (·)[i, a] = Σ_β U[i, β] T[i, β·x_a]."""

    degree: int

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return style.mark("[x^α = x^β · x_a]", r"[x^\alpha = x^\beta \cdot x_a]")

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        basis = monomials.full(at.head, self.degree)
        sigma = torch.as_tensor(monomials.selection(basis))
        full = torch.zeros(*sigma.shape, monomials.rank(basis), dtype=torch.float64)
        return full.scatter(2, sigma.unsqueeze(2), 1.0).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Stacked(Matrix):
    """[U, V]: columns side by side."""

    parts: tuple[Matrix, ...]

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        return "[" + ", ".join(part.write(style) for part in self.parts) + "]"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        return torch.cat([part.value(at) for part in self.parts], dim=1)


@dataclass(frozen=True)
class Columns(Matrix):
    """Some columns of a stack, X[:, :e] or X[:, e]."""

    x: Matrix
    part: int
    widths: tuple[Kind | None, ...]

    def write(self, style: Style) -> str:
        """See :meth:`Matrix.write`."""
        sizes = [sympy.Integer(1) if kind is None else kind.size for kind in self.widths]
        start = sum(sizes[: self.part], sympy.Integer(0))
        stop = start + sizes[self.part]
        if self.widths[self.part] is None:
            which = str(start)
        else:
            which = ("" if start == 0 else str(start)) + ":" + ("" if self.part == len(sizes) - 1 else str(stop))
        return f"{self.x.inside(style, ATOM)}[:, {which}]"

    def value(self, at: Dense) -> torch.Tensor:
        """See :meth:`Matrix.value`."""
        taken = take_part(self.x.value(at), self.part, self.widths)
        return taken.unsqueeze(1) if taken.ndim == 1 else taken
