"""Attention through the approximations, written densely: what values and gradients are compared with."""

from __future__ import annotations

import math

import torch


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
    """Attention through the polynomial, written densely; under a mask exp in the diagonal chunks.

    ``shift``: the mean query u and the mean key c of each key head are taken off before, and each key weighs
    exp(u·(k − c)); they are constants of the differentiation.
    """
    groups = q.shape[1] // k.shape[1]
    u, c, first = torch.zeros(()), torch.zeros(()), chunk if shift == "first_chunk" else None
    if shift != "none":
        c = k.detach()[:, :, :first].mean(2, keepdim=True).repeat_interleave(groups, 1)
        by_key_head = q.detach()[:, :, :first].unflatten(1, (k.shape[1], groups))
        u = by_key_head.mean((2, 3)).repeat_interleave(groups, 1)[:, :, None]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    x = (q - u) @ (k - c).mT / math.sqrt(q.shape[-1])
    log_weights = (u * (k - c)).sum(-1)[:, :, None] / math.sqrt(q.shape[-1])
    a = sum(x**m / math.factorial(m) for m in range(degree + 1))
    if causal:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        a = torch.where(j // chunk < i // chunk, a, torch.where((j // chunk == i // chunk) & (j <= i), x.exp(), 0.0))
    a = a * log_weights.exp()
    if substituted:
        # exp's own derivative with the polynomial's value in place of exp: d a = a dx
        logits = x + log_weights
        a = a.detach() * (1 + logits - logits.detach())
    return a / a.sum(-1, keepdim=True) @ v
