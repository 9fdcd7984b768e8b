"""The targets: who is chosen, why not, what happens when a device refuses a kernel, what suits a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from operands import spec_inputs
from rules import kernels

from polyattn.codegen import targets
from polyattn.codegen.cpu.fused import FLASH
from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.phases import Choose
from polyattn.codegen.reference import REFERENCE, ReferenceTarget
from polyattn.codegen.schedule import schedule
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import TILE_ELEMENTS, Target, block_length
from polyattn.codegen.triton.target import MAX_GRID, TRITON
from polyattn.errors import EmitError, ScheduleError
from polyattn.rewriter.algebra.expr import HEAD, KEY, VALUE
from polyattn.rewriter.algebra.monomials import Basis, full
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.planning.plan import node

DEVICES = {"cpu": CPU, "cuda": TRITON, "meta": REFERENCE}


def device(name: str) -> torch.device:
    return torch.device(name)


def test_the_preferred_target_comes_first() -> None:
    assert targets.TARGETS == (TRITON, CPU, REFERENCE)
    assert [target.name for target in targets.TARGETS] == ["triton", "cpu", "specification"]


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_a_preferred_target(name: str) -> None:
    assert targets.of_device(device(name)) is DEVICES[name]
    assert targets.of(kernels(True, 2, "consistent").forward, device(name)) is DEVICES[name]


def a_gather_alone() -> KernelSpec:
    (gather,) = [a for a in kernels(False, 2, "consistent").plan.outputs["dK"].args if a.op == "gather"]
    doubled = node("sum", (gather,), gather.axes, ((2,), ((0, 1, 2),)))
    return schedule("odd", {"dK": node("contract", (doubled,), (KEY, HEAD), (((0, 1, 2),), (0, 2)))})


def a_state_of_two_sums() -> KernelSpec:
    k, v = node("input", (), (KEY, HEAD), "K"), node("input", (), (KEY, VALUE), "V")
    sums = node("contract", (k, v), (HEAD, VALUE), (((0, 1), (0, 2)), (1, 2)))
    return schedule("odd", {"T": node("sum", (sums,), sums.axes, ((2,), ((0, 1),)))})


NEAR_MISSES: dict[str, tuple[Target, KernelSpec, str]] = {
    "features of a rule's own": (
        TRITON,
        kernels(False, None, "consistent").forward,
        "skeleton features have no Triton code yet",
    ),
    "and causal": (TRITON, kernels(True, None, "substituted").forward, "skeleton features have no Triton code yet"),
    "local window": (
        TRITON,
        kernels(False, 2, "consistent", window=True).forward,
        "an exact local window has no Triton code yet",
    ),
    "state": (TRITON, a_state_of_two_sums(), "the state T that is to be returned is no sum over tokens"),
    "gather": (
        CPU,
        a_gather_alone(),
        "the CPU target gathers only to multiply with weighted features of the degree below and sum",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_has_no_code_is_a_reason(case: str) -> None:
    target, spec, reason = NEAR_MISSES[case]
    found = target.unsupported(spec)
    assert found is not None
    assert reason in found
    assert target.unsupported(spec) is found  # found once
    with pytest.raises(EmitError) as caught:
        target.emit(spec)
    assert str(caught.value) == found
    assert isinstance(caught.value, ScheduleError)
    assert not target.runs(spec)
    assert targets.sources(spec)[target.name] == f"# no code for this target: {found}"


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_the_reference_runs_what_others_have_no_code_for(case: str) -> None:
    target, spec, _ = NEAR_MISSES[case]
    assert REFERENCE.unsupported(spec) is None
    assert REFERENCE.emit(spec) == str(spec)
    there = device("cpu" if target is CPU else "cuda")
    assert targets.of_device(there) is target
    assert targets.of(spec, there) is REFERENCE


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("gradient", ["consistent", "substituted", "projected"])
def test_polynomials_have_code_everywhere(degree: int, causal: bool, gradient: str) -> None:
    spec = kernels(causal, degree, gradient).backward(("dQ", "dK", "dV"))
    reasons = {target.name: target.unsupported(spec) for target in targets.TARGETS}
    assert {name for name, reason in reasons.items() if reason} <= ({"triton"} if gradient == "projected" else set())


class Fragile(ReferenceTarget):
    """A target whose device takes no kernel."""

    name = "fragile"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run(
        self,
        spec: KernelSpec,
        inputs: Mapping[str, torch.Tensor],
        scalars: Scalars,
        basis: Basis,
        block: int,
        choose: Choose | None = None,
    ) -> dict[str, torch.Tensor]:
        """Fails."""
        self.calls += 1
        raise RuntimeError("out of shared memory")


class Patient(Fragile):
    """The same, on a device that may do so."""

    may_fail = True


def arguments() -> tuple[KernelSpec, dict[str, torch.Tensor], Scalars, Basis, int]:
    scalars = {"s": 0.3, **PolynomialRule(2).values}
    return kernels(False, 2, "consistent").forward, spec_inputs(3, 4, 11, 11), scalars, full(3, 2), 4


def test_a_kernel_that_fails_is_run_by_the_next_target_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fragile = Patient()
    monkeypatch.setattr(targets, "TARGETS", (fragile, REFERENCE))
    spec, *others = arguments()
    with caplog.at_level(logging.WARNING, "polyattn"):
        for _ in range(3):
            out = targets.run(spec, *others)
    torch.testing.assert_close(out["O"], Evaluation(spec, *others).run()["O"], rtol=0, atol=0)
    assert fragile.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "fragile kernels of the forward do not run on cpu; plain torch runs instead: out of shared memory"
    ]
    assert fragile.unsupported(spec) is None
    assert not fragile.runs(spec)
    assert fragile.runs(replace(spec, name="another"))


def test_what_has_failed_is_forgotten_on_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = Patient()
    monkeypatch.setattr(targets, "TARGETS", (fragile, REFERENCE))
    targets.run(*arguments())
    targets.reset()
    targets.run(*arguments())
    assert fragile.calls == 2


def test_an_error_of_a_target_that_may_not_fail_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TARGETS", (Fragile(), REFERENCE))
    with pytest.raises(RuntimeError, match="out of shared memory"):
        targets.run(*arguments())


@pytest.mark.parametrize(("below", "cpu", "others"), [(4, 128, 64), (512, 128, 512), (800, 200, 512), (4096, 256, 512)])
def test_chunk_lengths(below: int, cpu: int, others: int) -> None:
    assert CPU.chunk_length(below) == cpu
    assert TRITON.chunk_length(below) == REFERENCE.chunk_length(below) == others


def test_heads_at_once_fill_a_tile_or_a_grid() -> None:
    assert CPU.heads_at_once(2, TILE_ELEMENTS // 8) == 4
    assert CPU.heads_at_once(2, 10 * TILE_ELEMENTS) == 1
    assert TRITON.heads_at_once(3, 10 * TILE_ELEMENTS) == MAX_GRID // 3
    assert TRITON.heads_at_once(10 * MAX_GRID, 1) == 1


def test_blocks_are_as_long_as_a_tile_allows() -> None:
    assert block_length(TILE_ELEMENTS // 100, 1) == 100
    assert block_length(TILE_ELEMENTS, 8) == 16
    assert block_length(1, 1) == 2048


def test_fused_kernels_are_those_of_the_device() -> None:
    assert targets.fused_kernel(torch.zeros(1, 1, 2, 8)) is FLASH
    assert targets.fused_kernel(torch.zeros(1, 1, 2, 8, dtype=torch.int64)) is None
    assert targets.fused_kernel(torch.zeros(1, 1, 2, 8, device="meta")) is None
    assert [target.added_masks for target in targets.TARGETS] == [False, True, False]
