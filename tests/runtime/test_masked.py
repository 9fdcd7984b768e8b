"""``polyattn::masked_attention``: an added mask in training, rows that it hides included."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import polyattn.runtime.masked  # noqa: F401  (registers the operator)
from polyattn import errors
from polyattn.runtime import ops

B, H, N, M, D, E = 2, 4, 37, 53, 8, 6
INF = float("inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Tensors = tuple[torch.Tensor, ...]


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def operands(dtype: torch.dtype, kv: int = H, n: int = N, m: int = M, e: int = E) -> tuple[list[torch.Tensor], Tensors]:
    """q, k, v that require gradients, and what arrives at the output."""
    q, k, v = rand(B, H, n, D, dtype=dtype), rand(B, kv, m, D, seed=1, dtype=dtype), rand(B, kv, m, e, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v)], (rand(B, H, n, e, seed=2, dtype=dtype),)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.softmax(q @ k.mT * scale + mask, -1).to(q.dtype) @ v


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    out: torch.Tensor = torch.ops.polyattn.masked_attention(q, k, v, mask, None, 0.0, scale, ops.VERSION)[0]
    return out


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def run(attend: Attend, inputs: list[torch.Tensor], mask: torch.Tensor, g: torch.Tensor) -> Tensors:
    """Output and gradients."""
    out = attend(*inputs, mask, 1 / math.sqrt(D))  # type: ignore[call-arg]
    return (out.detach(), *torch.autograd.grad(out, inputs, g))


def _hidden(fill: float, *size: int) -> torch.Tensor:
    """Noise, with every third row hidden and holes in the others."""
    mask = rand(*size)
    mask[..., 1::4] = fill
    mask[..., ::3, :] = fill
    return mask


def _padding(fill: float) -> torch.Tensor:
    mask = torch.zeros(B, 1, 1, M, dtype=torch.float64)
    mask[0, ..., :20] = fill
    return mask


def _batch(fill: float) -> torch.Tensor:
    mask = _padding(0.0)
    mask[1] = fill
    return mask


def _causal_and_padding(dtype: torch.dtype) -> torch.Tensor:
    """Two masks added to one another, with padding on the left: rows of finfo.min and of -inf."""
    least = torch.finfo(dtype).min
    causal = torch.full((N, M), least, dtype=dtype).triu(1)
    return causal + _padding(least).to(dtype)


MASKS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "key padding": lambda dtype: _padding(torch.finfo(dtype).min),
    "key padding, -inf": lambda dtype: _padding(-INF),
    "one row for all": lambda dtype: rand(1, M),
    "one number for each query": lambda dtype: rand(B, 1, N, 1),
    "one number": lambda dtype: rand(1, 1),
    "all keys hidden, smallest number": lambda dtype: _batch(torch.finfo(dtype).min),
    "all keys hidden, -inf": lambda dtype: _batch(-INF),
    "rows hidden, smallest number": lambda dtype: _hidden(torch.finfo(dtype).min, B, 1, N, M),
    "rows hidden, -1e9": lambda dtype: _hidden(-1e9 if dtype != torch.float16 else -6e4, N, M),
    "rows hidden, -inf": lambda dtype: _hidden(-INF, B, 1, N, M),
    "rows hidden, -1e4": lambda dtype: _hidden(-1e4, N, M),
    "rows lowered, -100": lambda dtype: _hidden(-100.0, N, M),
    "rows hidden for some heads": lambda dtype: torch.cat(
        [rand(1, 1, N, M), _hidden(torch.finfo(dtype).min, 1, 2, N, M), rand(1, 1, N, M)], 1
    ),
    "causal and padding": _causal_and_padding,
    "alibi": lambda dtype: torch.tensor([10.0, 5.0, 2.5, 1.25])[:, None, None] * torch.arange(M),
    "at the border of what the kernel does by itself": lambda dtype: _hidden(-63.0, B, 1, N, M).clamp(-63, -61),
    "far up": lambda dtype: _hidden(-1e4, N, M) + 3e4,
    "inf": lambda dtype: _hidden(INF, 1, N, M),
    "strided": lambda dtype: rand(B, 1, 1, 2 * M, dtype=dtype)[..., ::2],
    "transposed": lambda dtype: _hidden(-1e4, 1, H, N, M).to(dtype).mT.contiguous().mT,
    "repeated": lambda dtype: _padding(-1e4).to(dtype).expand(B, H, N, M),
}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root of the mean square of the difference, where there are numbers."""
    difference = (found.double() - wanted).nan_to_num(0.0, 0.0, 0.0)
    return float(difference.square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_as_eager_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    inputs, (g,) = operands(dtype)
    mask = MASKS[name](dtype).to(dtype)
    found, wanted = run(fused, inputs, mask, g), run(eager, inputs, mask, g)
    exact = run(eager, [x.detach().double().requires_grad_() for x in inputs], mask.double(), g.double())
    for what, x, y, z in zip(("out", "dq", "dk", "dv"), found, wanted, exact, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), what
        if dtype == torch.float64:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, what=what: what + m)
        else:
            assert error(x, z) <= 2 * error(y, z), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", ["finfo.min", "-1e9", "-inf"])
def test_hidden_rows_are_what_eager_makes_of_them(fill: str, dtype: torch.dtype) -> None:
    """To the last bits, although in float64 a row of -1e9 would be another one."""
    value = torch.finfo(dtype).min if fill == "finfo.min" else float(fill)
    inputs, (g,) = operands(dtype)
    mask = _hidden(value, 1, 1, N, M).to(dtype)
    g = torch.where(mask.amax(-1, keepdim=True) < -1e3, g, 0)
    found, wanted = run(fused, inputs, mask, g), run(eager, inputs, mask, g)
    eps = torch.finfo(dtype).eps
    for x, y in zip((found[0][:, :, ::3], *found[1:]), (wanted[0][:, :, ::3], *wanted[1:]), strict=True):
        torch.testing.assert_close(x, y, rtol=4 * eps, atol=4 * eps, equal_nan=True)


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_another_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """Its smallest number is finite, and no -inf of the dtype of q, where rows of it would be NaN."""
    inputs, (g,) = operands(dtype)
    fill = torch.finfo(mask_dtype).min if mask_dtype.is_floating_point else -50_000
    mask = _hidden(0.0, N, M).to(mask_dtype)
    mask[::3] = fill
    mask[:, ::5] = fill

    def promoted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        scores = q @ k.mT * scale
        return torch.softmax(scores + mask, -1).to(q.dtype) @ v

    found, wanted = run(fused, inputs, mask, g), run(promoted, inputs, mask, g)
    exact = run(eager, [x.detach().double().requires_grad_() for x in inputs], mask.double(), g.double())
    for x, y, z in zip(found, wanted, exact, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert not x.isnan().any()
        assert error(x, z) <= max(2 * error(y, z), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [-INF, -1e4, -1e9])
@pytest.mark.parametrize("added", ["rand", "-1e4", "finfo.min", "-inf"])
def test_scores_that_are_replaced_after_something_was_added(added: str, fill: float, dtype: torch.dtype) -> None:
    """Where nothing is kept, no gradient reaches the replaced scores; what is kept may be smaller than the fill."""
    inputs, (g,) = operands(dtype)
    low = {"rand": 0.5, "-1e4": -1e4, "finfo.min": torch.finfo(dtype).min, "-inf": -INF}[added]
    mask, kept = _hidden(low, B, 1, N, M).to(dtype), rand(1, H, N, M) < 1
    kept[:, :, 1::5] = False
    kept[..., 1::4] = True

    def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.softmax(torch.where(kept, q @ k.mT * scale + mask, fill), -1) @ v

    def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        made = torch.ops.polyattn.masked_attention(q, k, v, mask, kept, fill, scale, ops.VERSION)
        return made[0]  # type: ignore[no-any-return]

    found, wanted = run(replaced, inputs, mask, g), run(written, inputs, mask, g)
    exact = run(written, [x.detach().double().requires_grad_() for x in inputs], mask.double(), g.double())
    for x, y, z in zip(found, wanted, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert torch.equal(x.isnan(), y.isnan())
        assert error(x, z) <= max(2 * error(y, z), 1e-9)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("name", ["causal and padding", "rows hidden for some heads", "all keys hidden, -inf"])
def test_grouped_heads(name: str, kv: int) -> None:
    inputs, (g,) = operands(torch.float64, kv=kv)
    mask = MASKS[name](torch.float64)
    for x, y in zip(run(fused, inputs, mask, g), run(eager, inputs, mask, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_more_hidden_rows_than_are_computed_at_once() -> None:
    inputs, (g,) = operands(torch.float64, n=301, m=19)
    mask = _hidden(-1e9, B, 1, 301, 19)
    mask[:, :, 100:] = -1e9
    for x, y in zip(run(fused, inputs, mask, g), run(eager, inputs, mask, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_operands_whose_last_axis_is_not_contiguous(which: int) -> None:
    inputs, (g,) = operands(torch.float64)
    plain = [*inputs, g]
    strided = [x.detach().mT.contiguous().mT if at == which else x.detach() for at, x in enumerate(plain)]
    mask = MASKS["causal and padding"](torch.float64)
    found = run(fused, [x.requires_grad_() for x in strided[:3]], mask, strided[3])
    for x, y in zip(found, run(eager, inputs, mask, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_some_operands_need_a_gradient(needing: tuple[int, ...]) -> None:
    inputs, (g,) = operands(torch.float64)
    some = [x.detach().requires_grad_(at in needing) for at, x in enumerate(inputs)]
    mask = _hidden(-1e4, N, M)
    made = torch.autograd.grad(fused(*some, mask, 0.3), [some[at] for at in needing], g)  # type: ignore[call-arg]
    wanted = torch.autograd.grad(eager(*inputs, mask, 0.3), inputs, g)  # type: ignore[call-arg]
    for at, x in zip(needing, made, strict=True):
        torch.testing.assert_close(x, wanted[at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 3), (1, 2, 0, 5, 3), (1, 2, 5, 0, 3), (1, 2, 5, 5, 0)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    b, h, n, m, e = shape
    inputs = [rand(b, h, size, f).requires_grad_() for size, f in ((n, 4), (m, 4), (m, e))]
    mask, g = rand(b, 1, n, m), rand(b, h, n, e)
    for x, y in zip(run(fused, inputs, mask, g), run(eager, inputs, mask, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_activation_checkpointing(reentrant: bool) -> None:
    inputs, (g,) = operands(torch.float64)
    mask = MASKS["causal and padding"](torch.float64)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return fused(tensors[0].sin(), tensors[1], tensors[2], mask, 0.3)

    wanted = torch.autograd.grad(attend(*inputs), inputs, g)
    again = checkpoint(attend, *inputs, use_reentrant=reentrant)
    leaves = [x.grad for x in inputs]
    assert leaves == [None] * 3
    again.backward(g)
    for x, y in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(x.grad, y, equal_nan=True, rtol=0, atol=0)


def test_the_backward_may_run_where_saved_tensors_are_hooked_and_autocast_is_on() -> None:
    inputs, (g,) = operands(torch.float32)
    mask = _hidden(torch.finfo(torch.float32).min, N, M).float()
    wanted = run(fused, inputs, mask, g)
    with torch.autograd.graph.save_on_cpu(), torch.autocast("cpu", torch.bfloat16):
        found = run(fused, inputs, mask, g)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


def test_the_operators_are_registered_as_torch_asks() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        inputs, (g,) = operands(dtype)
        mask, kept = _hidden(-1e9, B, 1, N, M).to(dtype), rand(N, M) < 1
        torch.library.opcheck(
            torch.ops.polyattn.masked_attention.default, (*inputs, mask, kept, -1e4, 0.3, ops.VERSION)
        )
        plain = [x.detach() for x in inputs]
        out, lse = torch.ops.polyattn.masked_attention(*plain, mask, kept, -1e4, 0.3, ops.VERSION)
        arguments = (g, *plain, mask, kept, out, lse, -1e4, 0.3, ops.VERSION, [True, False, True])
        torch.library.opcheck(torch.ops.polyattn.masked_attention_backward.default, arguments)


def test_double_backward_is_a_named_error() -> None:
    inputs, _ = operands(torch.float64)
    (dq,) = torch.autograd.grad(fused(*inputs, rand(N, M), 0.3).sum(), inputs[:1], create_graph=True)  # type: ignore[call-arg]
    with pytest.raises(errors.DoubleBackwardError):
        dq.sum().backward()


def test_a_mask_that_needs_a_gradient_is_a_named_error() -> None:
    inputs, _ = operands(torch.float64)
    with pytest.raises(errors.PolyattnError, match="no gradient of the mask"):
        fused(*inputs, rand(N, M).requires_grad_(), 0.3)  # type: ignore[call-arg]


@pytest.mark.parametrize("size", [(N, M + 1), (3, 1, N, M), (2, 1, 1, N, M)], ids=str)
def test_a_mask_that_does_not_fit_is_a_named_error(size: tuple[int, ...]) -> None:
    inputs, _ = operands(torch.float64)
    with pytest.raises(errors.ShapeError, match="mask"):
        fused(*inputs, rand(*size), 0.3)  # type: ignore[call-arg]


MEMORY = """
import resource, sys, torch
from polyattn.runtime import masked, ops
n, shape = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
q, k, v = (torch.randn(2, 8, n, 16, requires_grad=True) for _ in range(3))
mask = torch.zeros(2, 1, 1, n)
mask[..., : n // 3] = torch.finfo(mask.dtype).min
mask[1] = torch.finfo(mask.dtype).min  # all rows of an element are hidden
if shape == "repeated":
    mask = mask.expand(2, 8, n, n)
kept = torch.ones(n, dtype=torch.bool) if shape == "filled" else None
def step(n):
    part = [x[:, :, :n] for x in (q, k, v)]
    some = None if kept is None else kept[:n]
    out = torch.ops.polyattn.masked_attention(*part, mask[..., -n:][:, :, -n:], some, -1e4, 0.25, ops.VERSION)[0]
    out.sum().backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="needs getrusage")
@pytest.mark.parametrize("shape", ["repeated", "filled"])
def test_peak_memory_with_hidden_rows(shape: str) -> None:
    """One matrix of scores, of all heads of one element, would be 288 MiB; q, k, v and their like are 3 MiB each."""
    done = subprocess.run([sys.executable, "-c", MEMORY, "3072", shape], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100.0
