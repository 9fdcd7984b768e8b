"""Kernels of a rule that codegen has never heard of: its axis, its inputs and its tiles are told by themselves.

The rule stands in tests/support. Both gradients under every mask are compared with autograd through the densely written
approximation, as evaluate and as the CPU target run them; the Triton target says why it does not.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from positive_features import PositiveRule, dense, operands

from polyattn.codegen import targets
from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.reference import REFERENCE
from polyattn.codegen.triton.target import TRITON
from polyattn.errors import EmitError
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import Kernels, kernels
from polyattn.rewriter.algebra.monomials import full
from polyattn.rewriter.masks.mask import CAUSAL, LOCAL_WINDOW, MASKS, NONE, Mask

S = 0.3
Inputs = dict[str, torch.Tensor]
masks = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask.name))
gradients = pytest.mark.parametrize("gradient", ["consistent", "substituted"])
biased = pytest.mark.parametrize("key_bias", [False, True], ids=["plain", "key bias"])


def made(mask: Mask, gradient: str, key_bias: bool = False) -> Kernels:
    return kernels(softmax(mask, key_bias), PositiveRule(), gradient)


def wanted(x: Inputs, mask: Mask, gradient: str, key_bias: bool, chunk: int) -> Inputs:
    """Output and gradients through exp of near pairs and the features of far ones."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("QKVB" if key_bias else "QKV")}
    q, k, v = (leaves[name] for name in "QKV")
    logits = S * q @ k[:, None].mT
    a = dense(q, k, x, S)
    if gradient == "substituted":
        a = a.detach() * (1 + logits - logits.detach())
    i, j = (torch.arange(n) for n in logits.shape[-2:])
    a = torch.where(mask.near(i, j, chunk), logits.exp(), a) * mask.visible(i, j)
    if key_bias:
        a = a * leaves["B"][:, None, None]
    out = a / a.sum(-1, keepdim=True) @ v[:, None]
    found = torch.autograd.grad(out, list(leaves.values()), x["G"])
    return {"O": out.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


def check(x: Inputs, mask: Mask, gradient: str, key_bias: bool, chunk: int) -> None:
    want, spec, basis = wanted(x, mask, gradient, key_bias, chunk), made(mask, gradient, key_bias), full(4, 0)
    names = tuple(name for name in want if name != "O")
    for target in (REFERENCE, CPU):
        found = target.run(spec.forward, x, {"s": S}, basis, chunk)
        for asked in (names, ("dQ",), names[1:]):
            got = {**found, **target.run(spec.backward(asked), {**x, **found}, {"s": S}, basis, chunk)}
            assert set(got) == {"O", "D", *asked}
            for name in ("O", *asked):
                limit = 1e-10 * float(want[name].abs().max().clamp_min(1))
                torch.testing.assert_close(got[name], want[name], rtol=0, atol=limit, msg=f"{target.name}: {name}")


@masks
@gradients
@biased
def test_equals_the_densely_written_approximation(mask: Mask, gradient: str, key_bias: bool) -> None:
    check(operands(4, 3, 41, 37), mask, gradient, key_bias, 8)


@settings(deadline=None, derandomize=True, max_examples=10)
@given(
    mask=st.sampled_from(MASKS),
    gradient=st.sampled_from(["consistent", "substituted"]),
    e=st.integers(1, 5),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    m=st.integers(1, 9),
    groups=st.integers(1, 3),
    chunk=st.integers(1, 20),
)
def test_any_size(mask: Mask, gradient: str, e: int, n_q: int, n_k: int, m: int, groups: int, chunk: int) -> None:
    check(operands(4, e, n_q, n_k, m, 1, groups), mask, gradient, True, chunk)


@masks
@gradients
def test_nothing_of_two_tokens_leaves_a_chunk(mask: Mask, gradient: str) -> None:
    spec = made(mask, gradient)
    assert spec.plan.token_degree() == 1
    for kernel in (spec.forward, spec.backward(("dQ", "dK", "dV"))):
        assert all(n.tokens == 1 for loop in kernel.loops for _, n in loop.stores)


def test_a_row_is_multiplied_scaled_and_added_to_in_one_call() -> None:
    text = CPU.emit(made(NONE, "consistent").forward)
    assert "torch.baddbmm(row_k[:, None], P, k.mT, beta=-s/2, alpha=s, out=memory_1[..., :T_k])  # [H, m, T_k]" in text
    assert "m = P.shape[1]" in text
    assert "Projections P [H, m, d], weights c [H, m]." in text
    assert text.count("Q.new_empty(H, m, T)") == 1


@masks
def test_triton_names_what_it_has_no_code_for(mask: Mask) -> None:
    spec = made(mask, "consistent").forward
    assert TRITON.unsupported(spec) == "positive features have no Triton code yet"
    with pytest.raises(EmitError, match="positive features have no Triton code yet"):
        TRITON.emit(spec)
    assert targets.of(spec, torch.device("cuda")) is REFERENCE
    assert targets.sources(spec)["triton"] == "# no code for this target: positive features have no Triton code yet"


def test_a_running_sum_without_any_chunk_before_it_is_zero() -> None:
    x = operands(4, 3, 5, 5)
    spec = made(CAUSAL, "consistent").forward
    near = Evaluation(spec, x, {"s": S}, full(4, 0), 5).run()["O"]
    torch.testing.assert_close(near, wanted(x, CAUSAL, "consistent", False, 5)["O"])


def test_a_window_over_everything_is_exact() -> None:
    x = operands(4, 3, 9, 9)
    got = CPU.run(made(LOCAL_WINDOW, "consistent").forward, x, {"s": S}, full(4, 0), 9)["O"]
    scores = S * x["Q"] @ x["K"][:, None].mT
    torch.testing.assert_close(got, torch.softmax(scores, -1) @ x["V"][:, None])
