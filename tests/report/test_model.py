"""What a report reads from the states of a site, and what its text says of them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import polyattn
from polyattn.report.reading import FromState, badness, worst_of
from polyattn.runtime import policy, registry
from polyattn.runtime.state import SiteState
from polyattn.site_plan import SitePlan

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPE = {"batch": 1, "heads": 2, "kv_heads": 2, "n_q": 300, "n_k": 300, "d": 4, "e": 4}
EVERYTHING = {
    "gradient": "substituted",
    "value_directions": 2,
    "key_directions": 3,
    "outlier_keys": 4,
    "exact_keys": (0, 7),
    "local_window": 8,
    "policy": "low_rank",
}


def decided(**options: Any) -> SiteState:
    chosen = polyattn.Options(**options)
    return policy.decide(SHAPE, SitePlan.of(chosen, False, 0.5, SHAPE["d"], "cpu"), chosen)


def report_of(state: SiteState, monkeypatch: pytest.MonkeyPatch, **options: Any) -> polyattn.SiteReport:
    monkeypatch.setattr(registry, "states", lambda site: (state,) if site == "none/0" else ())
    chosen = polyattn.Options(**options)
    return polyattn.SiteReport("none/0", "f.py:1, in f", "sdpa", False, "none", 0.5, {"n_q": 300}, chosen)


def test_a_low_rank_state_shows_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    site = report_of(decided(**EVERYTHING), monkeypatch, **EVERYTHING)
    assert (site.verdict, site.features, site.degree, site.rank) == ("low_rank", "polynomial", 2, 15)
    assert (site.gradient, site.projection, site.outlier_keys) == ("projected", (2, 3), 6)
    assert (site.centring, site.local_window, site.chunk) == ("call", True, 8)
    assert (site.shift, site.band, site.heavy, site.few) == ("call", True, 6, (2, 3)), "former names"
    text = " ".join(str(site).split())
    for words in (
        "LOW RANK, degree 2, rank 15, projected gradient, values on 2 directions, queries and keys on 3 directions",
        "centred, local window (keys up to 8 tokens away exact), 6 outlier keys exact: policy='low_rank'",
    ):
        assert words in text
    for former in ("shifted", "heavy", "band"):
        assert former not in text


def test_an_exact_state_shows_nothing_of_its_abandoned_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    state = policy.become_exact(
        policy.measured(decided(**EVERYTHING), 1, policy.AuditErrors(0.5, 0.7)), "audit of call 1"
    )
    site = report_of(state, monkeypatch, **EVERYTHING)
    assert (site.verdict, site.reason, site.guarantee) == ("exact", "audit of call 1", "exact")
    assert (site.features, site.degree, site.rank, site.widths) == ("none", None, None, ())
    assert (site.gradient, site.projection, site.outlier_keys) == ("exact", (0, 0), 0)
    assert (site.centring, site.local_window, site.chunk) == ("none", False, None)
    assert (site.derivation, site.kernels, site.forward_graph, site.backward_graph) == ("", {}, None, None)
    assert site.flops_after == site.flops_before
    assert (site.error, site.relative_error) == (0.5, 0.7), "what was measured stays known"
    text = str(site)
    assert "EXACT: audit of call 1" in text
    for words in ("directions", "outlier", "window", "centred", "degree", "fewer"):
        assert words not in text


def test_the_dict_has_every_attribute_and_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for state in (decided(**EVERYTHING), decided(policy="exact")):
        site = report_of(state, monkeypatch)
        read = site.to_dict()
        names = {name for name, value in vars(polyattn.SiteReport).items() if isinstance(value, FromState)}
        assert names <= set(read)
        assert {name: read[name] for name in names} == {name: getattr(site, name) for name in names}
        assert read["states"] == [{name: read[name] for name in names}]
        json.dumps(read)


def test_sites_that_have_not_run_or_never_will() -> None:
    options = polyattn.Options(gradient="substituted")
    site = polyattn.SiteReport("none/1", "f.py:1, in f", "sdpa", False, "none", 1.0, {"n_q": 3}, options)
    assert (site.worst, site.states, site.shape, site.gradient) == (None, (), {"n_q": 3}, "substituted")
    assert (site.features, site.centring, site.projection, site.calls) == ("none", "none", (0, 0), 0)
    never = dataclasses.replace(site, exact="dropout")
    assert (never.verdict, never.reason, never.guarantee, never.gradient) == ("exact", "dropout", "exact", "exact")


def test_the_worst_state_speaks() -> None:
    plain = decided(policy="low_rank")
    low, high, lost = (policy.measured(plain, 1, policy.AuditErrors(error, 0.0)) for error in (0.1, 0.2, math.nan))
    exact = policy.become_exact(low, "for a reason")
    assert worst_of([]) is None
    assert worst_of([low, high]) is worst_of([high, low]) is high
    assert worst_of([high, lost]) is worst_of([lost, high]) is lost
    assert worst_of([lost, exact]) is worst_of([exact, lost]) is exact
    assert badness(plain) < badness(low)


def test_through_the_compiler_after_a_failed_audit() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    chosen = {**EVERYTHING, "policy": "auto", "inner": "eager", "audit_every": 1}
    function = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="polyattn", options=chosen
    )
    function(0.01 * q, 0.01 * k, v)
    (site,) = polyattn.reports()[0].sites
    assert (site.verdict, site.projection) == ("low_rank", (2, 3)), site.reason
    function(9 * q, 9 * k, v)
    assert (site.verdict, site.projection, site.calls) == ("exact", (0, 0), 2), "a report asks when it is read"
    assert "directions" not in str(site)
