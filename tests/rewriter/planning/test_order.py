"""The planner's orders of contraction against opt_einsum's optimal paths, FLOPs counted alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import opt_einsum
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn.errors import RewriteError
from polyattn.passes.derive.derive import derive, exact
from polyattn.passes.derive.forms import softmax
from polyattn.rewriter.algebra.expr import Expr, Factor, Index, Kind, Leaf, Select, Term, fresh, of
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.families.skeleton.rule import SkeletonRule
from polyattn.rewriter.masks.mask import NONE
from polyattn.rewriter.planning.order import NOMINAL, plan
from polyattn.rewriter.rules.rule import ApproximateRule

ONE = sympy.Integer(1)


def planned(factors: Sequence[Factor], out: Sequence[Index]) -> float:
    """FLOPs of the planner's order at nominal sizes."""
    made = plan(Program((), {"O": Expr(tuple(out), (Term(ONE, tuple(factors)),))}))
    return float(made.cost().subs({s: NOMINAL[s.name] for s in made.cost().free_symbols}))


def optimal(factors: Sequence[Factor], out: Sequence[Index]) -> float:
    """FLOPs of opt_einsum's optimal path: like the planner's, two for each element of a step that sums, else one."""
    indices = sorted({index for f in factors for index in f.indices}, key=repr)
    letters = {index: opt_einsum.get_symbol(n) for n, index in enumerate(indices)}

    def text(some: Sequence[Index]) -> str:
        return "".join(letters[index] for index in some)

    equation = f"{','.join(text(f.indices) for f in factors)}->{text(out)}"
    shapes = [tuple(round(_number(index.kind)) for index in f.indices) for f in factors]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return float(info.opt_cost)


def _number(kind: Kind) -> float:
    return float(kind.size.subs({s: NOMINAL[s.name] for s in kind.size.free_symbols}))


@st.composite
def products(draw: st.DrawFn) -> tuple[list[Factor], list[Index]]:
    """Factors of one to three axes over a few indices with sizes, and which indices stay."""
    sizes = draw(st.lists(st.integers(2, 50), min_size=2, max_size=6))
    indices = [Index(Kind(f"x{n}", sympy.Integer(size))) for n, size in enumerate(sizes)]
    factors = []
    for n in range(draw(st.integers(1, 6))):
        held = draw(st.lists(st.sampled_from(indices), min_size=1, max_size=3, unique=True))
        factors.append(Factor(Leaf(f"F{n}", tuple(index.kind for index in held)), tuple(held)))
    used = sorted({index for f in factors for index in f.indices}, key=repr)
    return factors, draw(st.lists(st.sampled_from(used), max_size=3, unique=True))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(product=products())
def test_random_products_take_no_more_than_the_optimal_path(product: tuple[list[Factor], list[Index]]) -> None:
    factors, out = product
    assert planned(factors, out) <= optimal(factors, out)


def terms(program: Program) -> dict[str, tuple[list[Factor], tuple[Index, ...]]]:
    """The products of a program, with inputs in place of what each factor is; selections stay what they are."""
    found = {}
    for name, x in program.expressions():
        for number, term in enumerate(x.terms):
            factors = [
                f if isinstance(f.tensor, Select) else Factor(Leaf(f"F{n}", f.tensor.kinds), f.indices)
                for n, f in enumerate(term.factors)
            ]
            held = {index for f in factors for index in f.indices}
            found[f"{name}, term {number}"] = (factors, tuple(index for index in x.indices if index in held))
    return found


PROGRAMS: Mapping[str, tuple[ApproximateRule | None, str]] = {
    "exact": (None, ""),
    "degree 2, consistent": (PolynomialRule(2), "consistent"),
    "degree 2, substituted": (PolynomialRule(2), "substituted"),
    "degree 2, projected": (PolynomialRule(2), "projected"),
    "skeleton features, consistent": (SkeletonRule(), "consistent"),
    "skeleton features, substituted": (SkeletonRule(), "substituted"),
}


@pytest.mark.parametrize("which", PROGRAMS)
def test_the_terms_of_softmax_attention_take_no_more_than_the_optimal_path(which: str) -> None:
    rule, gradient = PROGRAMS[which]
    form = softmax(NONE, key_bias=True)
    program = exact(form) if rule is None else derive(form, rule, gradient)[-1].program
    for name, (factors, out) in terms(program).items():
        assert planned(factors, out) <= optimal(factors, out) * (1 + 1e-12), name


def test_an_axis_without_a_nominal_size_is_named() -> None:
    kind = Kind("x", sympy.Symbol("width"))
    (index,) = fresh((kind,), ())
    x = Expr((), (Term(ONE, (Factor(Leaf("U", (kind,)), (index,)), Factor(Leaf("W", (kind,)), (index,)))),))
    with pytest.raises(RewriteError, match=r"the axis x:width has no nominal size: .* knows no width"):
        plan(Program((), {"O": x}))


def test_an_axis_of_one_factor_alone_is_planned_too() -> None:
    kind = Kind("x", sympy.Integer(3))
    made = plan(Program((), {"O": of(Leaf("U", (kind,)))}))
    assert made.outputs["O"].op == "input"
    assert made.token_degree() == 0
