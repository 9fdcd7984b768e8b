"""Other people's approximations of softmax attention, to compare with: written from the papers, plain and not fast.

Each is a function of one layer's heads: q and k are [heads, tokens, d], v is [heads, tokens, e], ``scale`` multiplies
the logits, ``rank`` is the inner dimension that the approximation may have, and random choices are drawn from
``generator`` alone, anew for each head. It returns [heads, tokens, e] in the dtype of its input. Nothing here is tuned
to the data, and nothing is shifted or clamped that the paper does not shift or clamp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

Reference = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int, torch.Generator], torch.Tensor]
"""(q, k, v, scale, rank, generator) → output"""


def mean_pooling(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """Every row is the mean of v: what attention is where all logits are equal, and the least to be beaten."""
    return v.mean(1, keepdim=True).expand(-1, q.shape[1], -1).clone()


BLOCK = 64
"""Tokens of a block of ``position_blocks``."""


def position_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """Blocks of tokens by position: the heaviest pairs of blocks exact, the others by the means of their keys.

    What training-free sparse attention does (Jiang et al., *MInference*, arXiv 2407.02490; Xu et al., *XAttention*,
    arXiv 2503.16428): pairs of blocks are scored by pooled queries and keys; here the part that is left out is not
    dropped, but one key and value, the means of a block, stand for it. ``rank`` is the per cent of the pairs that are
    exact; a row of blocks has as many as any other.
    """
    n, label = q.shape[1], torch.arange(q.shape[1], device=q.device) // BLOCK
    blocks = int(label[-1]) + 1
    members = torch.nn.functional.one_hot(label, blocks).to(q.dtype)
    sizes = members.sum(0)
    mean_q, mean_k, mean_v = (members.mT @ x / sizes[:, None] for x in (q, k, v))
    kept = (scale * mean_q @ mean_k.mT).topk(max(1, blocks * rank // 100), dim=2)[1]
    near = torch.zeros(len(q), blocks, blocks, dtype=torch.bool, device=q.device).scatter_(2, kept, True)
    out = torch.empty_like(v)
    for block in range(blocks):
        rows = label == block
        exact = (scale * q[:, rows] @ k.mT).masked_fill(~near[:, block, None, label], -torch.inf)
        pooled = (scale * q[:, rows] @ mean_k.mT + sizes.log()).masked_fill(near[:, block, None], -torch.inf)
        weights = torch.cat([exact, pooled], 2).softmax(2)
        out[:, rows] = weights[..., :n] @ v + weights[..., n:] @ mean_v
    return out


def favor_plus(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """Positive random features in orthogonal Gaussian directions (FAVOR+).

    Choromanski et al., *Rethinking Attention with Performers*, ICLR 2021, arXiv 2009.14794, Lemma 1:
    exp(x·y) = E exp(w·x − ‖x‖²/2) exp(w·y − ‖y‖²/2) for w ~ N(0, 1).

    The stabiliser takes off maxima that cancel in the quotient. The usual one takes one maximum of all key features;
    here it is one of each feature, which the queries get back, so that no denominator is below 1.
    """
    directions = orthogonal_gaussian(q.shape[0], rank, q.shape[-1], generator, q)
    by_query = log_positive_features(q * math.sqrt(scale), directions)
    by_key = log_positive_features(k * math.sqrt(scale), directions)
    highest = by_key.amax(1, keepdim=True)
    by_query = by_query + highest
    return normalised((by_query - by_query.amax(-1, keepdim=True)).exp(), (by_key - highest).exp(), v)


def orthogonal_gaussian(
    heads: int, count: int, width: int, generator: torch.Generator, like: torch.Tensor
) -> torch.Tensor:
    """[heads, count, width]: rows that are each N(0, 1) and, in blocks of ``width``, orthogonal to one another."""
    blocks = -(-count // width)

    def normal() -> torch.Tensor:
        return torch.randn(
            (heads, blocks, width, width), generator=generator, dtype=like.dtype, device=generator.device
        ).to(like.device)

    q, r = torch.linalg.qr(normal())
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # uniform over all rotations
    rows: torch.Tensor = q * normal().norm(dim=-1, keepdim=True)  # the lengths that rows drawn independently have
    return rows.flatten(1, 2)[:, :count]


def log_positive_features(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """w·x − ‖x‖²/2: [heads, tokens, features]."""
    return x @ directions.mT - x.square().sum(-1, keepdim=True) / 2


def nystrom(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """Landmarks that are means of segments, between them the pseudo-inverse (Nyströmformer), exact.

    Xiong et al., *Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention*, AAAI 2021,
    arXiv 2102.03902, without the convolution that its models add. Singular values are kept down to the rounding of
    the dtype, as ``torch.linalg.pinv`` does by default.
    """
    return _nystrom(q, k, v, scale, rank, torch.linalg.pinv)


def nystrom_iterated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """The same with six steps of an iteration for the pseudo-inverse, as the paper runs it."""
    return _nystrom(q, k, v, scale, rank, iterated_pseudo_inverse)


def _nystrom(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    rank: int,
    pseudo_inverse: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    count = min(rank, q.shape[1], k.shape[1])
    queries, keys = segment_means(q, count), segment_means(k, count)
    rows = softmax_matrix(queries, k, scale) @ v  # [heads, count, e]
    core = pseudo_inverse(softmax_matrix(queries, keys, scale))
    return softmax_matrix(q, keys, scale) @ (core @ rows)


def segment_means(x: torch.Tensor, count: int) -> torch.Tensor:
    """[heads, count, d]: the means of ``count`` runs of tokens, whose lengths differ by at most 1."""
    return torch.stack([part.mean(1) for part in x.tensor_split(count, 1)], 1)


def iterated_pseudo_inverse(a: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """Z ← Z (13 − AZ (15 − AZ (7 − AZ))) / 4, which converges to the pseudo-inverse with order 3.

    Razavi, Kerayechian, Gachpazan, Shateyi, *A New Iterative Method for Finding Approximate Inverses of Complex
    Matrices*, 2014. It starts at Aᵀ / (‖A‖₁ ‖A‖∞), with the norms of each head's own matrix. Small singular values
    need more steps than six: until then they are damped, as with a ridge.
    """
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[:, None, None]
    for _ in range(steps):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def tensor_sketch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """The Taylor polynomial 1 + x + x²/2, with x² sketched: 1 + d + s = rank features.

    Pham and Pagh, *Fast and Scalable Polynomial Kernels via Explicit Feature Maps*, KDD 2013. The sketch of x ⊗ x is
    the circular convolution of two independent count sketches of x. All d (d + 1) / 2 monomials make x² exact, so
    a rank near 1 + d + d (d + 1) / 2 wastes the sketch. Rows whose denominator comes near 0 are not repaired.
    """
    d = q.shape[-1]
    size = rank - 1 - d
    if size < 1:
        raise ValueError(f"1 + x alone takes 1 + d = {1 + d} features: give a rank above that, not {rank}")
    places, signs = (drawn.to(q.device) for drawn in count_sketches(q.shape[0], d, size, generator))

    def features(x: torch.Tensor) -> torch.Tensor:
        x = x * math.sqrt(scale)
        one = torch.ones_like(x[..., :1])
        return torch.cat([one, x, sketched_square(x, places, signs, size) / math.sqrt(2)], -1)

    return normalised(features(q), features(k), v)


def count_sketches(heads: int, d: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Where two independent count sketches add each coordinate, and with which sign: both [2, heads, d]."""

    def drawn(end: int) -> torch.Tensor:
        return torch.randint(end, (2, heads, d), generator=generator, device=generator.device)

    return drawn(size), 2 * drawn(2) - 1


def sketched_square(x: torch.Tensor, places: torch.Tensor, signs: torch.Tensor, size: int) -> torch.Tensor:
    """[heads, tokens, size]: vectors whose products are, in expectation, the squares of the products of x."""
    spectrum = torch.ones((), dtype=x.dtype, device=x.device)
    for place, sign in zip(places, signs, strict=True):
        count_sketch = x.new_zeros(*x.shape[:-1], size)
        count_sketch.scatter_add_(-1, place[:, None].expand(x.shape), x * sign[:, None])
        spectrum = spectrum * torch.fft.rfft(count_sketch)
    sketch: torch.Tensor = torch.fft.irfft(spectrum, n=size)
    return sketch


def truncated_svd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """The best approximation of rank ``rank`` to the softmax matrix P itself, times v: forms P, one head at a time.

    Eckart and Young, *The Approximation of One Matrix by Another of Lower Rank*, 1936. What stands for P in every
    other function here has at most this rank, so none is closer to P in the Frobenius norm. For the output, or for
    the worst rows, that is a yardstick and no bound. Rows of this P̃ need not sum to 1.
    """
    heads = []
    for query, key, value in zip(q, k, v, strict=True):
        p = softmax_matrix(query, key, scale)
        left = leading_left_vectors(p, rank, generator)
        heads.append(left @ (left.mT @ (p @ value)))  # the best P̃ is U Uᵀ P
    return torch.stack(heads)


def leading_left_vectors(
    p: torch.Tensor, rank: int, generator: torch.Generator, iterations: int = 3, oversampling: float = 1.25
) -> torch.Tensor:
    """[rows, rank]: the left singular vectors of a matrix [rows, columns] with the largest singular values.

    Halko, Martinsson, Tropp, *Finding Structure with Randomness*, SIAM Review 2011, algorithms 4.4 and 5.1: subspace
    iteration from a random start that is wider than the rank; with no room to be wider it is the SVD of P itself.
    """
    rank = min(rank, *p.shape)
    width = math.ceil(oversampling * rank) + 8
    if width >= min(p.shape):
        return left_vectors(p)[:, :rank]
    start = torch.randn((p.shape[1], width), generator=generator, dtype=p.dtype, device=generator.device)
    basis: torch.Tensor = torch.linalg.qr(p @ start.to(p.device))[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(p.mT @ basis)[0]
        basis = torch.linalg.qr(p @ basis)[0]
    return basis @ left_vectors(basis.mT @ p)[:, :rank]


def left_vectors(a: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.svd(a, full_matrices=False)[0]
    return found


def softmax_matrix(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """P, exactly."""
    return torch.softmax(scale * (q @ k.mT), -1)


def normalised(phi: torch.Tensor, psi: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention through features of queries and of keys, in time linear in the tokens."""
    return phi @ (psi.mT @ v) / (phi @ psi.sum(1).unsqueeze(-1))


REFERENCES: Mapping[str, Reference] = {
    "mean_pooling": mean_pooling,
    "position_blocks": position_blocks,
    "favor_plus": favor_plus,
    "nystrom": nystrom,
    "nystrom_iterated": nystrom_iterated,
    "tensor_sketch": tensor_sketch,
    "truncated_svd": truncated_svd,
}
