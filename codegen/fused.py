"""torch's fused attention, below autograd: the flash kernel of a CPU, the memory-efficient one of a GPU.

Autograd is off inside the operators, so that the kernels behind ``scaled_dot_product_attention`` are called by their
aten names. On a GPU the first use on a device compares them, forward and backward, with autograd through plain float32
attention, and does without them where they differ.

Tensors are [B, H, n, wide], their last axis contiguous.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-2}
"""Largest difference from float32 at values of about 1; float32 may run in TF32."""
_ROWS = 32
"""The kernel's log-sum-exp is padded to a multiple of this many rows."""


class Fused(NamedTuple):
    """``forward(q, k, v, scale, causal)``: output and log-sum-exp [B, H, n_q];
    ``backward(g, q, k, v, out, lse, scale, causal)``: dq, dk, dv.

    Where ``masked``, both take a mask that is added to the scores as one argument more: [B|1, H|1, n_q|1, n_k|1] with
    any strides, of the dtype of q, or float32 beside a half-precision q. Of a row whose scores are all far from 0 the
    backward is wrong: log-sum-exp has rounded away the logarithm of how many they are.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    multiple: int
    """Of what the head dim must be a multiple."""
    masked: bool


def _cpu_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _cpu_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]


def _cuda_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    short = -lse.shape[-1] % _ROWS
    padded = torch.nn.functional.pad(lse.float(), (0, short), value=float("inf"))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    needs = [True, True, True, False]
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        g, q, k, v, None, out, padded, seed, seed, 0.0, needs, causal, scale=scale
    )
    return dq, dk, dv


CPU = Fused(_cpu_forward, _cpu_backward, 1, masked=True)
CUDA = Fused(_cuda_forward, _cuda_backward, 8, masked=False)


def kernel_for(q: torch.Tensor) -> Fused | None:
    """The kernel that takes tensors like this one; None where there is none that can be trusted."""
    if q.device.type == "cpu":
        return CPU if q.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) else None
    if q.device.type == "cuda" and q.dtype in _TOLERANCE and _checked(q.device, q.dtype):
        return CUDA
    return None


@functools.cache
def _checked(device: torch.device, dtype: torch.dtype) -> bool:
    log = logging.getLogger("polyattn")
    try:
        error = max(difference(CUDA, device, dtype, causal) for causal in (False, True))
    except RuntimeError as problem:
        log.warning(
            "torch's efficient attention does not run on %s (%s); exact attention will be slow", device, problem
        )
        return False
    if not error <= _TOLERANCE[dtype]:
        log.warning("torch's efficient attention is off by %.1e on %s; exact attention will be slow", error, device)
        return False
    return True


def difference(kernel: Fused, device: torch.device, dtype: torch.dtype, causal: bool) -> float:
    """The largest difference of output and gradients from autograd through float32 attention, on 45 tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 45, 16)
    q, k, v, g = (torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(4))
    out, lse = kernel.forward(q, k, v, 0.25, causal)
    made = (out, *kernel.backward(g, q, k, v, out, lse, 0.25, causal))
    wanted: list[torch.Tensor] = []
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def reference() -> None:
        # In a thread of its own autograd is on, whatever the caller is in the middle of.
        if stream is not None:
            torch.cuda.set_stream(stream)
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        score = leaves[0] @ leaves[1].mT * 0.25
        if causal:
            allowed = torch.ones(score.shape[-2:], dtype=torch.bool, device=device).tril()
            score = score.masked_fill(~allowed, float("-inf"))
        o = torch.softmax(score, -1) @ leaves[2]
        wanted.extend([o.detach(), *torch.autograd.grad(o, leaves, g.float())])

    thread = threading.Thread(target=reference)
    thread.start()
    thread.join()
    return max(float((x.float() - y).abs().max()) for x, y in zip(made, wanted, strict=True))
