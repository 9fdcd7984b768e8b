"""The plan of a site: made once from options, hashable, printable, known by an identifier."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from polyattn.options import Options
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.families.skeleton.family import Skeleton
from polyattn.rewriter.masks.mask import CAUSAL, LOCAL_WINDOW, NONE
from polyattn.site_plan import EXACT, OutlierKeys, ProjectionRanks, SitePlan, intern, interned


def plan(causal: bool = False, **options: object) -> SitePlan:
    return SitePlan.of(Options.make(options), causal, 0.5, 16, "cpu")


def test_the_default_plan() -> None:
    made = plan()
    assert made == SitePlan(NONE, Polynomial(2), "consistent", 0.5, 0, "call")
    assert str(made) == "degree 2, none mask, consistent gradient, centred by call"


@pytest.mark.parametrize(
    ("causal", "options", "fields"),
    [
        (True, {}, {"mask": CAUSAL, "chunk": 128, "centring": "call"}),
        (True, {"causal_chunk": 7, "causal_stats": "first_chunk"}, {"chunk": 7, "centring": "first_chunk"}),
        (False, {"causal_stats": "first_chunk"}, {"centring": "call"}),
        (False, {"local_window": 9}, {"mask": LOCAL_WINDOW, "chunk": 9}),
        (True, {"local_window": 9, "causal_chunk": 5}, {"mask": CAUSAL, "chunk": 5}),
        (False, {"centring": False}, {"centring": "none"}),
        (False, {"degree": 3, "rank": 40}, {"family": Polynomial(3, limit=40)}),
        (False, {"polynomial": "minimax"}, {"family": Polynomial(2, "minimax")}),
        (False, {"features": "skeleton"}, {"family": Skeleton(512)}),
        (True, {"features": "skeleton", "rank": 64}, {"family": Skeleton(64), "chunk": 128}),
        (False, {"gradient": "substituted"}, {"gradient": "substituted", "projection": ProjectionRanks()}),
        (
            False,
            {"gradient": "substituted", "value_directions": 3},
            {"gradient": "substituted", "projection": ProjectionRanks(3, 0)},
        ),
        (
            False,
            {"gradient": "substituted", "key_directions": 4},
            {"gradient": "projected", "projection": ProjectionRanks(0, 4)},
        ),
        (False, {"outlier_keys": 2, "exact_keys": (5, 1)}, {"outliers": OutlierKeys(2, (1, 5))}),
        (False, {"heavy_keys": 2, "shift": False}, {"outliers": OutlierKeys(2), "centring": "none"}),
        (False, {"near_field": 3}, {"mask": LOCAL_WINDOW, "chunk": 3}),
    ],
)
def test_options_make_the_plan(causal: bool, options: dict[str, object], fields: dict[str, object]) -> None:
    made = plan(causal, **options)
    assert {name: getattr(made, name) for name in fields} == fields


def test_key_factors_are_there_where_centring_or_outliers_need_them() -> None:
    assert plan().key_bias
    assert plan(centring=False, exact_keys=(0,)).key_bias
    assert not plan(centring=False).key_bias


def test_equal_plans_have_one_identifier_and_it_gives_the_plan_back() -> None:
    first, second, other = plan(), plan(), plan(degree=3)
    assert first is not second
    assert intern(first) == intern(second) != intern(other)
    assert interned(intern(other)) == other
    assert intern(None) == EXACT
    assert interned(EXACT) is None
    assert EXACT not in (intern(first), intern(other))


def test_threads_get_one_identifier() -> None:
    wanted = dataclasses.replace(plan(), scale=0.123)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(intern(dataclasses.replace(wanted)))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_tiles_have_no_code_for_gpus_yet() -> None:
    """Under ``auto`` such a site is exact and says why; who insists gets plain torch."""
    found = [
        SitePlan.of(Options.make({"features": "clustered", "policy": policy}), False, 0.5, 16, device).refusal
        for policy, device in (("auto", "cuda"), ("low_rank", "cuda"), ("auto", "cpu"))
    ]
    assert "no code for cuda" in found[0]
    assert found[1:] == ["", ""]
