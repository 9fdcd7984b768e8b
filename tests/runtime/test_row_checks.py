"""Rows that no softmax has are found; rows that one has are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sites import only_state

import polyattn
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.runtime import registry, row_checks
from polyattn.runtime.centring import OutlierKeys, centre
from polyattn.site_plan import Centring, SitePlan


def operands(n_q: int, n_k: int, d: int, size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 2, n_q, d), (2, n_k, d), (2, n_k, 3))
    )
    return size * q + 0.5, size * k - 0.3, v + 2


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    n_q=st.integers(1, 30),
    n_k=st.integers(1, 30),
    d=st.integers(1, 6),
    size=st.sampled_from([0.01, 0.3, 1.0, 4.0]),
    causal=st.booleans(),
    statistics=st.sampled_from(["none", "call", "first_chunk"]),
    outliers=st.sampled_from([OutlierKeys(), OutlierKeys(2), OutlierKeys(1, (0, 3))]),
)
def test_no_row_of_softmax_attention_is_found(
    n_q: int, n_k: int, d: int, size: float, causal: bool, statistics: Centring, outliers: OutlierKeys
) -> None:
    q, k, v = operands(n_q, n_k, d, size)
    plan = SitePlan(CAUSAL if causal else NONE, Polynomial(2), "consistent", 0.7, 4, statistics, outliers)
    centred = centre(q, k, plan)
    a = (0.7 * centred.q @ centred.k[:, None].mT).exp()
    a = a if centred.factors is None else a * centred.factors[:, None, None]
    a = a.tril() if causal else a
    sums = a.sum(-1)
    assert not bool(row_checks.denominators(centred, sums, plan).any())
    whole = (0.7 * q @ k[:, None].mT).masked_fill(torch.ones(n_q, n_k).triu(1).bool() & causal, -math.inf).softmax(-1)
    assert not bool(row_checks.outputs(v, whole @ v[:, None]).any())
    for wrong in (-1e-3, math.nan, math.inf, -math.inf):
        assert bool(row_checks.denominators(centred, torch.full_like(sums, wrong), plan).all())


def test_denominators_that_miss_half_are_found() -> None:
    """With logits of deviation 0.3 the bound is within a twentieth of the sum."""
    q, k, _ = operands(40, 500, 8, 0.35)
    plan = SitePlan(NONE, Polynomial(2), "consistent", 0.7, centring="call")
    centred = centre(q, k, plan)
    assert centred.factors is not None
    sums = ((0.7 * centred.q @ centred.k[:, None].mT).exp() * centred.factors[:, None, None]).sum(-1)
    assert bool(row_checks.denominators(centred, 0.45 * sums, plan).all())
    assert not bool(row_checks.denominators(centred, 0.6 * sums, plan).any())


def test_outputs_beyond_every_value_are_found() -> None:
    _, _, v = operands(1, 50, 2, 1.0)
    furthest = (v - v.mean(1, keepdim=True)).norm(dim=-1).argmax(1)
    edge = v[torch.arange(2), furthest] - v.mean(1)
    for reach, found in ((1.0, False), (1.09, False), (1.11, True), (1e6, True), (math.nan, True)):
        assert bool(row_checks.outputs(v, (v.mean(1) + reach * edge)[:, None, None]).all()) is found


def test_values_that_are_all_the_same_are_no_reason() -> None:
    v = torch.full((1, 70, 4), 0.1)
    found = v.mean(1)[:, None, None] * (1 + 1e-6)
    assert not bool(row_checks.outputs(v, found).any())


@pytest.mark.parametrize("causal", [False, True])
def test_rows_far_outside_of_what_was_fitted_stay_among_the_values(causal: bool) -> None:
    """A fit is kept while queries and keys turn and grow beyond it."""
    registry.reset()
    options: dict[str, Any] = {
        "policy": "low_rank", "audit_rows": 0, "features": "skeleton", "rank": 16, "causal_chunk": 16, "refit": False,
    }  # fmt: skip

    def attend(tensors: list[torch.Tensor]) -> torch.Tensor:
        return polyattn.attention(*tensors, causal=causal, options=options)

    q, k, v = (x.unsqueeze(0) for x in operands(200, 200, 8, 0.8))
    attend([q[:, :, 0], k, v])
    state = only_state()
    assert state.exact_rows <= 4
    other = [x.clone().requires_grad_() for x in (6 * q[:, :, 0].flip(-1), k, v)]
    found = attend(other)
    assert state.exact_rows > 10
    wanted = F.scaled_dot_product_attention(*other, is_causal=causal)
    unit = float((v - v.mean(2, keepdim=True)).norm(dim=-1).amax())
    assert float((found - wanted).detach().norm(dim=-1).max()) <= 2.1 * unit
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(found.square().sum(), other))
