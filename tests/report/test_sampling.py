"""Samples of a call with key padding: hidden keys are not looked at, and errors are those of the visible ones."""

from __future__ import annotations

import torch
from dense import dense_family
from operands import operands
from sites import only_state

import polyattn
from polyattn.report.sampling import sample, with_gradients
from polyattn.runtime import registry


def test_key_padding() -> None:
    q, k, v, g = operands(2, 4, 2, 30, 30, 5, 3)
    q = (0.4 * q).detach().requires_grad_()
    keep = torch.rand(2, 30, generator=torch.Generator().manual_seed(3)) < 0.7
    registry.reset()
    out = polyattn.attention(q, k, v, key_mask=keep, options={"policy": "low_rank", "audit_rows": 0, "degree": 4})
    gradients = torch.autograd.grad(out, (q, k, v), g)
    state = only_state()
    assert not state.exact_rows
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(x.detach() for x in (q, k, v))
    taken = sample(0, tensors, out.detach(), state.plan, None, 40, generator, keep)  # type: ignore[arg-type]
    batch = taken.rows[taken.row, 0]
    assert bool(keep[batch, taken.key].all())
    dense = dense_family(q, k, v, state.plan, None, keep).detach()
    scores = (q @ k.repeat_interleave(2, 1).mT / 5**0.5).masked_fill(~keep[:, None, None], -torch.inf)
    exact = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).detach()
    wanted = (dense - exact).norm(dim=-1)[tuple(taken.rows.T)]
    centred = torch.stack([v[b][:, keep[b]] - v[b][:, keep[b]].mean(1, keepdim=True) for b in (0, 1)][:1])
    unit = centred.norm(dim=-1).amax(-1)[0].repeat_interleave(2)  # of the first batch element, by head
    first = taken.rows[:, 0] == 0
    torch.testing.assert_close(taken.errors[first], (wanted / unit[taken.rows[:, 1]])[first])
    weights = scores.softmax(-1)[(*taken.rows[taken.row].T, taken.key)].detach()
    torch.testing.assert_close(taken.exact, weights)
    assert float((taken.approximate - taken.exact).abs().max()) < 1e-2
    made = with_gradients(taken, g, (q, k, v), gradients, state.plan, generator, keep)
    assert max(made.gradients.values()) < 0.02
    blind = with_gradients(taken, g, (q, k, v), gradients, state.plan, generator)
    assert max(blind.gradients.values()) > 0.1, "with all keys these are other gradients"
