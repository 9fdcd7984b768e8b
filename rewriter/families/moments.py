"""Means and covariances of tokens, of those that take part."""

from __future__ import annotations

import torch


def mean_of(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The mean of the rows [..., n, e] that take part (``keep`` [..., n]; None: all): [..., 1, e]."""
    if keep is None:
        return x.mean(-2, keepdim=True)
    share = keep.to(x.dtype)[..., None]
    return (x.masked_fill(~keep[..., None], 0)).sum(-2, keepdim=True) / share.sum(-2, keepdim=True).clamp_min(1)


def covariance_of(x: torch.Tensor, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [..., 1, d] and covariance [..., d, d] of the rows of x [..., n, d] that take part (``keep`` [..., n])."""
    mean = mean_of(x, keep)
    x0 = x - mean
    if keep is None:
        return mean, x0.mT @ x0 / x.shape[-2]
    x0 = x0.masked_fill(~keep[..., None], 0)
    return mean, x0.mT @ x0 / keep.sum(-1).clamp_min(1)[..., None, None]
