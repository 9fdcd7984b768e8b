"""Clustered attention at run time: outputs and gradients within their tolerances, head by head, or exact."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sites import only_state
from sorts import LOW, call, exact, operands, relative, run, tiles_pay

import polyattn
from polyattn.errors import OptionValueError
from polyattn.options import Options
from polyattn.rewriter.tiles.blocks import Blocks
from polyattn.runtime import execute, policy, registry, tile_check, tile_layout, tiled, tiled_call
from polyattn.runtime.tile_layout import Layout
from polyattn.site_plan import SitePlan

SHAPES: dict[str, dict[str, int]] = {
    "plain": {},
    "grouped queries": {"heads": 4, "kv_heads": 2},
    "cross attention": {"n_q": 300, "n_k": 777},
    "batch": {"batch": 3, "n_q": 256, "n_k": 256},
    "wide values": {"e": 17},
    "odd": {"n_q": 509, "n_k": 391, "d": 5, "e": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_close(shape: str) -> None:
    inputs = operands(**SHAPES[shape])
    out, wanted = run(inputs), exact(inputs)
    state = only_state()
    assert relative(out, wanted) < 0.05
    assert all(head.error is not None and head.error <= 2e-2 for head in state.now.heads)
    assert state.now.guarantee == "audited"
    mix = torch.randn(out.shape[-1], out.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.tanh(out.detach() @ mix)
    # outputs are checked by every call, gradients are not: they err a few times as much
    for x, y in zip(*(torch.autograd.grad(o, inputs, g) for o in (out, wanted)), strict=True):
        assert relative(x, y) < 0.15


def test_fewer_pairs_are_exact_than_all() -> None:
    inputs = operands(n_q=2048, n_k=2048)
    run(inputs)
    shares = [head.share for head in only_state().now.heads]
    assert max(shares) < 0.3


def test_a_small_tolerance_is_exact_attention() -> None:
    inputs = operands()
    out, wanted = run(inputs, tolerance=1e-12), exact(inputs)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-9)
    g = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(o, inputs, g) for o in (out, wanted)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8)


PADDINGS = {
    "right": torch.arange(512) < torch.tensor([[300], [512]]),
    "left": torch.arange(512) >= torch.tensor([[120], [3]]),
    "holes": torch.rand(2, 512, generator=torch.Generator().manual_seed(5)) < 0.7,
    "an element without keys": torch.arange(512) < torch.tensor([[0], [400]]),
    "one key": torch.arange(512) < torch.tensor([[1], [512]]),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_key_padding(padding: str) -> None:
    inputs, keep = operands(batch=2), PADDINGS[padding]
    out, wanted = run(inputs, key_mask=keep), exact(inputs, keep)
    assert relative(out, wanted) < 0.05
    g = torch.tanh(wanted.detach())
    found = torch.autograd.grad(out, inputs, g)
    expected = torch.autograd.grad(wanted, inputs, g)
    for x, y in zip(found, expected, strict=True):
        assert relative(x, torch.nan_to_num(y)) < 0.1
    hidden = ~keep[:, None, :, None]
    assert not bool(found[1].masked_select(hidden).any())
    wild = [inputs[0], inputs[1].detach().masked_fill(hidden, 1e4), inputs[2].detach().masked_fill(hidden, -1e4)]
    torch.testing.assert_close(run(wild, key_mask=keep), out.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = operands(dtype=dtype)
    out = run(inputs)
    assert out.dtype == dtype
    assert relative(out.double(), exact([x.double() for x in inputs])) < 0.05
    assert all(x.dtype == dtype for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_numbers_that_are_not_finite_go_where_exact_attention_sends_them(which: int, wrong: float) -> None:
    inputs = [x.detach() for x in operands(dtype=torch.float32)]
    inputs[which][0, 0, 5, 2] = wrong
    out, wanted = run(inputs), exact(inputs)
    torch.testing.assert_close(out[:, 0], wanted[:, 0], equal_nan=True)
    assert relative(out[:, 1], wanted[:, 1]) < 0.05
    assert [head.share == 1 for head in only_state().now.heads] == [True, False]


@pytest.mark.parametrize("case", ["equal tokens", "huge logits", "zero values", "one key dominates"])
def test_degenerate_heads(case: str) -> None:
    q, k, v = (x.detach() for x in operands(dtype=torch.float32))
    if case == "equal tokens":
        q, k = q[:, :, :1].expand_as(q).contiguous(), k[:, :, :1].expand_as(k).contiguous()
    elif case == "huge logits":
        q = q * 300
    elif case == "zero values":
        v = torch.zeros_like(v)
    else:
        k[:, :, 7] *= 40
    out, wanted = run([q, k, v]), exact([q, k, v])
    assert bool(torch.isfinite(out).all())
    unit = (v - v.mean(2, keepdim=True)).norm(dim=-1).amax().clamp_min(1e-6)
    assert float(((out - wanted).norm(dim=-1) / unit).flatten().quantile(0.98)) < 2.5e-2


def test_calls_repeat_and_leave_generators_alone() -> None:
    inputs = operands()
    before = torch.get_rng_state()
    first, second = run(inputs), run(inputs)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_a_scale_of_its_own() -> None:
    inputs = operands(spread=0.1)
    for scale in (0.05, 1.0, -0.3):
        assert relative(run(inputs, scale=scale), exact(inputs, scale=scale)) < 0.05


@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_order(order: int) -> None:
    inputs = operands()
    assert relative(run(inputs, degree=order), exact(inputs)) < 0.05


def test_a_width_of_its_own() -> None:
    inputs = operands()
    assert relative(run(inputs, rank=32), exact(inputs)) < 0.05
    plan = only_state().plan
    assert plan.family.tile_width(512) == 32


# -- thresholds ------------------------------------------------------------------------------------------------------


def plan_of(**options: Any) -> SitePlan:
    return SitePlan.of(Options.make({**LOW, **options}), False, 8**-0.5, 8, "cpu")


def test_a_check_predicts_the_errors_of_the_call() -> None:
    inputs = [x.detach() for x in operands(n_q=2048, n_k=2048)]
    plan, grouped = plan_of(), execute.grouped(*inputs)
    layout = Layout.of(grouped, plan, None)
    block = Blocks.whole(2048, 2048).blocks[0]
    step = tiled.Step(0, block, grouped, None, plan, grouped[2], grouped[1], None)
    check = tile_check.Check(step, 2, torch.Generator().manual_seed(0))
    wanted = exact(inputs)[0]
    for tau in (3e-3, 3e-2, 0.3):
        errors = check.errors(torch.full((2,), tau, dtype=torch.float64))
        made = tile_layout.approximate(layout, plan, torch.full((2,), tau, dtype=torch.float64), 2048, grouped[2])
        difference = made.out[:, 0] - wanted
        true = difference.flatten(1).norm(dim=1) / (wanted - inputs[2][0].mean(1, keepdim=True)).flatten(1).norm(dim=1)
        assert torch.allclose(errors.relative, true, rtol=0.5, atol=1e-4)
        assert torch.allclose(errors.share, made.share.double(), atol=0.1)


def test_a_threshold_that_does_not_hold_is_lowered_until_it_does() -> None:
    inputs = operands()
    run(inputs, tolerance=1e-3)
    entry = registry.entries()[-1]
    entry.state = policy.thresholds_kept(entry.state, policy.Fit(torch.full((2, 1), 50.0, dtype=torch.float64), call=1))
    out = call(inputs, tolerance=1e-3)
    assert all(head.error <= 1e-3 for head in entry.state.heads if head.error is not None)
    assert relative(out, exact(inputs)) < 0.01


def test_a_threshold_with_room_is_raised_for_the_next_call() -> None:
    inputs = operands()
    run(inputs)
    entry = registry.entries()[-1]
    low = torch.full((2, 1), 1e-4, dtype=torch.float64)
    entry.state = policy.thresholds_kept(entry.state, policy.Fit(low, call=1))
    call(inputs)
    assert entry.state.fit is not None
    assert bool((entry.state.fit.values > low).all())


def test_heads_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without structure is exact, the others are not: there is no verdict for a layer."""
    tiles_pay(monkeypatch)
    inputs = [x.detach() for x in operands(heads=4, kv_heads=4, n_q=1024, n_k=1024)]
    generator = torch.Generator().manual_seed(0)
    for x in inputs:
        x[:, 1] = 2 * torch.randn(x[:, 1].shape, generator=generator)
    out = run(inputs, policy="auto")
    heads = only_state().now.heads
    assert [head.threshold == 0 for head in heads] == [False, True, False, False]
    torch.testing.assert_close(out[:, 1], exact(inputs)[:, 1])
    assert relative(out, exact(inputs)) < 0.05


def test_an_exact_head_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_pay(monkeypatch)
    monkeypatch.setattr(tiled_call, "RECONSIDERED", 3)
    good = [x.detach() for x in operands(n_q=1024, n_k=1024)]
    bad = [x.clone() for x in good]
    for x in bad:
        x[:, 1] = 2 * torch.randn(x[:, 1].shape, generator=torch.Generator().manual_seed(0))
    run(bad, policy="auto")
    seen = []
    for _ in range(2):
        call(good, policy="auto")
        seen.append([head.threshold > 0 for head in only_state().now.heads])
    assert seen == [[True, False], [True, True]]


def test_a_site_of_heads_without_structure_becomes_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_pay(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    inputs = [2 * torch.randn(1, 2, 1024, 8, generator=generator) for _ in range(3)]
    out = run(inputs, policy="auto")
    torch.testing.assert_close(out, exact(inputs))
    state = only_state()
    assert state.now.verdict == "exact"
    assert "2 of 2 heads have too many near pairs" in state.now.decision.reason


def test_short_calls_are_exact_at_once() -> None:
    inputs = operands()
    out = run(inputs, policy="auto")
    torch.testing.assert_close(out, exact(inputs))
    assert "times as long as exact attention at this length" in only_state().now.decision.reason


def test_without_audits() -> None:
    inputs = operands()
    assert relative(run(inputs, audit_rows=0), exact(inputs)) < 0.1
    assert only_state().now.guarantee == "none"


# -- where it is used ------------------------------------------------------------------------------------------------


def test_a_checkpoint_repeats_its_call() -> None:
    inputs = operands()
    options = {**LOW, "seed": 3}

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        return polyattn.attention(*tensors, options=options)

    registry.reset()
    plain = torch.autograd.grad(f(*inputs).square().sum(), inputs)
    registry.reset()
    out = torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), inputs)
    for x, y in zip(plain, again, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert only_state().now.counters.calls == 1


@pytest.mark.parametrize("causal", [False, True])
def test_a_reentrant_checkpoint_repeats_its_call(causal: bool) -> None:
    """Its first run is without gradients, and the second is not a call of its own."""
    inputs = operands(n_q=1024, n_k=1024)
    registry.reset()

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        return call([2 * tensors[0], tensors[1], tensors[2]], causal=causal)

    out = torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=True)
    out.square().sum().backward()
    assert [entry.state.counters.calls for entry in registry.entries()] == [1, 0]
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = exact([2 * leaves[0], leaves[1], leaves[2]], causal=causal)
    assert relative(out, wanted) < 0.1
    for x, y in zip(inputs, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        assert x.grad is not None
        assert relative(x.grad, y) < 0.25


def test_where_gradients_are_wanted_more_pairs_are_exact() -> None:
    """Gradients err more than outputs, and are not asked for in inference: each has a state of its own."""
    inputs = operands(n_q=2048, n_k=2048, spread=0.4)
    registry.reset()
    training = call(inputs, tolerance=1.0)
    with torch.no_grad():
        inference = call(inputs, tolerance=1.0)
    shares = [max(head.share for head in entry.state.heads) for entry in registry.entries()]
    assert [entry.key.differentiated for entry in registry.entries()] == [True, False]
    assert shares[1] < 0.8 * shares[0]
    wanted = exact(inputs)
    assert relative(training, wanted) < relative(inference, wanted) < 0.1


class Model(torch.nn.Module):
    """One layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, n, 16] → the same."""
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_in_a_compiled_model_with_its_report() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 400, 16)
    torch._dynamo.reset()
    polyattn.reset()
    compiled = torch.compile(model, backend="polyattn", options={**LOW, "inner": "eager"})
    out, wanted = compiled(x), model(x)
    assert relative(out, wanted) < 0.05
    out.square().sum().backward()
    (site,) = polyattn.reports()[-1].sites
    assert (site.verdict, site.features) == ("low_rank", "clustered")
    assert len(site.states[0].heads) == 2
    assert site.flops_after is not None
    assert "exact pairs" in str(polyattn.reports()[-1])


def test_explain_draws_and_derives() -> None:
    torch.manual_seed(0)
    report = polyattn.explain(Model(), torch.randn(1, 300, 16), options=LOW)
    (site,) = report.sites
    assert site.samples
    assert "KP[I,J,a] = Σ_j" in str(site.derivation)
    assert "near.nonzero" in site.kernels["forward.cpu"]
    assert site.kernels["forward.triton"].startswith("# no code for this target")


def test_weights_of_a_call_are_those_of_a_softmax() -> None:
    inputs = [x.detach() for x in operands(n_q=256, n_k=256)]
    plan, grouped = plan_of(), execute.grouped(*inputs)
    tau = torch.full((2, 1), 0.1, dtype=torch.float64)
    ones = torch.ones(2, 256, 1, dtype=torch.float64)
    torch.testing.assert_close(execute.for_values(grouped, ones, plan, tau), torch.ones(2, 1, 256, 1).double())
    made = tiled.forward(grouped, plan, tiled.kept(tau))
    kept = ~execute.exact_rows(grouped, plan, tau)
    assert float(kept.double().mean()) > 0.9
    torch.testing.assert_close(execute.for_values(grouped, grouped[2], plan, tau)[kept], made.out[kept])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"degree": 3}, "0, 1 or 2"),
        ({"rank": 4}, "from 8 to 1024"),
        ({"polynomial": "minimax"}, "has none"),
        ({"local_window": 64}, "near pairs are found"),
        ({"outlier_keys": 4}, "near where it matters"),
        ({"exact_keys": (0,)}, "near where it matters"),
        ({"gradient": "substituted"}, "consistent"),
    ],
)
def test_options_that_do_not_apply(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionValueError, match=match):
        Options.make({**LOW, **options})


def test_the_figure_has_a_map_of_near_pairs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    report = polyattn.explain(Model(), torch.randn(1, 300, 16), options={**LOW, "tolerance": 1e-3})
    (samples,) = report.sites[0].samples
    assert samples.near is not None
    share = float(samples.near.double().mean())
    assert 0 < share <= 1
    (path,) = report.plot(tmp_path)
    assert "near pairs of tiles" in path.read_text(encoding="utf-8")
    assert len(report.sites[0].to_dict()["heads"]) == 2


MEMORY = """
import resource, sys, torch, polyattn
generator = torch.Generator().manual_seed(0)
n = int(sys.argv[1])
centres, values = (torch.randn(64, 32, generator=generator) for _ in range(2))
q, k, v = (
    table[torch.randint(64, (1, 4, n), generator=generator)] + 0.1 * torch.randn(1, 4, n, 32, generator=generator)
    for table in (centres, centres, values)
)
def run(*tensors):
    return polyattn.attention(*tensors, options={"features": "clustered", "policy": "low_rank"})
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
some = [x[:, :, :2048].clone().requires_grad_() for x in (q, k, v)]
run(*some).sum().backward()
before, unit = peak(), 4 * q.numel() * q.element_size()
with torch.no_grad():
    run(q, k, v)
forward = (peak() - before) / unit
for x in (q, k, v): x.requires_grad_()
run(q, k, v).sum().backward()
print(forward, (peak() - before) / unit)
"""


@pytest.mark.long
def test_peak_memory_at_65536_tokens() -> None:
    """In bytes of q, k, v and o of four heads: up to 3.5 for a first forward with its search, and 6 with a backward."""
    done = subprocess.run([sys.executable, "-c", MEMORY, "65536"], capture_output=True, text=True, check=True)
    forward, both = map(float, done.stdout.split())
    assert forward < 3.5
    assert both < 6
