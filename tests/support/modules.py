"""torch.nn's attention and transformer modules with parameters of every size, and how a compiled one is compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from matching import compile_and_report, rand
from torch import nn

from polyattn.report.model import SiteReport

B, H, N, M, C = 2, 2, 5, 7, 8
MINE = re.compile(r"\btest_\w+\.py:\d+")
"""A line of a test."""
PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
LATER = torch.ones(N, N, dtype=torch.bool).triu(1)


def made(module: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    """A module with parameters of every size, biases too, which torch starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = module(*args, **options, dtype=torch.float64)
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return result


def compare(got: Any, want: Any, needing: Iterable[torch.Tensor]) -> None:
    """Equal values, NaN where the other is NaN, and equal gradients of all that needs some."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    pairs = [(a, b) for a, b in zip(leaves(got), leaves(want), strict=True) if b.requires_grad]
    assert bool(pairs) == torch.is_grad_enabled()
    if pairs:
        weights = [rand(*b.shape, seed=1, grad=False) for _, b in pairs]
        inputs = [x for x in needing if x.requires_grad]
        a, b = (torch.autograd.grad(side, inputs, weights, allow_unused=True) for side in zip(*pairs, strict=True))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, equal_nan=True)


def leaves(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def check(
    function: Callable[..., Any],
    inputs: list[torch.Tensor],
    needing: Iterable[torch.Tensor] = (),
    dynamic: bool = False,
) -> tuple[SiteReport, ...]:
    """One graph without refusals, sites with my lines, equal values and gradients; the sites."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    compare(compiled(*inputs), function(*inputs), [*inputs, *needing])
    (report,) = found
    assert report.failure is None, str(report)
    assert not report.refusals, str(report)
    for site in report.sites:
        assert site.verdict == "exact"
        assert MINE.search(site.where)
    return report.sites


def attention(**options: Any) -> nn.MultiheadAttention:
    module: nn.MultiheadAttention = made(nn.MultiheadAttention, C, H, **{"batch_first": True, **options})
    return module


def inputs_of(shapes: Iterable[tuple[int, ...]]) -> list[torch.Tensor]:
    return [rand(*shape, seed=place) for place, shape in enumerate(shapes)]


def layer(kind: Callable[..., nn.Module], dropout: float = 0.0, **options: Any) -> Any:
    return made(kind, C, H, 16, dropout, **{"batch_first": True, **options})
