"""Low-rank attention of a call's tensors: kernels over groups of heads, and exact attention for rows that need it.

Tensors come as the operators hold them, [batch, heads, tokens, ·]; queries that share a key head are its groups. Rows
that are off for certain (row_checks.py), and the few whose query lies outside of what features were fitted to,
are computed exactly, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from polyattn.codegen import target
from polyattn.codegen.evaluate import block_length
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.passes.derive.kernels import Kernels, exact_nodes, kernels
from polyattn.rewriter.families.polynomial import monomials
from polyattn.rewriter.families.polynomial.rule import Approximation
from polyattn.runtime import exact as dense
from polyattn.runtime import outlier_keys, row_checks
from polyattn.runtime.centring import STATISTICS, Heavy, Moved, Turn, move
from polyattn.runtime.projection import Few, finite, project

Grouped = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [batch · kv_heads, groups, n_q, d], keys [batch · kv_heads, n_k, d], values [batch · kv_heads, n_k, e]."""


GRADIENTS = ("consistent", "substituted", "projected")
OUTLIERS = 1 / 64
"""Rows outside of what was fitted are exact where they are no larger part of a call than this; where they are more, the
fit does not suit the call, and an audit says so."""
ROWS = 128
"""Of dQ, that say which directions of the keys matter to it."""
FIRST, NUMBERS = 8, 12
"""Of a setting, as its backward gets them: eight, and the widths of up to four degrees; then the named positions."""


@dataclass(frozen=True)
class Setting:
    """How one call computes: what the plan fixes, and the call's scale and mask."""

    scale: float
    causal: bool
    degree: int | None
    """Of the polynomial; None for skeleton features."""
    gradient: str
    chunk: int
    shift: str = "none"
    """Which tokens the means are taken of that queries and keys are shifted by (polyattn/runtime/centring.py)."""

    band: bool = False
    """Without a mask: whether keys in a query's chunk and next to it stay exact."""
    heavy: Heavy = field(default_factory=Heavy)
    """Which keys stay exact wherever the query stands."""
    few: Few = field(default_factory=Few)
    """Of the substituted gradient: how many directions values, and queries and keys, are projected on."""
    widths: tuple[int, ...] = ()
    """Of a nested polynomial (monomials.Basis); nothing for the full form."""
    fitted: torch.Tensor | None = None
    """What was fitted to the heads. Of skeleton features [kv_heads, m, 2 d + m]: landmarks of keys and of queries, and
    core, side by side; of a polynomial [kv_heads, 2 d + 1, d or degree + 1]: the matrices that queries and keys are
    multiplied by, and the coefficients, one above the other; None for Taylor's polynomial."""

    radius: torch.Tensor | None = None
    """Of what was fitted: the largest norm of a shifted query, [kv_heads]; only a forward needs it."""

    def numbers(self) -> torch.Tensor:
        """What a backward must know of its forward beside scale and mask."""
        made = [
            self.degree or 0,
            GRADIENTS.index(self.gradient),
            self.chunk,
            STATISTICS.index(self.shift),
            int(self.band),
            self.heavy.count,
            *self.few,
            *self.widths,
        ]
        return torch.tensor([*made, *[0] * (NUMBERS - len(made)), *self.heavy.positions])

    @classmethod
    def of(cls, numbers: torch.Tensor, scale: float, causal: bool, fitted: torch.Tensor) -> Setting:
        """The inverse of :meth:`numbers`; ``fitted`` has no elements where nothing is."""
        degree, gradient, chunk, shift, band, count, few_values, few_keys, *widths = numbers.tolist()
        return cls(
            scale,
            causal,
            degree or None,
            GRADIENTS[gradient],
            chunk,
            STATISTICS[shift],
            bool(band),
            Heavy(count, tuple(widths[NUMBERS - FIRST :])),
            Few(few_values, few_keys),
            tuple(w for w in widths[:degree] if widths[0]),
            fitted if fitted.numel() else None,
        )

    @property
    def weighted(self) -> bool:
        return self.shift != "none" or bool(self.heavy)

    @property
    def kernels(self) -> Kernels:
        return kernels(self.causal, self.degree, self.gradient, self.weighted, self.band)

    def basis(self, d: int) -> monomials.Basis:
        """The monomials that the features are; none but the constant one with skeleton features."""
        return monomials.Basis(d, self.widths) if self.widths else monomials.full(d, self.degree or 0)

    def per_head(self, heads: int, like: torch.Tensor) -> torch.Tensor | None:
        """What was fitted, for all heads, batch elements one after the other."""
        if self.fitted is None:
            return None
        return self.fitted.to(like.dtype).repeat(heads // self.fitted.shape[0], 1, 1)

    def skeleton(self, heads: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Landmarks and core as inputs of the kernels; none for polynomials."""
        packed, d = self.per_head(heads, like) if self.degree is None else None, like.shape[-1]
        if packed is None:
            return {}
        return {"LK": packed[..., :d], "LQ": packed[..., d : 2 * d], "Z": packed[..., 2 * d :].contiguous()}

    def coefficients(self, heads: int, like: torch.Tensor) -> Scalars:
        """Of the polynomial: Taylor's numbers, or those of each head; none with skeleton features."""
        if self.degree is None:
            return {}
        packed, rule = self.per_head(heads, like), Approximation(self.degree)
        if packed is None:
            return rule.values
        return {c.name: packed[:, -1, m].contiguous() for m, c in enumerate(rule.coefficients)}

    def moved(self, q: torch.Tensor, k: torch.Tensor) -> Moved:
        """Queries and keys after the exact transformations."""
        packed, d = self.per_head(len(k), q) if self.degree is not None else None, q.shape[-1]
        turn = None
        if packed is not None:
            turn = Turn(packed[:, :d, :d].contiguous(), packed[:, d : 2 * d, :d].contiguous())
        return move(q, k, self.scale, self.shift, self.chunk, turn, self.heavy)


@dataclass(frozen=True)
class Forward:
    """Of grouped tensors: the output, the denominators (−1 marks rows computed exactly), and how many such rows."""

    out: torch.Tensor
    denominators: torch.Tensor
    exact_rows: int


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


@dataclass(frozen=True)
class Approximated:
    """What the kernels make of grouped tensors, heavy keys included, before any row is computed exactly."""

    out: torch.Tensor
    denominators: torch.Tensor
    off: torch.Tensor
    """Denominators that no softmax has, [heads, groups, n_q]."""
    moved: Moved


def approximate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting) -> Approximated:
    """The low-rank form in all rows: it is linear in the values."""
    moved = setting.moved(q, k)
    result = _run(setting.kernels.forward, {"V": v, **moved.inputs, **setting.skeleton(len(k), q)}, setting)
    out, denominators = result["O"], result["D"]
    off = row_checks.denominators(moved, denominators, setting.scale, setting.causal)
    if moved.heavy is not None:
        nodes = exact_nodes(setting.causal)
        out, denominators = outlier_keys.forward(
            nodes, (q, k, v), moved, out, denominators, setting.scale, setting.causal
        )
        off |= ~(torch.isfinite(denominators) & (denominators > 0))
    return Approximated(out, denominators, off, moved)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting) -> Forward:
    """Low-rank attention of grouped tensors."""
    made = approximate(q, k, v, setting)
    out, denominators, bad = made.out, made.denominators, made.off | row_checks.outputs(v, made.out)
    if setting.radius is not None:
        radius = setting.radius.to(q.dtype).repeat(len(k) // len(setting.radius))
        outside = made.moved.q.norm(dim=-1) > radius[:, None, None]
        if int(outside.sum()) <= OUTLIERS * outside.numel():
            bad |= outside
    count = int(bad.sum())
    if count:
        for h, g in bad.any(-1).nonzero().tolist():
            rows = bad[h, g].nonzero().squeeze(1)
            out[h, g, rows] = dense.rows_forward(q[h, g, rows], k[h], v[h], rows, setting.scale, setting.causal)
        denominators = denominators.masked_fill(bad, -1.0)
    return Forward(out, denominators, count)


def backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    denominators: torch.Tensor,
    setting: Setting,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients by q, k and v of [batch, heads, tokens, ·] tensors, grouped; None where ``needs`` says so.

    Args:
        g: gradient of the output.
        out, denominators: what :func:`forward` returned, in the shapes of the operators.
    """
    qs, ks, vs = grouped(q, k, v)
    gs, outs = g.reshape(*qs.shape[:-1], -1).to(qs.dtype), out.reshape(*qs.shape[:-1], -1).to(qs.dtype)
    stats = denominators.reshape(qs.shape[:-1])
    bad = stats <= 0
    some = bool(bad.any())
    moved = setting.moved(qs, ks)
    low_q, low_g, low_o = (x.masked_fill(bad.unsqueeze(-1), 0.0) if some else x for x in (moved.q, gs, outs))
    low_d = stats.masked_fill(bad, 1.0) if some else stats
    wanted = tuple(name for name, need in zip(("dQ", "dK", "dV"), needs, strict=True) if need)
    inputs = {"V": vs, **moved.inputs, **setting.skeleton(len(ks), qs)}
    inputs.update(Q=low_q, G=low_g, O=low_o, D=low_d)
    names = (*wanted, "dB") if "dK" in wanted and moved.weights is not None else wanted
    result = _gradients(names, inputs, setting, lambda: _sampled((qs, ks, vs), low_g, moved, setting))
    if "dQ" in result:
        result["dQ"] = moved.query_gradient(result["dQ"])
    if "dK" in result:
        result["dK"] = moved.key_gradient(result["dK"], result.pop("dB", None), setting.scale)
    if moved.heavy is not None:
        tensors = (qs.masked_fill(bad.unsqueeze(-1), 0.0) if some else qs, ks, vs)
        nodes = exact_nodes(setting.causal)
        outlier_keys.backward(nodes, tensors, moved, low_g, low_o, low_d, setting.scale, setting.causal, result)
    if some:
        result = _with_exact_rows(result, bad, (qs, ks, vs), gs, setting)
    return result.get("dQ"), result.get("dK"), result.get("dV")


def _gradients(
    names: Sequence[str],
    inputs: Mapping[str, torch.Tensor],
    setting: Setting,
    rows: Callable[[], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Gradients of the kernels' inputs; where values are projected, that of values by a run of its own.

    ``rows``: makes some rows of dQ, [heads, ·, d].
    """
    few = tuple(name for name in names if name != "dV")
    if any(setting.few) and few and not finite(*(inputs[name] for name in "QKVGO")):
        setting = replace(setting, gradient="substituted", few=Few())
    made = setting.kernels
    if not any(setting.few) or not few:
        return _run(made.backward(names), inputs, setting)
    apart = setting.few.values > 0 and "dV" in names
    projected = project(inputs, setting.few, rows)
    result = projected.back(_run(made.backward(few if apart else names), {**inputs, **projected.inputs}, setting))
    if apart:
        result |= _run(made.backward(("dV",)), inputs, setting)
    return result


def _sampled(tensors: Grouped, g: torch.Tensor, moved: Moved, setting: Setting) -> torch.Tensor:
    """Exact dQ of some rows at regular distances, in the coordinates of the moved queries: [heads, rows, d]."""
    q, k, v = tensors
    groups, n = q.shape[1:3]
    nodes, at = exact_nodes(setting.causal), torch.arange(0, n, -(-n * groups // ROWS), device=q.device)

    def some(h: int, i: int) -> torch.Tensor:
        return dense.rows_backward(nodes, q[h, i, at], k[h], v[h], g[h, i, at], at, setting.scale, setting.causal)[0]

    found = torch.stack([torch.cat([some(h, i) for i in range(groups)]) for h in range(len(q))])
    return found if moved.turn is None else found @ moved.turn.k


def _with_exact_rows(
    result: Mapping[str, torch.Tensor], bad: torch.Tensor, tensors: Grouped, g: torch.Tensor, setting: Setting
) -> dict[str, torch.Tensor]:
    """Low-rank gradients of the good rows, with the exact gradients of the bad ones."""
    q, k, v = tensors
    nodes = exact_nodes(setting.causal)
    # Rows may be exact because a feature overflowed; then the low-rank part of the gradient is lost as well.
    overflow = not all(bool(torch.isfinite(x).all()) for x in result.values())
    total = {name: torch.zeros_like(x) if overflow else x for name, x in result.items()}
    for h in range(q.shape[0]):
        for group in range(q.shape[1]):
            mask = torch.ones_like(bad[h, group]) if overflow else bad[h, group]
            rows = mask.nonzero().squeeze(1)
            if not len(rows):
                continue
            dq, dk, dv = dense.rows_backward(
                nodes, q[h, group, rows], k[h], v[h], g[h, group, rows], rows, setting.scale, setting.causal
            )
            if "dQ" in total:
                total["dQ"][h, group, rows] = dq
            if "dK" in total:
                total["dK"][h] += dk
            if "dV" in total:
                total["dV"][h] += dv
    return total


def _run(spec: KernelSpec, inputs: Mapping[str, torch.Tensor], setting: Setting) -> dict[str, torch.Tensor]:
    """One specification over all heads, a group of heads at a time."""
    heads, groups, _, d = inputs["Q"].shape
    basis = setting.basis(d)
    r = inputs["Z"].shape[-1] if setting.degree is None else monomials.rank(basis)
    block = setting.chunk if setting.causal or setting.band else block_length(r, groups)
    step = min(heads, target.heads_at_once(inputs["Q"].device, groups, block * r))
    scalars: Scalars = {"s": setting.scale, **setting.coefficients(heads, inputs["Q"])}
    parts = []
    for at in range(0, heads, step):
        some = {name: x[at : at + step] for name, x in inputs.items()}
        theirs = {name: x[at : at + step] if isinstance(x, torch.Tensor) else x for name, x in scalars.items()}
        parts.append(target.run(spec, some, theirs, basis, block))
    return {name: torch.cat([p[name] for p in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}
