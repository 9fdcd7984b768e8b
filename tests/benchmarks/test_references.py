"""benchmarks/references.py: each approximation does what its paper says, on small operands in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "references.py"
LOW_RANK = ("favor_plus", "nystrom", "nystrom_iterated", "tensor_sketch")
NAMES = ("mean_pooling", "position_blocks", *LOW_RANK, "truncated_svd")
HEADS, TOKENS, D, E = 2, 60, 6, 5
SCALE = 0.4
SEEDS = 10

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def references(load_file: Callable[[str, Path], Any]) -> Any:
    return load_file("benchmarks_references", FILE)


def operands(size: float = 1.0, dtype: torch.dtype = torch.float64) -> Operands:
    """q, k and v; ``size`` is about the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((HEADS, TOKENS, D), (HEADS, TOKENS, D), (HEADS, TOKENS, E))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    half = math.sqrt(size / (SCALE * math.sqrt(D)))
    return (q * half).to(dtype), (k * half).to(dtype), v.to(dtype)


def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)


def run(references: Any, name: str, x: Operands, rank: int, seed: int = 0) -> torch.Tensor:
    out = references.REFERENCES[name](*x, SCALE, rank, torch.Generator().manual_seed(seed))
    assert isinstance(out, torch.Tensor)
    return out


def mean_error(references: Any, name: str, x: Operands, rank: int, target: torch.Tensor) -> float:
    """Relative to the target, over seeds."""
    errors = [float((run(references, name, x, rank, seed) - target).norm() / target.norm()) for seed in range(SEEDS)]
    return sum(errors) / SEEDS


def approximate_p(references: Any, name: str, x: Operands, rank: int) -> torch.Tensor:
    """The matrix that stands for P: the output for values that are the unit vectors."""
    one = torch.eye(TOKENS, dtype=torch.float64).expand(HEADS, -1, -1)
    return run(references, name, (x[0], x[1], one), rank)


# ---- every one ----


def test_all_have_a_name(references: Any) -> None:
    assert tuple(references.REFERENCES) == NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_are_those_of_the_exact_output(references: Any, name: str, dtype: torch.dtype) -> None:
    x = operands(0.5, dtype)
    before = [y.clone() for y in x]
    out = run(references, name, x, 17)
    assert out.shape == (HEADS, TOKENS, E)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert all(map(torch.equal, x, before)), "an operand was changed"


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_the_global_generator_is_left_alone(references: Any, name: str) -> None:
    x, state = operands(0.5), torch.get_rng_state()
    first, again, other = (run(references, name, x, 17, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name not in ("favor_plus", "tensor_sketch", "truncated_svd"))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_computed_each_by_itself(references: Any, name: str) -> None:
    """What another head holds does not matter. (Random choices are drawn for all heads in one order.)"""
    q, k, v = operands(0.5)
    whole = run(references, name, (q, k, v), 17)
    changed = [torch.cat([y[:1], y[1:].flip(1) * 1.5]) for y in (q, k, v)]
    torch.testing.assert_close(run(references, name, (changed[0], changed[1], changed[2]), 17)[0], whole[0])


@pytest.mark.parametrize("name", NAMES)
def test_equal_values_give_that_value_where_rows_sum_to_one(references: Any, name: str) -> None:
    """Quotients keep row sums, and so does the pseudo-inverse of an invertible core; six steps and the SVD do not."""
    q, k, _ = operands(0.5)
    out = run(references, name, (q, k, torch.ones(HEADS, TOKENS, E, dtype=torch.float64)), 17)
    kept = (out - 1).abs().max() < 1e-6
    assert kept == (name not in ("nystrom_iterated", "truncated_svd"))


@pytest.mark.parametrize("name", ["favor_plus", "nystrom_iterated", "truncated_svd"])
def test_the_error_falls_with_the_rank(references: Any, name: str) -> None:
    x = operands(0.5)
    low, middle, high = (mean_error(references, name, x, rank, exactly(*x)) for rank in (2, 10, 50))
    assert low > 1.25 * middle > 1.25**2 * high


# ---- mean pooling ----


def test_mean_pooling_is_exact_for_equal_logits(references: Any) -> None:
    q, k, v = operands()
    x = (torch.zeros_like(q), k, v)
    torch.testing.assert_close(run(references, "mean_pooling", x, 1), exactly(*x))


# ---- FAVOR+ ----


def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(references: Any) -> None:
    like = torch.zeros((), dtype=torch.float64)
    w = references.orthogonal_gaussian(300, 2 * D + 1, D, torch.Generator().manual_seed(0), like)
    assert w.shape == (300, 2 * D + 1, D)
    for block in (w[:, :D], w[:, D : 2 * D]):
        gram = block @ block.mT
        assert (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max() < 1e-12
    assert (w[:, :D] @ w[:, D : 2 * D].mT).abs().mean() > 0.1, "blocks are drawn independently"
    squares = w.square().sum(-1).flatten()  # χ² with D degrees of freedom
    assert squares.mean() == pytest.approx(D, rel=0.03)
    assert squares.var() == pytest.approx(2 * D, rel=0.1)
    assert w.mean((0, 1)).abs().max() < 0.06
    assert ((w.flatten(0, 1).mT @ w.flatten(0, 1)) / len(squares) - torch.eye(D)).abs().max() < 0.1


def test_positive_features_are_unbiased_for_the_kernel(references: Any) -> None:
    q, k, _ = (y[:1] for y in operands(0.5))
    q, k = q * math.sqrt(SCALE), k * math.sqrt(SCALE)
    q, k = q[:, :8] / 2, k[:, :8] / 2
    w = references.orthogonal_gaussian(1, 400_000, D, torch.Generator().manual_seed(0), q)
    phi, psi = (references.log_positive_features(y, w).exp() for y in (q, k))
    kernel = (q @ k.mT).exp()
    spread = (phi.square() @ psi.square().mT / w.shape[1] - kernel.square()).sqrt() / math.sqrt(w.shape[1])
    assert ((phi @ psi.mT / w.shape[1] - kernel).abs() <= 4.5 * spread).all()
    assert spread.max() < 0.01 * kernel.max(), "the test would see a bias of some per cent"


def test_the_stabiliser_cancels(references: Any) -> None:
    q, k, v = operands(0.5)
    w = references.orthogonal_gaussian(HEADS, 17, D, torch.Generator().manual_seed(0), q)
    phi, psi = (references.log_positive_features(y * math.sqrt(SCALE), w).exp() for y in (q, k))
    a = phi @ psi.mT
    torch.testing.assert_close(run(references, "favor_plus", (q, k, v), 17), a / a.sum(-1, keepdim=True) @ v)


def test_favor_plus_is_finite_for_logits_of_hundreds(references: Any) -> None:
    assert run(references, "favor_plus", operands(200.0, torch.float32), 17).isfinite().all()


def test_favor_plus_converges(references: Any) -> None:
    x = operands(0.3)
    errors = [mean_error(references, "favor_plus", x, rank, exactly(*x)) for rank in (32, 512, 8192)]
    assert errors[1] < errors[0] / 2.5  # 4 by the law of large numbers
    assert errors[2] < errors[1] / 2.5


# ---- Nyström ----


@pytest.mark.parametrize("rank", [TOKENS, TOKENS + 9])
def test_nystrom_is_exact_where_every_token_is_a_landmark(references: Any, rank: int) -> None:
    x = operands()
    torch.testing.assert_close(run(references, "nystrom", x, rank), exactly(*x), rtol=1e-6, atol=1e-6)


def test_nystrom_with_one_landmark_is_mean_pooling_by_the_mean_query(references: Any) -> None:
    q, k, v = operands()
    want = exactly(q.mean(1, keepdim=True), k, v).expand(-1, TOKENS, -1)
    torch.testing.assert_close(run(references, "nystrom", (q, k, v), 1), want)


def test_nystrom_is_exact_for_tokens_that_repeat_in_segments(references: Any) -> None:
    q, k, v = operands()
    q, k = (y[:, :12].repeat_interleave(5, 1) for y in (q, k))
    torch.testing.assert_close(run(references, "nystrom", (q, k, v), 12), exactly(q, k, v), rtol=1e-8, atol=1e-8)


def test_segments_differ_by_at_most_one_token(references: Any) -> None:
    x = torch.arange(7, dtype=torch.float64)[None, :, None]
    assert references.segment_means(x, 3).flatten().tolist() == [1.0, 3.5, 5.5]


def test_the_iteration_reaches_the_pseudo_inverse(references: Any) -> None:
    a = references.softmax_matrix(*operands(0.5)[:2], SCALE)[:, :8, :8] + torch.eye(8) / 4
    a = a * torch.tensor([1.0, 30.0])[:, None, None]
    exact = torch.linalg.pinv(a)
    errors = [float((references.iterated_pseudo_inverse(a, n) - exact).norm() / exact.norm()) for n in (1, 2, 20)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10
    singular = a[:1, :, :1] @ a[:1, :1, :]
    torch.testing.assert_close(references.iterated_pseudo_inverse(singular, 8), torch.linalg.pinv(singular))


# ---- TensorSketch ----


def taylor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x = SCALE * q @ k.mT
    a = 1 + x + x.square() / 2
    return a / a.sum(-1, keepdim=True) @ v


def test_the_sketch_is_the_count_sketch_of_the_tensor_square(references: Any) -> None:
    x, size = operands()[0], 7
    generator = torch.Generator().manual_seed(1)
    places, signs = references.count_sketches(HEADS, D, size, generator)
    want = torch.zeros(HEADS, TOKENS, size, dtype=torch.float64)
    for h in range(HEADS):
        for a in range(D):
            for b in range(D):
                at = int(places[0, h, a] + places[1, h, b]) % size
                want[h, :, at] += signs[0, h, a] * signs[1, h, b] * x[h, :, a] * x[h, :, b]
    torch.testing.assert_close(references.sketched_square(x, places, signs, size), want)


def test_the_sketch_is_unbiased_for_the_squared_product(references: Any) -> None:
    draws, size = 20_000, 5
    q, k = (y[0, :4].expand(draws, -1, -1) for y in operands()[:2])
    generator = torch.Generator().manual_seed(1)
    places, signs = references.count_sketches(draws, D, size, generator)
    assert places.unique().tolist() == list(range(size))
    assert signs.unique().tolist() == [-1, 1]
    drawn = references.sketched_square(q, places, signs, size) @ references.sketched_square(k, places, signs, size).mT
    spread = drawn.std(0) / math.sqrt(draws)
    assert ((drawn.mean(0) - (q[0] @ k[0].mT).square()).abs() <= 4.5 * spread).all()


def test_tensor_sketch_approaches_the_dense_polynomial(references: Any) -> None:
    x = operands(0.3)
    errors = [mean_error(references, "tensor_sketch", x, rank, taylor(*x)) for rank in (16, 128, 2048)]
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.02


def test_tensor_sketch_approaches_exact_attention_on_small_logits(references: Any) -> None:
    x = operands(0.03)
    assert mean_error(references, "tensor_sketch", x, 2048, exactly(*x)) < 1e-3


def test_tensor_sketch_needs_room_for_the_linear_term(references: Any) -> None:
    assert run(references, "tensor_sketch", operands(0.3), D + 2).isfinite().all()
    with pytest.raises(ValueError, match=f"takes 1 \\+ d = {D + 1} features: give a rank above that, not {D + 1}"):
        run(references, "tensor_sketch", operands(), D + 1)


# ---- truncated SVD ----


def best_residual(references: Any, x: Operands, rank: int) -> torch.Tensor:
    s = torch.linalg.svdvals(references.softmax_matrix(x[0], x[1], SCALE))
    return s[:, rank:].norm(dim=-1)


def residual(references: Any, name: str, x: Operands, rank: int) -> torch.Tensor:
    p = references.softmax_matrix(x[0], x[1], SCALE)
    return (approximate_p(references, name, x, rank) - p).norm(dim=(1, 2))


def test_svd_of_full_rank_is_exact(references: Any) -> None:
    x = operands()
    torch.testing.assert_close(run(references, "truncated_svd", x, TOKENS), exactly(*x))


@pytest.mark.parametrize("size", [0.5, 1.5, 4.0], ids=lambda size: f"logits of {size}")
@pytest.mark.parametrize("rank", [4, 16, 32, 44])
def test_the_iterated_svd_is_the_best_within_a_per_cent(references: Any, rank: int, size: float) -> None:
    """At 44 the start would be wider than P, and it is the SVD of P itself."""
    x = operands(size)
    best, got = best_residual(references, x, rank), residual(references, "truncated_svd", x, rank)
    assert (got >= best * (1 - 1e-9)).all()
    assert (got <= 1.01 * best).all()
    p = approximate_p(references, "truncated_svd", x, rank)
    assert torch.linalg.matrix_rank(p, rtol=1e-10).tolist() == [rank] * HEADS


@pytest.mark.parametrize("name", ["mean_pooling", *LOW_RANK])
def test_none_is_closer_to_p_than_the_svd(references: Any, name: str) -> None:
    x = operands()
    for rank in (8, 16, 32):
        assert (residual(references, name, x, rank) >= best_residual(references, x, rank) * (1 - 1e-9)).all()
        assert torch.linalg.matrix_rank(approximate_p(references, name, x, rank), rtol=1e-10).max() <= rank


# ---- blocks by position ----


def test_all_blocks_near_is_exact_attention(references: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    x = tuple(torch.randn(2, 200, w, generator=generator, dtype=torch.float64) for w in (6, 6, 5))
    torch.testing.assert_close(run(references, "position_blocks", x, 100), exactly(*x))


def test_blocks_of_equal_keys_and_values_are_their_means(references: Any) -> None:
    """Nothing is lost where a block has one key and one value, whatever is exact."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 256, 6, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 4, 1, w, generator=generator, dtype=torch.float64).expand(-1, -1, 64, -1) for w in (6, 5))
    x = q, k.reshape(2, 256, 6), v.reshape(2, 256, 5)
    torch.testing.assert_close(run(references, "position_blocks", x, 1), exactly(*x))
