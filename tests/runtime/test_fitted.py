"""Features that are fitted to a head through ``polyattn.attention``: coefficients, nested forms, exact near fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import dense_fitted_polynomial, dense_skeleton
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import Model, only_state

import polyattn
from polyattn.rewriter.algebra import monomials
from polyattn.runtime import registry

LOW: dict[str, Any] = {"policy": "low_rank", "audit_rows": 0}
GRADIENTS = pytest.mark.parametrize("gradient", ["consistent", "substituted"])
MASKS = pytest.mark.parametrize("mask", ["none", "causal", "band"])


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None) -> None:
    """Nothing compiled, nothing decided."""


def operands(
    batch: int = 2, heads: int = 4, kv: int = 2, n: int = 60, d: int = 8, e: int = 5, seed: int = 0, size: float = 0.5
) -> list[torch.Tensor]:
    """Queries and keys whose directions differ in how much they contribute, and values."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = torch.logspace(0, -1.5, d, dtype=torch.float64)
    mix = torch.linalg.qr(rand(kv, d, d))[0]
    q = size * ((rand(batch, heads, n, d) * sizes) @ mix.repeat_interleave(heads // kv, 0) + 0.3)
    k = (rand(batch, kv, n, d) * sizes) @ mix - 0.2
    return [x.requires_grad_() for x in (q, k, rand(batch, kv, n, e))]


def options_of(mask: str, **more: Any) -> dict[str, Any]:
    chunk = {"causal": {"causal_chunk": 16}, "band": {"local_window": 16}}.get(mask, {})
    return {**LOW, **chunk, **more}


def compare(found: torch.Tensor, wanted: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x, y in zip(torch.autograd.grad(found, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(1.0, float(y.abs().max())))


def check(inputs: list[torch.Tensor], mask: str, gradient: str, **more: Any) -> None:
    registry.reset()
    found = polyattn.attention(*inputs, causal=mask == "causal", options=options_of(mask, gradient=gradient, **more))
    state = only_state()
    assert state.exact_rows == 0
    assert state.fitted is not None
    chunk, band, substituted = None if mask == "none" else 16, mask == "band", gradient == "substituted"
    if more.get("features") == "skeleton":
        wanted = dense_skeleton(*inputs, state.fitted, substituted, chunk, band)
    else:
        d = inputs[0].shape[-1]
        widths = state.widths or (d,) * more.get("degree", 2)
        shift = "call" if more.get("centring", True) else "none"
        wanted = dense_fitted_polynomial(*inputs, state.fitted, widths, substituted, chunk, band, shift)
    compare(found, wanted, inputs)


@MASKS
@GRADIENTS
@pytest.mark.parametrize(
    "more",
    [
        {"polynomial": "least_squares"},
        {"polynomial": "minimax", "degree": 3},
        {"polynomial": "least_squares", "degree": 3, "rank": 60},
        {"polynomial": "taylor", "degree": 4, "rank": 90},
        {"polynomial": "least_squares", "degree": 2, "rank": 20, "centring": False},
        {"features": "skeleton", "rank": 24},
    ],
    ids=str,
)
def test_equals_the_densely_written_approximation(mask: str, gradient: str, more: dict[str, Any]) -> None:
    check(operands(), mask, gradient, **more)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    mask=st.sampled_from(["none", "causal", "band"]),
    gradient=st.sampled_from(["consistent", "substituted"]),
    groups=st.integers(1, 3),
    n=st.integers(2, 50),
    d=st.integers(2, 7),
    e=st.integers(1, 6),
    degree=st.sampled_from([2, 4]),
    nested=st.booleans(),
)
def test_any_size(mask: str, gradient: str, groups: int, n: int, d: int, e: int, degree: int, nested: bool) -> None:
    more = {"rank": 1 + d + (monomials.rank(monomials.full(d, degree)) - d) // 3} if nested else {}
    inputs = operands(1, 2 * groups, 2, n, d, e, size=0.2)
    registry.reset()
    out = polyattn.attention(
        *inputs,
        causal=mask == "causal",
        options=options_of(mask, gradient=gradient, degree=degree, polynomial="least_squares", **more),
    )
    if only_state().exact_rows == 0:
        check(inputs, mask, gradient, degree=degree, polynomial="least_squares", **more)
    assert bool(out.isfinite().all())


def errors(inputs: list[torch.Tensor], options: dict[str, Any], causal: bool = False) -> float:
    registry.reset()
    q, k, v = (x.detach() for x in inputs)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out = polyattn.attention(q, k, v, causal=causal, options={**LOW, **options})
    return float((out - exact).norm() / (exact - v.mean(2, keepdim=True).repeat_interleave(2, 1)).norm())


def test_fitted_coefficients_and_nested_forms_pay() -> None:
    inputs = operands(n=600, d=12, size=1.3)
    taylor, fitted = (errors(inputs, {"polynomial": p}) for p in ("taylor", "least_squares"))
    assert fitted < 0.95 * taylor, (fitted, taylor)
    full = errors(inputs, {"polynomial": "least_squares", "degree": 3})
    nested = errors(inputs, {"polynomial": "least_squares", "degree": 4, "rank": 110})
    assert nested < full, ("110 features against C(15, 3) = 455", nested, full)
    assert monomials.rank(monomials.Basis(12, only_state().widths)) <= 110


def test_a_near_field_helps_heads_that_look_at_their_neighbourhood() -> None:
    place, periods = torch.arange(512, dtype=torch.float64)[:, None], torch.tensor([3, 5.3, 9.1, 16.7, 29.0])
    wave = torch.cat([torch.sin(place / periods), torch.cos(place / periods)], 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.5 * torch.randn(1, 2, 512, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    q[..., :10] += 3 * wave
    k[..., :10] += 3 * wave
    exact = F.scaled_dot_product_attention(q, k, v)
    found = {}
    for near in (None, 8, 32):
        registry.reset()
        out = polyattn.attention(q, k, v, options={**LOW, "features": "skeleton", "rank": 64, "local_window": near})
        found[near] = float((out - exact).norm() / exact.norm())
    assert found[8] < 0.3 * found[None], found
    assert found[32] < 0.3 * found[None], found


def test_the_report_names_family_coefficients_widths_and_near_field() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Model(), torch.randn(2, 80, 12, dtype=torch.float64)
    options = {**LOW, "polynomial": "least_squares", "degree": 3, "rank": 40, "local_window": 8, "inner": "eager"}
    compiled = torch.compile(model, backend="polyattn", options=options)
    compiled(x).square().mean().backward()
    (site,) = polyattn.reports()[0].sites
    assert site.widths[0] == 6
    assert monomials.rank(monomials.Basis(6, site.widths)) <= 40
    text = str(site)
    assert "degree 3, coefficients by least squares, nested (6, " in text
    assert "keys up to 8 tokens away exact" in text
    assert "fitted at call 1: a row's weights off by " in text
    assert site.to_dict()["states"][0]["widths"] == site.widths
    assert site.forward_graph is None
    assert "near" in site.derivation


def test_a_backward_serves_the_fit_of_its_own_forward() -> None:
    inputs, options = operands(), options_of("none", polynomial="least_squares", rank=30, degree=3)
    first = polyattn.attention(*inputs, options=options)
    kept = only_state().fit
    assert kept is not None
    wanted = dense_fitted_polynomial(*inputs, kept.values, kept.widths, False)
    only_state().fit = dataclasses.replace(kept, values=torch.full_like(kept.values, math.nan))
    g = torch.ones_like(first)
    for x, y in zip(torch.autograd.grad(first, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
