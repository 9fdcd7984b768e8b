"""The Triton target against evaluate, under Triton's interpreter or on a GPU; compilation for sm_90 without one.

Triton decides when it is imported whether it interprets. `make test` therefore runs this file a second time with
TRITON_INTERPRET=1; in the first run the tests that need the interpreter (or a GPU) are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import spec_inputs
from rules import kernels

from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.triton.target import TRITON, compile_offline, interpreted
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.families.polynomial.rule import PolynomialRule

triton = pytest.importorskip("triton")

# Rows behind the last token divide by zero; they are never stored.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="no GPU; `make test` runs this with TRITON_INTERPRET=1"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process and compiles nothing")
BLOCKS = (16, 16, 16)
Inputs = dict[str, torch.Tensor]


def inputs(*sizes: int, dtype: torch.dtype = torch.float64) -> Inputs:
    return spec_inputs(*sizes, dtype=dtype, device=DEVICE)


def both(spec: KernelSpec, x: Mapping[str, torch.Tensor], degree: int, block: int) -> tuple[Inputs, Inputs]:
    """What evaluate and the Triton kernels make of a specification."""
    scalars = {"s": 0.3, **PolynomialRule(degree).values}
    return run_both(spec, x, scalars, monomials.full(x["Q"].shape[-1], degree), block)


def run_both(
    spec: KernelSpec, x: Mapping[str, torch.Tensor], scalars: Scalars, basis: monomials.Basis, block: int
) -> tuple[Inputs, Inputs]:
    wanted = Evaluation(spec, x, scalars, basis, block).run()
    return wanted, TRITON.run(spec, x, scalars, basis, block, BLOCKS)


def compare(
    causal: bool, degree: int, gradient: str, x: Inputs, block: int, tolerance: float, weighted: bool = False
) -> None:
    made = kernels(causal, degree, gradient, weighted)
    wanted, got = both(made.forward, x, degree, block)
    x = {**x, "O": wanted["O"], "D": wanted["D"]}
    pairs = [(wanted, got)]
    for names in (("dQ", "dK", "dV"), ("dQ",), ("dK", "dV"), *([("dQ", "dK", "dV", "dB")] if weighted else [])):
        pairs.append(both(made.backward(names), x, degree, block))
    for wanted, got in pairs:
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            assert got[name].shape == value.shape
            assert float((got[name] - value).abs().max()) <= tolerance * (1 + float(value.abs().max())), name


@runs
@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("widths", [(5, 3), (4, 3, 2)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nested_monomials_with_coefficients_of_each_head(causal: bool, widths: tuple[int, ...], gradient: str) -> None:
    x, made = inputs(widths[0], 3, 37, 37, 2, 2), kernels(causal, len(widths), gradient)
    generator = torch.Generator().manual_seed(3)
    c = torch.rand(len(widths) + 1, 2, generator=generator, dtype=torch.float64).to(DEVICE) + 0.1
    scalars = {"s": 0.3, **{f"a{m}": row for m, row in enumerate(c)}}
    basis = monomials.Basis(widths[0], widths)
    wanted, got = run_both(made.forward, x, scalars, basis, 20)
    pairs = [(wanted, got), run_both(made.backward(("dQ", "dK", "dV")), {**x, **wanted}, scalars, basis, 20)]
    for wanted, got in pairs:
        for name, value in wanted.items():
            assert float((got[name] - value).abs().max()) <= 1e-12 * (1 + float(value.abs().max())), name


@runs
@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_equals_evaluate(causal: bool, degree: int, gradient: str) -> None:
    compare(causal, degree, gradient, inputs(5, 3, 37, 37, 2, 2), 20, 1e-12)


@runs
@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_weights_of_the_keys(causal: bool, gradient: str) -> None:
    compare(causal, 2, gradient, inputs(5, 3, 37, 29, 2, 2), 20, 1e-12, weighted=True)


@runs
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_degree_4(causal: bool) -> None:
    compare(causal, 4, "consistent", inputs(3, 4, 19, 19, 1, 1), 16, 1e-12)


@runs
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_heads_wider_than_a_block(causal: bool) -> None:
    compare(causal, 2, "consistent", inputs(18, 33, 21, 21, 1, 1), 16, 1e-12)


@runs
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    causal=st.booleans(),
    d=st.integers(1, 6),
    e=st.integers(1, 17),
    n_q=st.integers(1, 45),
    n_k=st.integers(1, 45),
    groups=st.integers(1, 3),
    block=st.sampled_from([7, 16, 33]),
)
def test_any_shape(causal: bool, d: int, e: int, n_q: int, n_k: int, groups: int, block: int) -> None:
    compare(causal, 2, "consistent", inputs(d, e, n_q, n_k, 1, groups), block, 1e-12)


@runs
def test_float32_accumulates_in_float32() -> None:
    compare(True, 2, "consistent", inputs(5, 3, 37, 37, 1, 1, dtype=torch.float32), 20, 2e-5)


@runs
def test_tiles_do_not_read_beyond_their_tensors() -> None:
    """Rows behind the inputs are NaN: a tile that read one of them would show it."""
    x = inputs(3, 3, 18, 18, 1, 1)
    poisoned = {}
    for name, value in x.items():
        wide = torch.full((value.numel() + 64,), float("nan"), dtype=value.dtype, device=value.device)
        wide[: value.numel()] = value.flatten()
        poisoned[name] = wide[: value.numel()].view(value.shape)
    compare(True, 2, "consistent", poisoned, 16, 1e-12)


def test_says_whether_it_can_run() -> None:
    assert TRITON.available(torch.device("cuda"))
    assert interpreted() == INTERPRETED


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_emitted_files(causal: bool, golden: Callable[..., None]) -> None:
    made = kernels(causal, 2, "consistent")
    mask = "causal" if causal else "full"
    golden(f"triton/forward-{mask}.py.txt", TRITON.emit(made.forward))
    golden(f"triton/backward-{mask}.py.txt", TRITON.emit(made.backward(("dQ", "dK", "dV"))))


def test_emitted_substituted_file(golden: Callable[..., None]) -> None:
    spec = kernels(False, 2, "substituted").backward(("dQ", "dK", "dV"))
    golden("triton/backward-full-substituted.py.txt", TRITON.emit(spec))


SUPPORT = Path(__file__).parents[2] / "support"


def test_the_text_does_not_depend_on_what_was_derived_before() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from rules import kernels\n"
        "from polyattn.codegen.triton.target import TRITON\n"
        "kernels(True, 3, 'substituted'), kernels(False, 1, 'consistent')\n"
        "print(TRITON.emit(kernels(True, 2, 'consistent').forward), end='')"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert other == TRITON.emit(kernels(True, 2, "consistent").forward)


@compiles
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_compiles_for_sm_90_without_a_gpu(causal: bool) -> None:
    for made in compile_offline(kernels(causal, 2, "consistent").forward, 16, 16).values():
        assert made.asm["cubin"]


@compiles
@pytest.mark.long
@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [32, 64, 128])
def test_every_kernel_compiles_for_sm_90(causal: bool, gradient: str, d: int) -> None:
    made = kernels(causal, 2, gradient)
    for spec in (made.forward, made.backward(("dQ", "dK", "dV"))):
        for kernel in compile_offline(spec, d, d).values():
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= 227 * 1024
