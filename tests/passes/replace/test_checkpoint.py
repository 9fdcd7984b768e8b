"""Activation checkpointing: checkpointed bodies are rewritten, and run again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import compile_and_report, gradients, rand, refused
from regions import (
    KEEP,
    B,
    H,
    M,
    N,
    biased,
    causal,
    check,
    masked,
    plain,
    qkv,
)
from torch.utils.checkpoint import checkpoint

from polyattn.passes import pipeline
from polyattn.runtime import exact


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)


BODIES: dict[str, tuple[Callable[..., Any], list[torch.Tensor], tuple[str, ...], int]] = {
    # body, further inputs, masks of the sites, how many of them are the operator
    "plain": (plain, [], ("none",), 1),
    "causal": (causal, [], ("causal",), 1),
    "masked": (masked, [KEEP], ("key padding",), 0),
    "bias": (biased, [rand(H, N, M)], ("bias",), 0),
    "two": (lambda q, k, v: plain(q, k, causal(k, k, v)), [], ("causal", "none"), 2),
    "masked and plain": (lambda q, k, v, keep: plain(q, k, masked(k, k, v, keep)), [KEEP], ("key padding", "none"), 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_checkpointed_bodies_are_rewritten_and_run_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, more, masks, count = BODIES[name]
    graphs: list[Any] = []
    run = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *args, **how: (graphs.append(run(*args, **how)), graphs[-1])[1])
    check(checkpointed(body), [*qkv(B, H), *more], *masks)
    rewritten = graphs[0].graph
    assert (rewritten is None) == all("stays as it was" in site.exact for _, site in graphs[0].sites)
    if rewritten is not None:
        (call,) = rewritten.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
        )
        assert call.kwargs["use_reentrant"] is False
        inner = getattr(rewritten, str(call.args[0].target))
        assert [n.target for n in inner.graph.nodes].count(torch.ops.polyattn.attention.default) == count


@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "plain"])
def test_a_checkpoint_recomputes_in_the_backward(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(exact, name)
        return lambda *args: (calls.append(name), original(*args))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(exact, name, counted(name))
    inputs = qkv(B, H)
    out = compile_and_report(checkpointed(causal) if again else causal)[0](*inputs)
    assert calls == ["forward"]
    gradients(out, inputs)
    assert calls == ["forward", *["forward"] * again, "backward"]


def test_a_checkpointed_near_miss_is_refused() -> None:
    assert "axis -2" in refused(checkpointed(lambda q, k, v: (q @ k.mT).softmax(-2) @ v), qkv(B, H))
