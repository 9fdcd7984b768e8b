"""Clustered attention under a causal mask: close to exact attention, and nothing depends on later tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sites import only_state
from sorts import call, exact, operands, relative, run

from polyattn.options import Options
from polyattn.rewriter.tiles.blocks import Blocks
from polyattn.rewriter.tiles.family import TYPICAL_SHARE
from polyattn.rewriter.tiles.near import NearPairs
from polyattn.runtime import execute, policy, registry, thresholds, tile_layout, tiled, tiled_call
from polyattn.site_plan import SitePlan

CHUNK = 128
"""Tokens of the shortest segment."""


def causal(inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """The first call of a site under a causal mask, of 8 segments."""
    return run(inputs, causal=True, **{"causal_chunk": CHUNK, **options})


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"heads": 4, "kv_heads": 2},
    "batch": {"batch": 3},
    "wide values": {"e": 17},
    "odd": {"n_q": 1021, "n_k": 1021, "d": 5, "e": 1},
    "a short last segment": {"n_q": 905, "n_k": 905},
    "wide heads": {"d": 40, "spread": 0.5},
}


def tokens(**shape: Any) -> list[torch.Tensor]:
    """Operands of 1,024 tokens or as many as are asked for."""
    return operands(**{"n_q": 1024, "n_k": 1024, **shape})


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_close(shape: str) -> None:
    inputs = tokens(**SHAPES[shape])
    out, wanted = causal(inputs), exact(inputs, causal=True)
    state = only_state()
    assert relative(out, wanted) < 0.05
    heads = state.now.heads
    assert all(head.error is not None and head.error <= 2e-2 for head in heads)
    assert all(head.threshold > 0 and head.share < 0.75 for head in heads)
    assert state.now.guarantee == "audited"
    mix = torch.randn(out.shape[-1], out.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.tanh(out.detach() @ mix)
    for x, y in zip(*(torch.autograd.grad(o, inputs, g) for o in (out, wanted)), strict=True):
        assert relative(x, y) < 0.15


def test_a_small_tolerance_is_exact_attention() -> None:
    inputs = tokens()
    out, wanted = causal(inputs, tolerance=1e-12), exact(inputs, causal=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-9)
    g = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(o, inputs, g) for o in (out, wanted)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8)


def plan_of(**options: Any) -> SitePlan:
    made = Options.make({"features": "clustered", "policy": "low_rank", "causal_chunk": CHUNK, **options})
    return SitePlan.of(made, True, 8**-0.5, 8, "cpu")


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_mixed_heads_and_blocks(seed: int) -> None:
    """Blocks of a head may be exact and others in tiles; with thresholds near 0 all are exact to rounding."""
    inputs = [x.detach() for x in tokens(heads=4, kv_heads=2)]
    plan, grouped = plan_of(), execute.grouped(*inputs)
    tau = (torch.rand(2, 63, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < 0.5) * 1e-13
    made = tiled.forward(grouped, plan, tiled.kept(tau))
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = exact(leaves, causal=True)
    torch.testing.assert_close(made.out.reshape(wanted.shape), wanted.detach(), rtol=0, atol=1e-9)
    g = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = tiled.backward(
        g.reshape(made.out.shape), grouped, made.out, made.denominators, plan, tau, ("dQ", "dK", "dV")
    )
    for x, y in zip(found.values(), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(x.reshape(y.shape), y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("at", [200, 511, 700, 1023])
@pytest.mark.parametrize("groups", [1, 2])
def test_nothing_depends_on_later_tokens(at: int, groups: int) -> None:
    inputs = [x.detach() for x in tokens(heads=2 * groups)]
    plan, tau = plan_of(), torch.full((2, 63), 0.05, dtype=torch.float64)
    other = [x.clone() for x in inputs]
    generator = torch.Generator().manual_seed(at)
    for x in other:
        x[:, :, at:] = 3 * torch.randn(x[:, :, at:].shape, generator=generator, dtype=torch.float64) + 1
    out, changed = (tiled.forward(execute.grouped(*some), plan, tiled.kept(tau)).out for some in (inputs, other))
    torch.testing.assert_close(out[:, :, :at], changed[:, :, :at], rtol=0, atol=1e-11)
    wanted = exact(inputs, causal=True).reshape(out.shape)
    assert float((out - wanted)[:, :, :at].norm()) > 1e-5  # it is not all exact


def test_a_threshold_of_its_own_for_every_block() -> None:
    inputs = tokens()
    causal(inputs)
    fit = only_state().now.fit
    assert fit is not None
    assert bool((fit.values[:, :7] >= 0).all())
    assert bool((fit.values[:, 3] > 0).all())  # the largest block
    assert bool((fit.values[:, 7:] == tiled_call.UNKNOWN).all())
    assert len(fit.values[0, :7].unique()) > 1


PADDINGS = {
    "right": torch.arange(1024) < torch.tensor([[600], [1024]]),
    "left": torch.arange(1024) >= torch.tensor([[300], [3]]),
    "holes": torch.rand(2, 1024, generator=torch.Generator().manual_seed(5)) < 0.7,
    "an element without keys": torch.arange(1024) < torch.tensor([[0], [900]]),
    "one key": torch.arange(1024) < torch.tensor([[1], [1024]]),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_key_padding(padding: str) -> None:
    inputs, keep = tokens(batch=2), PADDINGS[padding]
    out, wanted = causal(inputs, key_mask=keep), exact(inputs, keep, causal=True)
    assert only_state().now.verdict == "low_rank"
    assert relative(out, wanted) < 0.05
    g = torch.tanh(wanted.detach())
    found, expected = (torch.autograd.grad(o, inputs, g) for o in (out, wanted))
    for x, y in zip(found, expected, strict=True):
        assert relative(x, torch.nan_to_num(y)) < 0.15
    hidden = ~keep[:, None, :, None]
    assert not bool(found[1].masked_select(hidden).any())
    wild = [inputs[0], inputs[1].detach().masked_fill(hidden, 1e4), inputs[2].detach().masked_fill(hidden, -1e4)]
    torch.testing.assert_close(causal(wild, key_mask=keep), out.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = tokens(dtype=dtype)
    out = causal(inputs)
    assert out.dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = exact(wide, causal=True)
    assert relative(out.double(), wanted) < 0.05
    g = torch.tanh(wanted.detach())
    for x, y in zip(torch.autograd.grad(out, inputs, g.to(dtype)), torch.autograd.grad(wanted, wide, g), strict=True):
        assert x.dtype == dtype
        assert relative(x.double(), y) < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_finds_the_same_near_pairs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tokens(dtype=dtype)
    seen: list[list[torch.Tensor]] = []
    plain = NearPairs.__call__

    def watched(self: NearPairs, head: int, tiles: slice, values: Any) -> dict[str, torch.Tensor]:
        made = plain(self, head, tiles, values)
        seen[-1].append(made["M_near"])
        return made

    causal(inputs)
    monkeypatch.setattr(NearPairs, "__call__", watched)
    registry.reset()
    seen.append([])
    out = causal(inputs, audit_rows=0)
    seen.append([])
    out.float().square().sum().backward()
    forwards, backwards = seen
    assert len(forwards) == len(backwards) > 0
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_numbers_that_are_not_finite_go_where_exact_attention_sends_them(which: int, wrong: float) -> None:
    inputs = [x.detach() for x in tokens(dtype=torch.float32)]
    inputs[which][0, 0, 700, 2] = wrong
    out = causal(inputs)
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    # of the rows before that do not see it, torch's kernel makes as many NaN as it has in a block
    torch.testing.assert_close(out[:, 0, 700:], wanted[:, 0, 700:], equal_nan=True)
    clean = torch.isfinite(out[:, 0, :700])
    inputs[which][0, 0, 700, 2] = 0
    torch.testing.assert_close(out[:, 0, :700][clean], exact(inputs, causal=True)[:, 0, :700][clean])
    assert relative(out[:, 1], wanted[:, 1]) < 0.05
    assert [head.share == 1 for head in only_state().now.heads] == [True, False]


@pytest.mark.parametrize("case", ["equal tokens", "huge logits", "zero values", "one key dominates", "another text"])
def test_degenerate_heads(case: str) -> None:
    q, k, v = (x.detach() for x in tokens(dtype=torch.float32))
    if case == "equal tokens":
        q, k = q[:, :, :1].expand_as(q).contiguous(), k[:, :, :1].expand_as(k).contiguous()
    elif case == "huge logits":
        q = q * 300
    elif case == "zero values":
        v = torch.zeros_like(v)
    elif case == "another text":  # later tokens are like none of the earlier ones
        q[:, :, 512:], k[:, :, 512:] = 5 - q[:, :, 512:], -3 * k[:, :, 512:].flip(-1)
    else:
        k[:, :, 7] *= 40
    out, wanted = causal([q, k, v]), exact([q, k, v], causal=True)
    assert bool(torch.isfinite(out).all())
    unit = (v - v.mean(2, keepdim=True)).norm(dim=-1).amax().clamp_min(1e-6)
    assert float(((out - wanted).norm(dim=-1) / unit).flatten().quantile(0.98)) < 2.5e-2


def test_calls_repeat_and_leave_generators_alone() -> None:
    inputs, before = tokens(), torch.get_rng_state()
    assert torch.equal(causal(inputs), causal(inputs))
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_repeats_its_call() -> None:
    inputs = tokens()
    plain = torch.autograd.grad(causal(inputs).square().sum(), inputs)
    registry.reset()

    def f(*given: torch.Tensor) -> torch.Tensor:
        return call(list(given), causal=True, causal_chunk=CHUNK)

    out = torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), inputs)
    for x, y in zip(plain, again, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert only_state().now.counters.calls == 1


def test_short_calls_and_other_lengths_of_keys_are_exact() -> None:
    inputs = operands(n_q=100, n_k=100)
    torch.testing.assert_close(run(inputs, causal=True), exact(inputs, causal=True))
    assert "tiles need two segments of 128 tokens" in only_state().now.decision.reason
    inputs = operands(n_q=512, n_k=700)
    torch.testing.assert_close(run(inputs, causal=True), exact(inputs, causal=True))
    assert "512 queries and 700 keys has no form in tiles" in only_state().now.decision.reason


def test_a_site_that_has_seen_long_calls_takes_short_ones() -> None:
    causal(tokens())
    for n_q, n_k in ((100, 100), (700, 900)):
        inputs = operands(n_q=n_q, n_k=n_k)
        out, wanted = call(inputs, causal=True, causal_chunk=CHUNK), exact(inputs, causal=True)
        torch.testing.assert_close(out, wanted)
        g = torch.randn_like(wanted)
        for x, y in zip(*(torch.autograd.grad(o, inputs, g) for o in (out, wanted)), strict=True):
            torch.testing.assert_close(x, y)


def test_under_auto_segments_are_as_long_as_pays() -> None:
    plan = SitePlan.of(Options.make({"features": "clustered"}), True, 32**-0.5, 32, "cpu")
    shape = {"batch": 1, "heads": 2, "kv_heads": 2, "n_q": 1 << 17, "n_k": 1 << 17, "d": 32, "e": 32}
    state = policy.decide(shape, plan, Options.make({"features": "clustered"}))
    assert state.low_rank
    length = state.decision.plan.chunk
    assert thresholds.seconds(TYPICAL_SHARE, plan, length, length) < thresholds.PROMISING
    assert thresholds.seconds(TYPICAL_SHARE, plan, length // 2, length // 2) >= thresholds.PROMISING
    assert state.decision.flops_after < 0.5 * state.decision.flops_before


def test_fewer_pairs_are_exact_in_longer_calls() -> None:
    shares = []
    for n in (1024, 4096):
        causal([x.detach() for x in operands(n_q=n, n_k=n)])
        shares.append(max(head.share for head in only_state().now.heads))
    assert shares[1] < 0.6 * shares[0]


def test_weights_of_a_call_are_those_of_a_softmax() -> None:
    inputs = [x.detach() for x in tokens()]
    plan, grouped = plan_of(), execute.grouped(*inputs)
    tau = torch.full((2, 63), 0.1, dtype=torch.float64)
    ones = torch.ones(2, 1024, 1, dtype=torch.float64)
    torch.testing.assert_close(execute.for_values(grouped, ones, plan, tau), torch.ones(2, 1, 1024, 1).double())
    made = tiled.forward(grouped, plan, tiled.kept(tau))
    assert float(execute.exact_rows(grouped, plan, tau).double().mean()) < 0.1
    torch.testing.assert_close(execute.for_values(grouped, grouped[2], plan, tau), made.out)
    near = execute.near_pairs(grouped, plan, tau, None, 0)
    assert near is not None
    assert 0 < float(near.double().mean()) < 0.6
    largest = max(block.shape[1] for block in Blocks.of(1024, CHUNK).blocks)
    assert near.shape[1] == largest // tile_layout.family_of(plan).tile_width(largest)
