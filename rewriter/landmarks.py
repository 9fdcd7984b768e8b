"""Landmarks and core of skeleton features, fitted to the queries and keys of each head (math.md §2).

    exp(s q·k) ≈ Φ(q) Z R(k)ᵀ,   Φ(q)_ρ = exp(s q·κ_ρ),   R(k)_σ = exp(s k·λ_σ)

κ are centroids of the keys, weighted by the attention they get, λ centroids of the queries. The core is a generalised
Nyström approximation in the measure of the output: with P_i· the softmax rows of sampled queries I, and columns J,

    Z = pinv(Φ_I / z_I) · P_IJ · pinv(R_J)ᵀ,   P_IJ = exp(s Q_I K_Jᵀ) B_J / z_I,   R_J with the weights B of the keys

with ridges, the least of which are taken that keep the error on fresh rows small. All in float64, on samples, all heads
at once; the fit belongs to a head, not to a sequence, and is used again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Of the largest singular value of the features, whose columns are scaled to length one before."""
MASS_ROWS, LLOYD, VALIDATION = 256, 8, 128
"""Sampled rows that say which keys get attention; tokens per landmark in clustering; rows that choose the ridge."""


class Skeleton(NamedTuple):
    """Landmarks of keys and of queries [heads, m, d], core [heads, m, m]; and the mean error of the softmax rows."""

    keys: torch.Tensor
    queries: torch.Tensor
    core: torch.Tensor
    error: torch.Tensor
    """Σ_j |P̃_ij − P_ij|, mean over the validation rows, [heads]."""


def fit(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    m: int,
    generator: torch.Generator,
    causal: bool = False,
) -> Skeleton:
    """Fit the skeleton of every head.

    Args:
        q: queries [heads, elements, n_q, d]; k: keys [heads, elements, n_k, d], both shifted (codegen/shift.py); a
            query attends to the keys of its own batch element.
        weights: of the keys, [heads, elements, n_k].
        scale: factor of the logits.
        m: landmarks on each side; no more than there are queries or keys are used, the rest repeat them.
        causal: a query attends to the keys up to its own position.
        generator: draws rows and columns; torch's own generators are left alone.
    """
    per_query, per_key = q.shape[2], k.shape[2]
    q, k, weights = (x.detach().double().flatten(1, 2) for x in (q, k, weights))
    heads, n_q, d = q.shape
    element = torch.arange(k.shape[1], device=q.device) // per_key

    def draw(count: int, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator)[: min(count, n)].to(q.device)

    def logits_of(i: torch.Tensor) -> torch.Tensor:
        return scale * q[:, i] @ k.mT + weights.log()[:, None]

    def foreign(i: torch.Tensor) -> torch.Tensor:
        other = (i // per_query)[:, None] != element
        later = torch.arange(k.shape[1], device=q.device) % per_key > (i % per_query)[:, None]
        return other | later if causal else other

    some = draw(MASS_ROWS, n_q)
    mass = logits_of(some).masked_fill(foreign(some), -math.inf).softmax(2).mean(1)
    kappa = centroids(k, mass, m, generator)
    lam = centroids(q, torch.full((heads, n_q), 1.0 / n_q, dtype=q.dtype, device=q.device), m, generator)
    i, fresh = draw(3 * m, n_q), draw(VALIDATION, n_q)
    j = torch.multinomial((mass + 1.0 / k.shape[1]).cpu(), min(4 * m, k.shape[1]), generator=generator).to(q.device)
    k_j = k.gather(1, j[..., None].expand(-1, -1, d))
    logits = logits_of(i)
    normaliser = logits.masked_fill(foreign(i), -math.inf).logsumexp(2)
    p = (logits.gather(2, j[:, None].expand(-1, len(i), -1)) - normaliser[..., None]).exp()
    left = _Side(scale * q[:, i] @ kappa.mT - normaliser[..., None])
    right = _Side(scale * k_j @ lam.mT + weights.gather(1, j).log()[..., None])
    wanted = logits_of(fresh).masked_fill(foreign(fresh), -math.inf).softmax(2)
    phi, psi = (scale * q[:, fresh] @ kappa.mT).exp(), (scale * k @ lam.mT + weights.log()[..., None]).exp()
    best = torch.zeros(heads, m, m, dtype=q.dtype, device=q.device)
    error = torch.full((heads,), float("inf"), dtype=q.dtype, device=q.device)
    for ridge in RIDGES:
        core = left.solve(p, ridge)  # [heads, m, columns]
        core = right.solve(core.mT, ridge).mT
        core = core * (-left.logs)[:, :, None].exp() * (-right.logs)[:, None, :].exp()
        found = (phi @ core @ psi.mT).masked_fill(foreign(fresh), 0)
        found = found / found.sum(2, keepdim=True)
        off = (found - wanted).abs().sum(2).mean(1).nan_to_num(nan=float("inf"))
        better = off < error
        best = torch.where(better[:, None, None], core, best)
        error = torch.where(better, off, error)
    return Skeleton(kappa, lam, best, error)


class _Side:
    """Features of sampled tokens, [heads, samples, m], columns scaled to length one; given by their logarithms."""

    def __init__(self, logs: torch.Tensor) -> None:
        self.logs = 0.5 * (2 * logs).logsumexp(1)
        self.x = (logs - self.logs[:, None]).exp()
        self.gram = self.x.mT @ self.x
        vector = torch.ones_like(self.gram[..., :1])
        for _ in range(20):
            vector = self.gram @ vector
            vector = vector / vector.norm(dim=1, keepdim=True)
        self.top = (self.gram @ vector).norm(dim=1, keepdim=True)

    def solve(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        """The least squares solution z of x z = y, with a ridge."""
        eye = torch.eye(self.gram.shape[1], dtype=self.gram.dtype, device=self.gram.device)
        factor = torch.linalg.cholesky(self.gram + (ridge**2 * self.top) * eye)
        return torch.cholesky_solve(self.x.mT @ y, factor)


def centroids(x: torch.Tensor, mass: torch.Tensor, m: int, generator: torch.Generator) -> torch.Tensor:
    """Centroids [heads, m, d] of weighted tokens: tokens drawn by their mass, and one step of Lloyd's."""
    heads, n, d = x.shape
    share = (mass / mass.sum(1, keepdim=True) + 0.1 / n).cpu()
    picks = torch.multinomial(share, min(n, LLOYD * m), generator=generator).to(x.device)
    some = x.gather(1, picks[..., None].expand(-1, -1, d))
    # picks are drawn by mass already, so that those that follow count alike
    start = some[:, torch.arange(m, device=x.device) % some.shape[1]]
    nearest = torch.cdist(some, start).argmin(2)
    sums = torch.zeros_like(start).scatter_add_(1, nearest[..., None].expand(-1, -1, d), some)
    counts = torch.zeros(heads, m, dtype=x.dtype, device=x.device).scatter_add_(
        1, nearest, torch.ones_like(nearest, dtype=x.dtype)
    )
    return torch.where(counts[..., None] > 0, sums / counts.clamp_min(1)[..., None], start)
