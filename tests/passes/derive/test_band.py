"""An exact near field without a mask: kernels and both gradients against the densely written approximation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import spec_inputs
from rules import kernels

from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.triton.target import TRITON
from polyattn.errors import ScheduleError
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.inspection import derivation
from polyattn.rewriter.algebra.expr import CHUNK, N_K, N_Q, N
from polyattn.rewriter.algebra.monomials import full
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.masks.mask import LOCAL_WINDOW

S = 0.3
FAMILIES = pytest.mark.parametrize("degree", [1, 2, 3, None], ids=["degree 1", "degree 2", "degree 3", "skeleton"])
GRADIENTS = pytest.mark.parametrize("gradient", ["consistent", "substituted"])
Inputs = dict[str, torch.Tensor]


def operands(degree: int | None, n_q: int, n_k: int, d: int = 4, e: int = 3, groups: int = 2) -> Inputs:
    x = spec_inputs(d, e, n_q, n_k, heads=2, groups=groups)
    if degree is None:
        generator = torch.Generator().manual_seed(0)

        def rand(*size: int) -> torch.Tensor:
            return 0.4 * torch.randn(size, generator=generator, dtype=torch.float64)

        x |= {"LK": rand(2, 5, d), "LQ": rand(2, 5, d), "Z": torch.eye(5, dtype=torch.float64) + 0.1 * rand(2, 5, 5)}
    return x


def dense(x: Inputs, degree: int | None, gradient: str, chunk: int, weighted: bool) -> Inputs:
    """Output and gradients through exp in neighbouring chunks and the approximation elsewhere."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("QKVB" if weighted else "QKV")}
    q, k, v = (leaves[name] for name in "QKV")
    scores = S * q @ k[:, None].mT
    if degree is None:
        left, right = (S * q @ x["LK"][:, None].mT).exp(), (S * k @ x["LQ"].mT).exp()
        a = left @ x["Z"][:, None] @ right[:, None].mT
    else:
        values = PolynomialRule(degree).values
        a = torch.stack([values[f"a{m}"] * scores**m for m in range(degree + 1)]).sum(0)
    if gradient == "substituted":
        a = a.detach() * (1 + scores - scores.detach())
    i, j = (torch.arange(n) // chunk for n in scores.shape[-2:])
    a = torch.where((i[:, None] - j).abs() <= 1, scores.exp(), a)
    if weighted:
        a = a * leaves["B"][:, None, None]
    out = a / a.sum(-1, keepdim=True) @ v[:, None]
    made = torch.autograd.grad(out, list(leaves.values()), x["G"])
    return {"O": out.detach(), **{"d" + name: g for name, g in zip(leaves, made, strict=True)}}


def check(x: Inputs, degree: int | None, gradient: str, chunk: int, weighted: bool = True) -> None:
    made, wanted = kernels(False, degree, gradient, weighted, window=True), dense(x, degree, gradient, chunk, weighted)
    basis, scalars = (
        full(x["Q"].shape[-1], degree or 0),
        {"s": S, **({} if degree is None else PolynomialRule(degree).values)},
    )
    names = tuple(name for name in wanted if name != "O")
    for run in (lambda *args: Evaluation(*args).run(), CPU.run):
        found = run(made.forward, x, scalars, basis, chunk)
        got = {**found, **run(made.backward(names), {**x, **found}, scalars, basis, chunk)}
        for name, value in wanted.items():
            limit = 1e-9 * float(value.abs().max().clamp_min(1))
            torch.testing.assert_close(got[name], value, rtol=0, atol=limit)


@FAMILIES
@GRADIENTS
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_densely_written_approximation(degree: int | None, gradient: str, weighted: bool) -> None:
    check(operands(degree, 41, 41), degree, gradient, 8, weighted)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    n_q=st.integers(1, 50),
    n_k=st.integers(1, 50),
    d=st.integers(1, 5),
    e=st.integers(1, 5),
    groups=st.integers(1, 3),
    chunk=st.integers(1, 20),
    degree=st.sampled_from([2, None]),
    gradient=st.sampled_from(["consistent", "substituted"]),
)
def test_any_size(
    n_q: int, n_k: int, d: int, e: int, groups: int, chunk: int, degree: int | None, gradient: str
) -> None:
    check(operands(degree, n_q, n_k, d, e, groups), degree, gradient, chunk)


def test_some_gradients_only() -> None:
    x = operands(2, 41, 41)
    made, wanted = kernels(False, 2, "consistent", True, window=True), dense(x, 2, "consistent", 8, True)
    scalars = {"s": S, **PolynomialRule(2).values}
    found = CPU.run(made.forward, x, scalars, full(4, 2), 8)
    for names in (("dQ",), ("dK", "dB"), ("dV",)):
        got = CPU.run(made.backward(names), {**x, **found}, scalars, full(4, 2), 8)
        assert set(got) == set(names)
        for name in names:
            torch.testing.assert_close(got[name], wanted[name])


def test_its_cost_is_linear_in_tokens_and_counts_three_chunks() -> None:
    plain = kernels(False, 2, "consistent", True).forward.cost().subs({N_Q: N, N_K: N})
    band = kernels(False, 2, "consistent", True, window=True).forward.cost().subs({N_Q: N, N_K: N})
    near = band.coeff(CHUNK, 1)
    assert plain.coeff(CHUNK, 1) == 0
    assert str(near.coeff(N, 1).expand()).replace(" ", "") in ("6*d+6*e+15", "6*d+6*e+12", "6*d+6*e+18"), near


def test_the_derivation_says_what_stays_exact() -> None:
    text = str(derivation(softmax(LOCAL_WINDOW, True), PolynomialRule(2), "consistent"))
    assert "j in the chunk of i or next to it" in text
    assert "M_near" in text


def test_triton_has_no_code_for_it_yet() -> None:
    with pytest.raises(ScheduleError, match="an exact local window has no Triton code yet"):
        TRITON.emit(kernels(False, 2, "consistent", window=True).forward)
