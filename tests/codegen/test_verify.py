"""Broken specifications are refused, each with a sentence that says what is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from polyattn.codegen.schedule import schedule
from polyattn.codegen.spec import KernelSpec, accumulates
from polyattn.codegen.verify import verify
from polyattn.errors import ScheduleError
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import kernels
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.families.skeleton.rule import SkeletonRule
from polyattn.rewriter.masks.mask import CAUSAL, LOCAL_WINDOW, MASKS, NONE, Mask
from polyattn.rewriter.rules.rule import ApproximateRule


def forward(mask: Mask) -> KernelSpec:
    return kernels(softmax(mask), PolynomialRule(2), "consistent").forward


def tiles_backwards(spec: KernelSpec) -> KernelSpec:
    return replace(spec, loops=tuple(replace(loop, tiles=loop.tiles[::-1]) for loop in spec.loops))


def loops_backwards(spec: KernelSpec) -> KernelSpec:
    return replace(spec, loops=spec.loops[::-1])


def nothing_added_up(spec: KernelSpec) -> KernelSpec:
    return replace(spec, loops=tuple(replace(loop, accumulate=()) for loop in spec.loops))


def a_tile_added_up(spec: KernelSpec) -> KernelSpec:
    first = spec.loops[0]
    return replace(spec, loops=(replace(first, accumulate=(first.tiles[-1],)), *spec.loops[1:]))


def a_state_stored(spec: KernelSpec) -> KernelSpec:
    last = spec.loops[-1]
    state = next(n for loop in spec.loops for n in loop.accumulate)
    return replace(spec, loops=(*spec.loops[:-1], replace(last, stores=(("O", state),))))


def a_store_without_its_tile(spec: KernelSpec) -> KernelSpec:
    last = spec.loops[-1]
    stored = last.stores[0][1]
    return replace(spec, loops=(*spec.loops[:-1], replace(last, tiles=tuple(t for t in last.tiles if t is not stored))))


def a_tile_returned(spec: KernelSpec) -> KernelSpec:
    return replace(spec, states=(("S", spec.loops[-1].stores[0][1]),))


def a_state_returned_that_no_loop_makes(spec: KernelSpec) -> KernelSpec:
    state = next(n for loop in spec.loops for n in loop.accumulate)
    return replace(spec, loops=(), states=(("S", state),))


BROKEN: list[tuple[Mask, Callable[[KernelSpec], KernelSpec], str]] = [
    (NONE, tiles_backwards, r"forward: the tile .* reads .* before it is computed"),
    (CAUSAL, tiles_backwards, r"forward: the tile .* reads .* before it is computed"),
    (NONE, loops_backwards, r"reads contract.*, of which contract.* is not added up before"),
    (LOCAL_WINDOW, loops_backwards, r"reads the running sum contract.*, which no loop adds up"),
    (NONE, nothing_added_up, "is not added up before"),
    (CAUSAL, nothing_added_up, "reads the running sum .* which no loop adds up"),
    (NONE, a_tile_added_up, "is added up, and is no sum over tokens"),
    (NONE, a_state_stored, "stores O = .*, which has 0 token axes, not one"),
    (NONE, a_store_without_its_tile, "forward stores O = .* before it is computed"),
    (NONE, a_tile_returned, "forward returns S = .*, which is no state"),
    (NONE, a_state_returned_that_no_loop_makes, "forward returns S = .* is not added up before"),
]


@pytest.mark.parametrize(("mask", "break_", "message"), BROKEN, ids=[f"{f.__name__}-{m.name}" for m, f, _ in BROKEN])
def test_a_broken_specification_is_refused(
    mask: Mask, break_: Callable[[KernelSpec], KernelSpec], message: str
) -> None:
    verify(forward(mask))
    with pytest.raises(ScheduleError, match=message):
        verify(break_(forward(mask)))


@pytest.mark.parametrize("rule", [PolynomialRule(2), SkeletonRule()], ids=lambda rule: rule.title)
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.name)
def test_what_is_scheduled_passes(mask: Mask, rule: ApproximateRule) -> None:
    for gradient in ("consistent", "substituted", "projected"):
        made = kernels(softmax(mask, key_bias=True), rule, gradient)
        for wanted in (("dQ",), ("dK", "dV"), ("dQ", "dK", "dV", "dB")):
            verify(made.backward(wanted))
        verify(made.forward)


def test_a_state_alone_may_be_returned() -> None:
    made = kernels(softmax(NONE), PolynomialRule(2), "consistent")
    state = next(n for loop in made.forward.loops for n in loop.accumulate)
    assert accumulates(state)
    spec = schedule("state", {"S": state}, NONE)
    assert spec.states == (("S", state),)
    verify(spec)
