"""The rules of programs in tiles: what they do is what they say, and near misses are refused with their reasons."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import sympy
import torch
from tiled import Case, dense

from polyattn.errors import RewriteError
from polyattn.passes.derive.derive import after, lifting, pipeline
from polyattn.passes.derive.forms import EXPONENTIAL, softmax
from polyattn.passes.derive.tracing import Differentiate
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Leaf, Term
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import HEAD, KEY_TILE, QUERY, QUERY_TILE, Feature, R
from polyattn.rewriter.families.clustered.rule import ClusteredRule
from polyattn.rewriter.masks.mask import NEAR_TILES, NONE
from polyattn.rewriter.notation import indices
from polyattn.rewriter.notation.symbols import LATEX, TEXT
from polyattn.rewriter.rules.adjoint import ADJOINT, Adjoint
from polyattn.rewriter.rules.shift import SHIFT_RULE
from polyattn.rewriter.rules.split import Split
from polyattn.rewriter.rules.tile import TILE

FORM = softmax(NEAR_TILES)


def lifted(backward: bool = False) -> Program:
    return after((*lifting(FORM, backward), Split(NEAR_TILES)))


def tiled(*rules: object) -> Program:
    program = TILE.apply(lifted())
    return SHIFT_RULE.apply(program) if rules else program


def inputs(case: Case, head: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of one head, as the interpreter takes them."""
    q, k, v, near = (x[head] for x in (case.q, case.k, case.v, case.near))
    a, t_q, b, t_k = *q.shape[:2], *k.shape[:2]
    made = {"Q": q, "K": k, "V": v, "M_near": near.double(), "M_far": (~near).double()}
    made |= {"M": torch.ones_like(made["M_near"]), "SHIFT": case.lse[head], "TOP": case.lse[head, :, 0]}
    made |= {"FLOOR": torch.full((a,), 1e-100, dtype=q.dtype)}
    made |= {"W_Q": torch.full((a, t_q), 1 / t_q).to(q), "W_K": torch.full((b, t_k), 1 / t_k).to(q)}
    return made | {"G": torch.randn(a, t_q, v.shape[-1], generator=torch.Generator().manual_seed(2)).to(q)}


def value(program: Program, case: Case) -> dict[str, torch.Tensor]:
    env: Mapping[str, torch.Tensor] = inputs(case)
    return Interpreter(env, {"s": case.scale}).program(program)


CASE = Case.of(1, 3, 4, 2, 5, 3, 2)


def exact() -> torch.Tensor:
    q, k, v = CASE.q.flatten(1, 2), CASE.k.flatten(1, 2), CASE.v.flatten(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=CASE.scale)
    return out.view(*CASE.q.shape[:3], -1)[0]


def test_tiles_and_shifts_change_no_value() -> None:
    for program in (tiled(), tiled("shifted")):
        torch.testing.assert_close(value(program, CASE)["O"], exact())


def test_tokens_become_tiles_and_places() -> None:
    program = TILE.apply(lifted(backward=True))
    assert [k.letter for k in TILE.axes(lifted(backward=True))["dK"]] == ["J", "j", "a"]
    assert [i.kind.letter for i in program.outputs["O"].indices] == ["I", "i", "b"]
    masks = {f.tensor for _, x in program.expressions() for t in x.terms for f in t.factors if "M_" in f.tensor.name}
    assert {m.kinds for m in masks} == {(QUERY_TILE, KEY_TILE)}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_program_means_the_expansion(order: int) -> None:
    program = after(pipeline(FORM, ClusteredRule(order), "consistent"))
    q, k, v = (x.clone().requires_grad_() for x in (CASE.q, CASE.k, CASE.v))
    out = dense(CASE, order, q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), inputs(CASE)["G"][None])
    found = value(program, CASE)
    torch.testing.assert_close(found["O"], out[0].detach())
    for name, x in zip(("dQ", "dK", "dV"), gradients, strict=True):
        torch.testing.assert_close(found[name], x[0])


def test_reverse_accumulation_is_what_tracing_finds() -> None:
    """Two ways to the same gradients: definition by definition, and torch's own graph of the whole."""
    rule = ClusteredRule(1)
    forward = pipeline(FORM, rule, "consistent")[:-1]
    traced = Differentiate(FORM, rule.inputs, ()).apply(after(forward))
    one, other = value(ADJOINT.apply(after(forward)), CASE), value(traced, CASE)
    for name in ("O", "dQ", "dK", "dV"):
        torch.testing.assert_close(one[name], other[name])


def test_every_order_errs_less_near_the_means() -> None:
    """Of queries near the mean of their tile, the error falls with the order like a higher power of the distance."""
    generator = torch.Generator().manual_seed(5)
    q0, noise = torch.randn(1, 3, 1, 4, generator=generator), torch.randn(1, 3, 6, 4, generator=generator)
    k, v = (torch.randn(1, 3, 5, w, generator=generator).double() for w in (4, 2))
    errors = []
    for width in (0.1, 0.05):
        q = (q0 + width * noise).double()
        case = Case(q, k, v, torch.zeros(1, 3, 3, dtype=torch.bool))
        full = torch.nn.functional.scaled_dot_product_attention(
            q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), scale=case.scale
        ).view(1, 3, 6, 2)
        errors.append([float((dense(case, order, q, k, v) - full).norm()) for order in (0, 1)])
    assert errors[1][0] < 0.6 * errors[0][0]
    assert all(first < zeroth for zeroth, first in errors)


# -- near misses -----------------------------------------------------------------------------------------------------


def test_features_have_no_form_in_tiles() -> None:
    i, column = ir.Index(QUERY), ir.Index(ir.Kind("α", R))
    features = Factor(Feature(Leaf("Q", (QUERY, HEAD)), 2, column.kind), (i, column))
    with pytest.raises(RewriteError, match="has no form in tiles"):
        TILE.apply(Program((), {"O": Expr((i, column), (Term(sympy.Integer(1), (features,)),))}))


def test_a_score_that_is_read_itself_is_not_shifted() -> None:
    program = tiled()
    score = next(d for d in program.defs if len(d.kinds) == 4)
    read = Program(program.defs, {**program.outputs, "S": ir.of(score)})
    with pytest.raises(RewriteError, match=r"reads the score .* itself"):
        SHIFT_RULE.apply(read)


def test_a_score_without_tiles_is_not_shifted() -> None:
    with pytest.raises(RewriteError, match="is not over tiles of queries"):
        SHIFT_RULE.apply(lifted())


def test_a_score_that_is_no_product_is_refused() -> None:
    program = tiled("shifted")
    score = next(d for d in program.defs if len(d.kinds) == 4)
    twice = Def(score.label, Expr(score.expr.out, (*score.expr.terms, score.expr.terms[0])))
    broken = Program(tuple(twice if d is score else d for d in program.defs), program.outputs).rewrite(lambda x: x)
    with pytest.raises(RewriteError, match="is not one product and a shift"):
        ClusteredRule(1).apply(broken)


def test_a_score_without_a_shift_is_refused() -> None:
    with pytest.raises(RewriteError, match="is not one product and a shift"):
        ClusteredRule(1).apply(tiled())


def test_reverse_accumulation_refuses_what_it_cannot_do() -> None:
    program = after(lifting(softmax(NONE), backward=False))
    with pytest.raises(RewriteError, match="has no input X"):
        Adjoint(("X",)).apply(program)
    with pytest.raises(RewriteError, match="outputs beside O"):
        ADJOINT.apply(after(lifting(softmax(NONE))))


def test_reverse_accumulation_of_other_forms() -> None:
    """It is a rule about programs, not about tiles."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, w, generator=generator, dtype=torch.float64) for n, w in ((3, 2), (4, 2), (4, 5)))
    g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    for form in (softmax(NONE), EXPONENTIAL):
        found = Interpreter({"Q": q, "K": k, "V": v, "G": g}, {"s": 0.7}).program(
            ADJOINT.apply(after(lifting(form, backward=False)))
        )
        operands = [x.clone().requires_grad_() for x in (q, k, v)]
        out = form.function({"Q": operands[0], "K": operands[1], "V": operands[2], "s": torch.tensor(0.7).double()})
        for name, x in zip(("dQ", "dK", "dV"), torch.autograd.grad(out, operands, g), strict=True):
            torch.testing.assert_close(found[name], x)


def test_one_index_on_two_axes_has_no_derivative_here() -> None:
    i = ir.Index(QUERY)
    square = Leaf("Q", (QUERY, QUERY))
    diagonal = Expr((i,), (Term(sympy.Integer(1), (Factor(square, (i, i)),)),))
    with pytest.raises(RewriteError, match="one index on two axes"):
        Adjoint(("Q",)).apply(Program((), {"O": diagonal}))


# -- notation --------------------------------------------------------------------------------------------------------


def test_programs_in_tiles_are_written_in_indices() -> None:
    program = after(pipeline(FORM, ClusteredRule(1), "consistent"))
    assert indices.in_tiles(program)
    assert not indices.in_tiles(lifted())
    written = {label: indices.write(label, x, TEXT) for label, x in program.expressions()}
    assert written["DP"] == "DP[I,J] = Σ_j OMEGA[I,J,j]"
    assert written["CK"] == "CK[I,J,a] = 1/DP[I,J] KP[I,J,a]"
    assert written["KAPPA"] == "KAPPA[J,j,a] = K[J,j,a] − KBAR[J,a]"
    latex = indices.write("KAPPA", program["KAPPA"].expr, LATEX)
    assert latex == r"\kappa_{J j a} = K_{J j a} - \bar K_{J a}"
