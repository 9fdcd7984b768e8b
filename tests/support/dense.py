"""Attention through the approximations, written densely: what values and gradients are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Approximate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From shifted queries, shifted keys (one for each query head) and their logits to what stands for exp."""


def dense_polynomial(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    degree: int,
    causal: bool,
    chunk: int,
    substituted: bool,
    shift: str = "none",
) -> torch.Tensor:
    """Attention through the polynomial of a degree."""

    def polynomial(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x**m / math.factorial(m) for m in range(degree + 1)]).sum(0)

    return _dense(q, k, v, polynomial, chunk if causal else None, substituted, shift, chunk)


def dense_skeleton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    marks: torch.Tensor,
    substituted: bool,
    chunk: int | None = None,
    band: bool = False,
) -> torch.Tensor:
    """Attention through Φ Z Rᵀ with given landmarks, which are constants of the differentiation."""
    d, scale = q.shape[-1], 1 / math.sqrt(q.shape[-1])
    marks = marks.repeat_interleave(q.shape[1] // k.shape[1], 0)
    kappa, lam, core = marks[..., :d], marks[..., d : 2 * d], marks[..., 2 * d :]

    def skeleton(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (scale * q @ kappa.mT).exp() @ core @ (scale * k @ lam.mT).exp().mT

    return _dense(q, k, v, skeleton, chunk, substituted, "call", None, band)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    approximate: Approximate,
    chunk: int | None,
    substituted: bool,
    shift: str,
    first: int | None,
    band: bool = False,
) -> torch.Tensor:
    """Attention with an approximation in place of exp.

    With a ``chunk`` causal, and exp in the diagonal chunks; with a ``band`` too not causal, and exp in near chunks.

    ``shift``: the mean query u and the mean key c of each key head are taken off before (with ``first_chunk`` those of
    the first tokens), and each key weighs exp(u·(k − c)); they are constants of the differentiation.
    """
    groups, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    u, c, some = torch.zeros(()), torch.zeros(()), first if shift == "first_chunk" else None
    if shift != "none":
        c = k.detach()[:, :, :some].mean(2, keepdim=True).repeat_interleave(groups, 1)
        by_key_head = q.detach()[:, :, :some].unflatten(1, (k.shape[1], groups))
        u = by_key_head.mean((2, 3)).repeat_interleave(groups, 1)[:, :, None]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    x = (q - u) @ (k - c).mT * scale
    log_weights = (u * (k - c)).sum(-1)[:, :, None] * scale
    a = approximate(q - u, k - c, x)
    if chunk is not None:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        causal = torch.where(
            j // chunk < i // chunk, a, torch.where((j // chunk == i // chunk) & (j <= i), x.exp(), 0.0)
        )
        a = torch.where((j // chunk - i // chunk).abs() <= 1, x.exp(), a) if band else causal
    a = a * log_weights.exp()
    if substituted:
        # exp's own derivative with the approximation's value in place of exp: d a = a dx
        logits = x + log_weights
        a = a.detach() * (1 + logits - logits.detach())
    return a / a.sum(-1, keepdim=True) @ v


def dense_fitted_polynomial(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    fitted: torch.Tensor,
    widths: tuple[int, ...],
    substituted: bool,
    chunk: int | None = None,
    band: bool = False,
    shift: str = "call",
) -> torch.Tensor:
    """Attention through Σ_m c_m (s q'·k' over the last w_m coordinates)^m, with given matrices and coefficients."""
    d, scale = q.shape[-1], 1 / math.sqrt(q.shape[-1])
    made = fitted.repeat_interleave(q.shape[1] // k.shape[1], 0)
    to_q, to_k, c = made[:, :d, :d], made[:, d : 2 * d, :d], made[:, -1]

    def polynomial(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k = q @ to_q, k @ to_k
        total = c[:, 0, None, None].expand_as(x)
        for m, width in enumerate(widths, 1):
            total = total + c[:, m, None, None] * (scale * q[..., d - width :] @ k[..., d - width :].mT) ** m
        return total

    return _dense(q, k, v, polynomial, chunk, substituted, shift, chunk, band)
