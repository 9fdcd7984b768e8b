"""Low-rank attention of a call's tensors: kernels over groups of heads, and exact attention for rows that need it.

Tensors come as the operators hold them, [batch, heads, tokens, ·]; queries that share a key head are its groups. Rows
that are off for certain (row_checks.py), and the few whose query lies outside of what features were fitted to, are
computed exactly, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from polyattn.codegen import targets
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import block_length
from polyattn.rewriter.families.family import Bound, Fit
from polyattn.runtime import exact, outlier_keys, row_checks, tiled
from polyattn.runtime.centring import Centred, centre
from polyattn.runtime.exact import Grouped
from polyattn.runtime.projection import finite, project
from polyattn.site_plan import SitePlan

OUTSIDE = 1 / 64
"""Rows outside of what was fitted are exact where they are no larger part of a call than this; where they are more, the
fit does not suit the call, and an audit says so."""
ROWS = 128
"""Rows of dQ that say which directions of the keys matter to it."""


@dataclass(frozen=True)
class Forward:
    """The output of grouped tensors, the denominators (−1 for rows computed exactly, inf for rows that see no key), how
    many rows were exact."""

    out: torch.Tensor
    denominators: torch.Tensor
    exact_rows: int

    def packed(self, fit: Fit) -> torch.Tensor:
        """What the operator hands to its backward of a fit."""
        return fit.values.clone()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Grouped:
    """[batch, heads, tokens, ·] tensors by key head, in the accumulator's dtype."""
    dtype = accumulator(q.dtype)
    batch, kv = k.shape[0], k.shape[1]
    queries = q.reshape(batch * kv, q.shape[1] // kv, q.shape[2], q.shape[3])
    return (
        queries.to(dtype),
        k.reshape(batch * kv, *k.shape[2:]).to(dtype),
        v.reshape(batch * kv, *v.shape[2:]).to(dtype),
    )


def bound(plan: SitePlan, fitted: torch.Tensor | None, like: torch.Tensor) -> Bound:
    """What is fitted to each head (batch elements one after the other) as the kernels take it.

    Args:
        fitted: ``Fit.values``, or None where nothing is fitted.
        like: keys, [batch · kv_heads, n_k, d].
    """
    if fitted is None or not plan.family.fitted:
        return plan.family.bind(None, like.shape[-1])
    return plan.family.bind(fitted.to(like.dtype).repeat(len(like) // fitted.shape[0], 1, 1), like.shape[-1])


@dataclass(frozen=True)
class Approximated:
    """What the kernels make of grouped tensors, outlier keys included, before any row is computed exactly."""

    out: torch.Tensor
    denominators: torch.Tensor
    off: torch.Tensor
    """Denominators that no softmax has, [heads, groups, n_q]."""
    centred: Centred


def grouped_keep(keep: torch.Tensor | None, kv_heads: int) -> torch.Tensor | None:
    """Which keys take part, by key head: [batch, n_k] → [batch · kv_heads, n_k]."""
    return None if keep is None else keep.repeat_interleave(kv_heads, 0)


def approximate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SitePlan,
    fitted: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> Approximated:
    """The low-rank form in all rows of grouped tensors: it is linear in the values.

    Args:
        keep: which keys take part, bool [batch · kv_heads, n_k]; None: all.
    """
    features = bound(plan, fitted, k)
    centred = centre(q, k, plan, features.change, keep)
    result = _run(plan.kernels.forward, {"V": v, **centred.inputs}, plan, features)
    out, denominators = result["O"], result["D"]
    off = row_checks.denominators(centred, denominators, plan)
    if centred.outliers is not None:
        out, denominators = outlier_keys.forward((q, k, v), centred, out, denominators, plan, keep)
        off |= ~(torch.isfinite(denominators) & (denominators > 0))
    if keep is not None:
        lost = plan.mask.sums_of(keep.to(q.dtype), q.shape[2])[:, None] == 0
        out, off = out.masked_fill(lost[..., None], 0), off & ~lost
        denominators = denominators.masked_fill(lost, torch.inf)  # such rows have no gradient
    return Approximated(out, denominators, off, centred)


def for_values(
    tensors: Grouped,
    values: torch.Tensor,
    plan: SitePlan,
    fitted: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the low-rank form of grouped tensors makes of other values [heads, n_k, c]: it is linear in them."""
    if plan.tiled:
        assert fitted is not None, "a form in tiles has thresholds"
        return tiled.for_values(tensors, values, plan, fitted.to(values.dtype), keep)
    return approximate(tensors[0], tensors[1], values, plan, fitted, keep).out


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SitePlan,
    fitted: torch.Tensor | None = None,
    radius: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> Forward:
    """Low-rank attention of grouped tensors by kernels of tokens in their order; see ``tiled`` for others.

    Args:
        radius: the largest norm of a centred query that the fit saw, [kv_heads]; None where that is not known.
        keep: which keys take part, bool [batch · kv_heads, n_k]; None: all. A row that sees no key is 0.
    """
    made = approximate(q, k, v, plan, fitted, keep)
    out, denominators = made.out, made.denominators
    bad = made.off | (row_checks.outputs(v, made.out, keep) & ~denominators.isposinf())
    if radius is not None:
        largest = radius.to(q.dtype).repeat(len(k) // len(radius))
        outside = made.centred.q.norm(dim=-1) > largest[:, None, None]
        if int(outside.sum()) <= OUTSIDE * outside.numel():
            bad |= outside
    count = exact.write_rows(out, bad, (q, k, v), plan, keep)
    if count:
        denominators = denominators.masked_fill(bad, -1.0)
    return Forward(out, denominators, count)


def near_pairs(
    tensors: Grouped, plan: SitePlan, fitted: torch.Tensor | None, keep: torch.Tensor | None, head: int
) -> torch.Tensor | None:
    """Which pairs of tiles of a key head [tiles of queries, tiles of keys] are near, bool, on the CPU; under a causal
    mask those of the largest block, None where there is none."""
    assert fitted is not None, "a form in tiles has thresholds"
    one = slice(head, head + 1)
    q, k, v = (x[one] for x in tensors)
    tau = fitted[None, head % len(fitted)].to(q.dtype)
    found = tiled.near_pairs((q, k, v), plan, tau, None if keep is None else keep[one])
    return None if found is None else found[0].cpu()


def exact_rows(
    tensors: Grouped,
    plan: SitePlan,
    fitted: torch.Tensor | None = None,
    radius: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which rows of a call are computed exactly, bool [heads, groups, n_q]; the arguments are those of a forward."""
    if not plan.tiled:
        return forward(*tensors, plan, fitted, radius, keep).denominators <= 0
    assert fitted is not None, "a form in tiles has thresholds"
    tau = fitted.to(tensors[0].dtype).repeat(len(tensors[1]) // len(fitted), 1)
    made = tiled.forward(tensors, plan, tiled.kept(tau), keep)
    return made.denominators.isneginf() | ~made.tau.any(1)[:, None, None]


def backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    denominators: torch.Tensor,
    plan: SitePlan,
    fitted: torch.Tensor | None,
    needs: Sequence[bool],
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients by q, k and v of [batch, heads, tokens, ·] tensors, grouped; None where ``needs`` says so.

    Args:
        g: gradient of the output.
        out, denominators: what :func:`forward` returned, in the shapes of the operators.
        keep: which keys take part, bool [batch, n_k]; None: all.
    """
    qs, ks, vs = grouped(q, k, v)
    keep = grouped_keep(keep, k.shape[1])
    gs, outs = g.reshape(*qs.shape[:-1], -1).to(qs.dtype), out.reshape(*qs.shape[:-1], -1).to(qs.dtype)
    stats = denominators.reshape(qs.shape[:-1])
    if plan.tiled:
        assert fitted is not None, "a call in tiles hands its thresholds on"
        some_of = tuple(name for name, need in zip(("dQ", "dK", "dV"), needs, strict=True) if need)
        found = tiled.backward(gs, (qs, ks, vs), outs, stats, plan, fitted.to(qs.dtype), some_of, keep)
        return found.get("dQ"), found.get("dK"), found.get("dV")
    bad = stats <= 0
    quiet = bad | stats.isposinf()  # rows that are exact, and rows that see no key, add nothing to the sums
    some, silent = bool(bad.any()), bool(quiet.any())
    features = bound(plan, fitted, ks)
    centred = centre(qs, ks, plan, features.change, keep)
    low_q, low_g, low_o = (x.masked_fill(quiet.unsqueeze(-1), 0.0) if silent else x for x in (centred.q, gs, outs))
    low_d = stats.masked_fill(quiet, 1.0) if silent else stats
    wanted = tuple(name for name, need in zip(("dQ", "dK", "dV"), needs, strict=True) if need)
    inputs = {"V": vs, **centred.inputs}
    inputs.update(Q=low_q, G=low_g, O=low_o, D=low_d)
    names = (*wanted, "dB") if "dK" in wanted and centred.factors is not None else wanted
    result = _gradients(names, inputs, plan, features, lambda: _sampled((qs, ks, vs), low_g, centred, plan, keep))
    if "dQ" in result:
        result["dQ"] = centred.query_gradient(result["dQ"])
    if "dK" in result:
        result["dK"] = centred.key_gradient(result["dK"], result.pop("dB", None), plan.scale)
    if centred.outliers is not None:
        tensors = (qs.masked_fill(quiet.unsqueeze(-1), 0.0) if silent else qs, ks, vs)
        outlier_keys.backward(tensors, centred, low_g, low_o, low_d, plan, result, keep)
    if some:
        result = _with_exact_rows(result, bad, (qs, ks, vs), gs, plan, keep)
    return result.get("dQ"), result.get("dK"), result.get("dV")


def _gradients(
    names: Sequence[str],
    inputs: Mapping[str, torch.Tensor],
    plan: SitePlan,
    features: Bound,
    rows: Callable[[], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Gradients of the kernels' inputs; where values are projected, that of values by a run of its own.

    Args:
        rows: makes some rows of dQ, [heads, ·, d].
    """
    few = tuple(name for name in names if name != "dV")
    if plan.projection and few and not finite(*(inputs[name] for name in "QKVGO")):
        plan = plan.unprojected()
    made = plan.kernels
    if not plan.projection or not few:
        return _run(made.backward(names), inputs, plan, features)
    apart = plan.projection.values > 0 and "dV" in names
    projected = project(inputs, plan.projection, rows)
    spec = made.backward(few if apart else names)
    result = projected.back(_run(spec, {**inputs, **projected.inputs}, plan, features))
    if apart:
        result |= _run(made.backward(("dV",)), inputs, plan, features)
    return result


def _sampled(
    tensors: Grouped, g: torch.Tensor, centred: Centred, plan: SitePlan, keep: torch.Tensor | None
) -> torch.Tensor:
    """Exact dQ of some rows at regular distances, in the coordinates of the centred queries: [heads, rows, d]."""
    q, k, v = tensors
    groups, n = q.shape[1:3]
    at = torch.arange(0, n, -(-n * groups // ROWS), device=q.device)

    def some(h: int, i: int) -> torch.Tensor:
        mine = None if keep is None else keep[h]
        return exact.rows_backward(q[h, i, at], k[h], v[h], g[h, i, at], at, plan, mine)[0]

    found = torch.stack([torch.cat([some(h, i) for i in range(groups)]) for h in range(len(q))])
    return found if centred.change is None else found @ centred.change.k


def _with_exact_rows(
    result: Mapping[str, torch.Tensor],
    bad: torch.Tensor,
    tensors: Grouped,
    g: torch.Tensor,
    plan: SitePlan,
    keep: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Low-rank gradients of the good rows, with the exact gradients of the bad ones."""
    # Rows may be exact because a feature overflowed; then the low-rank part of the gradient is lost as well.
    overflow = not all(bool(torch.isfinite(x).all()) for x in result.values())
    total = {name: torch.zeros_like(x) if overflow else x for name, x in result.items()}
    exact.add_row_gradients(total, torch.ones_like(bad) if overflow else bad, tensors, g, plan, keep)
    return total


def _run(
    spec: KernelSpec, inputs: Mapping[str, torch.Tensor], plan: SitePlan, features: Bound
) -> dict[str, torch.Tensor]:
    """One specification over all heads, a group of heads at a time."""
    heads, groups, _, d = inputs["Q"].shape
    basis, r = plan.family.basis(d), plan.family.features(d)
    block = plan.chunk if plan.mask.chunked else block_length(r, groups)
    step = min(heads, targets.of_device(inputs["Q"].device).heads_at_once(groups, block * r))
    inputs = {**inputs, **features.inputs}
    scalars: Scalars = {"s": plan.scale, **features.scalars}
    parts = []
    for at in range(0, heads, step):
        some = {name: x[at : at + step] for name, x in inputs.items()}
        theirs = {name: x[at : at + step] if isinstance(x, torch.Tensor) else x for name, x in scalars.items()}
        parts.append(targets.run(spec, some, theirs, basis, block))
    return {name: torch.cat([p[name] for p in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}
