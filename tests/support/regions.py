"""Attentions that are put into regions, changed in place and fed from caches, and how they are compared with eager."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matching import INF, compile_and_report, gradients, rand

from polyattn.report.model import Report

B, H, N, M, D, E = 2, 3, 6, 8, 4, 5
LOW = torch.bfloat16
MINE = re.compile(r"\b(test_\w+|regions)\.py:\d+")
"""A line of a test, or of this file."""


def qkv(*batch: int, n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [
        rand(*batch, n, D, dtype=dtype),
        rand(*batch, m, D, seed=1, dtype=dtype),
        rand(*batch, m, E, seed=2, dtype=dtype),
    ]


def same(got: torch.Tensor, want: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got.requires_grad == want.requires_grad
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=1e-8, atol=1e-9)


def check(function: Callable[..., Any], inputs: list[torch.Tensor], *masks: str, dynamic: bool = False) -> Report:
    """One graph whose sites have these masks, nothing refused, equal value and gradients."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    same(compiled(*inputs), function(*inputs), inputs)
    (report,) = found
    assert report.failure is None, str(report)
    assert not report.refusals, str(report)
    assert tuple(site.mask for site in report.sites) == masks
    assert all(MINE.search(site.where) for site in report.sites)
    return report


def plain(q, k, v):
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


def masked(q, k, v, keep):
    return ((q @ k.mT) * 0.5).masked_fill(~keep, -INF).softmax(-1) @ v


def causal(q, k, v):
    return masked(q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())


def biased(q, k, v, bias):
    return ((q @ k.mT) * 0.5 + bias).softmax(-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def after(change: Callable[..., Any]) -> Callable[..., Any]:
    """Attention whose scores are changed in place."""

    def function(q, k, v, *more):
        scores = q @ k.mT
        change(scores, *more)
        return scores.softmax(-1) @ v

    return function


def fill(scores):
    scores *= 0.5
    scores.masked_fill_(torch.ones(scores.shape[-2:]).tril() == 0, -INF)


def under(mode: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def region(*inputs: torch.Tensor) -> Any:
        with mode():
            return function(*inputs)

    return region


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", LOW, enabled=enabled)


KEEP = torch.tensor([[True] * 5 + [False] * 3, [True] * 8])[:, None, None]


def no_less_precise(function: Callable[..., Any], inputs: list[torch.Tensor], reference: Callable[..., Any]) -> Report:
    """Output and gradients: the error against float64 is at most twice eager's (or a rounding of float32)."""
    compiled, found = compile_and_report(function)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    sides = [(compiled(*inputs), inputs), (function(*inputs), inputs), (reference(*wide), wide)]
    assert sides[0][0].dtype == sides[1][0].dtype
    results = [(y, *gradients(y, of)) for y, of in sides]
    for got, eager, right in zip(*results, strict=True):
        error, allowed = (got - right).norm(), 2 * (eager - right).norm() + 1e-6 * right.norm()
        assert error.item() <= allowed.item()
    (report,) = found
    assert report.failure is None, str(report)
    return report
