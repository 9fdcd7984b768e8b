"""The substituted gradient on a few directions of values, queries and keys."""

from __future__ import annotations

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
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import kernels
from polyattn.rewriter.algebra.expr import R
from polyattn.rewriter.algebra.tensor import D1, E1, D, E
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.families.skeleton.family import Skeleton
from polyattn.rewriter.families.skeleton.rule import M
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.runtime import policy, projection, registry
from polyattn.site_plan import ProjectionRanks, SitePlan

LOW: dict[str, Any] = {"policy": "low_rank", "audit_rows": 0, "gradient": "substituted", "causal_chunk": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Taylor 2": {"degree": 2},
    "not centred": {"degree": 3, "centring": False},
    "nested": {"degree": 3, "rank": 60, "polynomial": "least_squares"},
    "skeleton": {"features": "skeleton", "rank": 24},
    "band": {"features": "skeleton", "rank": 24, "local_window": 16},
    "heavy keys": {"degree": 2, "outlier_keys": 3},
}


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None) -> None:
    """Nothing compiled, nothing decided."""


def operands(
    heads: int = 4, kv: int = 2, n: int = 53, d: int = 8, e: int = 5, mean: float = 0.0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries (of the given mean), keys, values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = 0.4 * rand(2, heads, n, d).unflatten(1, (kv, -1))
    q = (q - q.mean((2, 3), keepdim=True)).flatten(1, 2) + mean
    inputs = [x.requires_grad_() for x in (q, 0.5 * rand(2, kv, n, d) - 0.2, rand(2, kv, n, e))]
    return inputs, rand(2, heads, n, e)


def gradients(inputs: list[torch.Tensor], g: torch.Tensor, causal: bool, **options: Any) -> tuple[torch.Tensor, ...]:
    registry.reset()
    out = polyattn.attention(*inputs, causal=causal, options={**LOW, **options})
    assert only_state().exact_rows == 0
    return torch.autograd.grad(out, inputs, g)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_directions_are_no_approximation(causal: bool, family: str) -> None:
    inputs, g = operands(mean=0.2)
    wanted = gradients(inputs, g, causal, **FAMILIES[family])
    for found, x in zip(
        gradients(inputs, g, causal, value_directions=99, key_directions=99, **FAMILIES[family]), wanted, strict=True
    ):
        torch.testing.assert_close(found, x, rtol=0, atol=1e-9)


def dense_gradients(
    inputs: list[torch.Tensor], g: torch.Tensor, causal: bool, few: ProjectionRanks, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Of the approximation written densely: with values of so many directions, and projected then; queries have mean
    zero, so that no weight of a key depends on it. All rows of dQ say which directions of keys matter."""
    state = only_state()
    q, k, v = (x.detach() for x in inputs)
    kv, chunk = k.shape[1], 16 if causal else None
    queries = q.unflatten(1, (kv, -1)).flatten(0, 1)
    values = v
    if few.values:
        of_g, of_v = projection.values(g.unflatten(1, (kv, -1)).flatten(0, 1), v.flatten(0, 1), few.values)
        centre = v.mean(2, keepdim=True)
        values = centre + (v - centre) @ (of_v @ of_g.mT).view(2, kv, *of_v.shape[1:2], of_g.shape[1])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if options.get("features") == "skeleton":
            return dense_skeleton(q, k, v, state.fitted, True, chunk)
        shift = "none" if options.get("centring") is False else "call"
        if state.fitted is None:
            return dense_polynomial(q, k, v, options["degree"], causal, 16, True, shift)
        return dense_fitted_polynomial(q, k, v, state.fitted, state.widths, True, chunk, False, shift)

    dq, dk = torch.autograd.grad(attend(inputs[0], inputs[1], values), inputs[:2], g)
    (dv,) = torch.autograd.grad(attend(*inputs), inputs[2:], g)
    if not few.keys:
        return dq, dk, dv
    d = q.shape[-1]
    to_q = to_k = torch.eye(d, dtype=q.dtype).expand(2 * kv, d, d)
    if state.fitted is not None and options.get("features") != "skeleton":
        to_q, to_k = (state.fitted[:, at : at + d, :d].repeat(2, 1, 1) for at in (0, d))
    exact = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
    (rows,) = torch.autograd.grad(exact, inputs[:1], g)
    of_k = projection.directions(rows.unflatten(1, (kv, -1)).flatten(0, 1).flatten(1, 2) @ to_k, few.keys)
    of_q = projection.directions(queries @ to_q[:, None], few.keys)
    dq = dq.unflatten(1, (kv, -1)).flatten(0, 1) @ (to_k @ of_k @ of_k.mT @ to_q.mT)[:, None]
    dk = dk.flatten(0, 1) @ to_q @ of_q @ of_q.mT @ to_k.mT
    return dq.view_as(q), dk.view_as(k), dv


def check(inputs: list[torch.Tensor], g: torch.Tensor, causal: bool, few: ProjectionRanks, **options: Any) -> None:
    found = gradients(
        inputs, g, causal, value_directions=few.values or None, key_directions=few.keys or None, **options
    )
    for x, y in zip(found, dense_gradients(inputs, g, causal, few, **options), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", ["Taylor 2", "not centred", "nested", "skeleton"])
@pytest.mark.parametrize("few", [ProjectionRanks(2, 0), ProjectionRanks(0, 3), ProjectionRanks(1, 4)], ids=str)
def test_equals_the_densely_written_projection(causal: bool, family: str, few: ProjectionRanks) -> None:
    check(*operands(), causal, few, **FAMILIES[family])


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    causal=st.booleans(),
    groups=st.integers(1, 3),
    n=st.integers(2, 40),
    d=st.integers(1, 7),
    e=st.integers(1, 7),
    few=st.builds(ProjectionRanks, st.integers(0, 8), st.integers(0, 8)),
)
def test_any_size(causal: bool, groups: int, n: int, d: int, e: int, few: ProjectionRanks) -> None:
    check(*operands(2 * groups, 2, n, d, e), causal, few, degree=2)


def test_values_and_keys_of_few_directions_lose_nothing_by_few() -> None:
    inputs, g = operands(n=120)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in inputs:
            narrow = torch.randn(x.shape[-1], 2, generator=generator, dtype=torch.float64)
            x.copy_(x @ narrow @ narrow.mT * 0.1)
    wanted = gradients(inputs, g, False, degree=2)
    for found, x in zip(
        gradients(inputs, g, False, degree=2, value_directions=2, key_directions=2), wanted, strict=True
    ):
        torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("degree", [2, None])
@pytest.mark.parametrize("causal", [False, True])
def test_the_cost_has_the_directions_in_place_of_the_widths(degree: int | None, causal: bool) -> None:
    family = Skeleton(512) if degree is None else Polynomial(degree, limit=512)
    rank, mask = M if degree is None else R, CAUSAL if causal else NONE
    plain, keys = (kernels(softmax(mask, True), family.rule, name) for name in ("substituted", "projected"))
    assert plain.cost().coeff(rank).has(D * E)
    assert not plain.cost(few_values=True).coeff(rank).has(D * E)
    assert plain.cost(few_values=True).coeff(rank).has(D * E1)
    assert keys.cost().coeff(rank).has(D1 * E)
    assert keys.cost(few_values=True).coeff(rank).has(D1 * E1)
    shape = {"batch": 1, "heads": 1, "kv_heads": 1, "n_q": 4096, "n_k": 4096, "d": 64, "e": 64}
    plans = (
        SitePlan(mask, family, gradient, 1.0, 256, "call", projection=ranks)
        for gradient, ranks in (
            ("substituted", ProjectionRanks()),
            ("substituted", ProjectionRanks(16)),
            ("projected", ProjectionRanks(16, 16)),
        )
    )
    full, values, both = (policy.costs(shape, plan)[1] for plan in plans)
    assert both < full / 5
    assert both < values < full / 2


def test_gradients_that_are_not_finite_are_no_error() -> None:
    """Loss scaling makes them on purpose now and then."""
    inputs, g = operands()
    g[0, 0, 3, 2] = torch.inf
    found = gradients(inputs, g, False, degree=2, value_directions=3, key_directions=3)
    assert not bool(found[0].isfinite().all())
    assert bool(found[0][1].isfinite().all()), "the other batch element"


def test_they_belong_to_the_substituted_gradient() -> None:
    for bad in ({"key_directions": 4}, {"value_directions": 0, "gradient": "substituted"}):
        with pytest.raises(OptionValueError, match=next(iter(bad))):
            Options.make(bad)
    projected = Options(gradient="substituted", key_directions=4)
    assert SitePlan.of(projected, False, 1.0, 8, "cpu").gradient == "projected"


def test_the_report_says_so_and_derives_it() -> None:
    model, x = Model(), torch.randn(1, 70, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {**LOW, "inner": "eager", "value_directions": 3, "key_directions": 4}
    torch.compile(model, backend="polyattn", options=options)(x).sum().backward()
    site = polyattn.reports()[-1].sites[0]
    assert "projected gradient, values on 3 directions, queries and keys on 4 directions" in " ".join(str(site).split())
    assert "project" in site.derivation
    assert "dQ" in site.kernels["backward.cpu"]
    assert site.to_dict()["states"][0]["projection"] == (3, 4)
