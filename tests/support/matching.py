"""What the tests of matching share: compile a function, look at its report, compare it with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import polyattn.runtime.ops  # noqa: F401  (registers the operators)
from polyattn.backend import compile_graph
from polyattn.options import Options
from polyattn.report.model import Report, SiteReport

INF = float("inf")
EXACT = Options(policy="exact", inner="eager")

IN_EVERY_DTYPE = pytest.mark.parametrize(
    ("dtype", "dynamic"),
    [
        pytest.param(torch.bfloat16, True, id="bfloat16-dynamic"),
        pytest.param(torch.bfloat16, False, id="bfloat16-static", marks=pytest.mark.long),
        pytest.param(torch.float32, True, id="float32-dynamic", marks=pytest.mark.long),
        pytest.param(torch.float32, False, id="float32-static", marks=pytest.mark.long),
    ],
)
"""For :func:`check_precision`: the narrowest dtype with symbolic sizes in every run, the other three in long ones."""
STATIC = pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static"), pytest.param(True, id="dynamic", marks=pytest.mark.long)]
)
"""For exact comparisons of what :data:`IN_EVERY_DTYPE` runs with symbolic sizes."""


def rand(*size: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def compile_and_report(
    function: Callable[..., Any], *, dynamic: bool | None = False, options: Options = EXACT, fullgraph: bool = False
) -> tuple[Callable[..., Any], list[Report]]:
    """The compiled function, and the list that receives a report for every graph that it compiles."""
    found: list[Report] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, options, found.append)

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph), found


def run(
    function: Callable[..., Any], inputs: Sequence[Any], *, dynamic: bool = False, options: Options = EXACT
) -> tuple[Any, Report]:
    """What the compiled function returns, and the report of its one graph."""
    compiled, found = compile_and_report(function, dynamic=dynamic, options=options)
    got = compiled(*inputs)
    (report,) = found
    assert report.failure is None, str(report)
    return got, report


def gradients(value: torch.Tensor, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Gradients by every input that requires one, for a fixed random gradient of the value."""
    needing = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return torch.autograd.grad(value, needing, weight, allow_unused=True) if value.requires_grad else ()


def check(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    sites: int = 1,
    dynamic: bool | None = False,
    also: Sequence[Sequence[Any]] = (),
) -> Report:
    """Matched; equal value and equal gradients, in training and in inference. Returns the report of training.

    ``also``: inputs of other sizes, which the same graph of inference takes.
    """
    compiled, found = compile_and_report(function, dynamic=dynamic)
    got, want = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), want, rtol=1e-9, atol=1e-9)
        for others in also:
            torch.testing.assert_close(compiled(*others), function(*others), rtol=1e-9, atol=1e-9)
    assert len(found) == 2
    for report in found:
        assert report.failure is None, str(report)
        assert not report.refusals, str(report)
        assert len(report.sites) == sites, str(report)
    return found[0]


def check_precision(
    function: Callable[..., Any], inputs: Sequence[Any], dtype: torch.dtype, dynamic: bool
) -> SiteReport:
    """In ``dtype``, in training and in inference: matched, and at most twice as far from float64 as eager is.

    Returns the site of training.
    """
    low = [_cast(x, dtype) for x in inputs]
    high = [_cast(x, torch.float64) for x in low]
    compiled, found = compile_and_report(copy.copy(function), dynamic=dynamic)
    values = [compiled(*low), function(*low), function(*high)]
    with torch.no_grad():
        _closer("value in inference", [compiled(*low), *values[1:]])
    _closer("value", values)
    made = [gradients(value, given) for value, given in zip(values, (low, low, high), strict=True)]
    for at, triple in enumerate(zip(*made, strict=True)):
        # a learned temperature's gradient is a sum over all queries, Σ q·dq: its rounding is relative to that sum
        size = float((high[0].norm() * made[2][0].norm()).detach()) if at >= 3 else 0.0
        _closer(f"gradient {at}", list(triple), size)
    assert len(found) == 2
    for report in found:
        assert report.failure is None, str(report)
        assert len(report.sites) == 1, str(report)
    return found[0].sites[0]


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype).requires_grad_(x.requires_grad)


def _closer(name: str, triple: Sequence[torch.Tensor], size: float = 0.0) -> None:
    got, plain, want = (x.detach().double() for x in triple)
    torch.testing.assert_close(got.isnan(), want.isnan())
    got, plain, want = (x.nan_to_num() for x in (got, plain, want))
    error, own = (float((x - want).abs().max()) for x in (got, plain))
    unit = torch.finfo(triple[0].dtype).eps * max(float(want.abs().max()), size)
    assert error <= 2 * own + 2 * unit, f"{name}: {error:.3g} from float64, eager {own:.3g}, one rounding {unit:.3g}"


def refused(
    function: Callable[..., Any], inputs: Sequence[Any], *, dynamic: bool = False, inference: bool = True
) -> str:
    """Refused in training and, with ``inference``, there too; values and gradients are the user's own. Returns the
    reason."""
    compiled, found = compile_and_report(function, dynamic=dynamic)
    got, want = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs), rtol=0, atol=0, equal_nan=True)
    if inference:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), want, rtol=0, atol=0, equal_nan=True)
    for report in found:
        assert report.failure is None, str(report)
        assert not report.sites, str(report)
        (refusal,) = report.refusals
        assert f"{Path(function.__code__.co_filename).name}:" in refusal.where
        assert ", in " in refusal.where
        assert refusal.node
    return found[0].refusals[0].reason
