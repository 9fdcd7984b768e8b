"""The operators that stand in the graph, ``polyattn::attention`` and its backward, and ``polyattn.attention``.

The forward takes its site's decision (:mod:`polyattn.guard`), runs the low-rank kernels or exact attention, and hands
the plan to its backward with the saved tensors. Rows whose low-rank denominator is not a positive finite number are
computed exactly, forward and backward.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyattn import guard
from polyattn.codegen import exact as dense
from polyattn.codegen import target
from polyattn.codegen.evaluate import TILE_ELEMENTS, block_length
from polyattn.errors import DeviceError, DoubleBackwardError, DtypeError, ShapeError
from polyattn.guard import SiteState
from polyattn.options import Options
from polyattn.passes.derive import exact
from polyattn.passes.forms import softmax_form
from polyattn.passes.kernels import kernels
from polyattn.rewriter import features
from polyattn.rewriter.lowrank import Approximation

_LowRank = tuple[torch.Tensor, torch.Tensor, int]
"""Output, denominators, and how many rows were computed exactly."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def _version() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in (root, root / "rewriter", root / "passes", root / "codegen"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


VERSION = _version()
"""Hash of this package's sources: an argument of the ops, so that torch's caches never keep a stale backward."""


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Named errors for tensors that do not make an attention.

    Raises:
        ShapeError, DtypeError, DeviceError: the message says which tensors and what to change.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if q.dtype not in DTYPES:
        raise DtypeError(f"attention needs float16, bfloat16, float32 or float64, got {q.dtype}; cast q, k and v")
    if not q.device == k.device == v.device:
        raise DeviceError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}; move them")
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ShapeError("q, k and v need at least the axes [tokens, head_dim]")
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"head dims of q and k differ: {q.shape[-1]} and {k.shape[-1]}; project them to the same head_dim"
        )
    if k.shape[-2] != v.shape[-2]:
        raise ShapeError(f"k has {k.shape[-2]} tokens and v {v.shape[-2]}; they must be the same tokens")


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, Hq, n, d] → [B·Hk, groups, n, d]; keys and values [B·Hk, n, ·], in the accumulator's dtype."""
    dtype = _accumulator(q.dtype)
    batch, kv = k.shape[0], k.shape[1]
    queries = q.reshape(batch * kv, q.shape[1] // kv, q.shape[2], q.shape[3])
    return (
        queries.to(dtype),
        k.reshape(batch * kv, *k.shape[2:]).to(dtype),
        v.reshape(batch * kv, *v.shape[2:]).to(dtype),
    )


def _groups_of_heads(heads: int, groups: int, r: int, block: int) -> int:
    return max(1, min(heads, TILE_ELEMENTS // max(1, groups * block * r)))


def _run(
    spec: Any, inputs: Mapping[str, torch.Tensor], scale: float, degree: int, d: int, block: int
) -> dict[str, torch.Tensor]:
    """One specification over all heads, a group of heads at a time."""
    heads, groups = inputs["Q"].shape[0], inputs["Q"].shape[1]
    step = _groups_of_heads(heads, groups, features.rank(d, degree), block)
    parts = []
    for at in range(0, heads, step):
        some = {name: x[at : at + step] for name, x in inputs.items()}
        parts.append(target.run(spec, some, {"s": scale, **Approximation(degree).values}, d, block))
    return {name: torch.cat([p[name] for p in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    names = ("batch", "heads", "kv_heads", "n_q", "n_k", "d", "e")
    return dict(
        zip(names, (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]), strict=True)
    )


def _bad_rows(out: torch.Tensor, denominators: torch.Tensor) -> torch.Tensor:
    good = torch.isfinite(denominators) & (denominators > 0) & torch.isfinite(out).all(-1)
    return ~good


def _low_rank_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    degree: int,
    gradient: str,
    chunk: int,
) -> _LowRank:
    """Output and denominators (−1 marks rows computed exactly) of grouped tensors; how many rows."""
    made = kernels(causal, degree, gradient)
    d = q.shape[-1]
    block = chunk if causal else block_length(features.rank(d, degree), q.shape[1])
    result = _run(made.forward, {"Q": q, "K": k, "V": v}, scale, degree, d, block)
    out, denominators = result["O"], result["D"]
    bad = _bad_rows(out, denominators)
    count = int(bad.sum())
    if count:
        for h, g in bad.any(-1).nonzero().tolist():
            rows = bad[h, g].nonzero().squeeze(1)
            out[h, g, rows] = dense.rows_forward(q[h, g, rows], k[h], v[h], rows, scale, causal)
        denominators = denominators.masked_fill(bad, -1.0)
    return out, denominators, count


def _audit(
    state: SiteState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    causal: bool,
    options: Options,
) -> None:
    """Compare random rows with exact attention, in the two units of math.md §5."""
    heads, groups, n = q.shape[:3]
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randint(heads * groups * n, (options.audit_rows,), generator=generator).tolist()
    by_head: dict[int, set[int]] = {}
    for flat in drawn:
        by_head.setdefault(flat // n, set()).add(flat % n)
    worst, error2, spread2 = [], 0.0, 0.0
    for head, chosen in sorted(by_head.items()):
        h, g = divmod(head, groups)
        rows = torch.tensor(sorted(chosen), device=q.device)
        wanted = dense.rows_forward(q[h, g, rows], k[h], v[h], rows, scale, causal)
        centre = v[h].mean(0)
        difference = (out[h, g, rows] - wanted).norm(dim=-1)
        worst.append(difference.max() / (v[h] - centre).norm(dim=-1).max().clamp_min(1e-30))
        error2 += float(difference.square().sum())
        spread2 += float((wanted - centre).square().sum())
    state.error = float(torch.stack(worst).max())  # keeps NaN, which Python's max may drop
    state.relative_error = math.sqrt(error2 / max(spread2, 1e-300))
    state.guarantee = "audited"


def _decide(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, options: Options
) -> tuple[SiteState, _LowRank | None]:
    """A new decision: by cost, then by an audit of this call; ``auto`` falls back to exact above a tolerance.

    With it comes the low-rank forward that was audited, so that it need not run again.
    """
    shape = _shape(q, k, v)
    state = guard.decide(shape, causal, options)
    if state.verdict == "exact" or options.audit_rows == 0 or q.numel() == 0 or k.numel() == 0:
        return state, None
    chunk = guard.chunk_length(options, shape["d"], options.resolved_degree)
    grouped = _grouped(q, k, v)
    audited = _low_rank_forward(*grouped, scale, causal, options.resolved_degree, state.gradient, chunk)
    _audit(state, *grouped, audited[0], scale, causal, options)
    assert state.error is not None
    assert state.relative_error is not None
    if options.policy == "auto" and not (
        state.error <= options.tolerance and state.relative_error <= options.relative_tolerance
    ):
        state.reason = (
            f"audit: worst row {state.error:.2e} (tolerance {options.tolerance:.0e}), "
            f"relative {state.relative_error:.2e} (relative_tolerance {options.relative_tolerance:.0e})"
        )
        state.verdict, state.guarantee = "exact", "exact"
        state.flops_after, state.flops_after_symbolic = state.flops_before, state.flops_before_symbolic
        state.degree = state.rank = state.chunk = None
    return state, audited


@functools.lru_cache(maxsize=256)
def _options(key: str) -> Options:
    return Options.from_key(key)


@torch.library.custom_op(
    "polyattn::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] owners, float scale, bool causal, str site, str options, "
    "str version) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    owners: Sequence[torch.Tensor],
    scale: float,
    causal: bool,
    site: str,
    options: str,
    version: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        opts = _options(options)
        where = guard.key(site, owners, options, causal, scale, q.shape[-1], v.shape[-1])
        state, done = guard.find(where), None
        if state is None:
            state, done = _decide(q, k, v, scale, causal, opts)
            state = guard.keep(where, state)
        with state.lock:
            state.calls += 1
        accumulator = _accumulator(q.dtype)
        empty = torch.zeros(0, dtype=accumulator, device=q.device)
        degree = opts.resolved_degree
        chunk = guard.chunk_length(opts, q.shape[-1], degree)
        low = state.verdict == "low_rank" and q.numel() > 0 and k.numel() > 0
        plan = torch.tensor([int(low), degree, int(state.gradient == "substituted"), chunk])
        if not low:
            out, lse = dense.forward(q, k, v, scale, causal)
            return out, lse.to(accumulator), empty, plan
        if done is None:
            done = _low_rank_forward(*_grouped(q, k, v), scale, causal, degree, state.gradient, chunk)
        out, stat, rows = done
        with state.lock:
            state.exact_rows += rows
        return out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype), stat.reshape(q.shape[:-1]), empty, plan


@_attention.register_fake
def _(q: Any, k: Any, v: Any, owners: Any, scale: Any, causal: Any, site: Any, options: Any, version: Any) -> Any:
    check(q, k, v)
    accumulator = _accumulator(q.dtype)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    stat = q.new_empty(q.shape[:-1], dtype=accumulator)
    return out, stat, q.new_empty(0, dtype=accumulator), torch.empty(4, dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "polyattn::attention_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stat, Tensor plan, float scale, bool causal, "
    "str version, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stat: torch.Tensor,
    plan: torch.Tensor,
    scale: float,
    causal: bool,
    version: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, degree, substituted, chunk = plan.tolist()
    with torch.autocast(q.device.type, enabled=False):
        if low:
            gradient = "substituted" if substituted else "consistent"
            made = _low_rank_backward(g, q, k, v, out, stat, scale, causal, degree, gradient, chunk, needs)
        else:
            program = exact(softmax_form(causal))
            made = dense.backward(program, g, (q, k, v), out, stat, scale, causal)
    results = []
    for need, x, like in zip(needs, made, (q, k, v), strict=True):
        results.append(x.reshape(like.shape).to(like.dtype).contiguous() if need else like.new_zeros(0))
    return results[0], results[1], results[2]


@_attention_backward.register_fake
def _(
    g: Any, q: Any, k: Any, v: Any, out: Any, stat: Any, plan: Any, scale: Any, causal: Any, version: Any, needs: Any
) -> Any:
    return tuple(
        like.new_empty(like.shape) if need else like.new_empty(0) for need, like in zip(needs, (q, k, v), strict=True)
    )


def _low_rank_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stat: torch.Tensor,
    scale: float,
    causal: bool,
    degree: int,
    gradient: str,
    chunk: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qs, ks, vs = _grouped(q, k, v)
    gs, outs = g.reshape(*qs.shape[:-1], -1).to(qs.dtype), out.reshape(*qs.shape[:-1], -1).to(qs.dtype)
    stats = stat.reshape(qs.shape[:-1])
    bad = stats <= 0
    some = bool(bad.any())
    low_q, low_g, low_o = (x.masked_fill(bad.unsqueeze(-1), 0.0) if some else x for x in (qs, gs, outs))
    low_d = stats.masked_fill(bad, 1.0) if some else stats
    wanted = [name for name, need in zip(("dQ", "dK", "dV"), needs, strict=True) if need]
    made = kernels(causal, degree, gradient)
    d = q.shape[-1]
    block = chunk if causal else block_length(features.rank(d, degree), qs.shape[1])
    inputs = {"Q": low_q, "K": ks, "V": vs, "G": low_g, "O": low_o, "D": low_d}
    result = _run(made.backward(tuple(wanted)), inputs, scale, degree, d, block)
    if some:
        program = exact(softmax_form(causal))
        # Rows may be exact because a feature overflowed; then the low-rank part of the gradient is lost as well.
        overflow = not all(bool(torch.isfinite(x).all()) for x in result.values())
        if overflow:
            result = {name: torch.zeros_like(x) for name, x in result.items()}
        for h in range(qs.shape[0]):
            for group in range(qs.shape[1]):
                mask = torch.ones_like(bad[h, group]) if overflow else bad[h, group]
                rows = mask.nonzero().squeeze(1)
                if not len(rows):
                    continue
                dq, dk, dv = dense.rows_backward(
                    program, qs[h, group, rows], ks[h], vs[h], gs[h, group, rows], rows, scale, causal
                )
                if needs[0]:
                    result["dQ"][h, group, rows] = dq
                if needs[1]:
                    result["dK"][h] += dk
                if needs[2]:
                    result["dV"][h] += dv
    return tuple(result.get(name, qs) for name in ("dQ", "dK", "dV"))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, owners, scale, causal, _, _, version = inputs
    out, stat, _, plan = output
    ctx.mark_non_differentiable(stat, output[2], plan)
    ctx.save_for_backward(q, k, v, out, stat, plan)
    ctx.scale, ctx.causal, ctx.version, ctx.owners = scale, causal, version, len(owners)


def _backward(ctx: Any, g: torch.Tensor, *unused: Any) -> Any:
    needs = list(ctx.needs_input_grad[:3])
    q, k, v, out, stat, plan = ctx.saved_tensors
    made = torch.ops.polyattn.attention_backward(g, q, k, v, out, stat, plan, ctx.scale, ctx.causal, ctx.version, needs)
    gradients = [x if need else None for x, need in zip(made, needs, strict=True)]
    return (*gradients, [None] * ctx.owners, None, None, None, None, None)


def _twice(ctx: Any, *unused: Any) -> Any:
    raise DoubleBackwardError(
        "polyattn's backward is not differentiable itself; for gradients of gradients use the model without "
        "backend='polyattn' (or torch's scaled_dot_product_attention)"
    )


_attention.register_autograd(_backward, setup_context=_setup)
_attention_backward.register_autograd(_twice, setup_context=lambda ctx, inputs, output: None)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Softmax attention, low rank where the policy allows it; differentiable once.

    Args:
        q: [..., heads, n_q, d]; k: [..., kv_heads, n_k, d]; v: [..., kv_heads, n_k, e]; kv_heads divides heads.
            [tokens, head_dim] is one head.
        key_mask: not supported yet; must be None.
        causal: query i sees keys j ≤ i (torch's ``is_causal``, also for n_q ≠ n_k).
        scale: factor of the logits, 1/√d by default.
        options: an Options or a mapping of its fields.
    Returns:
        [..., heads, n_q, e], in the dtype of q.
    Raises:
        ShapeError, DtypeError, DeviceError: inputs that do not fit together.
        UnknownOptionError, OptionValueError: bad options.
    """
    opts = Options.make(options)
    check(q, k, v)
    if key_mask is not None:
        raise ShapeError("key_mask is not supported yet; drop the masked keys, or use scaled_dot_product_attention")
    if not (q.ndim == k.ndim == v.ndim) or q.shape[:-3] != k.shape[:-3] or k.shape[:-2] != v.shape[:-2]:
        raise ShapeError(
            f"q, k and v must have the same leading axes, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.ndim >= 3 and q.shape[-3] % k.shape[-3]:
        raise ShapeError(f"{q.shape[-3]} query heads cannot be shared out over {k.shape[-3]} key heads")
    lead = q.shape[:-3]
    four = [
        x.reshape(-1 if x.ndim > 3 else 1, *((1,) if x.ndim == 2 else x.shape[-3:-2]), *x.shape[-2:]) for x in (q, k, v)
    ]
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    site = "polyattn.attention"
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        site = f"polyattn.attention at {frame.f_code.co_filename}:{frame.f_lineno}"
    out: torch.Tensor = torch.ops.polyattn.attention(*four, [], factor, causal, site, opts.key(), VERSION)[0]
    return out.reshape(*(lead if q.ndim > 3 else ()), *q.shape[-3:-1], v.shape[-1])
