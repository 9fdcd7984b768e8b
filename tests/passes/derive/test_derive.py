"""Every step of every derivation means what autograd through the dense form means; costs are what math.md says."""

from __future__ import annotations

import math
import time

import pytest
import sympy
import torch
from operands import form_inputs

from polyattn.errors import LiftError
from polyattn.passes.derive.derive import after, derive, exact
from polyattn.passes.derive.forms import FORMS, Form
from polyattn.passes.derive.lift import Lifter, trace
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import walk
from polyattn.rewriter.rules.stack import STACK

SIZES = {"i": 13, "j": 13, "t": 12, "a": 4, "b": 3}
CHUNK = 4


def reference(
    form: Form, env: dict[str, torch.Tensor], degree: int | None, substituted: bool, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Autograd through the form with exp replaced by the dense polynomial (degree None: exp itself)."""
    exp = torch.exp

    def polynomial(x: torch.Tensor) -> torch.Tensor:
        if degree is None:
            return exp(x)
        value = sum(x**m / math.factorial(m) for m in range(degree + 1))
        assert isinstance(value, torch.Tensor)
        if "M_far" in env:
            value = env["M_far"] * value + env["M_near"] * exp(x)
        return value.detach() * (1 + x - x.detach()) if substituted else value

    free = {name: env[name].clone().requires_grad_() for name in form.differentiable}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "exp", polynomial)
        out = form.function({**env, **free, "s": torch.tensor(0.7, dtype=torch.float64)})
    gradients = torch.autograd.grad(out, list(free.values()), env["G"])
    return {"O": out.detach(), **{"d" + name: g for name, g in zip(free, gradients, strict=True)}}


def evaluate(program: Program, env: dict[str, torch.Tensor], degree: int) -> dict[str, torch.Tensor]:
    scalars = {"s": 0.7, **{f"a{m}": 1 / math.factorial(m) for m in range(degree + 1)}}
    return Interpreter(env, scalars).program(program)


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n} after {what}: {m}"
        )


@pytest.mark.parametrize("name", FORMS)
def test_exact_program_is_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[name]
    env = form_inputs(form, SIZES, CHUNK)
    compare(evaluate(exact(FORMS[name]), env, 0), reference(form, env, None, False, monkeypatch), "lift")


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FORMS)
def test_every_step_keeps_the_meaning(name: str, degree: int, gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[name]
    env = form_inputs(form, SIZES, CHUNK)
    wanted = reference(form, env, degree, gradient == "substituted", monkeypatch)
    checked = 0
    approximated = False
    for step in derive(FORMS[name], PolynomialRule(degree), gradient):
        approximated = approximated or step.rule == "approximate"
        found = evaluate(step.program, env, degree)
        if approximated:
            expected = wanted if len(step.program.outputs) > 1 else {"O": wanted["O"]}
            compare(found, expected, step.rule)
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("name", FORMS)
def test_no_intermediate_is_more_than_linear_in_n(name: str, gradient: str) -> None:
    for degree in (1, 2, 3, 4):
        made = plan(derive(FORMS[name], PolynomialRule(degree), gradient)[-1].program)
        assert made.token_degree() == 1
        n = sympy.Symbol("n", positive=True)
        total = made.cost().subs({ir.N_Q: n, ir.N_K: n})
        assert sympy.degree(total, n) == 1


def test_exact_attention_is_quadratic() -> None:
    made = plan(exact(FORMS["softmax"]))
    assert made.token_degree() == 2
    n = sympy.Symbol("n", positive=True)
    forward = sympy.Poly(made.cost(["O"]).subs({ir.N_Q: n, ir.N_K: n, ir.E: ir.D}), n, ir.D)
    assert forward.coeff_monomial(n**2 * ir.D) == 4


def leading(value: sympy.Expr) -> sympy.Expr:
    """The terms with a factor n r."""
    n = sympy.Symbol("n", positive=True)
    flat = sympy.expand(value.subs({ir.N_Q: n, ir.N_K: n}))
    return sympy.expand(sum(t for t in sympy.Add.make_args(flat) if t.has(n) and t.has(ir.R)))


def test_consistent_backward_costs_8_n_r_e_plus_1() -> None:
    made = plan(derive(FORMS["softmax"], PolynomialRule(2), "consistent")[-1].program)
    known = list(walk([made.outputs["O"]]))
    n = sympy.Symbol("n", positive=True)
    assert leading(made.cost(["dQ", "dK", "dV"], known)) == sympy.expand(8 * n * ir.R * (ir.E + 1))
    assert leading(made.cost(["O"])).coeff(ir.E) == 4 * n * ir.R


def test_substituted_backward_costs_8_n_r_e_plus_1_times_d() -> None:
    made = plan(derive(FORMS["softmax"], PolynomialRule(2), "substituted")[-1].program)
    known = list(walk([made.outputs["O"]]))
    n = sympy.Symbol("n", positive=True)
    with_d = sympy.expand(sum(t for t in leading(made.cost(["dQ", "dK", "dV"], known)).args if t.has(ir.D)))
    assert with_d == sympy.expand(8 * n * ir.R * (ir.E + 1) * ir.D)


def test_without_compression_the_consistent_backward_would_have_the_factor_d() -> None:
    steps = {step.rule: step.program for step in derive(FORMS["softmax"], PolynomialRule(2), "consistent")}
    before = plan(STACK.apply(steps["kronecker"]))
    after = plan(STACK.apply(steps["compress"]))
    sizes = {ir.N_Q: 65536, ir.N_K: 65536, ir.D: 32, ir.E: 32, ir.R: 561, ir.R1: 33}
    assert after.cost().subs(sizes) < before.cost().subs(sizes)
    assert any(t.has(ir.D) and t.has(ir.E) and t.has(ir.R1) for t in before.cost().args)
    assert not any(t.has(ir.D) and t.has(ir.E) and (t.has(ir.R) or t.has(ir.R1)) for t in after.cost().args)


def test_the_papers_gradients_are_linear_in_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """softmax(X W Xᵀ) X W_V: dX has the paper's five terms (math.md §1), each linear; dW and dW_V too."""
    form = FORMS["paper"]
    program = exact(FORMS["paper"])
    inlined = program.outputs["dX"]
    for _ in range(3):
        inlined = ir.map_factors(
            inlined,
            lambda f: (
                f.tensor.expr
                if isinstance(f.tensor, ir.Def)
                and any(
                    g.tensor.name == "G" or (isinstance(g.tensor, ir.Def) and g.tensor.label.startswith("t"))
                    for t in f.tensor.expr.terms
                    for g in t.factors
                )
                and len(f.tensor.kinds) == 2
                else None
            ),
        )
    assert len(inlined.terms) == 5
    made = plan(derive(FORMS["paper"], PolynomialRule(2), "substituted")[-1].program)
    n = sympy.Symbol("n", positive=True)
    for name in ("dX", "dW", "dW_V"):
        assert sympy.degree(made.cost([name]), n) == 1
    env = form_inputs(form, SIZES, CHUNK)
    compare(
        evaluate(Program(program.defs, {**program.outputs, "dX": inlined}), env, 0),
        reference(form, env, None, False, monkeypatch),
        "five terms",
    )


def test_a_derivation_takes_less_than_two_seconds() -> None:
    derive.cache_clear()
    exact.cache_clear()
    after.cache_clear()
    start = time.perf_counter()
    plan(derive(FORMS["softmax"], PolynomialRule(2), "consistent")[-1].program)
    assert time.perf_counter() - start < 2.0
    start = time.perf_counter()
    derive(FORMS["softmax"], PolynomialRule(2), "consistent")
    assert time.perf_counter() - start < 0.01


def test_an_operation_without_meaning_is_named() -> None:
    graph = trace(lambda x: torch.sin(x), [torch.rand(2, 3)])
    with pytest.raises(LiftError, match=r"aten\.sin"):
        Lifter([ir.Leaf("X", (ir.TOKEN, ir.HEAD))]).lift(graph.graph, ["O"])
