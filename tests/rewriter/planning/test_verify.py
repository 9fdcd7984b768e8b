"""Broken plans are refused, each with a sentence that names the node."""

from __future__ import annotations

import pytest
import sympy

from polyattn.errors import RewriteError
from polyattn.passes.derive.derive import derive
from polyattn.passes.derive.forms import FORMS
from polyattn.rewriter.algebra.expr import HEAD, KEY, QUERY, VALUE, E, Kind
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import Node, Plan, node
from polyattn.rewriter.planning.verify import verify

UPPER = Kind("α", sympy.Symbol("r"))
WIDE = Kind("b̂", E + 1)
Q, K, V = (
    node("input", (), axes, name) for name, axes in (("Q", (QUERY, HEAD)), ("K", (KEY, HEAD)), ("V", (KEY, VALUE)))
)
D = node("input", (), (QUERY,), "D")
STATE = node("input", (), (UPPER, VALUE), "S")


def contraction(args: tuple[Node, ...], axes: tuple[Kind, ...], patterns: object, result: object) -> Node:
    return node("contract", args, axes, (patterns, result))


BROKEN = {
    "too few patterns": (
        contraction((Q, K), (QUERY, KEY), ((0, 1),), (0, 2)),
        r"contract#\d+\[ij\] has patterns \(\(0, 1\),\) for arguments of axes",
    ),
    "a pattern of another length": (contraction((Q,), (QUERY,), ((0,),), (0,)), "has patterns"),
    "one index of two kinds": (
        contraction((Q, V), (QUERY, KEY), ((0, 1), (2, 1)), (0, 2)),
        "shares one index between axes a:d and b:e",
    ),
    "an index from nowhere": (
        contraction((Q,), (QUERY, KEY), ((0, 1),), (0, 7)),
        "has the index 7 that no",
    ),
    "other axes than its pattern": (
        contraction((Q, K), (KEY, QUERY), ((0, 1), (2, 1)), (0, 2)),
        r"has axes \(j:n_k, i:n_q\), its pattern says \(i:n_q, j:n_k\)",
    ),
    "a sum without a coefficient": (node("sum", (Q, Q), Q.axes, ((1,), ((0, 1), (0, 1)))), "adds 2 values with 1"),
    "a sum of other axes": (
        node("sum", (Q, K), Q.axes, ((1, 1), ((0, 1), (0, 1)))),
        r"adds a value of axes \(j:",
    ),
    "a sum that loses an axis": (node("sum", (Q,), (QUERY,), ((1,), ((0,),))), r"in the order \(0,\)"),
    "a function of other axes": (node("map", (Q,), (QUERY,), "exp"), "is elementwise in values of axes"),
    "features of a column": (node("features", (D,), (QUERY, UPPER), 2), "is no features of the rows"),
    "features of other rows": (node("features", (K,), (QUERY, UPPER), 2), "is no features of the rows"),
    "a gather that keeps its axis": (
        node("gather", (STATE,), (UPPER, HEAD, VALUE, VALUE), (0, 2)),
        r"has axes \(α:r, a:d, b:e, b:e\), two in place of axis 0",
    ),
    "a stack that lacks a part": (
        node("concat", (V,), (KEY, WIDE), ((VALUE, None), (None, None))),
        "stacks 2 values",
    ),
    "a stack of other rows": (
        node("concat", (V,), (QUERY, WIDE), ((VALUE, None), (None, 1))),
        "stacks a value of axes",
    ),
    "columns that lose the rows": (node("part", (V,), (VALUE,), (0, (VALUE, None))), "which are no columns of"),
    "an input with arguments": (node("input", (Q,), Q.axes, "X"), "is given, and has arguments"),
    "an unknown operation": (node("solve", (Q,), Q.axes, None), "is no operation of a plan"),
    "three token axes": (
        contraction((Q, K, D), (QUERY, KEY, QUERY), ((0, 1), (2, 1), (3,)), (0, 2, 3)),
        "forms a value of more than two token axes",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plan_is_refused(what: str) -> None:
    made, message = BROKEN[what]
    with pytest.raises(RewriteError, match=message):
        verify(Plan({"O": made}, 0))
    above = contraction((made,), made.axes[:1], (tuple(range(len(made.axes))),), (0,))
    with pytest.raises(RewriteError, match=message):
        verify(Plan({"O": above}, 0))


@pytest.mark.parametrize("name", FORMS)
def test_plans_of_derivations_pass(name: str) -> None:
    for step in derive(FORMS[name], PolynomialRule(2), "consistent")[-1:]:
        verify(plan(step.program))


def test_the_degree_in_n_counts_token_axes_and_near_pairs_as_one() -> None:
    scores = contraction((Q, K), (QUERY, KEY), ((0, 1), (2, 1)), (0, 2))
    assert Plan({"O": Q}, 0).token_degree() == 1
    assert Plan({"O": STATE}, 0).token_degree() == 0
    assert Plan({"O": scores}, 0).token_degree() == 2
    assert Plan({"O": scores}, 1).token_degree() == 1
