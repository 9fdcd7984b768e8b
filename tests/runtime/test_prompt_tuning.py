"""Prompt tuning of a compiled model: all parameters frozen but the prompt; what it does not need is not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import dense_polynomial
from torch import nn

from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.monomials import full, rank
from polyattn.runtime import execute

pytestmark = pytest.mark.usefixtures("fresh_compiler")

WIDTH, HEADS, TOKENS, PROMPT = 16, 2, 40, 24
HEAD = WIDTH // HEADS


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)


class Reader(nn.Module):
    """Attention of one sequence to another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(y)), heads(self.v(y)))
        return x + mixed.transpose(1, 2).flatten(-2)


class Model(nn.Module):
    """Tokens read a prompt, then themselves: the first layer's queries do not depend on the prompt."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.prompt = nn.Parameter(torch.randn(1, PROMPT, WIDTH))
            self.first, self.second = Reader(), Reader()
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x, self.prompt.expand(len(x), -1, -1))
        return self.second(x, x)


def frozen(model: Model) -> Model:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "prompt")
    return model


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return dense_polynomial(q, k, v, 2, False, 1, False, "call")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Counter:
    """FLOPs of the specifications that ran, and which gradients they had to make."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flops, self.wanted = 0, []
        self.original: Callable[..., Any] = execute.targets.run
        monkeypatch.setattr(execute.targets, "run", self.run)

    def run(self, spec: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
        made = self.original(spec, inputs, *rest)
        if spec.name == "backward":
            self.wanted.append(tuple(sorted(made)))
            q, k = inputs["Q"], inputs["K"]
            sizes = {
                ir.N_Q: q.shape[1] * q.shape[2], ir.N_K: k.shape[1], ir.D: HEAD, ir.E: HEAD,
                ir.R: rank(full(HEAD, 2)), ir.R1: rank(full(HEAD, 1)),
            }  # fmt: skip
            self.flops += int(spec.cost().subs(sizes)) * q.shape[0]
        return made


def compiled(model: Model, inner: str) -> Callable[[torch.Tensor], torch.Tensor]:
    options = {"policy": "low_rank", "inner": inner, "expect_sites": 2, "audit_rows": 0}
    made: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model, backend="polyattn", options=options)
    return made


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_only_what_the_prompt_needs_is_computed(
    inner: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen(Model())
    counter = Counter(monkeypatch)
    loss = compiled(model, inner)(tokens).square().mean()
    loss.backward()
    assert counter.wanted == [("dB", "dK", "dQ", "dV"), ("dB", "dK", "dV")], "second layer, then the first without dQ"
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["prompt"]
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", dense)
        (wanted,) = torch.autograd.grad(model(tokens).square().mean(), [model.prompt])
    torch.testing.assert_close(model.prompt.grad, wanted, rtol=0, atol=1e-9)


def test_it_costs_less_than_training_everything(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for model in (Model(), frozen(Model())):
        torch._dynamo.reset()
        counter = Counter(monkeypatch)
        compiled(model, "eager")(tokens).square().mean().backward()
        counts.append(counter.flops)
    everything, prompt = counts
    assert 0 < prompt < 0.9 * everything, "dQ of the first layer is gone"


def test_frozen_keys_and_values_leave_queries_alone(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch)
    reader = Reader().double().requires_grad_(False)
    x = tokens.clone().requires_grad_()
    options = {"policy": "low_rank", "inner": "eager"}
    torch.compile(reader, backend="polyattn", options=options)(x, tokens).square().mean().backward()
    assert counter.wanted == [("dQ",)]
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", dense)
        (wanted,) = torch.autograd.grad(reader(x, tokens).square().mean(), [x])
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=1e-9)
