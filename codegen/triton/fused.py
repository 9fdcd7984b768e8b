"""torch's memory-efficient attention of GPUs, below autograd: called by its aten name.

The first use on a device compares it, forward and backward, with autograd through plain float32 attention; where they
differ, it is not used.
"""

from __future__ import annotations

import functools
import logging
import threading

import torch

from polyattn.codegen.target import Fused

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-2}
"""Largest difference from float32 at values of about 1; float32 may run in TF32."""
_ROWS = 32
"""The kernel's log-sum-exp is padded to a multiple of this many rows."""


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, is_causal, scale=scale
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
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    short = -lse.shape[-1] % _ROWS
    padded = torch.nn.functional.pad(lse.float(), (0, short), value=float("inf"))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    needs = [True, True, True, False]
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        g, q, k, v, None, out, padded, seed, seed, 0.0, needs, is_causal, scale=scale
    )
    return dq, dk, dv


EFFICIENT = Fused(_cuda_forward, _cuda_backward, 8, masked=False)


def kernel_for(q: torch.Tensor) -> Fused | None:
    """The kernel, for tensors like this one on a GPU; None where it has not reproduced a reference."""
    return EFFICIENT if q.dtype in _TOLERANCE and _checked(q.device, q.dtype) else None


@functools.cache
def _checked(device: torch.device, dtype: torch.dtype) -> bool:
    log = logging.getLogger("polyattn")
    try:
        error = max(difference(EFFICIENT, device, dtype, is_causal) for is_causal in (False, True))
    except RuntimeError as problem:
        log.warning(
            "torch's efficient attention does not run on %s (%s); exact attention will be slow", device, problem
        )
        return False
    if not error <= _TOLERANCE[dtype]:
        log.warning("torch's efficient attention is off by %.1e on %s; exact attention will be slow", error, device)
        return False
    return True


def difference(kernel: Fused, device: torch.device, dtype: torch.dtype, is_causal: bool) -> float:
    """The largest difference of output and gradients from autograd through float32 attention, on 45 tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 45, 16)
    q, k, v, g = (torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(4))
    out, lse = kernel.forward(q, k, v, 0.25, is_causal)
    made = (out, *kernel.backward(g, q, k, v, out, lse, 0.25, is_causal))
    wanted: list[torch.Tensor] = []
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def reference() -> None:
        # In a thread of its own autograd is on, whatever the caller is in the middle of.
        if stream is not None:
            torch.cuda.set_stream(stream)
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        score = leaves[0] @ leaves[1].mT * 0.25
        if is_causal:
            allowed = torch.ones(score.shape[-2:], dtype=torch.bool, device=device).tril()
            score = score.masked_fill(~allowed, float("-inf"))
        o = torch.softmax(score, -1) @ leaves[2]
        wanted.extend([o.detach(), *torch.autograd.grad(o, leaves, g.float())])

    thread = threading.Thread(target=reference)
    thread.start()
    thread.join()
    return max(float((x.float() - y).abs().max()) for x, y in zip(made, wanted, strict=True))
