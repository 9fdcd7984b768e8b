"""What the report shows of a site is what ran: its graphs, and the operations that it counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polyattn
from polyattn.passes.forms import softmax_form
from polyattn.passes.kernels import exact_plan, kernels
from polyattn.rewriter import expr as ir
from polyattn.rewriter.plan import flops


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=0.9)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_graphs_of_a_report_compute_what_ran(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 1, 70, 4, generator=generator) for _ in range(4))
    options = {"policy": "low_rank", "causal_chunk": 16, "audit_rows": 8}
    (site,) = polyattn.explain(Attention(causal), q, k, v, options=options).sites
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ran = polyattn.attention(*inputs, causal=causal, scale=0.9, options=options)
    gradients = torch.autograd.grad(ran, inputs, g)
    with torch.no_grad():
        assert site.forward_graph is not None
        assert site.backward_graph is not None
        out, denominators = site.forward_graph(q, k[0], v[0])
        shown = site.backward_graph(q, k[0], v[0], g, out, denominators)
    torch.testing.assert_close(out.view_as(ran), ran.detach(), rtol=0, atol=1e-5)
    for x, y in zip(shown, gradients, strict=True):
        torch.testing.assert_close(x.view_as(y), y, rtol=0, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flops_after_are_those_of_every_tile_that_runs(causal: bool, gradient: str) -> None:
    from polyattn.guard import symbolic_costs

    made = kernels(causal, 2, gradient)
    specs = (made.forward, made.backward(("dQ", "dK", "dV")))
    ran = sum(flops(n, causal) for spec in specs for loop in spec.loops for n in (*loop.tiles, *loop.accumulate))
    sizes = {ir.N_Q: 4096, ir.N_K: 4096, ir.D: 32, ir.E: 32, ir.CHUNK: 512, ir.R: 561, ir.R1: 33}
    assert symbolic_costs(causal, 2, gradient)[1].subs(sizes) == ran.subs(sizes)
    assert symbolic_costs(causal, 2, gradient)[1].subs(sizes) >= made.plan.cost().subs(sizes)


def test_flops_before_are_those_of_flash_attention() -> None:
    """4 n² d forward and 10 n² d backward, which recomputes the scores (math.md §7), half of it under a causal mask."""
    from polyattn.guard import symbolic_costs

    for causal, share in ((False, 1), (True, 2)):
        before = symbolic_costs(causal, 2, "consistent")[0].subs({ir.N_K: ir.N_Q, ir.E: ir.D})
        assert before.expand().coeff(ir.N_Q, 2).coeff(ir.D, 1) * share == 14
    assert exact_plan(softmax_form(False)).token_degree() == 2
