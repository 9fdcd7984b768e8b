"""The form in tiles written out: the expansion by its definition, on dense tensors, with autograd through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Operands in tiles of some heads: q [H, A, T_q, d], k [H, B, T_k, d], v [H, B, T_k, e], which pairs are near."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    near: torch.Tensor
    scale: float = 0.5

    @classmethod
    def of(cls, heads: int, a: int, t_q: int, b: int, t_k: int, d: int, e: int, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def rand(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        near = torch.rand(heads, a, b, generator=generator) > 0.6
        near[:, 0] = True  # a tile without far pairs
        if a > 1:
            near[:, 1] = False  # and one without near ones
        return cls(rand(heads, a, t_q, d), rand(heads, b, t_k, d), rand(heads, b, t_k, e), near)

    @property
    def lse(self) -> torch.Tensor:
        """Logarithms of the exact sums of the rows, [H, A, T_q]."""
        logits = self.scale * self.q.flatten(1, 2) @ self.k.flatten(1, 2).mT
        return logits.logsumexp(-1).view(self.q.shape[:3])


def dense(case: Case, order: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The output [H, A, T_q, e] of clustered attention of an order, for tiles in which every place holds a token."""
    s, far = case.scale, ~case.near
    mu, mean = q.mean(2), k.mean(2)
    kappa = k - mean[:, :, None]
    omega = (s * torch.einsum("hIa,hJja->hIJj", mu, kappa)).exp()
    mass = omega.sum(3)
    away = torch.einsum("hIJj,hJja->hIJa", omega, kappa) / mass[..., None]
    key = away + mean[:, None]  # c_IJ
    exponent = s * torch.einsum("hIia,hIJa->hIiJ", q, key) - s * torch.einsum("hIa,hIJa->hIJ", mu, away)[:, :, None]
    weight = exponent.exp() * far[:, :, None]
    total = torch.einsum("hIiJ,hIJ->hIi", weight, mass)
    out = torch.einsum("hIiJ,hIJj,hJjb->hIib", weight, omega, v)
    if order:
        seen = (s * torch.einsum("hIa,hJa->hIJ", mu, mean)).exp() * mass * far
        share = seen / seen.sum(2, keepdim=True).clamp_min(1e-300)
        cross = torch.einsum("hIJ,hJja,hJjb->hIab", share, kappa, v) / k.shape[2]
        delta = q - mu[:, :, None]
        first = s * total[..., None] * torch.einsum("hIia,hIab->hIib", delta, cross)
        if order == 2:
            inside = torch.einsum("hIJ,hJja,hJjc->hIac", share, kappa, kappa) / k.shape[2]
            half = s * s / 2 * torch.einsum("hIia,hIac,hIic->hIi", delta, inside, delta)
            out, total = out * (1 + half[..., None]), total * (1 + half)
        out = out + first
    exact = (s * torch.einsum("hIia,hJja->hIiJj", q, k)).exp() * case.near[:, :, None, :, None]
    numerator = out + torch.einsum("hIiJj,hJjb->hIib", exact, v)
    return numerator / (total + exact.sum((3, 4)))[..., None]
