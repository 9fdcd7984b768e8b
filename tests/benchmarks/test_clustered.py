"""benchmarks/clustered: the batched form is what the oracle says it is, on small operands in float64."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "benchmarks" / "clustered"
MODULES = ("tiles", "moments", "plan", "fields", "gradients", "causal", "dense", "costs")
HEADS, TOKENS, D, E = 2, 256, 8, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

SETTINGS = {
    "tree": {"width_q": 16, "width_k": 16, "tau": 2e-2},
    "tree, narrow keys": {"width_q": 32, "width_k": 8, "tau": 1e-2},
    "tree, narrow queries": {"width_q": 8, "width_k": 32, "tau": 2e-2},
    "refined tree": {"width_q": 16, "width_k": 16, "tau": 2e-2, "grouping": "refined tree"},
    "k-means": {"width_q": 16, "width_k": 16, "tau": 2e-2, "grouping": "k-means"},
    "k-means, narrow keys": {"width_q": 16, "width_k": 8, "tau": 1e-2, "grouping": "k-means"},
}
EVERY_SETTING = pytest.mark.parametrize("name", SETTINGS)
PADDED = pytest.mark.parametrize("padded", [False, True], ids=["every key", "key padding"])


@pytest.fixture(scope="module")
def study(load_file: Callable[[str, Path], Any]) -> Any:
    """The modules of the study, as attributes."""
    load_file("clustered", FOLDER / "__init__.py")
    return SimpleNamespace(**{name: importlib.import_module(f"clustered.{name}") for name in MODULES})


def operands(tokens: int = TOKENS, seed: int = 0) -> Operands:
    """q, k and v with a structure to find: tokens lie around a few centres, and logits have a deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def around(count: int, width: int) -> torch.Tensor:
        centres = torch.randn(HEADS, count, width, generator=generator, dtype=torch.float64)
        at = torch.randint(count, (tokens,), generator=generator)
        return centres[:, at] + 0.5 * torch.randn(HEADS, tokens, width, generator=generator, dtype=torch.float64)

    return around(12, D) * 0.6, around(12, D), around(12, E)


def cotangent(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(HEADS, tokens, E, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def some_keys(padded: bool) -> torch.Tensor | None:
    """Which keys are there; enough are not that a tile of a tree can be without any."""
    return torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.7 if padded else None


def planned(study: Any, name: str, x: Operands, padded: bool = False) -> tuple[Any, Any]:
    """A setting and its plan, which has near pairs and far ones."""
    setting = study.plan.Setting(**SETTINGS[name])
    plan = study.plan.make(*x, setting, some_keys(padded))
    share = study.plan.near_shares(plan, TOKENS, TOKENS)[0]
    assert ((share > 0.05) & (share < 0.95)).all(), f"the test needs near pairs and far ones, near are {share.tolist()}"
    return setting, plan


def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=1.0)


# ---- tiles ----


@EVERY_SETTING
@PADDED
def test_every_token_that_is_there_is_in_one_tile(study: Any, name: str, padded: bool) -> None:
    x = operands()
    _, plan = planned(study, name, x, padded)
    for tiles, valid in ((plan.queries, None), (plan.keys, some_keys(padded))):
        wanted = torch.ones(HEADS, TOKENS, dtype=torch.bool) if valid is None else valid
        assert (tiles.sizes().sum(1) == wanted.sum(1)).all()
        assert ((tiles.labels(TOKENS) >= 0) == wanted).all()
        back = tiles.scatter(tiles.gather(x[2]), TOKENS)
        assert torch.equal(back, x[2] * wanted[..., None])


def test_a_tree_makes_tiles_of_one_width(study: Any) -> None:
    tiles = study.tiles.tree(operands()[0], 16)
    assert tiles.index.shape == (HEADS, TOKENS // 16, 16)
    assert tiles.valid.all()


def test_a_tree_says_how_many_tokens_it_takes(study: Any) -> None:
    with pytest.raises(ValueError, match="16 times a power of two tokens, got 240"):
        study.tiles.tree(operands(240)[0], 16)


def test_tiles_are_closer_than_tokens_by_position_and_closer_still_when_refined(study: Any) -> None:
    x = operands()[0]

    def squares(tiles: Any) -> float:
        return float(study.moments.centred(tiles.gather(x), tiles.valid)[1].square().sum())

    made = study.tiles.tree(x, 16)
    by_position = study.tiles.Tiles(torch.arange(TOKENS).view(1, -1, 16).expand(HEADS, -1, -1), made.valid)
    assert squares(study.tiles.refine(made, x)) <= squares(made) < 0.7 * squares(by_position)


# ---- the output ----


@EVERY_SETTING
@PADDED
def test_the_output_is_the_oracles(study: Any, name: str, padded: bool) -> None:
    x = operands()
    _, plan = planned(study, name, x, padded)
    torch.testing.assert_close(study.fields.output(*x, plan), study.dense.planned(*x, plan), **CLOSE)


@EVERY_SETTING
@PADDED
def test_the_near_pairs_are_those_of_the_oracles_scores(study: Any, name: str, padded: bool) -> None:
    x = operands()
    setting, plan = planned(study, name, x, padded)
    assert torch.equal(study.dense.planned_scores(*x, plan, setting) > setting.tau, plan.near)


@pytest.mark.parametrize("more", [{"exponent": 1.0}, {"ratio": 5.0}, {"ratio": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["tree", "k-means"])
def test_the_options_of_a_score_are_the_oracles(study: Any, name: str, more: dict[str, float]) -> None:
    x = operands()
    setting = dataclasses.replace(study.plan.Setting(**SETTINGS[name]), **more)
    plan = study.plan.make(*x, setting)
    assert torch.equal(study.dense.planned_scores(*x, plan, setting) > setting.tau, plan.near)


@pytest.mark.parametrize("name", ["tree, narrow keys", "k-means"])
@PADDED
def test_with_all_pairs_near_attention_is_exact(study: Any, name: str, padded: bool) -> None:
    x = operands()
    _, plan = planned(study, name, x, padded)
    plan = dataclasses.replace(plan, near=torch.ones_like(plan.near))
    mask = some_keys(padded)
    wanted = exactly(*x, None if mask is None else mask[:, None].expand(-1, TOKENS, -1))
    torch.testing.assert_close(study.fields.output(*x, plan), wanted, **CLOSE)


def test_a_smaller_threshold_errs_less(study: Any) -> None:
    x = operands()
    errors = []
    for tau in (1.0, 1e-1, 1e-2, 1e-3, 1e-5):
        plan = study.plan.make(*x, study.plan.Setting(16, 16, tau))
        errors.append(float((study.fields.output(*x, plan) - exactly(*x)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_large_logits_stay_finite_in_float32(study: Any) -> None:
    q, k, v = (x.float() for x in operands())
    x = (20 * q, 20 * k, v)
    plan = study.plan.make(*x, study.plan.Setting(**SETTINGS["k-means"]))
    assert study.fields.output(*x, plan).isfinite().all()
    for order in (0, 1):
        assert all(y.isfinite().all() for y in study.gradients.substituted(*x, cotangent().float(), plan, order))


# ---- gradients ----


@pytest.mark.parametrize("name", ["tree", "tree, narrow keys", "k-means"])
@PADDED
def test_the_consistent_gradient_is_autograds_of_the_oracle(study: Any, name: str, padded: bool) -> None:
    x, g = operands(), cotangent()
    _, plan = planned(study, name, x, padded)
    found = []
    for output in (study.fields.output, study.dense.planned):
        leaves = [y.clone().requires_grad_() for y in x]
        found.append(torch.autograd.grad(output(*leaves, plan), leaves, g))
    for made, wanted in zip(*found, strict=True):
        torch.testing.assert_close(made, wanted, **CLOSE)


@EVERY_SETTING
@PADDED
def test_the_substituted_gradient_of_order_0_is_the_oracles(study: Any, name: str, padded: bool) -> None:
    x, g = operands(), cotangent()
    _, plan = planned(study, name, x, padded)
    wanted = study.dense.planned_gradient(*x, g, plan)
    for made, one in zip(study.gradients.substituted(*x, g, plan, 0), wanted, strict=True):
        torch.testing.assert_close(made, one, **CLOSE)


@pytest.mark.parametrize("order", [0, 1])
@PADDED
def test_with_all_pairs_near_gradients_are_exact(study: Any, order: int, padded: bool) -> None:
    x, g, mask = operands(), cotangent(), some_keys(padded)
    _, plan = planned(study, "k-means", x, padded)
    plan = dataclasses.replace(plan, near=torch.ones_like(plan.near))
    leaves = [y.clone().requires_grad_() for y in x]
    out = exactly(*leaves, None if mask is None else mask[:, None].expand(-1, TOKENS, -1))
    wanted = torch.autograd.grad(out, leaves, g)
    for made, one in zip(study.gradients.substituted(*x, g, plan, order), wanted, strict=True):
        torch.testing.assert_close(made, one, **CLOSE)


@pytest.mark.parametrize("widths", [(1, 16), (16, 1)], ids=["one query", "one key"])
def test_with_tiles_of_one_token_everything_is_exact(study: Any, widths: tuple[int, int]) -> None:
    """Nothing is left to expand: deviations inside a tile are 0, whichever pairs are near."""
    x, g = operands(64), cotangent(64)
    plan = study.plan.make(*x, study.plan.Setting(*widths))
    plan = dataclasses.replace(plan, near=torch.rand(plan.near.shape, generator=torch.Generator().manual_seed(2)) < 0.3)
    leaves = [y.clone().requires_grad_() for y in x]
    out = exactly(*leaves)
    torch.testing.assert_close(study.fields.output(*x, plan), out.detach(), **CLOSE)
    wanted = torch.autograd.grad(out, leaves, g)
    for order in (0, 1):
        for made, one in zip(study.gradients.substituted(*x, g, plan, order), wanted, strict=True):
            torch.testing.assert_close(made, one, **CLOSE)


@pytest.mark.parametrize("name", ["tree", "tree, narrow keys", "refined tree"])
def test_the_substituted_gradient_of_order_1_errs_less_than_that_of_order_0(study: Any, name: str) -> None:
    """It has no oracle, as its moments are pooled: the exact gradient is what it is held to."""
    x = operands()
    setting = dataclasses.replace(study.plan.Setting(**SETTINGS[name]), tau=2e-3)
    plan = study.plan.make(*x, setting)
    leaves = [y.clone().requires_grad_() for y in x]
    out = exactly(*leaves)
    g = torch.tanh(out.detach() - out.detach().mean(1, keepdim=True))
    wanted = torch.autograd.grad(out, leaves, g)
    errors = {
        order: [
            float((made - one).norm() / one.norm())
            for made, one in zip(study.gradients.substituted(*x, g, plan, order), wanted, strict=True)
        ]
        for order in (0, 1)
    }
    assert max(errors[1]) < 0.1
    assert sum(errors[1]) < sum(errors[0])


# ---- causal ----

CAUSAL = {"segment": 64, "width_q": 8, "width_k": 16, "cluster": 16, "tau": 2e-2}


def test_the_causal_output_is_the_oracles(study: Any) -> None:
    x = operands(512)
    setting = study.causal.CausalSetting(**CAUSAL)
    out, segments = study.causal.output(*x, setting)
    near = torch.cat([segment.near.flatten() for segment in segments]).double().mean()
    assert 0.05 < near < 0.95
    torch.testing.assert_close(out, study.dense.causal(*x, segments, setting), **CLOSE)


@pytest.mark.parametrize("changed", [64, 300, 448, 511])
def test_later_tokens_change_nothing_earlier(study: Any, changed: int) -> None:
    x, other = operands(512), operands(512, seed=1)
    setting = study.causal.CausalSetting(**CAUSAL)
    moved = [torch.cat([a[:, :changed], b[:, changed:]], 1) for a, b in zip(x, other, strict=True)]
    before, after = (study.causal.output(*y, setting)[0] for y in (x, moved))
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-12, atol=1e-12)
    assert (after[:, changed:] - before[:, changed:]).abs().amax(2).min() > 1e-6


def test_the_causal_form_with_all_pairs_near_is_exact(study: Any) -> None:
    x = operands(512)
    setting = study.causal.CausalSetting(**{**CAUSAL, "tau": -1.0})
    out, segments = study.causal.output(*x, setting)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, scale=1.0), **CLOSE
    )
    pairs, executed = study.causal.near_shares(segments, 512, setting)
    torch.testing.assert_close(pairs, torch.ones_like(pairs))
    assert (executed >= pairs).all()


def test_a_causal_call_says_how_many_tokens_it_takes(study: Any) -> None:
    with pytest.raises(ValueError, match="multiple of 64 tokens, got 500"):
        study.causal.output(*operands(500), study.causal.CausalSetting(**CAUSAL))


# ---- properties ----


@settings(deadline=None, max_examples=20)
@given(
    width_q=st.sampled_from([4, 8, 16, 32]),
    width_k=st.sampled_from([4, 8, 16, 32]),
    k_means=st.booleans(),
    density=st.floats(0.05, 0.95),
    padded=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_any_near_pairs_give_the_oracles_output(
    study: Any, width_q: int, width_k: int, k_means: bool, density: float, padded: bool, seed: int
) -> None:
    """Near pairs drawn at random, in place of those that a score picks."""
    x = operands(64, seed)
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(HEADS, 64, generator=generator) < 0.7 if padded else None
    setting = study.plan.Setting(width_q, width_k, grouping="k-means" if k_means else "tree")
    plan = study.plan.make(*x, setting, valid)
    near = torch.rand(plan.near.shape, generator=generator) < density
    plan = dataclasses.replace(plan, near=near)
    torch.testing.assert_close(study.fields.output(*x, plan), study.dense.planned(*x, plan), **CLOSE)


@settings(deadline=None, max_examples=20)
@given(permutation=st.permutations(range(64)), shift=st.floats(-3, 3))
def test_a_shift_of_all_keys_changes_nothing(study: Any, permutation: list[int], shift: float) -> None:
    """Nor does the order of the keys, with the same tiles and near pairs."""
    q, k, v = operands(64)
    plan = study.plan.make(q, k, v, study.plan.Setting(8, 8, 2e-2))
    back = torch.tensor(permutation).argsort()
    moved = study.tiles.Tiles(back[plan.keys.index], plan.keys.valid)
    other = study.plan.Plan(plan.queries, moved, plan.near)
    out = study.fields.output(q, k[:, permutation] + shift, v[:, permutation], other)
    torch.testing.assert_close(out, study.fields.output(q, k, v, plan), **CLOSE)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), width=st.integers(1, 16))
def test_clusters_of_any_size_are_cut_into_tiles(study: Any, sizes: list[int], width: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    labels = labels[:, torch.randperm(labels.shape[1], generator=torch.Generator().manual_seed(0))]
    tiles, cluster = study.tiles.split(labels, len(sizes), width)
    assert tiles.index.shape[1] == sum(-(-size // width) for size in sizes)
    assert torch.equal(cluster.gather(1, tiles.labels(labels.shape[1])), labels)


# ---- costs ----


@EVERY_SETTING
def test_costs_count_near_pairs_as_exact_attention_does(study: Any, name: str) -> None:
    setting = study.plan.Setting(**SETTINGS[name])
    for stages in (
        study.costs.forward(4096, 32, 32, (64, 64), 0.25, setting),
        study.costs.backward(4096, 32, 32, (64, 64), 0.25),
    ):
        assert stages["near"] == 0.25
        assert all(share > 0 for share in stages.values())
        assert sum(stages.values()) < 1


# ---- the page ----


def test_the_page_tells_the_study_from_the_compiler_and_has_a_place_for_the_tables(
    study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "examples"))
    page = importlib.import_module("clustered.page")
    text = (FOLDER.parents[1] / "docs" / "clustered.md").read_text(encoding="utf-8")
    compiler, _, study_part = text.partition("# The study that came before")
    assert 'options={"features": "clustered"}' in compiler
    assert page.BEGIN in study_part
    copy = tmp_path / "clustered.md"
    copy.write_text(text, encoding="utf-8")
    page.update(copy, "a table")
    found = copy.read_text(encoding="utf-8")
    assert f"{page.BEGIN}\na table\n{page.END}" in found
    assert (found.partition(page.BEGIN)[0], found.partition(page.END)[2]) == (
        text.partition(page.BEGIN)[0],
        text.partition(page.END)[2],
    )
    copy.write_text("no place", encoding="utf-8")
    with pytest.raises(SystemExit, match="to write the tables between"):
        page.update(copy, "a table")
