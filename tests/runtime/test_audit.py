"""Repeated audits: when they happen, on which rows, what a failed one changes, what the report says."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from sites import Live, only_state

import polyattn
import polyattn.errors
from polyattn.runtime import audit as auditing
from polyattn.runtime import policy, registry

pytestmark = pytest.mark.usefixtures("fresh_compiler")

N, D = 192, 4
"""Long enough for degree 2 (rank 15) to be cheaper than exact attention."""


def operands(size: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, N, D, dtype=torch.float64, generator=generator) for _ in range(3))
    return size * q, size * k, v


def attend(size: float = 0.3, **options: object) -> torch.Tensor:
    """One call of the one site of these tests."""
    return polyattn.attention(*operands(size), options={"audit_every": 4, **options})


def state() -> Live:
    return only_state()


def test_audits_happen_at_first_use_and_every_so_many_calls() -> None:
    audited = []
    for call in range(1, 11):
        attend()
        if state().audited_call == call:
            audited.append(call)
        assert state().calls_since_audit == call - audited[-1]
    assert audited == [1, 5, 9]
    assert (state().audits, state().calls) == (3, 10)


@pytest.mark.parametrize(("every", "expected"), [(0, 1), (1, 6)], ids=["first_only", "each"])
def test_audit_every(every: int, expected: int) -> None:
    for _ in range(6):
        attend(audit_every=every)
    assert state().audits == expected


def test_by_default_audits_are_repeated() -> None:
    every = polyattn.Options().audit_every
    assert every > 0
    q, k, v = operands()
    for _ in range(every + 1):
        polyattn.attention(q, k, v)
    assert state().audits == 2


def test_every_audit_draws_other_rows_and_runs_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    original = auditing.rows

    def spy(*args: object) -> list[int]:
        drawn.append(original(*args))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(auditing, "rows", spy)
    for _ in range(2):
        registry.reset()
        for _ in range(3):
            attend(audit_every=1)
    first, second = drawn[:3], drawn[3:]
    assert first == second
    assert len({tuple(rows) for rows in first}) == 3
    registry.reset()
    attend(seed=1)
    assert drawn[-1] != first[0]


def test_a_failing_audit_makes_the_site_exact_from_that_call_on() -> None:
    for _ in range(4):
        attend()
    assert state().verdict == "low_rank"
    drifted = attend(size=3.0)  # call 5
    exact = F.scaled_dot_product_attention(*operands(3.0))
    torch.testing.assert_close(drifted, exact, rtol=0, atol=1e-12)
    found = state()
    assert (found.verdict, found.guarantee, found.audits, found.audited_call) == ("exact", "exact", 2, 5)
    assert found.reason.startswith("audit of call 5: worst row")
    assert "tolerance 2e-02" in found.reason
    assert found.error == found.worst_error
    torch.testing.assert_close(attend(), F.scaled_dot_product_attention(*operands()), rtol=0, atol=1e-12)
    assert (state().verdict, state().audits, state().calls) == ("exact", 2, 6)


def test_between_audits_a_drift_is_not_seen() -> None:
    # What the report's "last at call X of Y" is for.
    for _ in range(2):
        attend()
    attend(size=3.0)
    assert (state().verdict, state().audited_call, state().calls) == ("low_rank", 1, 3)


def test_under_low_rank_the_error_is_reported_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="polyattn"):
        attend(policy="low_rank", audit_every=1)
        assert not caplog.records
        for _ in range(3):
            attend(size=3.0, policy="low_rank", audit_every=1)
    (record,) = caplog.records
    assert "test_audit.py" in record.getMessage()
    assert "audit failed" in record.getMessage()
    found = state()
    assert (found.verdict, found.guarantee, found.audits) == ("low_rank", "audited", 4)
    assert found.error is not None
    assert found.error > 2e-2


def test_the_state_keeps_the_last_and_the_worst_error() -> None:
    for size in (0.3, 1.0, 0.2):
        attend(size=size, policy="low_rank", audit_every=1, tolerance=1.0, relative_tolerance=10.0)
    found = state()
    assert found.error is not None
    assert found.worst_error is not None
    assert found.error < found.worst_error / 3


def test_nan_stays_the_worst_error() -> None:
    assert math.isnan(policy.larger(1.0, math.nan))
    assert math.isnan(policy.larger(math.nan, 1.0))
    assert policy.larger(None, 1.0) == policy.larger(0.5, 1.0) == policy.larger(1.0, 0.5) == 1.0


def test_an_empty_call_decides_nothing() -> None:
    q, k, v = operands()
    for x in (q[:, :, :0], q):
        polyattn.attention(x, k, v)
    assert (state().verdict, state().audits, state().calls) == ("low_rank", 1, 1)


def test_random_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    for _ in range(3):
        attend(audit_every=1)
    assert torch.equal(before, torch.get_rng_state())


def compiled_report(calls: int, **options: object) -> polyattn.Report:
    function = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        backend="polyattn",
        options={"inner": "eager", "audit_every": 2, **options},
    )
    for _ in range(calls):
        function(*operands())
    (report,) = polyattn.reports()
    return report


def test_the_report_says_how_often_and_when() -> None:
    report = compiled_report(4)
    text = " ".join(str(report).split())
    assert "audited 2 times, last at call 3 of 4; it does not bound every row" in text
    assert "error of the last audit" in text
    assert "(worst" in text
    (site,) = report.sites
    assert (site.audits, site.audited_call, site.calls) == (2, 3, 4)
    assert site.error is not None
    assert site.worst_error is not None
    assert site.worst_error >= site.error
    read = report.to_dict()["sites"][0]
    assert (read["audits"], read["audited_call"], read["calls"]) == (2, 3, 4)
    assert read["states"][0]["calls_since_audit"] == 1


def test_the_report_of_one_audit() -> None:
    text = " ".join(str(compiled_report(1)).split())
    assert "audited once, last at call 1 of 1; it does not bound every row" in text


def test_the_report_shows_the_layer_whose_error_is_nan() -> None:
    from polyattn.report.reading import badness

    attend(policy="low_rank")
    good = state()
    registry.reset()
    attend(policy="low_rank")
    bad = state()
    bad.change(audit=dataclasses.replace(bad.now.audit, error=math.nan))
    states = [bad.now, good.now]
    assert max(states, key=badness) is max(states[::-1], key=badness) is states[0]


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_audit_every_is_a_count(value: object) -> None:
    with pytest.raises(polyattn.errors.OptionValueError, match="audit_every"):
        polyattn.Options(audit_every=value)  # type: ignore[arg-type]
