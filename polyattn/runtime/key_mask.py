"""``key_mask`` of ``polyattn.attention``: which keys take part, for each batch element."""

from __future__ import annotations

import torch

from polyattn.errors import DeviceError, DtypeError, ShapeError


def expanded(mask: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The mask of every batch element, [batch, n_k], for keys [..., kv_heads, n_k, d].

    Raises:
        DtypeError, DeviceError: a mask that is not boolean, or on another device than the keys.
        ShapeError: a mask that does not fit the keys.
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
    return rows
