"""``features="auto"``: a polynomial while its audits hold, then tiles where they are faster, then exact attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sites import only_state
from sorts import tiles_pay
from torch.utils.checkpoint import checkpoint

import polyattn
from polyattn.options import Options
from polyattn.rewriter.families.registry import families
from polyattn.runtime import policy, registry

N, D = 2048, 8


@pytest.fixture(autouse=True)
def _tiles_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tiles paid at these lengths, as they do at longer ones."""
    tiles_pay(monkeypatch)
    registry.reset()


def operands(size: float, seed: int = 0) -> list[torch.Tensor]:
    """Tokens of sixteen sorts; ``size`` is that of queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    centres = size * torch.randn(16, D, generator=generator)
    values = torch.randn(16, D, generator=generator)
    q, k, v = (
        table[torch.randint(16, (1, 2, N), generator=generator)] + 0.1 * torch.randn(1, 2, N, D, generator=generator)
        for table in (centres, centres, values)
    )
    return [q, k, v]


def call(inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
    causal = options.pop("causal", False)
    return polyattn.attention(*inputs, causal=causal, options=options)


def exact(inputs: list[torch.Tensor], causal: bool = False) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return float((x - y).norm() / y.norm()) < 0.05


def test_small_logits_have_a_polynomial() -> None:
    inputs = operands(0.3)
    out = call(inputs)
    assert only_state().now.plan.family.name == "polynomial"
    assert only_state().now.low_rank
    assert close(out, exact(inputs))


def test_sharp_heads_have_tiles_from_the_first_call() -> None:
    inputs = operands(1.6)
    out = call(inputs)
    state = only_state().now
    assert (state.low_rank, state.plan.family.name) == (True, "clustered")
    assert "degree 2: audit of call 1" in state.decision.reason
    assert close(out, exact(inputs))
    assert all(head.share < 1 for head in state.heads)


def test_a_site_changes_its_form_as_its_logits_grow() -> None:
    names = []
    for number, size in enumerate((0.3, 0.3, 1.6, 1.6)):
        inputs = operands(size, number)
        out = call(inputs, audit_every=1)
        names.append(only_state().now.plan.family.name)
        assert close(out, exact(inputs))
    assert names == ["polynomial", "polynomial", "clustered", "clustered"]


def test_a_change_of_form_compiles_nothing_again() -> None:
    torch._dynamo.reset()

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(f, backend="polyattn", options={"audit_every": 1, "inner": "eager"})
    for size in (0.3, 1.6):
        inputs = operands(size)
        assert close(compiled(*inputs), exact(inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_recomputation_takes_the_form_of_its_call() -> None:
    first = [x.requires_grad_() for x in operands(0.3)]
    options = {"audit_every": 1}

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return polyattn.attention(*tensors, options=options)

    plain = torch.autograd.grad(attend(*first).square().sum(), first)
    registry.reset()
    loss = checkpoint(attend, *first, use_reentrant=False).square().sum()
    attend(*(x.requires_grad_() for x in operands(1.6)))  # the site changes its form before the backward
    assert only_state().now.plan.family.name == "clustered"
    for x, y in zip(torch.autograd.grad(loss, first), plain, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_heads_without_structure_are_exact_in_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [2 * torch.randn(1, 2, N, D, generator=generator) for _ in range(3)]
    torch.testing.assert_close(call(inputs), exact(inputs))
    state = only_state().now
    assert not state.low_rank
    assert "too many near pairs" in state.decision.reason
    assert "degree 2: audit" in state.decision.reason


def test_a_causal_site_has_both_forms_too() -> None:
    inputs = operands(1.6)
    out, wanted = call(inputs, causal=True), exact(inputs, True)
    state = only_state().now
    assert (state.low_rank, state.plan.family.name) == (True, "clustered")
    assert "degree 2: audit" in state.decision.reason
    assert float((out - wanted).norm() / wanted.norm()) < 0.05
    assert float((out - wanted).norm()) > 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["polynomial", "clustered"]),
        ({"degree": 2}, ["polynomial"]),
        ({"rank": 561, "degree": 4}, ["polynomial"]),
        ({"polynomial": "least_squares"}, ["polynomial"]),
        ({"local_window": 64}, ["polynomial"]),
        ({"outlier_keys": 3}, ["polynomial"]),
        ({"gradient": "substituted"}, ["polynomial"]),
        ({"features": "clustered"}, ["clustered"]),
        ({"features": "skeleton"}, ["skeleton"]),
    ],
)
def test_which_families_options_ask_for(options: dict[str, Any], names: list[str]) -> None:
    assert [family.name for family in families(Options.make(options))] == names


def test_under_low_rank_the_polynomial_stays() -> None:
    """For those who train through the approximation: its error is reported."""
    call(operands(1.6), policy="low_rank")
    state = only_state().now
    assert (state.low_rank, state.plan.family.name) == (True, "polynomial")
    assert state.audit.error is not None
    assert state.audit.error > 2e-2


def test_a_form_that_is_not_tried_is_not_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the first form is taken, nor where tiles would not pay at the length: a derivation takes long."""
    asked = []
    costs = policy.costs
    monkeypatch.setattr(policy, "costs", lambda shape, plan: asked.append(plan.family.name) or costs(shape, plan))
    call(operands(0.3))
    registry.reset()
    tiles_pay(monkeypatch, fixed=1e9)
    call([x[:, :, :64] for x in operands(0.3)])
    assert asked == ["polynomial", "polynomial"]
