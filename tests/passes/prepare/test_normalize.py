"""Normalisation keeps meaning, source lines, symbolic sizes, regions and checkpoint bodies, and leaves its input
alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from polyattn.passes.prepare.normalize import checkpoint_body, functionalize_fresh, normalize


def normalised(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    """The normalised graph of a function; it is checked to compute what the function computes."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before = str(gm.graph)
        graphs.append(normalize(gm, example_inputs))
        assert str(gm.graph) == before, "the input graph was changed"
        return graphs[-1].forward

    torch._dynamo.reset()
    got = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    torch.testing.assert_close(got, function(*inputs))
    return graphs[0]


def names(graph: fx.Graph) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if node.op == "call_function"]


def test_aten_operators_with_source_lines_and_values() -> None:
    gm = normalised(lambda x: torch.softmax(x @ x.T, dim=-1) @ x, torch.randn(4, 3))
    assert "softmax.int" in names(gm.graph)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert "test_normalize.py" in node.meta["stack_trace"]
            assert isinstance(node.meta["val"], torch.Tensor)


def test_placeholders_keep_their_names() -> None:
    linear = torch.nn.Linear(3, 3)
    gm = normalised(linear, torch.randn(2, 3))
    targets = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    assert any(target.startswith("L_") and target.endswith("weight_") for target in targets)


def test_symbolic_sizes_are_not_specialised() -> None:
    gm = normalised(lambda x: x.view(-1, x.shape[1], 2, 2).softmax(-1), torch.randn(3, 5, 4), dynamic=True)
    assert any(isinstance(node.meta.get("val"), torch.SymInt) for node in gm.graph.nodes)


def test_in_place_on_a_fresh_tensor_becomes_functional() -> None:
    def function(x):
        y = x * 2
        y += 1
        y.masked_fill_(x > 0, -1.0)
        return y.div_(3)

    assert names(normalised(function, torch.randn(5)).graph) == [
        "mul.Tensor", "add.Tensor", "gt.Scalar", "masked_fill.Scalar", "div.Tensor",
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["input", "view", "viewed"])
def test_other_in_place_calls_stay(case: str) -> None:
    def function(x):
        y = x if case == "input" else x * 2
        z = y[1:] if case == "view" else y
        w = y[:2] if case == "viewed" else y
        z.mul_(3.0)
        return w + 1, y + 0

    gm = normalised(lambda x: function(x.clone() if case != "input" else x.detach().clone()), torch.randn(5))
    assert "mul_.Tensor" in names(gm.graph) or case == "input"


def test_functionalize_counts() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    assert functionalize_fresh(graph) == 0


def test_constants_and_held_tensors() -> None:
    gm = normalised(lambda x: x * torch.tensor(2.0) + torch.tensor([1.0, 2.0]), torch.randn(2))
    assert torch.equal(gm(torch.ones(2))[0], torch.tensor([3.0, 4.0]))


def test_attributes_of_a_plain_graph_module_are_put_back() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)
            self.register_buffer("shift", torch.ones(3))

        def forward(self, x):
            return self.inner(x) + self.shift

    model = Model()
    gm = normalize(fx.symbolic_trace(Model()), [torch.randn(2, 3)])
    gm.load_state_dict(model.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(gm(x), model(x))
    assert set(dict(gm.named_parameters())) == {"inner.weight", "inner.bias"}


def test_regions_stay_in_order() -> None:
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x
        with torch.no_grad():
            z = x @ x
        return y.float() + z

    found = names(normalised(function, torch.randn(3, 3)).graph)
    assert found.index("_enter_autocast") < found.index("matmul.default") < found.index("_exit_autocast")
    assert found.count("_set_grad_enabled") == 2


def test_checkpoint_bodies_are_normalised_and_keep_their_meta() -> None:
    def body(x):
        return torch.softmax(x @ x.T, -1) @ x

    gm = normalised(lambda x: checkpoint(body, x, use_reentrant=False) + 1, torch.randn(3, 3, requires_grad=True))
    bodies = [found for node in gm.graph.nodes if (found := checkpoint_body(node)) is not None]
    assert len(bodies) == 1
    assert "softmax.int" in names(bodies[0].graph)


def test_autograd_functions_stay_calls_with_their_gradient() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 7  # not the derivative, to see that it is the user's backward that runs

    x = torch.randn(3, requires_grad=True)
    normalised(lambda x: Double.apply(x) * 1, x)
    compiled = torch.compile(
        lambda x: Double.apply(x) * 1, backend=lambda gm, inputs: normalize(gm, inputs).forward, dynamic=False
    )
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(gradient, torch.full((3,), 7.0))
