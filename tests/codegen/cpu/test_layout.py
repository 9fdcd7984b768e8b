"""Layouts of the CPU target, and the expressions that read them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import sympy
from positive_features import PositiveRule
from rules import kernels

from polyattn.codegen.cpu.layout import Sizes, Value, einsum, matrices, number, ordered
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import HEAD, Kind, Leaf
from polyattn.rewriter.rules.rule import ApproximateRule

s, a1 = sympy.symbols("s a1", positive=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (sympy.Rational(1, 3), "1/3"),
        (-s / 2, "-s/2"),
        (s**2 * a1, "a1*s**2"),
        (sympy.sqrt(s), "s**(1/2)"),
        (a1 / sympy.sqrt(s), "a1/s**(1/2)"),
        (1 / s, "1/s"),
    ],
)
def test_numbers_are_python_without_functions(value: sympy.Expr, text: str) -> None:
    assert number(value) == text
    assert eval(number(value), {"s": 0.3, "a1": 0.7}) == pytest.approx(float(value.subs({s: 0.3, a1: 0.7})))


def test_a_function_in_a_coefficient_is_refused() -> None:
    with pytest.raises(EmitError, match=r"no code for the coefficient log\(s\)"):
        number(sympy.log(s))


@dataclass(frozen=True)
class TwoSizes(PositiveRule):
    """Features of two sizes."""

    inputs = (
        Leaf("P", (Kind("ω", sympy.Symbol("m"), feature=True), HEAD)),
        Leaf("R", (Kind("ω", sympy.Symbol("m"), feature=True), Kind("π", sympy.Symbol("m'"), feature=True))),
    )


def spec_of(rule: ApproximateRule) -> KernelSpec:
    return KernelSpec("odd", (), (), tuple(leaf.name for leaf in rule.inputs), rule=rule)


def test_sizes_of_a_rules_own_axes_come_from_its_inputs() -> None:
    sizes = Sizes(spec_of(TwoSizes()))
    assert sizes.sources == {"m": "P.shape[1]", "m_1": "R.shape[2]"}
    assert sizes.shape(("ω", "π", "i")) == "[H, m, m_1, T_q]"
    assert sizes.shape(("α", "b̂")) == "[H, r, e + 1]"
    assert sizes.shape(()) == "[H]"


def test_an_axis_of_no_input_has_no_size() -> None:
    with pytest.raises(EmitError, match="how large the axis ω is"):
        Sizes(kernels(False, 2, "consistent").forward).of("ω")


@dataclass(frozen=True)
class OddSize(PositiveRule):
    """Features whose number is no symbol."""

    inputs = (Leaf("P", (Kind("ω", sympy.Symbol("m") + 1, feature=True), HEAD)),)


def test_a_size_that_is_no_symbol_is_refused() -> None:
    with pytest.raises(EmitError, match=r"no variable for the size m \+ 1 of the axis ω"):
        Sizes(spec_of(OddSize()))


def test_tiles_end_in_tokens_and_states_in_features() -> None:
    assert ordered(("i", "ω")) == ("ω", "i")
    assert ordered(("ω", "b")) == ("b", "ω")
    assert ordered(("j", "a")) == ("a", "j")
    assert ordered(("i", "j")) == ("i", "j")


def test_values_are_read_as_matrices_where_they_lie_so() -> None:
    rows, state = Value("x", ("i", "a")), Value("S", ("a", "ω"))
    assert matrices([rows, state], ("i", "ω")) == ("x", "S", (1, 1))
    assert matrices([rows, state], ("ω", "i")) == ("S.mT", "x.mT", (1, 1))
    assert matrices([rows, Value("y", ("i", "b"))], ("i", "a")) is None
    assert einsum([rows, state], ("ω", "i")) == 'torch.einsum("hia,ham->hmi", x, S)'
