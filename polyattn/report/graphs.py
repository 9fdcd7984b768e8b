"""Runnable aten graphs of a site's rewritten forward and backward, for the report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from polyattn.codegen.evaluate import Evaluation, block_length
from polyattn.passes.derive.kernels import kernels
from polyattn.rewriter.algebra.monomials import full, rank
from polyattn.rewriter.families.polynomial.rule import Approximation
from polyattn.runtime.centring import move


def graphs(
    *,
    causal: bool,
    degree: int,
    gradient: str,
    shape: Mapping[str, int],
    scale: float,
    chunk: int | None,
    shift: str = "none",
    band: bool = False,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Runnable aten graphs of the rewritten forward (Q, K, V → O, D) and backward (… G, O, D → dQ, dK, dV).

    Their inputs are [heads, groups, n_q, ·] and [heads, n_k, ·] float32; loops over blocks stand unrolled.
    ``chunk`` is the chunk length of a causal site, None without a mask; ``shift`` one of ``codegen.shift.STATISTICS``.
    """
    from functorch import make_fx

    made = kernels(causal, degree, gradient, shift != "none", band)
    d, e = shape["d"], shape["e"]
    heads, groups = shape["batch"] * shape["kv_heads"], shape["heads"] // shape["kv_heads"]
    scalars = {"s": scale, **Approximation(degree).values}
    basis = full(d, degree)
    block = chunk if chunk is not None else block_length(rank(basis), groups)
    q, k, v = (
        torch.zeros(heads, groups, shape["n_q"], d),
        torch.zeros(heads, shape["n_k"], d),
        torch.zeros(heads, shape["n_k"], e),
    )
    g, denominators = torch.zeros(heads, groups, shape["n_q"], e), torch.ones(heads, groups, shape["n_q"])

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = {"V": v, **move(q, k, scale, shift, chunk or 0).inputs}
        result = Evaluation(made.forward, inputs, scalars, basis, block).run()
        return result["O"], result["D"]

    def backward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(("Q", "K", "V", "G", "O", "D"), tensors, strict=True))
        moved = move(inputs["Q"], inputs["K"], scale, shift, chunk or 0)
        inputs.update(moved.inputs)
        names = ("dQ", "dK", "dV", *(["dB"] if "B" in moved.inputs else []))
        result = Evaluation(made.backward(names), inputs, scalars, basis, block).run()
        return result["dQ"], moved.key_gradient(result["dK"], result.get("dB"), scale), result["dV"]

    return make_fx(forward)(q, k, v), make_fx(backward)(q, k, v, g, torch.zeros_like(g), denominators)
