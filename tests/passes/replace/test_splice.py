"""Splicing replaces the site, keeps everything that others use, and needs no specialised size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from polyattn.passes import pipeline
from polyattn.runtime.ops import VERSION

OP = torch.ops.polyattn.attention.default
BACKWARD = torch.ops.polyattn.attention_backward.default


def spliced(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    results: list[pipeline.Result] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        from polyattn.options import Options

        key = Options(policy="exact").key()
        result = pipeline.run(
            gm, example_inputs, op=OP, backward_op=BACKWARD, graph_id="test", options=key, version=VERSION
        )
        results.append(result)
        return (result.graph or gm).forward

    torch._dynamo.reset()
    got = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-5)
    assert results[0].graph is not None, results[0].refusals
    return results[0].graph


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def softmax_attention(q, k, v):
    return ((q @ k.transpose(-2, -1)) * 0.3).masked_fill(
        torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, float("-inf")
    ).softmax(-1) @ v


def test_dropped_weights_are_not_drawn_a_second_time() -> None:
    results: list[pipeline.Result] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        results.append(
            pipeline.run(gm, example_inputs, op=OP, backward_op=BACKWARD, graph_id="test", options="", version="")
        )
        return gm.forward

    q = torch.randn(2, 3, 8, 4)
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]):
        torch.compile(lambda q: F.dropout((q @ q.mT).softmax(-1), 0.4, training=True) @ q, backend=backend)(q)
    (result,) = results
    assert result.graph is not None
    left = {str(target) for target in targets(result.graph)}
    assert "aten.scaled_dot_product_attention.default" in left
    assert not left & {"aten.softmax.int", "aten.matmul.default", "aten.dropout.default"}


def test_a_softmax_by_hand_that_is_no_attention_stays_by_hand() -> None:
    def function(q, k, v):
        e = q.exp()
        return softmax_attention(q, k, v), e / e.sum(-1, keepdim=True)

    q = torch.randn(2, 3, 8, 4)
    left = targets(spliced(function, q, q, q))
    assert torch.ops.aten.exp.default in left
    assert torch.ops.aten.softmax.int not in left


def test_torchs_own_attention_is_not_computed_a_second_time() -> None:
    q = torch.randn(2, 3, 8, 4)
    gm = spliced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, q, q)
    assert targets(gm).count(OP) == 1
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets(gm)


def test_nothing_of_the_old_spelling_remains() -> None:
    q = torch.randn(2, 3, 8, 4)
    gm = spliced(softmax_attention, q, q, q)
    assert targets(gm).count(OP) == 1
    left = {str(target) for target in targets(gm)}
    assert not left & {"aten.softmax.int", "aten.matmul.default", "aten.masked_fill.Scalar", "aten.tril.default"}


def test_four_dimensional_operands_are_passed_without_reshape() -> None:
    q = torch.randn(2, 3, 8, 4)
    gm = spliced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, q, q)
    assert torch.ops.aten.reshape.default not in targets(gm)


def test_what_others_use_stays() -> None:
    def function(q, k, v):
        mask = torch.ones(q.shape[-2], k.shape[-2]).tril()
        out = (q @ k.transpose(-2, -1)).masked_fill(mask == 0, float("-inf")).softmax(-1) @ v
        return out, mask

    q = torch.randn(2, 3, 8, 4)
    assert torch.ops.aten.tril.default in targets(spliced(function, q, q, q))


@pytest.mark.parametrize("shape", [(8, 4), (3, 8, 4), (2, 3, 8, 4), (2, 2, 3, 8, 4)], ids=str)
def test_ranks(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    spliced(softmax_attention, q, q, q)
    spliced(softmax_attention, q, q, q, dynamic=True)


def test_call_carries_scale_mask_owners_and_identifier() -> None:
    q = torch.randn(2, 3, 8, 4)
    gm = spliced(softmax_attention, q, q, q)
    (call,) = (node for node in gm.graph.nodes if node.target is OP)
    _, _, _, masks, owners, scale, causal, changes, differentiated, site, _, version = call.args
    assert (list(masks), changes) == ([], "softmax")
    assert (list(owners), scale, causal, site) == ([], 0.3, True, "test/0")
    assert version == VERSION
    assert differentiated is False  # no input requires a gradient
    assert "test_splice.py" in call.meta["stack_trace"]


def test_a_call_says_whether_gradients_may_be_asked_for() -> None:
    q = torch.randn(2, 3, 8, 4)
    weight = q.clone().requires_grad_()
    for inputs, grad, wanted in (
        ((q, q, weight), True, True),
        ((q, q, weight), False, False),
        ((q, q, q), True, False),
    ):
        with torch.set_grad_enabled(grad):
            gm = spliced(softmax_attention, *inputs)
        (call,) = (node for node in gm.graph.nodes if node.target is OP)
        assert call.args[8] is wanted


def test_view_of_an_output_with_other_strides() -> None:
    def function(q):
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    q = torch.randn(2, 8, 3, 4).transpose(1, 2)
    spliced(function, q)


def test_autocast_region_casts_operands() -> None:
    def function(q):
        with torch.autocast("cpu", torch.bfloat16):
            return (q @ q.transpose(-2, -1)).softmax(-1) @ q

    results: list[torch.dtype] = []
    q = torch.randn(2, 3, 8, 4)
    torch._dynamo.reset()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        result = pipeline.run(
            gm, example_inputs, op=OP, backward_op=BACKWARD, graph_id="t", options="{}", version=VERSION
        )
        assert result.graph is not None
        casts = [node for node in result.graph.graph.nodes if node.target is torch.ops.aten.to.dtype]
        results.extend(node.args[1] for node in casts)
        return gm.forward

    torch.compile(function, backend=backend, dynamic=False)(q)
    assert results == [torch.bfloat16] * 3
