"""``key_mask`` of ``polyattn.attention``: masked keys are left out, which is exact for every way to compute attention.

Each batch element keeps keys of its own, so that elements with different masks are computed one by one. Under a causal
mask positions matter, and only keys at the end (padding) can be left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from polyattn.errors import DeviceError, DtypeError, ShapeError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expanded(mask: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """The mask of every batch element, [batch, n_k], for keys [..., kv_heads, n_k, d].

    Raises:
        DtypeError, DeviceError: a mask that is not boolean, or on another device than the keys.
        ShapeError: a mask that does not fit the keys, or that a causal mask does not allow.
    """
    if mask.dtype != torch.bool:
        raise DtypeError(f"key_mask must be boolean, True where a key takes part, got {mask.dtype}; compare it first")
    if mask.device != k.device:
        raise DeviceError(f"key_mask is on {mask.device} and k on {k.device}; move it")
    wanted = (*k.shape[:-3], k.shape[-2])
    try:
        rows = mask.broadcast_to(wanted).reshape(-1, k.shape[-2]) if mask.numel() or 0 in wanted else None
    except RuntimeError:
        rows = None
    if rows is None:
        raise ShapeError(f"key_mask has shape {tuple(mask.shape)}, which does not broadcast to {wanted}: [batch, n_k]")
    if causal and bool((rows[:, 1:] & ~rows[:, :-1]).any()):
        raise ShapeError(
            "under a causal mask key_mask may only drop keys at the end (padding on the right); reorder the tokens, or "
            "use scaled_dot_product_attention with attn_mask"
        )
    return rows


def attend(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Attend) -> torch.Tensor:
    """Attention of [batch, heads, tokens, ·] tensors without the masked keys; zeros where no key is left.

    Args:
        mask: [batch, n_k].
        run: attention of four-dimensional tensors without a mask.
    """
    if not len(mask) or bool((mask == mask[:1]).all()):
        return run(q, *_kept(mask[:1].any(0), k, v))
    parts = [run(q[b : b + 1], *_kept(mask[b], k[b : b + 1], v[b : b + 1])) for b in range(len(mask))]
    return torch.cat(parts)


def _kept(mask: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys = mask.nonzero().squeeze(1)
    return k.index_select(2, keys), v.index_select(2, keys)
