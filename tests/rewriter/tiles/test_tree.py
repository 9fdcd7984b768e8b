"""Tiles of similar tokens: every token once, whatever the tokens are; gather and scatter are inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn.rewriter.tiles.tree import LEADING, Cut, Shape, descend, features, leading, seat, tree


@given(tokens=st.integers(1, 5000), wanted=st.integers(1, 256))
def test_a_layout_has_places_for_all_tokens_and_few_more(tokens: int, wanted: int) -> None:
    shape = Shape.of(tokens, wanted)
    assert shape.tiles & (shape.tiles - 1) == 0
    assert shape.places >= tokens
    assert shape.width <= 2**0.5 * wanted + 8
    assert (shape.width - 8) * shape.tiles < tokens


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 70), wanted=st.integers(2, 20), kind=st.sampled_from(["any", "equal", "holes", "none"]))
def test_every_valid_token_is_in_one_place(tokens: int, wanted: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 3, generator=generator)
    if kind == "equal":
        x = torch.ones_like(x)
    valid = None
    if kind in ("holes", "none"):
        valid = torch.rand(2, tokens, generator=generator) < (0.6 if kind == "holes" else 0.0)
    tiles = tree(x, Shape.of(tokens, wanted), valid)
    for head in range(2):
        held = tiles.index[head][tiles.valid[head]].sort()[0]
        expected = torch.arange(tokens) if valid is None else valid[head].nonzero().squeeze(1)
        assert torch.equal(held, expected)
        if valid is not None and len(expected):  # an empty place names a token that takes part
            assert bool(valid[head][tiles.index[head]].all())
    values = torch.randn(2, tokens, 4, generator=generator)
    back = tiles.scatter(tiles.gather(values), tokens)
    kept = torch.ones(2, tokens, dtype=torch.bool) if valid is None else valid
    torch.testing.assert_close(back, values * kept[..., None])


def test_tiles_hold_similar_tokens() -> None:
    """Eight groups far apart: most of what tokens differ by is between tiles."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(512) % 8
    centres = 20 * torch.randn(8, 6, generator=generator)
    x = (centres[label] + torch.randn(512, 6, generator=generator))[None]
    tiles = tree(x, Shape(8, 64))
    inside = tiles.gather(x)[0].var(1, correction=0).sum()
    assert float(inside / 8) < 0.2 * float(x[0].var(0, correction=0).sum())


def test_the_same_tokens_yield_the_same_tiles() -> None:
    x = torch.randn(2, 300, 5, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first, second = tree(x, Shape.of(300, 32)), tree(x, Shape.of(300, 32))
    assert torch.equal(first.index, second.index)
    assert torch.equal(state, torch.get_rng_state())


def test_heads_do_not_see_each_other() -> None:
    x = torch.randn(3, 200, 5, generator=torch.Generator().manual_seed(1))
    together = tree(x, Shape.of(200, 32))
    for head in range(3):
        assert torch.equal(tree(x[head : head + 1], Shape.of(200, 32)).index[0], together.index[head])


def test_few_directions_keep_most_of_the_power() -> None:
    x = torch.randn(1, 100, 40, generator=torch.Generator().manual_seed(2)) * torch.linspace(3, 0.01, 40)
    few = x @ leading(x.mT @ x)
    assert few.shape[-1] == LEADING
    assert float(few.square().sum() / x.square().sum()) > 0.8


@pytest.mark.parametrize("case", ["constant keys", "constant values", "huge", "tiny"])
def test_features_are_finite(case: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 64, 8, generator=generator) for _ in range(3))
    if case == "constant keys":
        k = torch.ones_like(k)
    if case == "constant values":
        v = torch.zeros_like(v)
    if case in ("huge", "tiny"):
        q, k, v = (x * (1e8 if case == "huge" else 1e-12) for x in (q, k, v))
    project, of_k = features(q, k, v)
    for x in (project(q), of_k):
        assert bool(torch.isfinite(x).all())


def test_hidden_keys_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 64, 8, generator=generator) for _ in range(3))
    valid = torch.rand(1, 64, generator=generator) < 0.5
    wild = (x.masked_fill(~valid[..., None], 1e6) for x in (k, v))
    (project, of_k), (same, same_k) = features(q, k, v, valid), features(q, *wild, valid)
    torch.testing.assert_close(project(q), same(q))
    torch.testing.assert_close(of_k, same_k)


def test_heads_with_other_than_finite_numbers_have_directions() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 64, 40, generator=generator) for _ in range(3))
    k[0, 3, 2] = torch.nan
    project, of_k = features(q, k, v)
    assert bool(torch.isfinite(project(q)[1]).all())
    assert bool(torch.isfinite(of_k[1]).all())


@settings(max_examples=30, deadline=None)
@given(power=st.integers(0, 4), width=st.integers(1, 9), seed=st.integers(0, 100))
def test_tokens_find_their_own_tile_again(power: int, width: int, seed: int) -> None:
    tiles = 2**power
    x = torch.randn(2, tiles * width, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cuts: list[Cut] = []
    made = tree(x, Shape(tiles, width), None, cuts)
    own = torch.arange(tiles)[None, :, None].expand_as(made.index)
    found = descend(x, cuts).gather(1, made.index.flatten(1)).view_as(own)
    assert float((found == own).double().mean()) > 0.98  # but for ties, to rounding


def test_tokens_of_another_sequence_find_similar_ones() -> None:
    generator, sizes = torch.Generator().manual_seed(0), torch.tensor([5.0, 3, 2, 1, 1, 1])
    old, new = (sizes * torch.randn(1, n, 6, generator=generator) for n in (1024, 500))
    cuts: list[Cut] = []
    tiles = tree(old, Shape(16, 64), None, cuts).gather(old)[0]
    means = tiles.mean(1)
    inside = float((tiles - means[:, None]).square().sum(2).mean())
    away = float((new[0] - means[descend(new, cuts)[0]]).square().sum(1).mean())
    assert away < 1.2 * inside < 0.4 * float(old[0].var(0).sum())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 60),
    count=st.integers(1, 5),
    room=st.integers(1, 9),
    spare=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_seats(tokens: int, count: int, room: int, spare: int, seed: int) -> None:
    """Every token once; in its own tile while there is room; where it sits does not depend on later tokens."""
    told = torch.randint(count + 1, (2, tokens), generator=torch.Generator().manual_seed(seed))
    made = seat(told, count, room + spare, spare)
    tiles = made.tiles
    assert not spare or not bool(tiles.valid[:, :, room:].any())
    for head in range(2):
        held = tiles.index[head][tiles.valid[head]].sort()[0]
        assert torch.equal(held, torch.arange(tokens))
        for a in range(tiles.index.shape[1]):
            mine = tiles.index[head, a][tiles.valid[head, a]]
            if a < count:
                assert torch.equal(mine, (told[head] == a).nonzero().squeeze(1)[:room])
                assert bool(made.further[head, a]) is not bool(len(mine))
            else:
                assert bool(made.further[head, a])
    half = seat(told[:, : tokens // 2], count, room + spare, spare).tiles
    before = tiles.valid & (tiles.index < tokens // 2)
    same = before[:, :count]
    assert torch.equal(half.valid[:, :count], same)
    assert torch.equal(half.index[:, :count][same], tiles.index[:, :count][same])
