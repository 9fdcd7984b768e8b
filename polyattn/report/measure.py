"""How far low-rank attention of whole heads is from exact attention, which is computed in float64.

Units (math.md §5). Of a row the additive error is ‖õ_i − o_i‖ / max_j ‖v_j − v̄‖; of a head the relative error is
RMS_i ‖õ_i − o_i‖ / RMS_i ‖o_i − v̄‖; of a gradient the relative error is ‖dX̃ − dX‖ / ‖dX‖ in the Frobenius norm, for
one gradient of the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F

from polyattn.errors import DeviceError, DtypeError, OptionValueError, ShapeError
from polyattn.options import Options
from polyattn.passes.match.changes import NOTHING
from polyattn.rewriter.masks.mask import CAUSAL, NONE, Mask
from polyattn.runtime import ops, registry

SITE = "polyattn.measure"
QUANTILE = 0.985
"""The part of the rows of a head that stays within ``Errors.additive``."""
TINY = 1e-300
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Errors:
    """Errors of each head, float64 tensors on the CPU: [batch, heads]; those of dK and dV [batch, kv_heads]."""

    additive: torch.Tensor
    """98.5 % of the rows are within this, in the additive unit."""
    additive_max: torch.Tensor
    """The error of the worst row, in the additive unit."""
    relative: torch.Tensor
    """The relative errors."""
    dq: torch.Tensor | None = None
    """Relative error of the gradient by the queries; None without a gradient of the output."""
    dk: torch.Tensor | None = None
    """Relative error of the gradient by the keys."""
    dv: torch.Tensor | None = None
    """Relative error of the gradient by the values."""
    cotangent: str = "none"
    """The gradient of the output: ``smooth``, ``white``, ``given`` or ``none``."""
    verdict: str = ""
    """``low_rank`` or ``exact``: what ran; empty for outputs of another origin."""
    reason: str = ""
    """Why that ran."""
    exact_rows: int = 0
    """Rows of all heads that the low-rank form had to compute exactly."""

    @classmethod
    def of(cls, out: torch.Tensor, exact: torch.Tensor, v: torch.Tensor) -> Errors:
        """Measure any output against exact attention's, without gradients.

        Args:
            out, exact: [batch, heads, n_q, e]; v: [batch, kv_heads, n_k, e]; all taken to float64.
        Raises:
            ShapeError: shapes that do not fit together.
        """
        fits = out.shape == exact.shape and out.ndim == v.ndim == 4 and out.shape[::3] == v.shape[::3]
        if not fits or exact.shape[1] % v.shape[1] or not exact.shape[2] or not v.shape[2]:
            raise ShapeError(
                f"outputs must be [batch, heads, n_q, e] and v [batch, kv_heads, n_k, e], with one token or more, got "
                f"{tuple(out.shape)}, {tuple(exact.shape)} and {tuple(v.shape)}"
            )
        out, exact, v = (x.detach().double() for x in (out, exact, v))
        groups = exact.shape[1] // v.shape[1]
        centre = v.mean(2, keepdim=True)
        unit = (v - centre).norm(dim=-1).amax(-1).clamp_min(TINY).repeat_interleave(groups, 1)
        rows = (out - exact).norm(dim=-1) / unit[..., None]
        quantile = torch.stack([head.quantile(QUANTILE) for head in rows.flatten(0, 1)]).view_as(unit)
        spread = (exact - centre.repeat_interleave(groups, 1)).square().sum((2, 3)).clamp_min(TINY)
        relative = ((out - exact).square().sum((2, 3)) / spread).sqrt()
        return cls(quantile.cpu(), rows.amax(-1).cpu(), relative.cpu())

    def to_dict(self) -> dict[str, Any]:
        """The errors as JSON-serialisable values; tensors become nested lists."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in values.items()}

    def __str__(self) -> str:
        batch, heads = self.additive.shape
        columns: dict[str, torch.Tensor] = {
            f"{QUANTILE:.1%} of rows": self.additive,
            "worst row": self.additive_max,
            "relative": self.relative,
        }
        for name, x in (("dQ", self.dq), ("dK", self.dk), ("dV", self.dv)):
            if x is not None:
                columns[name] = x.repeat_interleave(heads // x.shape[1], 1)
        lines = [f"{'batch, head':<14}" + "".join(f"{name:>15}" for name in columns)]
        shown = [divmod(number, heads) for number in range(batch * heads)][:_LINES]
        lines += [
            f"{f'{b}, {h}':<14}" + "".join(f"{float(x[b, h]):>15.2e}" for x in columns.values()) for b, h in shown
        ]
        if len(shown) < batch * heads:
            lines.append(f"({batch * heads - len(shown)} more heads)")
        lines.append(f"{'largest':<14}" + "".join(f"{float(x.max()):>15.2e}" for x in columns.values()))
        notes = [f"gradients for a {self.cotangent} gradient of the output"] if self.dq is not None else []
        notes += [f"{self.verdict.replace('_', ' ')}: {self.reason}"] if self.verdict else []
        notes += [f"{self.exact_rows} rows computed exactly"] if self.exact_rows else []
        return "\n".join([*lines, *notes])


_LINES = 24


def measure(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | str | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    options: Options | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Errors:
    """Measure low-rank attention, and its gradients, against torch's exact attention in float64.

    It runs the operator once, as a first call: what is fitted is fitted to these tensors, and forgotten. Exact
    attention is quadratic in n. Torch's random generators are left alone.

    Args:
        q: [batch, heads, n_q, d]; k: [batch, kv_heads, n_k, d]; v: [batch, kv_heads, n_k, e]; kv_heads divides heads.
        g: the gradient of the output that gradients are compared for: a tensor [batch, heads, n_q, e]; "smooth", a
            fixed linear map of each row of the exact output; "white", normal noise; None: gradients are not compared.
        causal, scale: as :func:`polyattn.attention`.
        options: an Options, or a mapping of its fields, to which ``policy="low_rank"`` and ``audit_rows=0`` are added
            where it does not name them.
        seed: of the linear map and of the noise; ``Options.seed`` is that of fits.
    Raises:
        ShapeError, DtypeError, DeviceError: inputs that do not fit together.
        UnknownOptionError, OptionValueError: bad options, another text for ``g``, or a seed that is no integer.
    """
    low = {"policy": "low_rank", "audit_rows": 0}
    opts = options if isinstance(options, Options) else Options.make({**low, **(options or {})})
    _check(q, k, v, g, seed)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    mask = CAUSAL if causal else NONE
    owner = torch.zeros(1)  # its memory tells this call's state from all others while it lives
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_(g is not None) for x in (q, k, v)]
            wanted, cotangent, gradients = _exact(cast("Tensors", tuple(leaves)), g, mask, factor, seed)
            out = torch.ops.polyattn.attention(
                *leaves, [], [owner], factor, causal, NOTHING.text(), g is not None, SITE, opts.key(), ops.VERSION
            )[0]
            found = Errors.of(out, wanted, v)
            if cotangent is not None:
                made = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
                dq, dk, dv = (relative(x, y, (2, 3)).cpu() for x, y in zip(made, gradients, strict=True))
                kind = g if isinstance(g, str) else "given"
                found = dataclasses.replace(found, dq=dq, dk=dk, dv=dv, cotangent=kind)
    finally:
        state = registry.forget(SITE, (owner.data_ptr(),))
    assert state is not None, "the call has tokens, so that it was decided on"
    return dataclasses.replace(
        found, verdict=state.verdict, reason=state.decision.reason, exact_rows=state.counters.exact_rows
    )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | str | None, seed: int) -> None:
    ops.check(q, k, v)
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShapeError(f"measure needs q, k and v as [batch, heads, tokens, head_dim], got {shapes}; add axes")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"q, k and v must have the same batch, and k and v the same heads and tokens, got {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ShapeError(f"there is nothing to measure in empty tensors: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"{q.shape[1]} query heads cannot be shared out over {k.shape[1]} key heads")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionValueError(f"seed={seed!r}: it must be an integer")
    if isinstance(g, torch.Tensor):
        if g.shape != (*q.shape[:3], v.shape[-1]):
            raise ShapeError(f"g has shape {tuple(g.shape)}; the output has {(*q.shape[:3], v.shape[-1])}")
        if not g.is_floating_point():
            raise DtypeError(f"g must be of a floating dtype, got {g.dtype}; cast it")
        if g.device != q.device:
            raise DeviceError(f"g is on {g.device} and q on {q.device}; move it")
    elif g not in (None, "smooth", "white"):
        raise OptionValueError(f"g={g!r}: it must be a tensor, 'smooth', 'white' or None")


def _exact(
    leaves: Tensors, g: torch.Tensor | str | None, mask: Mask, scale: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, Tensors]:
    """Compute exact attention a key head at a time, in float64.

    Returns:
        the output [batch, heads, n_q, e], its gradient (None without one), and the gradients of q, k and v.
    """
    q, k, v = leaves
    groups = q.shape[1] // k.shape[1]
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    mix = None
    if g == "smooth":
        mix = torch.randn(v.shape[-1], v.shape[-1], generator=generator, dtype=torch.float64).to(q.device)
    cotangent = None if g is None else torch.empty_like(out)
    if g == "white":
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(q.device)
    elif isinstance(g, torch.Tensor):
        cotangent = g.detach().double()
    made = cast("Tensors", tuple(torch.zeros_like(x, dtype=torch.float64) for x in leaves))
    for b in range(k.shape[0]):
        for c in range(k.shape[1]):
            mine, theirs = slice(c * groups, (c + 1) * groups), slice(c, c + 1)
            parts = [x.detach()[b : b + 1].double() for x in (q[:, mine], k[:, theirs], v[:, theirs])]
            wide = [x.requires_grad_(g is not None) for x in parts]
            keys, values = (x.expand(-1, groups, -1, -1) for x in wide[1:])
            found = F.scaled_dot_product_attention(wide[0], keys, values, is_causal=mask.is_causal, scale=scale)
            out[b, mine] = found.detach()[0]
            if cotangent is None:
                continue
            if mix is not None:
                cotangent[b, mine] = found.detach()[0] @ mix
            got = torch.autograd.grad(found, wide, cotangent[b : b + 1, mine])
            for whole, heads, x in zip(made, (mine, theirs, theirs), got, strict=True):
                whole[b, heads] = x[0]
    return out, cotangent, made


def relative(x: torch.Tensor, wanted: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The relative error ‖x − wanted‖ / ‖wanted‖ over some axes, float64."""
    difference, size = (y.square().sum(axes).sqrt() for y in (x.double() - wanted, wanted))
    return difference / size.clamp_min(TINY)
