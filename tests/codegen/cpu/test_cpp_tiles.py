"""Programs in tiles as C++: against the specification, special numbers, what runs without a compiler, the cache."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiled import Case

from polyattn.codegen import tables
from polyattn.codegen.cpu import tiled
from polyattn.codegen.cpu.cpp import library
from polyattn.codegen.cpu.cpp.runtime import HEADER
from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.phases import Choose
from polyattn.codegen.reference import REFERENCE
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.target import PLAIN, Target
from polyattn.errors import EmitError
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.kernels import Kernels, kernels
from polyattn.rewriter.algebra.monomials import full
from polyattn.rewriter.families.clustered.rule import ClusteredRule
from polyattn.rewriter.masks.mask import NEAR_TILES

Tensors = dict[str, torch.Tensor]
GRADIENTS = ("dQ", "dK", "dV")
TINY = (
    f'#include "{HEADER}"\n'
    + """
extern "C" void powers(void* const* tensor, const Size* size, const double* number) {
  float* const x = static_cast<float*>(tensor[0]);
  for (Size at = 0; at < size[0]; at += W) store(x + at, exp2(load(x + at) * float(number[0])));
}
"""
)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        library.load(TINY)
    except EmitError as error:
        pytest.skip(str(error))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def made(order: int, weighted: bool) -> Kernels:
    return kernels(softmax(NEAR_TILES, weighted), ClusteredRule(order), "consistent")


def operands(case: Case, weighted: bool, dtype: torch.dtype) -> Tensors:
    (h, a, t_q), (_, b, t_k) = case.q.shape[:3], case.k.shape[:3]
    generator = torch.Generator().manual_seed(2)
    x = {"Q": case.q, "K": case.k, "V": case.v, "FLOOR": torch.full((h, a), 1e-30)}
    x |= {"W_Q": torch.full((h, a, t_q), 1 / t_q), "W_K": torch.full((h, b, t_k), 1 / t_k)}
    if weighted:
        x["LOG_B"] = torch.randn(h, b, t_k, generator=generator)
    x["G"] = torch.randn(h, a, t_q, case.v.shape[-1], generator=generator)
    return {name: value.to(dtype) for name, value in x.items()}


def choice(case: Case, shift: torch.Tensor, dtype: torch.dtype) -> Choose:
    def choose(head: int, tiles: slice, values: Mapping[str, torch.Tensor]) -> Tensors:
        near, rows = case.near[head, tiles], shift[head, tiles].to(dtype)
        return {"M_near": near, "M_far": ~near, "SHIFT": rows, "TOP": case.lse[head, tiles, 0].to(dtype)}

    return choose


def run(
    target: Target | None,
    case: Case,
    x: Tensors,
    order: int,
    block: int = 4,
    shift: torch.Tensor | None = None,
    outputs: Tensors | None = None,
) -> Tensors:
    """Output, denominators and gradients; without a target by torch code.

    Args:
        outputs: what the gradients read, if it is not what was computed here.
    """
    specs, dtype = made(order, "LOG_B" in x), x["Q"].dtype
    choose = choice(case, case.lse, dtype), choice(case, case.lse if shift is None else shift, dtype)

    def one(spec: KernelSpec, inputs: Tensors, choose: Choose) -> Tensors:
        given = {name: value for name, value in inputs.items() if name in (*spec.inputs, "Q", "K", "V")}
        if target is not None:
            return target.run(spec, given, {"s": case.scale}, full(x["Q"].shape[-1], 0), block, choose)
        text = tiled.torch_text(spec)
        got: Tensors = tables.module(f"cpu_{spec.name}", text).run(given, {"s": case.scale}, block, choose)
        return got

    out = one(specs.forward, x, choose[0])
    read = out if outputs is None else {name: value.to(dtype) for name, value in outputs.items() if name in ("O", "D")}
    return {**out, **one(specs.backward(GRADIENTS), {**x, **read}, choose[1])}


def agree(found: Tensors, wanted: Tensors, torch_code: Tensors | None = None) -> None:
    """What was found is what was wanted, or at least errs no more than twice as much as torch code.

    With one key, dQ and dK are zero up to rounding, of which neither is right.
    """
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.abs().max().clamp_min(1e-1))
        error = float((found[name] - value).abs().max()) / scale
        allowed = 0.0 if torch_code is None else 2 * float((torch_code[name] - value).abs().max()) / scale
        assert error <= max(2e-5, allowed), (name, error, allowed)


@settings(max_examples=40, deadline=None)
@given(
    order=st.sampled_from([0, 1, 2]),
    weighted=st.booleans(),
    sizes=st.tuples(*[st.integers(1, high) for high in (2, 6, 70, 6, 70, 35, 35)]),
    block=st.integers(1, 6),
    count=st.sampled_from([1, 2]),
)
def test_any_size(order: int, weighted: bool, sizes: tuple[int, ...], block: int, count: int) -> None:
    """A tile without near pairs, one without far pairs, and any other mask; sizes that no vector has."""
    case = Case.of(*sizes)
    x = operands(case, weighted, torch.float32)
    with threads(count):
        found = run(CPU, case, x, order, block)
    wanted = run(REFERENCE, case, operands(case, weighted, torch.float64), order, block)
    agree(found, wanted, run(None, case, x, order, block))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_pair_and_every_pair_near(share: float) -> None:
    case = Case.of(1, 5, 64, 7, 48, 32, 16)
    case.near[:] = share == 1
    found = run(CPU, case, operands(case, False, torch.float32), 1)
    agree(found, run(REFERENCE, case, operands(case, False, torch.float64), 1))


def test_rows_with_an_infinite_shift_take_no_part_in_gradients() -> None:
    case = Case.of(2, 4, 20, 5, 24, 16, 16)
    shift = case.lse.clone()
    shift[:, 1:, 3] = torch.inf
    outputs = run(REFERENCE, case, operands(case, True, torch.float64), 1)
    wanted = run(REFERENCE, case, operands(case, True, torch.float64), 1, shift=shift)
    found = run(CPU, case, operands(case, True, torch.float32), 1, shift=shift, outputs=outputs)
    agree({name: found[name] for name in GRADIENTS}, {name: wanted[name] for name in GRADIENTS})
    assert all(bool(torch.isfinite(found[name]).all()) for name in GRADIENTS)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("operand", ["Q", "K", "V"])
def test_numbers_that_are_not_finite_reach_what_they_reach_in_torch(operand: str, number: float) -> None:
    """In forward and gradients: nothing is lost in padding, nothing spreads through it."""
    case = Case.of(1, 4, 20, 5, 24, 17, 17)
    case.near[:] = torch.rand(case.near.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    x = operands(case, False, torch.float32)
    x[operand][0, 2, 7, 3] = number
    found, wanted = run(CPU, case, x, 1), run(None, case, x, 1)
    for name, value in wanted.items():
        assert torch.equal(torch.isnan(found[name]), torch.isnan(value)), name
        assert torch.equal(torch.isinf(found[name]), torch.isinf(value)), name


def test_sums_of_threads_are_the_same_in_every_run() -> None:
    case = Case.of(1, 9, 33, 8, 40, 32, 32)
    x = operands(case, False, torch.float32)
    with threads(2):
        first, second = run(CPU, case, x, 1), run(CPU, case, x, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_dtypes_run_as_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.of(1, 3, 4, 3, 5, 4, 3)
    monkeypatch.setattr(tiled, "library", lambda text: pytest.fail("C++ is for float32"))
    found = run(CPU, case, operands(case, False, torch.float64), 1)
    assert found["O"].dtype == torch.float64


# -- without a compiler ------------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (library.load, tiled.library)
    monkeypatch.setattr(tiled, "_failures", set[str]())
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_without_a_compiler_torch_code_runs_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> str:
        raise EmitError("there is no C++ compiler: none on this machine")

    monkeypatch.setattr(library, "_compiler", none)
    case = Case.of(1, 3, 4, 3, 5, 4, 3)
    x = operands(case, False, torch.float32)
    with caplog.at_level(logging.WARNING, "polyattn"):
        found = run(CPU, case, x, 1)
    wanted = run(None, case, x, 1)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [r.message for r in caplog.records] == [
        "clustered attention runs as torch code on this CPU, which takes longer than C++: "
        "there is no C++ compiler: none on this machine"
    ]
    assert CPU.tile_costs(False, torch.float32) == PLAIN  # and it is known that tiles cost more


def test_costs_are_those_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "_failures", set[str]())
    monkeypatch.setattr(tiled, "_compiler", lambda: True)
    assert CPU.tile_costs(False, torch.float32).near < 1
    assert CPU.tile_costs(True, torch.float32) != CPU.tile_costs(False, torch.float32)
    assert CPU.tile_costs(False, torch.float64) == PLAIN
    monkeypatch.setattr(tiled, "_compiler", lambda: False)
    assert CPU.tile_costs(False, torch.float32) == PLAIN


@pytest.mark.usefixtures("forgetful")
def test_what_a_compiler_refuses_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EmitError, match=r"does not compile the C\+\+ of tiles: .*error"):
        library.load("not C++")
    assert list((tmp_path / "polyattn").iterdir()) == []


# -- the cache ---------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform == "darwin", reason="the folder is another one")


@linux
@pytest.mark.usefixtures("forgetful")
def test_a_library_is_compiled_once_and_nothing_else_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load(TINY)
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert path.parent == tmp_path / "polyattn"
    before = path.stat().st_mtime_ns
    program = f"from polyattn.codegen.cpu.cpp import library\nlibrary.load({TINY!r})"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=env) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.stat().st_mtime_ns == before


@linux
@pytest.mark.usefixtures("forgetful")
def test_processes_that_compile_the_same_leave_one_library(tmp_path: Path) -> None:
    program = f"from polyattn.codegen.cpu.cpp import library\nlibrary.load({TINY!r})"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=env) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "polyattn").iterdir())) == 1


@linux
@pytest.mark.usefixtures("forgetful")
def test_other_flags_and_other_cpus_are_other_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {library._compiled(TINY, library._compiler())}
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DOTHER"))
    paths.add(library._compiled(TINY, library._compiler()))
    monkeypatch.setattr(library, "_cpu", lambda: "another CPU")
    paths.add(library._compiled(TINY, library._compiler()))
    assert len(paths) == 3


@linux
@pytest.mark.usefixtures("forgetful")
def test_a_folder_that_cannot_be_written_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EmitError, match="cannot be kept or loaded"):
        library.load(TINY)


# -- the C++ that emitted files include --------------------------------------------------------------------------------

architectures = pytest.mark.parametrize(
    "architecture",
    ["native", *(["x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else [])],
)


@linux
@architectures
@pytest.mark.usefixtures("forgetful")
def test_powers_of_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, f"-march={architecture}"))
    inf = float("inf")
    special = torch.tensor([inf, -inf, float("nan"), 0.0, -0.0, 127.9, 128.0, -126.0, -149.0, -151.0, 1e30, -1e30])
    x = torch.cat([torch.linspace(-130, 130, 100001), special, torch.zeros(15)])
    x = x[: len(x) // 16 * 16].clone()
    wanted = torch.exp2(x.double())
    library.load(TINY)("powers", (x,), (len(x),), (1.0,))
    single = wanted.float()
    assert torch.equal(torch.isnan(x), torch.isnan(single))
    assert torch.equal(torch.isinf(x), torch.isinf(single))
    normal = torch.isfinite(single) & (single > 1.2e-38)
    assert float(((x - wanted).abs() / wanted)[normal].max()) < 3e-7
    small = torch.isfinite(single) & ~normal
    assert float((x - wanted)[small].abs().max()) < 3e-45


@pytest.mark.long
@linux
@architectures
@pytest.mark.usefixtures("forgetful")
def test_every_width_of_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, f"-march={architecture}"))
    case = Case.of(1, 5, 70, 4, 37, 20, 33)
    found = run(CPU, case, operands(case, True, torch.float32), 1)
    agree(found, run(REFERENCE, case, operands(case, True, torch.float64), 1))


def test_memory_that_is_not_in_one_piece_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not lie in one piece"):
        library.load(TINY)("powers", (torch.zeros(4, 32).mT,), (128,), (1.0,))


@pytest.mark.golden
def test_the_cpp_is_part_of_the_emitted_file(golden: Callable[..., None]) -> None:
    source = tables.module("cpu_tiles", CPU.emit(made(0, True).forward)).SOURCE
    golden("cpu/clustered_forward_order_0.cpp", source.strip("\n"))
