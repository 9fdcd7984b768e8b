"""Keys that stay exact for every query: the largest of a head, and named ones such as an attention sink."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import dense_fitted_polynomial, dense_polynomial, dense_skeleton
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import Model, only_state

import polyattn
from polyattn.errors import OptionValueError
from polyattn.options import Options
from polyattn.runtime import policy, registry
from polyattn.site_plan import OutlierKeys

LOW: dict[str, Any] = {"policy": "low_rank", "audit_rows": 0}
CHUNK = 16
FAMILIES: dict[str, dict[str, Any]] = {
    "Taylor 2": {"degree": 2},
    "Taylor 3": {"degree": 3},
    "least squares": {"degree": 2, "polynomial": "least_squares"},
    "nested": {"degree": 3, "rank": 60, "polynomial": "least_squares"},
    "skeleton": {"features": "skeleton", "rank": 24},
}


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None) -> None:
    """Nothing compiled, nothing decided."""


def operands(
    batch: int = 2, heads: int = 4, kv: int = 2, n_q: int = 53, n_k: int = 53, d: int = 8, e: int = 5, size: float = 0.5
) -> list[torch.Tensor]:
    """A head of small logits, but for three keys of each head, the first among them, that are large."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k = 0.5 * rand(batch, kv, n_k, d) - 0.2
    for at in {0, n_k // 3, n_k - 1}:
        k[:, :, at] *= 6
    return [x.requires_grad_() for x in (size * rand(batch, heads, n_q, d) + 0.3, k, rand(batch, kv, n_k, e))]


def dense(
    inputs: list[torch.Tensor], mask: str, substituted: bool, heavy: tuple[int, tuple[int, ...]], **more: Any
) -> torch.Tensor:
    """What the options stand for, with all pairs of tokens at once."""
    state = only_state()
    chunk, band, d = None if mask == "none" else CHUNK, mask == "band", inputs[0].shape[-1]
    if more.get("features") == "skeleton":
        return dense_skeleton(*inputs, state.fitted, substituted, chunk, band, heavy)
    degree, shift = more["degree"], "none" if more.get("centring") is False else more.get("causal_stats", "call")
    if state.fitted is None:
        return dense_polynomial(*inputs, degree, mask == "causal", CHUNK, substituted, shift, heavy)
    widths = state.widths or (d,) * degree
    return dense_fitted_polynomial(*inputs, state.fitted, widths, substituted, chunk, band, shift, heavy)


def check(inputs: list[torch.Tensor], mask: str, gradient: str, heavy: tuple[int, tuple[int, ...]], **more: Any) -> int:
    """Output and gradients; the number of rows that were computed exactly, of which nothing is checked."""
    registry.reset()
    chunk = {"causal": {"causal_chunk": CHUNK}, "band": {"local_window": CHUNK}}.get(mask, {})
    options = {**LOW, **chunk, **more, "gradient": gradient, "outlier_keys": heavy[0], "exact_keys": heavy[1]}
    found = polyattn.attention(*inputs, causal=mask == "causal", options=options)
    assert bool(found.isfinite().all())
    if only_state().exact_rows:
        return only_state().exact_rows
    wanted = dense(inputs, mask, gradient == "substituted", heavy, **more)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x, y in zip(torch.autograd.grad(found, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9 * max(1.0, float(y.abs().max())))
    return 0


@pytest.mark.parametrize(
    ("mask", "family"),
    [
        (mask, family)
        for mask in ("none", "causal", "band")
        for family in FAMILIES
        if mask != "band" or not family.startswith("Taylor")  # the band's reference takes what is fitted
    ],
)
@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
def test_equals_the_densely_written_approximation(mask: str, gradient: str, family: str) -> None:
    assert check(operands(), mask, gradient, (2, (0,)), **FAMILIES[family]) == 0


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    causal=st.booleans(),
    gradient=st.sampled_from(["consistent", "substituted"]),
    groups=st.integers(1, 3),
    n_q=st.integers(1, 50),
    n_k=st.integers(1, 50),
    d=st.integers(1, 6),
    e=st.integers(1, 6),
    count=st.integers(0, 9),
    positions=st.lists(st.integers(0, 60), max_size=4),
    more=st.sampled_from([{}, {"centring": False}, {"causal_stats": "first_chunk"}]),
)
def test_any_size(
    causal: bool,
    gradient: str,
    groups: int,
    n_q: int,
    n_k: int,
    d: int,
    e: int,
    count: int,
    positions: list[int],
    more: dict[str, Any],
) -> None:
    """Also more heavy keys than keys, positions beyond the last key, and rows that see no key but heavy ones."""
    inputs = operands(1, 2 * groups, 2, n_q, n_k, d, e, size=0.2)
    mask = "causal" if causal else "none"
    if not causal:
        more = {name: value for name, value in more.items() if name != "causal_stats"}
    assert check(inputs, mask, gradient, (count, tuple(positions)), degree=2, **more) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_which_every_key_is_heavy_are_exact_attention(family: str) -> None:
    inputs = operands(n_q=20, n_k=20)
    found = polyattn.attention(*inputs, options={**LOW, **FAMILIES[family], "outlier_keys": 20})
    wanted = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert only_state().exact_rows == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heavy_keys_whose_exponentials_overflow(dtype: torch.dtype) -> None:
    """Their rows are computed exactly then, and the others are not disturbed."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in operands(1, 2, 2))
    with torch.no_grad():
        k[:, :, 0] *= 1e4
    found = polyattn.attention(q, k, v, options={**LOW, "outlier_keys": 2, "exact_keys": (0,)})
    wanted = F.scaled_dot_product_attention(q, k, v)
    g = torch.ones_like(wanted)
    limit = 1e-2  # of polynomials of degree 2 on the other keys
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
    for x, y in zip(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(wanted, (q, k, v), g), strict=True):
        assert bool(x.isfinite().all())
        assert float((x - y).norm()) <= 0.05 * float(y.norm())


def errors(inputs: list[torch.Tensor], **options: Any) -> float:
    registry.reset()
    q, k, v = (x.detach() for x in inputs)
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    out = polyattn.attention(q, k, v, options={**LOW, **options})
    return float((out - exact).norm() / (exact - v.mean(2, keepdim=True).repeat_interleave(2, 1)).norm())


def test_they_pay_where_a_few_keys_are_large() -> None:
    inputs = operands(n_q=300, n_k=300)
    for family in FAMILIES.values():
        plain, named, chosen = (errors(inputs, **family, **x) for x in ({}, {"exact_keys": (0,)}, {"outlier_keys": 3}))
        assert chosen < 0.5 * plain, (family, plain, chosen)
        assert chosen < named, (family, named, chosen)


def test_the_largest_keys_are_chosen_by_norm_around_the_mean() -> None:
    """All keys lie far from the origin; two of each head lie far from the others."""
    inputs = operands(n_q=200, n_k=200)
    with torch.no_grad():
        inputs[1].mul_(0.1).add_(3)
        inputs[1][:, :, [7, 130]] -= 2
    assert errors(inputs, degree=2, outlier_keys=2) < 0.05 * errors(inputs, degree=2)


def test_through_a_compiled_model_and_in_the_report() -> None:
    model, x = Model(), torch.randn(1, 70, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {**LOW, "inner": "eager", "outlier_keys": 3, "exact_keys": (0,)}
    compiled = torch.compile(model, backend="polyattn", options=options)
    compiled(x).sum().backward()
    state = only_state()
    assert state.plan.outliers.total == 4
    site = polyattn.reports()[-1].sites[0]
    assert "4 outlier keys exact" in str(site)
    assert site.to_dict()["states"][0]["outlier_keys"] == 4
    assert site.forward_graph is None
    assert "B[j]" in site.derivation or "diag(B)" in site.derivation
    plain = dataclasses.replace(state.plan, outliers=OutlierKeys())
    few = policy.costs(state.shape | {"n_k": 4}, plain)[0]
    assert state.flops_after - policy.costs(state.shape, plain)[1] == few


@pytest.mark.parametrize(
    "bad",
    [{"outlier_keys": -1}, {"outlier_keys": 2000}, {"exact_keys": (-1,)}, {"exact_keys": 3}, {"exact_keys": (0.5,)}],
)
def test_bad_options_say_what_is_allowed(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionValueError, match=next(iter(bad))):
        Options.make(bad)


def test_options_survive_their_key() -> None:
    options = Options(exact_keys=(5, 0, 5), outlier_keys=2)
    assert options.exact_keys == (0, 5)
    assert Options.from_key(options.key()) == options
