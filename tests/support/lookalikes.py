"""Softmax attention in parts, from which tests build what looks like attention; how such a function is compared."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import compile_and_report, gradients, rand

from polyattn.report.model import Report

B, H, N, M, D = 2, 3, 5, 7, 4
MINE = re.compile(r"\b(test_\w+|lookalikes)\.py:\d+")
"""A line of a test, or of this file."""
Function = Callable[..., Any]


def qkv(*more: torch.Tensor) -> list[torch.Tensor]:
    return [rand(B, H, N, D), rand(B, H, M, D), rand(B, H, M, D, seed=1), *more]


def run(function: Function, inputs: list[torch.Tensor], training: bool, tolerance: float) -> Report:
    """The report of one graph whose value and gradients, NaN included, are those of eager; in training or inference."""
    compiled, found = compile_and_report(function)
    with contextlib.nullcontext() if training else torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            got = compiled(*inputs)
            torch.manual_seed(0)
            want = function(*inputs)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert got.requires_grad == want.requires_grad
        sides = [gradients(side, inputs) for side in (got, want)]
        torch.testing.assert_close(*sides, rtol=10 * tolerance, atol=tolerance, equal_nan=True)
    (report,) = found
    assert report.failure is None, str(report)
    assert all(MINE.search(found.where) for found in (*report.sites, *report.refusals)), str(report)
    return report


def in_both_modes(cases: dict[str, Any], each: int = 1) -> Any:
    """Parametrises a test with the names of cases, in training and in inference; where a case says nothing about the
    mode, ``each`` third one, say, is enough in inference: the others are long."""

    def mark(test: Any) -> Any:
        both = [(name, True, False) for name in cases]
        both += [(name, False, bool(number % each)) for number, name in enumerate(cases)]
        return pytest.mark.parametrize(
            ("name", "training"),
            [
                pytest.param(
                    *case, id=f"{case[0]}-{'training' if case[1] else 'inference'}", marks=[pytest.mark.long] * rest
                )
                for *case, rest in both
            ],
        )(test)

    return mark


def scores(q, k):
    return (q @ k.mT) * 0.5


def weights(q, k):
    return scores(q, k).softmax(-1)


def hand(q, k, v, normal: Function, exponent: Function = torch.exp):
    """Exponentials over something."""
    e = exponent(scores(q, k))
    return (e / normal(e)) @ v


def total(e):
    return e.sum(-1, keepdim=True)


HIDDEN = torch.ones(N, M, dtype=torch.bool).triu(2)
ROW = HIDDEN | (torch.arange(N) == 2)[:, None]
"""The third query sees nothing."""


def routed(*experts: int) -> Callable[[], list[torch.Tensor]]:
    return lambda: [rand(6, D), rand(D, 3), rand(*experts)]
