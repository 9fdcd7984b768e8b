"""The CPU target against evaluate: every specification, any shape; its text; what it allocates."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import spec_inputs
from rules import kernels
from torch.utils._python_dispatch import TorchDispatchMode

from polyattn.codegen import tables
from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.schedule import schedule
from polyattn.codegen.spec import KernelSpec
from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.expr import HEAD, KEY
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.planning.plan import node

Inputs = dict[str, torch.Tensor]
ALL = ("dQ", "dK", "dV")
PARTS = (ALL, ("dQ",), ("dK",), ("dV",), ("dK", "dV"), ("dQ", "dV"))
masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
gradients = pytest.mark.parametrize("gradient", ["consistent", "substituted"])


def both(spec: KernelSpec, x: Mapping[str, torch.Tensor], degree: int, block: int) -> tuple[Inputs, Inputs]:
    """What evaluate and the emitted file make of a specification."""
    scalars = {"s": 0.3, **PolynomialRule(degree).values}
    basis = monomials.full(x["Q"].shape[-1], degree)
    return Evaluation(spec, x, scalars, basis, block).run(), CPU.run(spec, x, scalars, basis, block)


def agree(wanted: Inputs, got: Inputs, tolerance: float = 1e-11) -> None:
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == value.dtype, name
        if value.numel():
            scale = float(value.abs().max().clamp_min(1e-3))  # with one key, dQ and dK are zero up to rounding
            error = float((got[name] - value).abs().max())
            assert error <= tolerance * scale, (name, error / scale)


def compare(
    causal: bool,
    degree: int,
    gradient: str,
    x: Inputs,
    block: int,
    parts: tuple[tuple[str, ...], ...] = (ALL,),
    tolerance: float = 1e-11,
    weighted: bool = False,
) -> None:
    made = kernels(causal, degree, gradient, weighted)
    wanted, got = both(made.forward, x, degree, block)
    agree(wanted, got, tolerance)
    x = {**x, "O": wanted["O"], "D": wanted["D"]}
    for names in parts:
        agree(*both(made.backward(names), x, degree, block), tolerance)


@gradients
@masks
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize(("d", "e"), [(3, 16), (16, 3), (5, 5)])
def test_equals_evaluate(causal: bool, degree: int, gradient: str, d: int, e: int) -> None:
    n = 23 if degree < 4 else 11
    compare(causal, degree, gradient, spec_inputs(d, e, n, n), 7)


@gradients
@masks
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_some_of_the_gradients(causal: bool, degree: int, gradient: str) -> None:
    compare(causal, degree, gradient, spec_inputs(4, 3, 21, 21), 8, PARTS)


@gradients
@masks
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_weights_of_the_keys(causal: bool, degree: int, gradient: str) -> None:
    parts = ((*ALL, "dB"), ("dB",), ("dQ", "dK"), ("dK", "dB"))
    compare(causal, degree, gradient, spec_inputs(4, 3, 25, 22, heads=2, groups=2), 8, parts, weighted=True)


@gradients
@masks
@pytest.mark.parametrize(("n_q", "n_k"), [(29, 13), (13, 29), (1, 17), (17, 1)])
def test_grouped_queries_and_other_numbers_of_keys(causal: bool, gradient: str, n_q: int, n_k: int) -> None:
    compare(causal, 2, gradient, spec_inputs(4, 3, n_q, n_k, heads=2, groups=3), 8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    causal=st.booleans(),
    gradient=st.sampled_from(["consistent", "substituted"]),
    degree=st.integers(1, 3),
    d=st.integers(1, 6),
    e=st.integers(1, 7),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    block=st.integers(1, 50),
    parts=st.sampled_from(PARTS),
)
def test_any_shape(
    causal: bool,
    gradient: str,
    degree: int,
    d: int,
    e: int,
    n_q: int,
    n_k: int,
    heads: int,
    groups: int,
    block: int,
    parts: tuple[str, ...],
) -> None:
    compare(causal, degree, gradient, spec_inputs(d, e, n_q, n_k, heads, groups), block, (parts,))


@masks
def test_float32_stays_float32(causal: bool) -> None:
    compare(causal, 2, "consistent", spec_inputs(6, 5, 40, 40, dtype=torch.float32), 16, tolerance=2e-5)


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """torch fills what it does not initialize with NaN while its algorithms must be deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@gradients
@masks
@pytest.mark.parametrize(("n_q", "n_k"), [(19, 19), (19, 9), (9, 19)])
def test_reads_no_memory_that_it_has_not_written(causal: bool, gradient: str, n_q: int, n_k: int) -> None:
    with uninitialized_memory_is_nan():
        assert bool(torch.empty(3).isnan().all())
        compare(causal, 2, gradient, spec_inputs(3, 4, n_q, n_k, groups=2), 8)


def test_inputs_that_are_views_and_require_gradients() -> None:
    x = spec_inputs(4, 3, 21, 21, heads=2, groups=2)
    wide = {name: torch.stack([value, value], -1)[..., 0].requires_grad_() for name, value in x.items()}
    scalars = {"s": 0.3, **PolynomialRule(2).values}
    spec = kernels(True, 2, "consistent").forward
    made = CPU.run(spec, wide, scalars, monomials.full(4, 2), 8)
    assert not made["O"].requires_grad
    agree(Evaluation(spec, x, scalars, monomials.full(4, 2), 8).run(), made)


def test_a_future_key_whose_score_overflows_is_not_seen() -> None:
    x = spec_inputs(3, 3, 12, 12)
    x["K"][:, -1] = 1e4
    x["Q"][:, :, :-1] = x["Q"][:, :, :-1].abs() + 1
    scalars = {"s": 1.0, **PolynomialRule(2).values}
    out = CPU.run(kernels(True, 2, "consistent").forward, x, scalars, monomials.full(3, 2), 12)["O"]
    assert bool(out[:, :, :-1].isfinite().all())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@gradients
@masks
@pytest.mark.parametrize("degree", [2, 4])
def test_no_tensor_grows_with_the_square_of_tokens_or_with_tokens_and_rank(
    causal: bool, degree: int, gradient: str
) -> None:
    n, d, block = 512, 3, 8
    x = spec_inputs(d, d, n, n, heads=1)
    scalars = {"s": 0.3, **PolynomialRule(degree).values}
    made = kernels(causal, degree, gradient)
    limit = max(n * (d + 1), monomials.rank(monomials.full(d, degree)) * max(block, d + 1) * (d + 1))
    assert limit < n * monomials.rank(monomials.full(d, degree))
    with Largest() as seen:
        out = CPU.run(made.forward, x, scalars, monomials.full(d, degree), block)
        CPU.run(made.backward(ALL), {**x, **out}, scalars, monomials.full(d, degree), block)
    assert n <= seen.elements <= limit


def test_a_state_is_kept_once_for_sums_that_differ_in_weights() -> None:
    text = CPU.emit(kernels(True, 2, "consistent").backward(ALL))
    assert text.count("new_zeros") == 2


def test_low_degrees_are_a_prefix_of_the_high_ones() -> None:
    text = CPU.emit(kernels(False, 3, "consistent").backward(("dK", "dV")))
    assert "phi_k_2 = phi_k[:, :r_1]" in text


@gradients
@masks
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_the_text_is_a_file_of_its_own(causal: bool, degree: int, gradient: str) -> None:
    made = kernels(causal, degree, gradient)
    for spec in (made.forward, made.backward(ALL)):
        text = CPU.emit(spec)
        module: dict[str, Any] = {}
        exec(compile(text, "emitted", "exec"), module)
        assert callable(module["run"])
        assert str(spec.cost()) in " ".join(module["__doc__"].split())
        assert degree == 1 or "einsum" not in text
        assert "polyattn" not in text


@gradients
@masks
@pytest.mark.parametrize("widths", [(5, 3), (5, 5, 2), (5, 4, 3), (4, 4, 2, 1), (5, 0), (3, 2, 0)])
def test_nested_monomials_with_coefficients_of_each_head(widths: tuple[int, ...], causal: bool, gradient: str) -> None:
    """Against autograd through Σ_m c_m (q·k over the last w_m coordinates)^m, written densely."""
    d, degree, s = widths[0], len(widths), 0.3
    x = spec_inputs(d, 3, 23, 23, heads=2, groups=2)
    basis = monomials.Basis(d, widths)
    generator = torch.Generator().manual_seed(3)
    c = torch.rand(degree + 1, 2, generator=generator, dtype=torch.float64) + 0.1
    scalars = {"s": s, **{f"a{m}": c[m] for m in range(degree + 1)}}
    made = kernels(causal, degree, gradient)
    leaves = {name: x[name].clone().requires_grad_() for name in "QKV"}
    scores = s * leaves["Q"] @ leaves["K"][:, None].mT
    near = torch.full_like(scores, False, dtype=torch.bool)
    if causal:
        i = torch.arange(23)
        near = (i[:, None] // 8 == i // 8) & (i <= i[:, None])
    a = torch.zeros_like(scores) + c[0][:, None, None, None]
    for m, width in enumerate(widths, 1):
        part = s * leaves["Q"][..., d - width :] @ leaves["K"][:, None, :, d - width :].mT
        a = a + c[m][:, None, None, None] * part**m
    if gradient == "substituted":
        a = a.detach() * (1 + scores - scores.detach())
    a = torch.where(near, scores.exp(), a)
    if causal:
        a = a * (i <= i[:, None])
    out = a / a.sum(-1, keepdim=True) @ leaves["V"][:, None]
    wanted = dict(zip("QKV", torch.autograd.grad(out, list(leaves.values()), x["G"]), strict=True))
    for run in (lambda *args: Evaluation(*args).run(), CPU.run):
        found = run(made.forward, x, scalars, basis, 8)
        torch.testing.assert_close(found["O"], out, rtol=0, atol=1e-9 * float(out.detach().abs().max().clamp_min(1)))
        got = run(made.backward(ALL), {**x, **found}, scalars, basis, 8)
        for name, value in wanted.items():
            limit = 1e-9 * float(value.abs().max().clamp_min(1))
            torch.testing.assert_close(got["d" + name], value, rtol=0, atol=limit)


def test_coefficients_of_each_head_are_weights_of_monomials_only() -> None:
    with pytest.raises(ScheduleError, match="differs from head to head"):
        tables.number(sympy.Symbol("a1", positive=True), {"a1": torch.ones(2)})


def test_tracebacks_show_the_emitted_lines() -> None:
    x = spec_inputs(3, 3, 9, 9)
    x["V"] = x["V"][:, :5]
    with pytest.raises(RuntimeError) as caught:
        CPU.run(
            kernels(False, 2, "consistent").forward, x, {"s": 1.0, **PolynomialRule(2).values}, monomials.full(3, 2), 4
        )
    assert "v_hat[:, :, :-1] = v" in "".join(traceback.format_exception(caught.value))


def test_a_gather_without_features_is_refused() -> None:
    found = kernels(False, 2, "consistent").plan.outputs["dK"]
    (gather,) = [a for a in found.args if a.op == "gather"]
    doubled = node("sum", (gather,), gather.axes, ((2,), ((0, 1, 2),)))
    total = node("contract", (doubled,), (KEY, HEAD), (((0, 1, 2),), (0, 2)))
    with pytest.raises(ScheduleError, match="gathers only to multiply with weighted features"):
        CPU.emit(schedule("odd", {"dK": total}))


@masks
def test_emitted_files(causal: bool, golden: Callable[..., None]) -> None:
    made, mask = kernels(causal, 2, "consistent"), "causal" if causal else "full"
    golden(f"cpu/forward-{mask}.py.txt", CPU.emit(made.forward))
    golden(f"cpu/backward-{mask}.py.txt", CPU.emit(made.backward(ALL)))


def test_emitted_substituted_file(golden: Callable[..., None]) -> None:
    spec = kernels(False, 2, "substituted").backward(ALL)
    golden("cpu/backward-full-substituted.py.txt", CPU.emit(spec))


SUPPORT = Path(__file__).parents[2] / "support"


def test_the_text_does_not_depend_on_what_was_derived_before() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from rules import kernels\n"
        "from polyattn.codegen.cpu.target import CPU\n"
        "kernels(True, 3, 'substituted'), kernels(False, 1, 'consistent').backward(('dV',))\n"
        "for causal in (True, False):\n"
        "    for gradient in ('substituted', 'consistent'):\n"
        "        print(CPU.emit(kernels(causal, 2, gradient).backward(('dQ', 'dK', 'dV'))), end='')\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    here = [
        CPU.emit(kernels(causal, 2, gradient).backward(ALL))
        for causal in (True, False)
        for gradient in ("substituted", "consistent")
    ]
    assert other == "".join(here)
