"""Activation checkpointing: what is run again takes the plan of its first run, counts as no call and is not audited."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites import all_states
from torch.utils.checkpoint import checkpoint

import polyattn
from polyattn.runtime import audit as auditing
from polyattn.runtime import policy, registry, replay

pytestmark = pytest.mark.usefixtures("fresh_compiler")

N, D = 192, 4
AUTO = {"audit_every": 1, "causal_chunk": 16}


def tokens(size: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(1, 1, N, D, dtype=torch.float64, generator=generator)).requires_grad_()


def attend(x: torch.Tensor) -> torch.Tensor:
    return polyattn.attention(x, 0.7 * x, x.sin(), options=AUTO)


def low_rank(x: torch.Tensor) -> torch.Tensor:
    return polyattn.attention(x, 0.7 * x, x.sin(), options={**AUTO, "policy": "low_rank"})


def exact(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, 0.7 * x, x.sin())


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(function(x).square().sum(), x)
    return found


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])


@REENTRANT
def test_a_recompute_takes_the_plan_of_its_first_run(reentrant: bool) -> None:
    x, large = tokens(), tokens(5.0, seed=1)
    first = checkpoint(attend, x, use_reentrant=reentrant).square().sum()
    (state,) = all_states()
    assert state.verdict == "low_rank"
    second = checkpoint(attend, large, use_reentrant=reentrant).square().sum()
    assert state.verdict == "exact"
    first.backward()
    second.backward()
    assert (state.calls, state.audits) == (2, 2)
    torch.testing.assert_close(x.grad, gradient(low_rank, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(large.grad, gradient(exact, large), rtol=0, atol=1e-10)
    assert float((gradient(low_rank, x) - gradient(exact, x)).abs().max()) > 1e-6, "the two plans can be told apart"


def test_equal_tensors_before_and_after_a_change_of_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    # Backward passes run in reverse order: the last call with these tensors is the first to be run again.
    x = tokens()
    first = checkpoint(attend, x, use_reentrant=False).square().sum()
    monkeypatch.setattr(auditing, "measure", lambda *args: policy.AuditErrors(1.0, 1.0))
    second = checkpoint(attend, x, use_reentrant=False).square().sum()
    assert [state.verdict for state in all_states()] == ["exact"]
    torch.autograd.backward([first, second])
    torch.testing.assert_close(x.grad, gradient(low_rank, x) + gradient(exact, x), rtol=0, atol=1e-12)


def test_a_recompute_is_never_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    audited: list[int] = []
    original = auditing.measure

    def counted(*args: Any) -> tuple[float, float]:
        audited.append(1)
        return original(*args)

    monkeypatch.setattr(auditing, "measure", counted)
    for _ in range(3):
        checkpoint(attend, tokens(), use_reentrant=False).sum().backward()
    assert len(audited) == 3
    assert [state.calls for state in all_states()] == [3]


def test_under_low_rank_and_exact_calls_are_counted_once() -> None:
    for chosen in ("low_rank", "exact"):
        registry.reset()

        def attention(x: torch.Tensor, policy: str = chosen) -> torch.Tensor:
            return polyattn.attention(x, x, x, options={"policy": policy, "audit_every": 1})

        for _ in range(2):
            checkpoint(attention, tokens(), use_reentrant=False).sum().backward()
        assert [state.calls for state in all_states()] == [2]


def test_a_model_that_a_hook_runs_is_no_recompute() -> None:
    x = tokens()
    out = attend(x)

    def run_again(g: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            attend(tokens(5.0, seed=7))
        return g

    out.register_hook(run_again)
    out.sum().backward()
    (state,) = all_states()
    assert (state.calls, state.audits, state.verdict) == (2, 2, "exact")


def test_backward_on_another_thread() -> None:
    x, large = tokens(), tokens(5.0, seed=1)
    first = checkpoint(attend, x, use_reentrant=False).square().sum()
    attend(large)
    thread = threading.Thread(target=first.backward)
    thread.start()
    thread.join()
    assert [state.calls for state in all_states()] == [2]
    torch.testing.assert_close(x.grad, gradient(low_rank, x), rtol=0, atol=1e-12)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(D, 3 * D, dtype=torch.float64)
        self.out = torch.nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


class Model(torch.nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_in_a_compiled_model(inner: str) -> None:
    x, large = tokens(), tokens(30.0, seed=1)
    plain = Model(checkpointed=False)
    options = {"inner": inner, "expect_sites": 2, **AUTO}
    reference = torch.compile(plain, backend="polyattn", options={**options, "policy": "low_rank"})
    wanted = torch.autograd.grad(reference(x).square().sum(), [x, *plain.parameters()])
    polyattn.reset()
    torch._dynamo.reset()

    model = Model(checkpointed=True)
    compiled = torch.compile(model, backend="polyattn", options=options)
    loss = compiled(x).square().sum()
    (report,) = polyattn.reports()
    assert [site.verdict for site in report.sites] == ["low_rank", "low_rank"]
    compiled(large)
    assert [site.verdict for site in report.sites] == ["exact", "exact"]
    found = torch.autograd.grad(loss, [x, *model.parameters()])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert [site.calls for site in report.sites] == [2, 2]
    assert [site.audits for site in report.sites] == [2, 2]

    exact_gradient = torch.autograd.grad(plain(x).square().sum(), [x])[0]
    assert float((wanted[0] - exact_gradient).abs().max()) > 1e-5, "the two plans can be told apart"


# -- the calls that are remembered -------------------------------------------------------------------------------------


def three(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, 33, 5, generator=generator).to(dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", list(replay.NEAR), ids=str)
def test_rounding_does_not_hide_a_call(dtype: torch.dtype) -> None:
    calls = replay.Calls()
    for seed in range(5):
        calls.add(seed % 2 == 0, None, *three(seed, dtype))
    for seed in range(5):
        noisy = [x * (1 + 2 * torch.finfo(dtype).eps) for x in three(seed, dtype)]
        found = calls.find(*noisy)
        assert found is not None
        assert found.low_rank is (seed % 2 == 0)
    assert calls.find(*three(9, dtype)) is None


def test_other_shapes_are_other_calls() -> None:
    calls = replay.Calls()
    q, k, v = three(0)
    calls.add(True, None, q, k, v)
    assert calls.find(q[:, :, :32], k, v) is None


def test_only_so_many_calls_are_remembered() -> None:
    calls = replay.Calls()
    for seed in range(replay.KEPT + 1):
        calls.add(True, None, *three(seed))
    assert calls.find(*three(0)) is None
    assert calls.find(*three(1)) is not None


def test_values_that_are_no_numbers_can_be_remembered() -> None:
    calls = replay.Calls()
    q, k, v = three(0)
    broken = [torch.full_like(q, value) for value in (math.nan, math.inf, 3e38)]
    calls.add(True, None, *broken)
    assert calls.find(*broken) is not None
    assert calls.find(q, k, v) is None
    calls.add(False, None, *(torch.zeros_like(x) for x in (q, k, v)))
    found = calls.find(*(torch.zeros_like(x) for x in (q, k, v)))
    assert found is not None
    assert not found.low_rank


def test_strided_tensors_give_the_same_fingerprint() -> None:
    q, k, v = three(0)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(replay.fingerprint(q, k, v), replay.fingerprint(*strided))


def test_no_backward_is_running_here() -> None:
    assert not replay.inside_backward()
