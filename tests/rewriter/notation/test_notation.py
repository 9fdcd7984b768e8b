"""What is printed is what is computed: formulas evaluate, by their printed names alone, to what the program means."""

from __future__ import annotations

import math
import re

import pytest
import sympy
import torch
from operands import form_inputs

from polyattn.passes.derive.derive import derive, exact
from polyattn.passes.derive.forms import FORMS, Form
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.notation import printer
from polyattn.rewriter.notation.assemble import Piece, assemble
from polyattn.rewriter.notation.matrix import Dense, Einstein, Matrix, Named, Sum
from polyattn.rewriter.notation.recipe import recipe
from polyattn.rewriter.notation.symbols import symbol

SIZES = {"i": 13, "j": 11, "t": 12, "a": 4, "b": 3}
CHUNK = 4


def scalars(degree: int) -> dict[str, float]:
    return {"s": 0.7, **{f"a{m}": 1 / math.factorial(m) for m in range(degree + 1)}}


def dense(form: Form, degree: int) -> Dense:
    names = {symbol(name).text: column(value) for name, value in form_inputs(form, SIZES, CHUNK).items()}
    kinds = (ir.QUERY, ir.KEY, ir.TOKEN, ir.HEAD, ir.VALUE)
    sizes = {kind: SIZES[kind.letter] for kind in kinds}
    sizes[ir.Kind("b̂", ir.E + 1)] = SIZES["b"] + 1
    return Dense(names, scalars(degree), sizes, SIZES["a"])


def meant(program: Program, form: Form, degree: int) -> dict[str, torch.Tensor]:
    interpreter = Interpreter(form_inputs(form, SIZES, CHUNK), scalars(degree))
    outputs = interpreter.program(program)
    return {**{d.label: interpreter.tensor(d) for d in program.defs}, **outputs}


def column(value: torch.Tensor) -> torch.Tensor:
    return value if value.ndim == 2 else value.reshape(-1, 1)


def einsteins(tree: Matrix) -> bool:
    return any(einsteins(part) for _, part in tree.parts) if isinstance(tree, Sum) else isinstance(tree, Einstein)


CASES = [
    (name, degree, gradient) for name in FORMS for degree in (1, 2, 3) for gradient in ("consistent", "substituted")
]


@pytest.mark.parametrize(("name", "degree", "gradient"), CASES)
def test_every_formula_of_every_step_means_what_the_program_means(name: str, degree: int, gradient: str) -> None:
    """Trees are evaluated with matrix operations on the values of the names that they print, line after line."""
    form = FORMS[name]
    checked = 0
    for step in derive(FORMS[name], PolynomialRule(degree), gradient):
        wanted, at = meant(step.program, form, degree), dense(form, degree)
        printed = set()
        lines = printer.lines(step.program)
        for line in sorted(lines, key=lambda x: x.note is None):  # w and C are written last and used before
            value = line.tree.value(at) if line.note is None or line.name.text[0] in "wC" else None
            if value is None:
                continue
            assert line.name.text not in at.names or line.source is None, f"two things are called {line.name.text}"
            at.names[line.name.text] = value
            assert not einsteins(line.tree), f"{line} has a matrix form"
            if line.source is not None:
                printed.add(line.source)
                torch.testing.assert_close(
                    value, column(wanted[line.source]), rtol=0, atol=1e-11, msg=lambda m, x=line: f"{x}: {m}"
                )
                checked += 1
        assert set(step.program.outputs) <= printed
    assert checked > 10


UNMASKED = [case for case in CASES if not case[0].startswith(("causal", "local_window"))]


@pytest.mark.parametrize(("name", "degree", "gradient"), UNMASKED)
def test_every_line_of_a_recipe_means_what_the_plan_means(name: str, degree: int, gradient: str) -> None:
    form = FORMS[name]
    program = derive(FORMS[name], PolynomialRule(degree), gradient)[-1].program
    wanted, at = meant(program, form, degree), dense(form, degree)
    for line in printer.lines(program):
        if line.name.text[0] in "wC":
            at.names[line.name.text] = line.tree.value(at)
    made = recipe(program)
    for block in made.blocks:
        for step in block.steps:
            at.names[step.name.text] = step.tree.value(at)
        torch.testing.assert_close(at.names[block.output], column(wanted[block.output]), rtol=0, atol=1e-11)
    total = sum((block.flops for block in made.blocks), sympy.Integer(0))
    assert sympy.expand(total - made.plan.cost()) == 0


def test_the_exact_form_reads_as_in_the_mathematics() -> None:
    assert printer.text(exact(FORMS["softmax"], False)).splitlines() == [
        "A = exp(s Q Kᵀ)",
        "D = A 1",
        "N = A V",
        "O = diag(1/D) N",
    ]
    assert "dQ = diag(1/D) T" in printer.text(exact(FORMS["softmax"]))
    assert "T = s (A ∘ (G Vᵀ)) K − s diag(δ/D) A K" in printer.text(exact(FORMS["softmax"]))


def test_the_low_rank_form_reads_as_in_the_mathematics() -> None:
    consistent = printer.text(derive(FORMS["softmax"], PolynomialRule(2), "consistent")[-1].program).splitlines()
    assert "V̂ = [V, 1]" in consistent
    assert "N̂ = Φ₂(Q) diag(w) (Φ₂(K)ᵀ V̂)" in consistent
    assert "dQ = (Φ₁(Q) diag(w′) ⊘ Ĝ (V̂ᵀ Φ₂(K))) C" in consistent
    substituted = printer.text(derive(FORMS["softmax"], PolynomialRule(2), "substituted")[-1].program).splitlines()
    assert "dQ = s (Φ₂(Q) diag(w) ⊘ Ĝ) ((Φ₂(K) ⊘ V̂)ᵀ K)" in substituted


def test_an_expression_has_a_text_and_a_latex_form() -> None:
    program = derive(FORMS["causal_softmax"], PolynomialRule(2), "consistent")[-1].program
    x = program["N̂"].expr
    assert printer.text(x) == "(M_near ∘ A) V̂ + (M_far ∘ (Φ₂(Q) diag(w) Φ₂(K)ᵀ)) V̂"
    assert r"M_{\mathrm{far}} \circ (\Phi_{2}(Q)\, \mathrm{diag}(w)\, \Phi_{2}(K)^{\top})" in printer.latex(x)


def test_a_product_without_a_matrix_form_shows_its_indices() -> None:
    """Σ_abc of a tetrahedron of matrices: no order of matrix operations computes it."""
    i, j, a, b = (ir.Index(kind) for kind in (ir.QUERY, ir.KEY, ir.HEAD, ir.VALUE))
    pairs = {"U": (i, j), "W": (i, a), "X": (i, b), "Y": (j, a), "Z": (j, b), "R": (a, b)}
    pieces = [Piece(Named(symbol(name)), ((x,), (y,))) for name, (x, y) in pairs.items()]
    tree = assemble(pieces, ((i,),))
    assert isinstance(tree, Einstein)
    assert str(tree) == "Σ_{j,a,b} U[i,j] W[i,a] X[i,b] Y[j,a] Z[j,b] R[a,b]"
    generator = torch.Generator().manual_seed(0)
    names = {
        name: torch.randn(SIZES[x.kind.letter], SIZES[y.kind.letter], dtype=torch.float64, generator=generator)
        for name, (x, y) in pairs.items()
    }
    wanted = torch.einsum("ij,ia,ib,ja,jb,ab->i", *names.values())
    torch.testing.assert_close(tree.value(Dense(names, {}, {}, 0)), wanted.unsqueeze(1))


def test_a_diagonal_shows_its_indices() -> None:
    t = ir.Index(ir.TOKEN)
    tree = assemble([Piece(Named(symbol("S")), ((t,), (t,)))], ((t,),))
    assert str(tree) == "S[t,t]"


def test_names_of_symbols() -> None:
    assert [symbol(x).text for x in ("t2̂", "V̂", "Ĝ'", "M_near", "a10", "dQ")] == [
        "t̂₂", "V̂", "Ĝ′", "M_near", "a₁₀", "dQ"
    ]  # fmt: skip
    assert symbol("Ĝ'").latex == r"\hat{G}'"
    assert symbol("M_near").latex == r"M_{\mathrm{near}}"
    assert symbol("t2̂").latex == r"\hat{t}_{2}"


@pytest.mark.parametrize("name", FORMS)
def test_mathtext_renders_every_formula(name: str) -> None:
    mathtext = pytest.importorskip("matplotlib.mathtext")
    parser = mathtext.MathTextParser("path")
    for gradient in ("consistent", "substituted"):
        formulas = {
            formula
            for step in derive(FORMS[name], PolynomialRule(2), gradient)
            for formula in printer.latex(step.program).splitlines()
        }
        for formula in sorted(formulas):
            assert not re.search(r"[^\x00-\x7f]", formula), f"{formula} is not plain LaTeX"
            parser.parse(f"${formula}$")
