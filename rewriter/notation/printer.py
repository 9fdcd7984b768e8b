"""Notation: programs as people read them, in matrices (math.md §1, §2), as text and as LaTeX.

    [i,b] w₂[α] · Φ₂(Q)[i,α] · Φ₂(K)[j,α] · V̂[j,b̂]      reads      N̂ = Φ₂(Q) diag(w) (Φ₂(K)ᵀ V̂)

Products are read from left to right, parentheses say what is computed first; a product binds more tightly than ∘ and ⊘.
Names are chosen here and depend on the program alone: a score's exponential is A, its polynomial p(S) and the
polynomial's derivative p′(S); weights of monomials are w and w′; unnamed intermediates are δ (columns) and T.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Concat, Def, Expr, Factor, Term
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import (
    Feature,
    Indicator,
    Leaf,
    Map,
    Poly,
    Select,
    StackedPart,
    Tensor,
    Weights,
)
from polyattn.rewriter.notation import indices
from polyattn.rewriter.notation.assemble import Piece, assemble
from polyattn.rewriter.notation.atoms import Apply, Columns, Features, Selection, Stacked, WeightColumn
from polyattn.rewriter.notation.matrix import AllOnes, Matrix, Named, Ratio, Sum
from polyattn.rewriter.notation.symbols import LATEX, TEXT, Style, Symbol, symbol

ONE = sympy.Integer(1)
Coefficients = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Line:
    """One formula: a name and what it stands for.

    ``source`` is the definition or output of the program that the line computes; None is a name of the notation's own.
    ``note`` stands in place of the formula where words say it better (polynomials, weights, selections).
    """

    name: Symbol
    tree: Matrix
    source: str | None = None
    note: Callable[[Style], str] | None = None

    def write(self, style: Style) -> str:
        """``name = formula``."""
        if self.note is not None:
            return self.note(style)
        return f"{style.name(self.name)} = {self.tree.write(style)}"

    def __str__(self) -> str:
        return self.write(TEXT)


def text(x: Program | Expr) -> str:
    """A program (or one expression) in matrices, a formula on each line."""
    return _written(x, TEXT)


def latex(x: Program | Expr) -> str:
    """The same in LaTeX, without the dollar signs."""
    return _written(x, LATEX)


def lines(program: Program) -> tuple[Line, ...]:
    """The formulas of a program in order, what they use before them; then the meaning of p, w and C.

    Programs in tiles are written in index notation.
    """
    if not indices.in_tiles(program):
        return Notation(program).lines()

    def line(label: str, x: Expr) -> Line:
        name = symbol(label)
        return Line(name, Named(name), label, lambda style: indices.write(label, x, style))

    return tuple(line(label, x) for label, x in program.expressions())


def _written(x: Program | Expr, style: Style) -> str:
    if isinstance(x, Program):
        return "\n".join(line.write(style) for line in lines(x))
    return Notation(Program((), {"": x})).expr(x).write(style)


class Family:
    """Names for tuples of coefficients: a multiple of a known one shares its name, a derivative gets a prime."""

    def __init__(self, letter: str) -> None:
        self.letter = letter
        self.known: dict[Coefficients, Symbol] = {}

    def find(self, coefficients: Coefficients) -> tuple[sympy.Expr, Symbol, Coefficients]:
        """(factor, name, named coefficients), with coefficients = factor · named."""
        for known, name in self.known.items():
            factor = _ratio(coefficients, known)
            if factor is not None:
                return factor, name, known
        for known, name in self.known.items():
            derivative = tuple(m * c for m, c in enumerate(known) if m)
            if derivative and _ratio(coefficients, derivative) is not None:
                return self._add(coefficients, Symbol(name.text + "′", name.latex + "'"))
        number = sum("′" not in name.text for name in self.known.values()) + 1
        return self._add(coefficients, symbol(self.letter + (str(number) if number > 1 else "")))

    def _add(self, coefficients: Coefficients, name: Symbol) -> tuple[sympy.Expr, Symbol, Coefficients]:
        self.known[coefficients] = name
        return ONE, name, coefficients


def _ratio(x: Coefficients, y: Coefficients) -> sympy.Expr | None:
    if len(x) != len(y) or any((a == 0) != (b == 0) for a, b in zip(x, y, strict=True)):
        return None
    found = {sympy.cancel(a / b) for a, b in zip(x, y, strict=True) if b != 0}
    return found.pop() if len(found) == 1 else None


class Notation:
    """The names of one program and the formulas that use them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.reads = _reads(program)
        self.folded = self._folded()
        self.functions, self.weights = Family("p"), Family("w")
        self.own: dict[str, Line] = {}
        """Lines of the notation's own by name, in order of first use."""
        self.stacks: dict[str, Symbol] = {}
        """Names by what is stacked: labels of stacks are not unique in a program."""
        self.selections: dict[Select, Symbol] = {}
        self.exponentials: dict[Tensor, Symbol] = {}
        found = [t for _, x in program.expressions() for t in tensors(x)]
        for poly in sorted((t for t in found if isinstance(t, Poly) and t.degree), key=lambda t: -t.degree):
            self.functions.find(poly.coefficients)
        for weights in sorted((t for t in found if isinstance(t, Weights)), key=lambda t: -t.degree):
            self.weights.find(weights.coefficients)
        for tensor in found:
            if isinstance(tensor, Concat):
                self.stack(tensor)
        self.inlined = self._inlined()
        self.names = self._names()

    # -- names -------------------------------------------------------------------------------------------------------

    def _folded(self) -> dict[str, Expr]:
        """Outputs that are nothing but a definition that is read there alone: the output's name is the formula's."""
        found = {}
        for name, x in self.program.outputs.items():
            if len(x.terms) == 1 and x.terms[0].coefficient == 1 and len(x.terms[0].factors) == 1:
                (factor,) = x.terms[0].factors
                tensor = factor.tensor
                if isinstance(tensor, Def) and self.reads[tensor.label] == 1 and set(factor.indices) == set(x.out):
                    there = dict(zip(factor.indices, tensor.expr.indices, strict=True))
                    found[name] = Expr(tuple(there[index] for index in x.indices), tensor.expr.terms)
        return found

    def _gone(self) -> set[str]:
        return {self.program.outputs[name].terms[0].factors[0].tensor.name for name in self.folded} | self.inlined

    def _inlined(self) -> set[str]:
        """Scores that are read by exponentials alone: A = exp(s Q Kᵀ)."""
        factors = [f.tensor for _, x in self.program.expressions() for t in x.terms for f in t.factors]
        scores = {t.argument for t in factors if isinstance(t, Map) and len(t.kinds) == 2}
        other = {t.score if isinstance(t, Poly) else t for t in factors}
        return {t.label for t in scores - other if isinstance(t, Def)}

    def _names(self) -> dict[str, Symbol]:
        """Labels of the lifter that say nothing become δ and T; numbers start at none."""
        names: dict[str, Symbol] = {}
        counts: dict[str, int] = {}
        roots: dict[str, str] = {}
        folded = self._gone() - self.inlined
        for definition in self.program.defs:
            if definition.label in folded or definition.label in self.inlined:
                continue
            root = definition.label.replace("̂", "")
            hat = "̂" if root != definition.label else ""
            if root not in roots:
                base = root
                if re.fullmatch(r"t\d*|D\d+", root):
                    base = "δ" if len(definition.kinds) == 1 else "T"
                elif re.fullmatch(r"S\d+", root):
                    base = "S"
                counts[base] = counts.get(base, 0) + 1
                roots[root] = base + (str(counts[base]) if counts[base] > 1 else "")
            names[definition.label] = symbol(roots[root] + hat)
        return names

    def _own(self, name: Symbol, tree: Matrix, note: Callable[[Style], str] | None = None) -> Symbol:
        self.own.setdefault(name.text, Line(name, tree, None, note))
        return name

    # -- lines -------------------------------------------------------------------------------------------------------

    def lines(self) -> tuple[Line, ...]:
        """The formulas in order, then the notation's own: p, w and C."""
        made: list[Line] = []
        placed: set[str] = set()

        def place(label: str, name: Symbol, x: Expr) -> None:
            tree = self.expr(x)
            new = [line for line in self.own.values() if line.note is None and line.name.text not in placed]
            placed.update(line.name.text for line in new)
            made.extend([*new, Line(name, tree, label)])

        gone = self._gone()
        for definition in self.program.defs:
            if definition.label not in gone:
                place(definition.label, self.names[definition.label], definition.expr)
        for name, x in self.program.outputs.items():
            place(name, symbol(name), self.folded.get(name, x))
        notes = [line for line in self.own.values() if line.note is not None]
        return (*made, *sorted(notes, key=lambda line: ("pwC".index(line.name.text[0]), line.name.text)))

    def expr(self, x: Expr) -> Matrix:
        """The formula of an expression."""
        if not x.terms:
            raise RewriteError("an expression without terms has no shape")
        out = tuple((index,) for index in x.indices)
        parts = []
        for term in x.terms:
            coefficient, pieces = self.pieces(term)
            parts.append((coefficient, assemble(pieces, out)))
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Sum(tuple(parts))

    def pieces(self, term: Term) -> tuple[sympy.Expr, list[Piece]]:
        """The coefficient of a term and its factors as matrices."""
        coefficient, pieces = term.coefficient, []
        for factor in term.factors:
            extra, made = self.factor(factor)
            coefficient = sympy.cancel(coefficient * extra)
            pieces += made
        return coefficient, pieces

    def factor(self, factor: Factor) -> tuple[sympy.Expr, list[Piece]]:
        """A factor as a coefficient and pieces."""
        tensor = factor.tensor
        ends = tuple((index,) for index in factor.indices)
        if isinstance(tensor, Poly):
            if tensor.degree == 0:
                return tensor.coefficients[0], [Piece(AllOnes(*tensor.kinds), ends)]
            extra, name, own = self.functions.find(tensor.coefficients)
            score = self.tensor(tensor.score)
            self._own(name, score, lambda style: f"{style.name(name)}(x) = {_written_in_x(own, style)}")
            return extra, [Piece(Apply(name, score, own), ends)]
        if isinstance(tensor, Weights):
            extra, weight = self.weight(tensor.coefficients)
            return extra, [Piece(weight, ends)]
        if isinstance(tensor, Select):
            beta, a, alpha = factor.indices
            return ONE, [Piece(self.select(tensor), ((beta, alpha), (a,)))]
        return ONE, [Piece(self.tensor(tensor), ends)]

    def weight(self, coefficients: Coefficients) -> tuple[sympy.Expr, Named]:
        """The weights of monomials by their name, up to a factor."""
        extra, name, own = self.weights.find(coefficients)

        def note(style: Style) -> str:
            listed = ", ".join(_written_in_x((c,), style) for c in own)
            formula = style.mark("[α] = c_|α| |α|!/α!", r"[\alpha] = c_{|\alpha|}\, |\alpha|!/\alpha!")
            return f"{style.name(name)}{formula}, c = ({listed})"

        return extra, Named(self._own(name, WeightColumn(own), note))

    def select(self, tensor: Select) -> Named:
        """The constant that picks columns, as a matrix with rows (β, α) and columns a."""
        if tensor not in self.selections:
            number = len(self.selections) + 1
            self.selections[tensor] = symbol("C" + (str(number) if number > 1 else ""))
        name = self.selections[tensor]

        def note(style: Style) -> str:
            return style.mark(
                f"{name.text} picks columns: ((U ⊘ Y) {name.text})[i,a] = Σ_β U[i,β] Y[i,σ(β,a)], x^σ(β,a) = x^β x_a",
                rf"((U \oslash Y)\, {name.latex})[i,a] = \sum_{{\beta}} U[i,\beta]\, Y[i,\sigma(\beta,a)], "
                rf"\quad x^{{\sigma(\beta,a)}} = x^{{\beta}} x_a",
            )

        return Named(self._own(name, Selection(tensor.degree), note))

    def stack(self, tensor: Concat) -> Symbol:
        """The name of columns side by side; equal stacks have one name, others differ by a prime."""
        key = repr(tensor.parts)
        if key not in self.stacks:
            label = tensor.label.replace("'", "")
            while symbol(label) in self.stacks.values():
                label += "'"
            self.stacks[key] = symbol(label)
        return self.stacks[key]

    def tensor(self, tensor: Tensor) -> Matrix:
        """A tensor of at most two axes, axes in their order."""
        if isinstance(tensor, Def):
            return Named(self.names[tensor.label])
        if isinstance(tensor, (Leaf, Indicator)):
            return Named(symbol(tensor.name))
        if isinstance(tensor, Map):
            return self._map(tensor)
        if isinstance(tensor, Feature):
            return Features(tensor.degree, self.tensor(tensor.source))
        if isinstance(tensor, Concat):
            name = self.stack(tensor)
            self._own(name, Stacked(tuple(self.expr(part) for part in tensor.parts)))
            return Named(name)
        if isinstance(tensor, StackedPart):
            return Columns(self.tensor(tensor.whole), tensor.part, tensor.widths)
        raise RewriteError(f"{tensor.name} has no formula of its own")

    def _map(self, tensor: Map) -> Matrix:
        argument = tensor.argument
        if tensor.function == "exp":
            if tensor not in self.exponentials:
                number = len(self.exponentials) + 1
                inner = (
                    self.expr(argument.expr)
                    if isinstance(argument, Def) and argument.label in self.inlined
                    else self.tensor(argument)
                )
                name = symbol("A" + (str(number) if number > 1 else ""))
                self.exponentials[tensor] = self._own(name, Apply(Symbol("exp", r"\exp"), inner))
            return Named(self.exponentials[tensor])
        inner = self.tensor(argument)
        if isinstance(inner, Named) and len(argument.kinds) == 1:
            return Ratio((), (inner,))
        return Apply(Symbol("1/", "1/"), inner)


def _written_in_x(coefficients: Coefficients, style: Style) -> str:
    parts = []
    for power, c in enumerate(coefficients):
        base = style.power("x", power) if power else ""
        parts.append(" ".join(filter(None, (style.coefficient(c) if c != 1 or not base else "", base))) if c else "")
    return " + ".join(filter(None, parts)) or "0"


def tensors(x: Expr) -> list[Tensor]:
    """The tensors that an expression names, with those inside them, definitions not entered."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> None:
        if isinstance(tensor, Concat):
            for part in tensor.parts:
                found.extend(tensors(part))
        elif not isinstance(tensor, Def):
            for inner in ir.base_tensors(tensor):
                visit(inner)
        found.append(tensor)

    for term in x.terms:
        for factor in term.factors:
            visit(factor.tensor)
    return found


def _reads(program: Program) -> Mapping[str, int]:
    """How often each definition is read."""
    reads: dict[str, int] = {d.label: 0 for d in program.defs}
    for _, x in program.expressions():
        for tensor in tensors(x):
            if isinstance(tensor, Def):
                reads[tensor.label] = reads.get(tensor.label, 0) + 1
    return reads
