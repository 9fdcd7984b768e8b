"""Broken programs are refused, each with a sentence that says what is broken."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
import sympy
from programs import program

from polyattn.errors import RewriteError
from polyattn.passes.derive.derive import derive
from polyattn.passes.derive.forms import softmax
from polyattn.rewriter.algebra.expr import (
    HEAD,
    KEY,
    QUERY,
    VALUE,
    Concat,
    Def,
    E,
    Expr,
    Factor,
    Feature,
    Index,
    Kind,
    Leaf,
    Map,
    StackedPart,
    Tensor,
    Term,
)
from polyattn.rewriter.algebra.programs import Program, ordered
from polyattn.rewriter.algebra.verify import output_axes, verify
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.masks.mask import CAUSAL
from polyattn.rewriter.rules.rule import Rule

ONE = sympy.Integer(1)
GOOD = "S[i,j] = s * Q[i,a] K[j,a];  N[i,b] = exp(S)[i,j] V[j,b];  O[i,b] = N[i,b] z[i]"
I, J, A, B = (Index(kind) for kind in (QUERY, KEY, HEAD, VALUE))
WIDE = Kind("b̂", E + 1)


def holding(tensor: Tensor, *indices: Index) -> Program:
    """A program whose output is one tensor."""
    return Program((), {"O": Expr(indices, (Term(ONE, (Factor(tensor, indices),)),))})


def column(*indices: Index) -> Expr:
    return Expr(indices, (Term(ONE, (Factor(Leaf("U", tuple(i.kind for i in indices)), indices),)),))


def test_a_program_that_means_something_passes() -> None:
    verify(program(GOOD))
    verify(program(GOOD), output_axes(program(GOOD)))
    verify(Program((), {}))


def with_wrong_axes() -> Program:
    made = program(GOOD)
    factor = made.outputs["O"].terms[0].factors[0]
    object.__setattr__(factor, "indices", (J, B))
    return made


def shadowed() -> Program:
    """An output that reads another S than the one that is defined."""
    other = program("S[i,j] = 2 * Q[i,a] K[j,a];  O[i] = exp(S)[i,j]")
    return Program(program(GOOD).defs, other.outputs)


def twice() -> Program:
    made = program(GOOD)
    return replace(made, defs=(*made.defs, made.defs[0]))


def backwards() -> Program:
    made = program("U[i,b] = A[i,j] V[j,b];  W[i,b] = U[i,b] z[i];  O[i,b] = W[i,b]")
    return replace(made, defs=made.defs[::-1])


def output_of_a_name() -> Program:
    made = program(GOOD)
    return replace(made, outputs={"N": made.outputs["O"]})


BROKEN = {
    "an index that no factor has": (
        lambda: program("O[i,b] = A[i,j] z[i]"),
        r"the index b of O is free: no factor has it in \[i,b\]",
    ),
    "an index on two axes": (lambda: program("O[i,i] = z[i]"), "has one index on two axes"),
    "no terms": (lambda: Program((), {"O": Expr((I,), ())}), "O has no terms, and so no shape"),
    "a broadcast axis": (lambda: Program((), {"O": Expr((I, None), column(I).terms)}), "a broadcast axis is left in O"),
    "indices of other kinds": (with_wrong_axes, r"N has axes \(i:n_q, b:e\), O reads it at \(j, b\)"),
    "a use without a definition": (
        lambda: replace(program(GOOD), defs=()),
        "O reads N, which nothing defines",
    ),
    "a use before its definition": (backwards, "W reads U before its definition"),
    "another definition of the name": (shadowed, "O reads another S than the one that is defined"),
    "two definitions of one name": (twice, "two definitions are called S"),
    "a definition and an output of one name": (output_of_a_name, "a definition and an output are called N"),
    "an input with the name of a definition": (
        lambda: program("O[i] = A[i,j] z[j];  A[i,j] = Q[i,a] K[j,a]"),
        "O reads an input A, and a definition has its name",
    ),
    "features of what has no rows": (
        lambda: holding(Feature(Leaf("z", (QUERY,)), 2, HEAD), I, A),
        "O reads features of z, whose rows are not those of tokens",
    ),
    "a stack of rows of different tokens": (
        lambda: holding(Concat("U", (column(I, B), column(J)), WIDE), I, Index(WIDE)),
        "O reads U, whose parts have rows of different tokens",
    ),
    "a stack of the wrong width": (
        lambda: holding(Concat("U", (column(I, B), column(I, B)), WIDE), I, Index(WIDE)),
        r"U has e \+ 1 columns, its parts have 2\*e",
    ),
    "a part that a stack does not have": (
        lambda: holding(_PastTheEnd(Leaf("U", (QUERY, WIDE)), 2, (VALUE, None)), I),
        "O reads part 2 of U, which has 2",
    ),
    "a part of another stack": (
        lambda: holding(StackedPart(Leaf("U", (QUERY, WIDE)), 0, (VALUE, VALUE)), I, B),
        r"U has e \+ 1 columns, its parts have 2\*e",
    ),
    "something broken inside a function": (
        lambda: holding(Map("exp", Def("S", column(I, J))), I, J),
        "O reads S, which nothing defines",
    ),
}


class _PastTheEnd(StackedPart):
    """A part whose axes do not need its number."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return self.whole.kinds[:-1]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_program_is_refused(what: str) -> None:
    make, message = BROKEN[what]
    with pytest.raises(RewriteError, match=message):
        verify(make())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"O": (QUERY, HEAD)}, r"O has the axes \(i:n_q, b:e\), declared are \(i:n_q, a:d\)"),
        ({"O": (QUERY, VALUE), "dQ": (QUERY, HEAD)}, "the outputs are O, declared are O, dQ"),
        ({}, "the outputs are O, declared are "),
    ],
)
def test_outputs_are_as_they_are_declared(outputs: dict[str, tuple[Kind, ...]], message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        verify(program(GOOD), outputs)


@dataclass(frozen=True)
class Careless(Rule):
    """A rule that answers with a given program."""

    answer: str

    name, formula, source, note = "careless", "x → y", "math.md §0", "it is not checked"

    def rewrite(self, program_: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        return program(self.answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("O[i,a] = Q[i,a]", "careless leaves a broken program: O has the axes"),
        ("dQ[i,b] = G[i,b]", "careless leaves a broken program: the outputs are dQ, declared are O"),
        ("O[i,b] = z[i]", "careless leaves a broken program: the index b of O is free"),
    ],
)
def test_a_rule_may_not_break_a_program_or_change_its_outputs(answer: str, message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        Careless(answer).apply(program(GOOD))
    with pytest.raises(RewriteError, match="careless is given a broken program: O reads N, which nothing defines"):
        Careless(GOOD).apply(replace(program(GOOD), defs=()))


def test_definitions_are_brought_into_order() -> None:
    made = ordered(backwards())
    assert [d.label for d in made.defs] == ["U", "W"]
    verify(made)


def test_a_definition_that_needs_itself_has_no_order() -> None:
    first = Def("U", Expr((I,), (Term(ONE, (Factor(Def("W", column(I)), (I,)),)),)))
    second = Def("W", Expr((I,), (Term(ONE, (Factor(first, (I,)),)),)))
    with pytest.raises(RewriteError, match="U is defined by itself"):
        ordered(Program((first, second), {"O": column(I)}))


def test_it_takes_milliseconds() -> None:
    made = derive(softmax(CAUSAL, key_bias=True), PolynomialRule(2), "consistent")[-1].program
    start = time.perf_counter()
    for _ in range(10):
        verify(made)
    assert time.perf_counter() - start < 0.5  # about 10 ms on an idle machine
