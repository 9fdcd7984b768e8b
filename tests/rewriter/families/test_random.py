"""Positive random features by themselves: unbiased, positive, orthogonal, seeded."""

from __future__ import annotations

import pytest
import torch

import polyattn
from polyattn.errors import OptionValueError
from polyattn.rewriter.families.family import Sample
from polyattn.rewriter.families.random.family import Random
from polyattn.rewriter.masks.mask import NONE


def tokens(heads: int, n: int, d: int, seed: int) -> torch.Tensor:
    return 0.6 * torch.randn(heads, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(m: int, d: int, seed: int = 0, scale: float = 0.5, heads: int = 1) -> torch.Tensor:
    x = tokens(heads, 3, d, 0)[:, None]
    sample = Sample(x, x, torch.ones(heads, 1, 3), scale, NONE, None)
    return Random(m).fit(sample, torch.Generator().manual_seed(seed)).values


def test_the_mean_over_draws_is_exp_and_every_entry_is_positive() -> None:
    q, k = tokens(1, 5, 4, 1), tokens(1, 6, 4, 2)
    family, scale = Random(64), 0.5
    made = torch.stack([family.dense(q, k, scale, drawn(64, 4, seed)) for seed in range(400)])
    assert bool((made > 0).all())
    deviation = made.std(0) / len(made) ** 0.5
    assert bool(((made.mean(0) - (scale * q @ k.mT).exp()).abs() < 5 * deviation).all())


def test_more_features_are_closer() -> None:
    q, k = tokens(1, 40, 4, 1), tokens(1, 50, 4, 2)
    wanted = (0.5 * q @ k.mT).exp()
    errors = [
        float(
            torch.stack([Random(m).dense(q, k, 0.5, drawn(m, 4, seed)) / wanted - 1 for seed in range(8)])
            .abs()
            .median()
        )
        for m in (16, 256, 4096)
    ]
    assert errors[2] < errors[1] / 2.5 < errors[0] / 6.25, "in theory a quarter each time"


def test_directions_are_orthogonal_in_blocks_and_have_the_lengths_of_normal_vectors() -> None:
    made = drawn(2000, 5, scale=1.0)[0, :, :5]
    block = torch.nn.functional.normalize(made[:5], dim=-1)
    torch.testing.assert_close(block @ block.mT, torch.eye(5, dtype=torch.float64))
    assert abs(float(made.square().sum(-1).mean()) - 5) < 0.3


def test_a_seed_decides_and_torch_generators_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = drawn(10, 3), drawn(10, 3), drawn(10, 3, seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("bad", [{"rank": 4}, {"rank": 5000}, {"degree": 2}, {"polynomial": "minimax"}])
def test_options_that_do_not_belong_to_it(bad: dict[str, object]) -> None:
    with pytest.raises(OptionValueError, match=next(iter(bad))):
        polyattn.Options.make({"features": "random", **bad})


def test_a_negative_scale_has_no_real_root() -> None:
    with pytest.raises(ValueError, match="not negative"):
        drawn(8, 3, scale=-1.0)
