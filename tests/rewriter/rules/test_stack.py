"""stack: matrices that meet the same partner are put side by side."""

from __future__ import annotations

import pytest
from programs import assert_equal, program

from polyattn.rewriter.algebra.expr import Concat
from polyattn.rewriter.algebra.programs import Program, factors
from polyattn.rewriter.rules.stack import STACK

HAT = "\u0302"
S = "S[i,j] = s * Q[i,a] K[j,a];"


def stacks(made: Program) -> dict[str, str]:
    return {f.tensor.label: repr(f.tensor.parts) for f in factors(made) if isinstance(f.tensor, Concat)}


def test_inside_a_sum() -> None:
    """X ∘ (G Vᵀ) − X ∘ (δ 1ᵀ)."""
    before = program(S + "O[i,a] = exp(S)[i,j] G[i,b] V[j,b] K[j,a] - exp(S)[i,j] z[i] K[j,a]")
    after = STACK.apply(before)
    assert stacks(after) == {f"G{HAT}": "([i,b] G[i,b], [i] -1 · z[i])", f"V{HAT}": "([j,b] V[j,b], [j] 1)"}
    assert len(after.outputs["O"].terms) == 1
    assert_equal(after, before)


def test_across_results() -> None:
    """A V and A 1 are columns of A [V, 1]."""
    before = program(S + "N[i,b] = exp(S)[i,j] V[j,b];  D[i] = exp(S)[i,j];  O[i,b] = N[i,b] 1/D[i]")
    after = STACK.apply(before)
    assert stacks(after) == {f"V{HAT}": "([j,b] V[j,b], [j] 1)"}
    assert [d.label for d in after.defs] == ["S", f"N{HAT}", "N", "D"]
    assert_equal(after, before)


def test_widened_to_a_stack_that_is_there() -> None:
    """Aᵀ diag(z) G is the first columns of Aᵀ [diag(z) G, −y]."""
    before = program(
        S
        + "O[i,a] = exp(S)[i,j] z[i] G[i,b] V[j,b] K[j,a] - exp(S)[i,j] y[i] K[j,a];"
        + "dV[j,b] = exp(S)[i,j] z[i] G[i,b]"
    )
    after = STACK.apply(before)
    assert repr(after.outputs["dV"]) == f"[j,b] dV{HAT}[0][j,b]"
    assert_equal(after, before)


def test_written_out_where_nothing_else_reads_them() -> None:
    before = program(
        S
        + "U[i,a] = exp(S)[i,j] G[i,b] V[j,b] K[j,a];  W[i,a] = exp(S)[i,j] z[i] K[j,a];"
        + "O[i,a] = U[i,a] + -1 * W[i,a]"
    )
    after = STACK.apply(before)
    assert [d.label for d in after.defs] == ["S"]
    assert set(stacks(after)) == {f"G{HAT}", f"V{HAT}"}
    assert_equal(after, before)


def test_definitions_come_before_the_stacks_that_read_them() -> None:
    """What is stacked is defined after the definition that becomes wide: the order changes, the value does not."""
    before = program(
        S
        + "N[i,b] = exp(S)[i,j] V[j,b];  D[i] = exp(S)[i,j];  t[i] = G[i,b] N[i,b];"
        + "O[i,b] = N[i,b] 1/D[i];  dQ[i,a] = exp(S)[i,j] G[i,b] V[j,b] K[j,a] - exp(S)[i,j] t[i] K[j,a]"
    )
    assert_equal(STACK.apply(before), before)


@pytest.mark.parametrize(
    ("what", "text"),
    {
        "columns of two kinds": "O[i,a] = exp(S)[i,j] G[i,b] V[j,b] K[j,a] + exp(S)[i,j] E[i,c] F[j,c] K[j,a]",
        "partners differ": "O[i,a] = exp(S)[i,j] G[i,b] V[j,b] K[j,a] - B[j] z[i] K[j,a]",
        "the sum of another exponential": "T[i,j] = Q[i,a] L[j,a];  N[i,b] = exp(S)[i,j] V[j,b];  D[i] = exp(T)[i,j];"
        "O[i,b] = N[i,b] 1/D[i]",
        "a sum that is read twice": "U[i,a] = A[i,j] K[j,a];  W[i,a] = C[i,j] K[j,a];  O[i,a] = U[i,a] + W[i,a];"
        "dQ[i,a] = U[i,a] z[i]",
    }.items(),
)
def test_near_misses_are_left_as_they_are(what: str, text: str) -> None:
    before = program(S + text)
    after = STACK.apply(before)
    assert stacks(after) == {}, what
    assert_equal(after, before)
