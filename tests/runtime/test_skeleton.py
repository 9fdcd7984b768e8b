"""Skeleton features through ``polyattn.attention`` and compiled models: values, gradients, fits that are kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import dense_skeleton
from sites import Model, only_state

import polyattn
from polyattn.errors import OptionValueError
from polyattn.rewriter.families.skeleton.family import Skeleton
from polyattn.rewriter.families.skeleton.landmarks import fit
from polyattn.rewriter.masks.mask import NONE
from polyattn.runtime import policy, registry
from polyattn.runtime.centring import centre
from polyattn.site_plan import SitePlan

M = 24
OPTIONS = {"features": "skeleton", "rank": M, "policy": "low_rank", "audit_rows": 0}


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None) -> None:
    """Nothing compiled, nothing decided."""


def operands(
    batch: int = 2, heads: int = 4, kv: int = 2, n: int = 60, d: int = 8, e: int = 5, inner: int = 3, seed: int = 0
) -> list[torch.Tensor]:
    """Queries and keys in a few directions, as trained heads have them, and values."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    basis = rand(kv, inner, d) / math.sqrt(inner)
    q = 0.4 * (rand(batch, heads, n, inner) @ basis.repeat_interleave(heads // kv, 0) + 0.5)
    k = rand(batch, kv, n, inner) @ basis - 0.3
    return [x.requires_grad_() for x in (q, k, rand(batch, kv, n, e))]


@pytest.mark.parametrize("chunk", [None, 16], ids=["full", "causal"])
@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
def test_equals_the_densely_written_approximation(gradient: str, chunk: int | None) -> None:
    inputs = operands()
    options = {**OPTIONS, "gradient": gradient, "causal_chunk": chunk}
    found = polyattn.attention(*inputs, causal=chunk is not None, options=options)
    state = only_state()
    assert state.exact_rows == 0
    assert (state.family.name, state.rank, state.degree, state.centring) == ("skeleton", M, None, "call")
    assert state.fitted is not None
    wanted = dense_skeleton(*inputs, state.fitted, gradient == "substituted", chunk)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x, y in zip(torch.autograd.grad(found, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(1.0, float(y.abs().max())))


def test_it_holds_where_a_polynomial_does_not() -> None:
    q, k, v = (x.detach() for x in operands(n=400))
    q = q * 1.75
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    spread = exact - v.mean(2, keepdim=True).repeat_interleave(2, 1)
    errors = {}
    for name, options in {
        "skeleton": {**OPTIONS, "rank": 128},
        "degree 2": {"policy": "low_rank", "audit_rows": 0},
        "degree 4": {"policy": "low_rank", "audit_rows": 0, "degree": 4},
    }.items():
        registry.reset()
        errors[name] = float((polyattn.attention(q, k, v, options=options) - exact).norm() / spread.norm())
    assert errors["skeleton"] < 0.03, errors
    assert errors["degree 4"] > 3 * errors["skeleton"], errors
    assert errors["degree 2"] > 10 * errors["skeleton"], errors


def test_the_fit_is_kept_and_serves_other_data_of_the_same_heads() -> None:
    first, second = operands(n=300, seed=0), operands(n=300, seed=0)
    with torch.no_grad():  # the same directions, other tokens
        second = [x.flip(2) * 0.9 for x in second]

    def attend(inputs: list[torch.Tensor]) -> torch.Tensor:
        return polyattn.attention(*inputs, options={**OPTIONS, "rank": 96})

    for inputs in (first, second):
        out = attend(inputs)
        exact = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
        assert float((out - exact).norm() / exact.norm()) < 0.05
        kept = only_state().fitted
    assert only_state().calls == 2
    registry.reset()
    attend(first)
    assert torch.equal(only_state().fitted, kept), "fitted at the first call, with the seed of the options"


def test_random_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    polyattn.attention(*operands(), options=OPTIONS)
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_tokens_than_landmarks() -> None:
    inputs = operands(n=10)
    out = polyattn.attention(*inputs, options=OPTIONS)
    exact = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    assert float((out - exact).norm() / exact.norm()) < 0.2
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), inputs))


def test_under_a_causal_mask_it_is_close_to_exact_attention() -> None:
    inputs = operands(n=400)
    out = polyattn.attention(*inputs, causal=True, options={**OPTIONS, "rank": 96, "causal_chunk": 32})
    exact = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert float((out - exact).norm() / exact.norm()) < 0.02
    assert only_state().verdict == "low_rank"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "skeleton", "degree": 2}, "no degree"),
        ({"features": "skeleton", "rank": 4}, "8 to 2048"),
        ({"features": "skeleton", "polynomial": "minimax"}, "skeleton features have none"),
        ({"rank": 1}, "integer >= 2"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionValueError, match=words):
        polyattn.Options.make(options)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_compiled_model_trains_through_it(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Model(), torch.randn(2, 40, 12, dtype=torch.float64)
    options = {**OPTIONS, "inner": inner, "audit_rows": 16}
    compiled = torch.compile(model, backend="polyattn", options=options)
    compiled(x).square().mean().backward()
    got = model.project.weight.grad.clone()
    (site,) = polyattn.reports()[0].sites
    assert (site.verdict, site.features, site.rank, site.degree) == ("low_rank", "skeleton", M, None)
    assert "skeleton (CUR) features, rank 24" in str(site)
    assert "; queries to a norm of " in str(site)
    assert "skeleton features" in site.derivation
    assert "skeleton features" in site.kernels["forward.cpu"]
    (state,) = site.states
    assert state.fit is not None
    marks = state.fit.values
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: dense_skeleton(q, k, v, marks, False))
        model(x).square().mean().backward()
    torch.testing.assert_close(got, model.project.weight.grad, rtol=0, atol=1e-9)


def test_auto_keeps_it_where_the_audit_holds_and_is_exact_where_not() -> None:
    options = {"features": "skeleton", "rank": 128}
    q, k, v = (x.detach() for x in operands(n=700, d=16, e=16))
    smooth = [0.5 * q, k, v]
    polyattn.attention(*smooth, options=options)
    assert only_state().verdict == "low_rank", only_state().reason
    assert only_state().guarantee == "audited"
    registry.reset()
    sharp = [8 * q, k, v]
    out = polyattn.attention(*sharp, options=options)
    assert only_state().verdict == "exact"
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*sharp, enable_gqa=True))


def test_more_landmarks_fit_better_and_the_error_is_that_of_the_rows() -> None:
    q, k, _ = (x.detach() for x in operands(batch=1, heads=2, n=500))
    plan = SitePlan(NONE, Skeleton(), "consistent", 0.35, centring="call")
    moved = centre(q[0][:, None], k[0], plan)
    queries, logits = moved.q[:, 0], 0.35 * q[0] @ k[0].mT
    errors = []
    for m in (8, 32, 128):
        made = fit(
            queries[:, None], moved.k[:, None], moved.factors[:, None], 0.35, m, torch.Generator().manual_seed(0)
        )
        a = (0.35 * queries @ made.keys.mT).exp() @ made.core @ (0.35 * moved.k @ made.queries.mT).exp().mT
        a = a * moved.factors[:, None]
        rows = (a / a.sum(-1, keepdim=True) - logits.softmax(-1)).abs().sum(-1).mean(-1)
        assert bool(((rows / made.error).log().abs() < 0.5).all()), (rows, made.error)
        errors.append(float(rows.max()))
    assert errors[2] < 0.2 * errors[1] < 0.2 * errors[0]


def test_a_site_that_became_exact_keeps_its_fit_for_what_a_checkpoint_runs_again() -> None:
    polyattn.attention(*operands(), options=OPTIONS)
    state = only_state()
    kept = state.fitted
    registry.update(state.entry, lambda state: policy.become_exact(state, "an audit failed"))
    assert kept is not None
    assert state.fitted is kept


@pytest.mark.parametrize("causal", [False, True])
def test_the_few_queries_outside_of_what_was_fitted_are_exact(causal: bool) -> None:
    first, second = operands(n=300), operands(n=300)
    with torch.no_grad():
        longest = second[0].norm(dim=-1).argmax(-1)[:, :, None, None].expand(-1, -1, 1, 8)
        second[0][:, :, 100:101] = 6 * second[0].gather(2, longest)

    def attend(inputs: list[torch.Tensor]) -> torch.Tensor:
        return polyattn.attention(*inputs, causal=causal, options={**OPTIONS, "rank": 96, "causal_chunk": 16})

    attend(first)
    before = only_state().exact_rows
    out = attend(second)
    assert 0 < only_state().exact_rows - before <= 8
    exact = F.scaled_dot_product_attention(*second, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out[:, :, 100], exact[:, :, 100], rtol=0, atol=1e-9)
    g = torch.zeros_like(out)
    g[:, :, 100] = 1.0
    for x, y in zip(torch.autograd.grad(out, second, g), torch.autograd.grad(exact, second, g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_many_queries_outside_of_what_was_fitted_are_left_to_the_audit() -> None:
    first, second = operands(n=300), operands(n=300)
    with torch.no_grad():
        second[0][:, :, ::2] *= 3
    found = []
    for inputs in (first, second):
        polyattn.attention(*inputs, options={**OPTIONS, "rank": 96})
        found.append(only_state().exact_rows)
    assert found[1] - found[0] < 300, "of 2,400 rows, at least a third of which lie outside"
