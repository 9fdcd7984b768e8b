"""project: dQ and dK in coordinates of a few directions of keys and queries."""

from __future__ import annotations

import pytest
import torch
from programs import dense, program, values

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import Expr, Factor, map_factors
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import DIRECTION, HEAD
from polyattn.rewriter.algebra.verify import output_axes
from polyattn.rewriter.rules.project import KP, PROJECT, QP

GRADIENTS = "dQ[i,a] = A[i,j] K[j,a] - C[i,j] z[i] K[j,a];  dK[j,a] = A[i,j] Q[i,a]"


def with_directions(made: Program) -> Program:
    """The program with K U and Q U in place of the inputs KP and QP."""
    products = program("KU[j,c] = K[j,a] U[a,c];  QU[i,c] = Q[i,a] U[a,c]")

    def change(factor: Factor) -> Expr | None:
        return {KP: products["KU"].expr, QP: products["QU"].expr}.get(factor.tensor)

    return made.rewrite(lambda x: map_factors(x, change))


def test_gradients_are_in_coordinates_and_nothing_else_changes() -> None:
    before = program("O[i,b] = A[i,j] V[j,b];" + GRADIENTS)
    after = PROJECT.apply(before)
    assert repr(after.outputs["dQ"]) == "[i,c] A[i,j] · KP[j,c] + -1 · C[i,j] · KP[j,c] · z[i]"
    assert repr(after.outputs["dK"]) == "[j,c] A[i,j] · QP[i,c]"
    assert after.outputs["O"] == before.outputs["O"]
    axes = output_axes(after)
    assert (axes["dQ"][1], axes["dK"][1]) == (DIRECTION, DIRECTION)


def test_values_are_those_of_the_gradients_times_the_directions() -> None:
    before = program(GRADIENTS)
    found, wanted = values(with_directions(PROJECT.apply(before))), values(before)
    u = dense("U", (HEAD, DIRECTION))
    for name in ("dQ", "dK"):
        torch.testing.assert_close(found[name], wanted[name] @ u)


def test_a_gradient_that_is_a_name_is_looked_up() -> None:
    after = PROJECT.apply(program("T[i,a] = A[i,j] K[j,a];  dQ[i,a] = 2 * T[i,a];  dK[j,a] = A[i,j] Q[i,a]"))
    assert after.defs == ()
    assert repr(after.outputs["dQ"]) == "[i,c] 2 · A[i,j] · KP[j,c]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "dQ[i,a] = A[i,j] K[j,a] + G[i,a];  dK[j,a] = A[i,j] Q[i,a]",
            r"project: dQ is not a product with K: G",
        ),
        ("dQ[i,a] = A[i,j] L[j,a];  dK[j,a] = A[i,j] Q[i,a]", "dQ is not a product with K"),
        ("dQ[i,a] = A[i,j] K[j,a];  dK[j,a] = A[i,j] Q[i,a] H[j,a]", "dK is not a product with Q"),
        ("dQ[i,a] = A[i,j] K[j,a]", "the program has no output dK"),
    ],
)
def test_near_misses_are_refused(text: str, reason: str) -> None:
    with pytest.raises(RewriteError, match=reason):
        PROJECT.apply(program(text))
