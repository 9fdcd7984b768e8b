"""Attention through the approximations, written densely: what values and gradients are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from polyattn.rewriter.families.family import FeatureFamily
from polyattn.rewriter.families.polynomial.family import Polynomial
from polyattn.rewriter.families.skeleton.family import Skeleton
from polyattn.rewriter.masks.mask import LOCAL_WINDOW
from polyattn.site_plan import SitePlan

Approximate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From centred queries, centred keys (one for each query head) and their logits to what stands for exp."""
Heavy = tuple[int, tuple[int, ...]]


def dense_polynomial(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    degree: int,
    causal: bool,
    chunk: int,
    substituted: bool,
    shift: str = "none",
    heavy: Heavy = (0, ()),
) -> torch.Tensor:
    """Attention through Taylor's polynomial of a degree."""
    made = _of_family(Polynomial(degree), q, k, None)
    return _dense(q, k, v, made, chunk if causal else None, substituted, shift, chunk, heavy=heavy)


def dense_skeleton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    marks: torch.Tensor,
    substituted: bool,
    chunk: int | None = None,
    band: bool = False,
    heavy: Heavy = (0, ()),
) -> torch.Tensor:
    """Attention through Φ Z Rᵀ with given landmarks, which are constants of the differentiation."""
    made = _of_family(Skeleton(marks.shape[1]), q, k, marks)
    return _dense(q, k, v, made, chunk, substituted, "call", None, band, heavy)


def dense_family(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SitePlan, packed: torch.Tensor | None
) -> torch.Tensor:
    """Attention through any family, as a plan says, with what was fitted; outlier keys have exp."""
    heavy = plan.outliers.count, plan.outliers.positions
    made = _of_family(plan.family, q, k, packed)
    window = plan.mask is LOCAL_WINDOW
    substituted = plan.gradient != "consistent"
    return _dense(q, k, v, made, plan.near, substituted, plan.centring, plan.chunk, window, heavy)


def _of_family(family: FeatureFamily, q: torch.Tensor, k: torch.Tensor, packed: torch.Tensor | None) -> Approximate:
    """The family's own dense form, for each query head."""
    scale = 1 / math.sqrt(q.shape[-1])
    made = None if packed is None else packed.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return lambda q, k, x: family.dense(q, k, scale, made)


def _heavy(k: torch.Tensor, count: int, positions: tuple[int, ...], some: int | None) -> torch.Tensor:
    """Which keys have exp, [batch, heads, n_k]."""
    named = torch.zeros_like(k[..., 0], dtype=torch.bool)
    named[..., [p for p in positions if p < k.shape[2]]] = True
    allowed = ~named
    allowed[:, :, k.shape[2] if some is None else some :] = False
    chosen = named
    for _ in range(2):
        norms = (k - _mean(k, chosen, some)).norm(dim=-1).masked_fill(~allowed, -1.0)
        chosen = named | (allowed & (norms.argsort(-1, descending=True).argsort(-1) < count))
    return chosen


def _mean(k: torch.Tensor, without: torch.Tensor, some: int | None) -> torch.Tensor:
    """Mean of the first keys, [batch, heads, 1, d]."""
    keep = (~without).to(k.dtype)[:, :, :some, None]
    return (k[:, :, :some] * keep).sum(2, keepdim=True) / keep.sum(2, keepdim=True).clamp_min(1)


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
    heavy: Heavy = (0, ()),
) -> torch.Tensor:
    """Attention with an approximation in place of exp.

    With a ``chunk`` causal, and exp in the diagonal chunks; with a ``band`` too not causal, and exp in near chunks.

    ``shift``: the mean query u and the mean key c of each key head are taken off before (with ``first_chunk`` those of
    the first tokens), and each key weighs exp(u·(k − c)); they are constants of the differentiation.

    ``heavy``: how many keys of largest norm around the mean, and keys at which positions, have exp.
    """
    groups, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    u, c, some = torch.zeros(()), torch.zeros(()), first if shift == "first_chunk" else None
    if shift != "none":
        c = _mean(k.detach(), _heavy(k.detach(), *heavy, some), some).repeat_interleave(groups, 1)
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
    if heavy != (0, ()):
        exact = _heavy(k.detach(), *heavy, some)[:, :, None]
        hidden = chunk is not None and not band
        a = torch.where(exact, x.exp().tril() if hidden else x.exp(), a)
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
    heavy: Heavy = (0, ()),
) -> torch.Tensor:
    """Attention through Σ_m c_m (s q'·k' over the last w_m coordinates)^m, with given matrices and coefficients."""
    made = _of_family(Polynomial(len(widths), "least_squares", widths=widths), q, k, fitted)
    return _dense(q, k, v, made, chunk, substituted, shift, chunk, band, heavy)
