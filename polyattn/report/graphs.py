"""Runnable aten graphs of a site's rewritten forward and backward, for the report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.target import block_length
from polyattn.runtime.centring import centre
from polyattn.site_plan import SitePlan


def possible(plan: SitePlan) -> bool:
    """True where :func:`graphs` can be made: nothing is fitted to the tensors of a call, or chosen from them."""
    return not (plan.family.fitted or plan.outliers or plan.projection)


def graphs(plan: SitePlan, shape: Mapping[str, int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Trace the rewritten forward (Q, K, V → O, D) and backward (Q, K, V, G, O, D → dQ, dK, dV) of a plan.

    Tensors are float32: Q [heads, groups, n_q, d], K [heads, n_k, d], V [heads, n_k, e], G and O [heads, groups, n_q,
    e], D [heads, groups, n_q], where heads are key heads of all batch elements. Loops over blocks stand unrolled.

    Args:
        plan: one of which graphs are :func:`possible`.
        shape: batch, heads, kv_heads, n_q, n_k, d and e.
    """
    from functorch import make_fx

    made, family, d, e = plan.kernels, plan.family, shape["d"], shape["e"]
    heads, groups = shape["batch"] * shape["kv_heads"], shape["heads"] // shape["kv_heads"]
    scalars = {"s": plan.scale, **family.bind(None, d).scalars}
    basis = family.basis(d)
    block = plan.chunk if plan.mask.chunked else block_length(family.features(d), groups)
    q, k, v = (
        torch.zeros(heads, groups, shape["n_q"], d),
        torch.zeros(heads, shape["n_k"], d),
        torch.zeros(heads, shape["n_k"], e),
    )
    g, denominators = torch.zeros(heads, groups, shape["n_q"], e), torch.ones(heads, groups, shape["n_q"])

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = {"V": v, **centre(q, k, plan).inputs}
        result = Evaluation(made.forward, inputs, scalars, basis, block).run()
        return result["O"], result["D"]

    def backward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(("Q", "K", "V", "G", "O", "D"), tensors, strict=True))
        centred = centre(inputs["Q"], inputs["K"], plan)
        inputs.update(centred.inputs)
        names = ("dQ", "dK", "dV", *(["dB"] if "B" in centred.inputs else []))
        result = Evaluation(made.backward(names), inputs, scalars, basis, block).run()
        return result["dQ"], centred.key_gradient(result["dK"], result.get("dB"), plan.scale), result["dV"]

    return make_fx(forward)(q, k, v), make_fx(backward)(q, k, v, g, torch.zeros_like(g), denominators)
