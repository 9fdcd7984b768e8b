"""Attention that arrives already differentiated: found with its gradients, and replaced with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch import make_fx
from matching import INF, rand
from torch._subclasses.fake_tensor import FakeTensorMode

from polyattn.backend import compile_graph
from polyattn.options import Options
from polyattn.passes.match import joint
from polyattn.passes.match.anchors import match
from polyattn.report.model import Report

B, H, N, M, D, E = 2, 3, 10, 7, 8, 6


def qkv() -> list[torch.Tensor]:
    return [rand(B, H, n, d, grad=False) for n, d in ((N, D), (M, D), (M, E))]


def run(
    function: Callable[..., Any],
    inputs: list[torch.Tensor],
    *,
    dynamic: bool = False,
    fullgraph: bool = True,
    policy: str = "exact",
) -> tuple[Any, Report, list[torch.fx.GraphModule]]:
    found: list[Report] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        from polyattn import inner

        original = inner.compile_inner
        options = Options(policy=policy, inner="eager", audit_rows=0)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("polyattn.backend.compile_inner", lambda g, *a: (graphs.append(g), original(g, *a))[1])
            return compile_graph(gm, example_inputs, options, found.append)

    torch._dynamo.reset()
    got = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph)(*inputs)
    (report,) = found
    assert report.failure is None, str(report)
    return got, report, graphs


def targets(graphs: list[torch.fx.GraphModule]) -> list[str]:
    return [str(node.target) for graph in graphs for node in graph.graph.nodes]


def plain(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ v


def causal(q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.transpose(-2, -1) * 0.3
    return scores.masked_fill(torch.ones(q.shape[-2], k.shape[-2]).tril() == 0, -INF).softmax(-1) @ v


SPELLINGS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "causal": causal,
    "causal, where": lambda q, k, v: (
        torch.where(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(), q @ k.mT, -INF).softmax(-1) @ v
    ),
    "causal, added": lambda q, k, v: (
        (q @ k.mT + torch.full((q.shape[-2], k.shape[-2]), -INF, dtype=q.dtype).triu(1)).softmax(-1) @ v
    ),
    "torch's own": lambda q, k, v: F.scaled_dot_product_attention(q, k, k, scale=0.2),
    "torch's own, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.4),
    "torch's own, two head dims": F.scaled_dot_product_attention,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhje->bhie", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v
    ),
    "einsum, tokens first": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1),
        v.transpose(1, 2),
    ),
    "scaled queries": lambda q, k, v: ((q * 0.3) @ k.mT).softmax(-1) @ v,
    "scaled twice": lambda q, k, v: ((q @ k.mT) * 0.3 / 2).softmax(-1) @ v,
    "divided by a size": lambda q, k, v: ((q @ k.mT) / math.sqrt(q.size(-1))).softmax(-1) @ v,
    "transposed": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
    "folded heads": lambda q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).view(B, H, -1, E),
    "one head": lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0],
    "keys broadcast": lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.2).softmax(-1),
        v.flatten(0, 1),
    ),
}


def grad(attention: Callable[..., Any], which: tuple[int, ...] = (0, 1, 2)) -> Callable[..., Any]:
    return torch.func.grad(lambda q, k, v: attention(q, k, v).sin().sum(), argnums=which)


def vjp(attention: Callable[..., Any]) -> Callable[..., Any]:
    def function(q: Any, k: Any, v: Any) -> Any:
        out, pull = torch.func.vjp(attention, q, k, v)
        return out, pull(out.cos())

    return function


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": grad,
    "grad of one": lambda attention: grad(attention, (1,)),
    "value": lambda attention: torch.func.grad_and_value(lambda q, k, v: attention(q, k, v).sin().sum(), (0, 1, 2)),
    "linear loss": lambda attention: torch.func.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)),
    "vjp": vjp,
    "jacrev": lambda attention: torch.func.jacrev(lambda q, k, v: attention(q, k, v).sin().sum(), (0, 1, 2)),
}


CASES = [(name, transform, False) for name in SPELLINGS for transform in ("grad", "vjp")]
CASES += [("causal", transform, False) for transform in TRANSFORMS]
CASES += [(name, "jacrev", False) for name in ("torch's own", "einsum, tokens first", "keys broadcast", "baddbmm")]
CASES += [("causal", transform, True) for transform in ("vjp", "value")]
CASES += [(name, "vjp", True) for name in ("causal, added", "torch's own, causal", "divided by a size", "folded heads")]
MORE = [(name, "jacrev", False) for name in SPELLINGS]
MORE += [(name, "vjp", True) for name in SPELLINGS]
MORE += [("causal", transform, True) for transform in TRANSFORMS]


@pytest.mark.parametrize(
    ("name", "transform", "dynamic"),
    [
        *sorted(set(CASES)),
        *(pytest.param(*case, marks=pytest.mark.long) for case in sorted(set(MORE) - set(CASES))),
    ],
    ids=str,
)
def test_found_with_its_gradients(name: str, transform: str, dynamic: bool) -> None:
    function = TRANSFORMS[transform](SPELLINGS[name])
    inputs = qkv()
    got, report, graphs = run(function, inputs, dynamic=dynamic)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-9, atol=1e-9)
    assert not report.refusals, str(report)
    (site,) = report.sites
    assert site.causal is ("causal" in name)
    assert "and its gradients" in site.spelling
    assert "test_joint.py:" in site.where
    found = targets(graphs)
    assert found.count("polyattn.attention.default") == 1
    assert found.count("polyattn.attention_backward.default") == 1
    assert not any("softmax" in target or "scaled_dot" in target for target in found)


def test_a_function_that_was_traced_with_its_gradients() -> None:
    inputs = qkv()
    traced = make_fx(grad(causal))(*inputs)
    got, report, graphs = run(traced, inputs)
    torch.testing.assert_close(got, grad(causal)(*inputs), rtol=1e-9, atol=1e-9)
    assert "and its gradients" in report.sites[0].spelling
    assert "polyattn.attention_backward.default" in targets(graphs)


def two(q: Any, k: Any, v: Any) -> Any:
    return causal(plain(q, k, k), k, v)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
def test_two_in_a_row(transform: str) -> None:
    """What arrives at the output of the first comes straight from the gradients of the second."""
    function, inputs = TRANSFORMS[transform](two), qkv()
    got, report, graphs = run(function, inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-9, atol=1e-9)
    assert len(report.sites) == 2, str(report)
    assert targets(graphs).count("polyattn.attention_backward.default") == 2


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 24, dtype=dtype)
        self.norm = torch.nn.LayerNorm(8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = self.project(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def step(model: Model) -> Callable[..., Any]:
    def function(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            out = torch.func.functional_call(model, parameters, (x,))
            return out.square().mean()

        return torch.func.grad_and_value(loss)(parameters)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_of_torch_func(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(torch.float64)
    x = rand(2, N, 8, grad=False)
    wanted = step(model)({n: p.detach() for n, p in model.named_parameters()}, x)
    function = step(model.to(dtype))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    got, report, _ = run(function, [parameters, x.to(dtype)])  # type: ignore[list-item]
    plain = function(parameters, x.to(dtype))
    assert len(report.sites) == 2, str(report)
    for name, want in wanted[0].items():
        error, own = ((value[0][name].double() - want).abs().max() for value in (got, plain))
        assert error <= 2 * own + 1e-12, name


def test_low_rank_with_its_gradients() -> None:
    """With small logits the low-rank form is close, and its own backward runs."""
    inputs = [0.3 * x for x in qkv()]
    got, report, _ = run(grad(causal), inputs, policy="low_rank")
    (site,) = report.sites
    assert site.verdict == "low_rank"
    for made, want in zip(got, grad(causal)(*inputs), strict=True):
        assert 0 < (made - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_sample_its_own_gradient(dynamic: bool) -> None:
    function = torch.vmap(grad(causal))
    inputs = qkv()
    got, report, _ = run(function, inputs, dynamic=dynamic)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-9, atol=1e-9)
    assert len(report.sites) == 1, str(report)


def test_inputs_that_require_gradients_leave_the_graph_alone() -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    got, report, graphs = run(grad(causal), inputs)
    torch.testing.assert_close(got, grad(causal)(*inputs), rtol=0, atol=0)
    assert not report.sites
    (refusal,) = report.refusals
    assert "under torch.no_grad() or with detached inputs" in refusal.reason
    assert "polyattn.attention.default" not in targets(graphs)
    want = torch.autograd.grad(sum(x.square().sum() for x in grad(causal)(*inputs)), inputs)
    made = torch.autograd.grad(sum(x.square().sum() for x in got), inputs)
    torch.testing.assert_close(made, want, rtol=1e-9, atol=1e-9)


def test_a_traced_gradient_that_may_be_differentiated_again_is_refused() -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    traced = make_fx(grad(plain))(*[x.detach() for x in inputs])
    got, report, _ = run(traced, inputs)
    assert not report.sites
    assert "differentiated again" in report.refusals[0].reason
    made = torch.autograd.grad(sum(x.sin().sum() for x in got), inputs)
    want = torch.autograd.grad(sum(x.sin().sum() for x in grad(plain)(*inputs)), inputs)
    torch.testing.assert_close(made, want, rtol=1e-9, atol=1e-9)


def edited(change: Callable[[torch.fx.GraphModule], None]) -> Callable[..., Any]:
    """The traced gradients of causal attention with something else in the place of one node."""
    traced = make_fx(grad(causal))(*qkv())
    change(traced)
    traced.recompile()
    return traced


def _find(gm: torch.fx.GraphModule, target: Any, which: int = 0) -> torch.fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[which]


def _after_softmax_backward(gm: torch.fx.GraphModule, target: Any, *more: Any) -> None:
    node = _find(gm, torch.ops.aten._softmax_backward_data.default)
    with gm.graph.inserting_after(node):
        made = gm.graph.call_function(target, (node, *more))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def _scale(gm: torch.fx.GraphModule) -> None:
    _after_softmax_backward(gm, torch.ops.aten.mul.Tensor, 2.0)


def _clamp(gm: torch.fx.GraphModule) -> None:
    _after_softmax_backward(gm, torch.ops.aten.clamp.default, -0.1, 0.1)


def _mask(gm: torch.fx.GraphModule) -> None:
    node = _find(gm, torch.ops.aten._softmax_backward_data.default)
    (where_,) = [user for user in node.users if user.target is torch.ops.aten.masked_fill.Scalar]
    with gm.graph.inserting_before(where_):
        where_.args = (node, gm.graph.call_function(torch.ops.aten.logical_not.default, (where_.args[1],)), 0)


def _values(gm: torch.fx.GraphModule) -> None:
    """dP is formed with twice the values."""
    product = _find(gm, torch.ops.aten.bmm.default, 3)
    with gm.graph.inserting_before(product):
        product.args = (product.args[0], gm.graph.call_function(torch.ops.aten.mul.Tensor, (product.args[1], 2.0)))


def _queries(gm: torch.fx.GraphModule) -> None:
    """dk is formed with the absolute value of the queries."""
    product = _find(gm, torch.ops.aten.bmm.default, 4)
    with gm.graph.inserting_before(product):
        product.args = (gm.graph.call_function(torch.ops.aten.abs.default, (product.args[0],)), product.args[1])


def _returned(gm: torch.fx.GraphModule) -> None:
    """The weights' gradient is returned as well."""
    node = _find(gm, torch.ops.aten._softmax_backward_data.default)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], node),)


MISSES: dict[str, tuple[Callable[[torch.fx.GraphModule], None], str]] = {
    "scaled otherwise": (_scale, "is scaled by"),
    "clipped": (_clamp, "goes through clamp"),
    "masked otherwise": (_mask, "has a mask that the scores have not"),
    "other values": (_values, "other values than the attention"),
    "other queries": (_queries, "other queries than the attention"),
    "gradient of the scores returned": (_returned, "goes through output"),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    change, words = MISSES[name]
    function, inputs = edited(change), qkv()
    got, report, _ = run(function, inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=0, atol=0)
    assert not report.sites, str(report)
    (refusal,) = report.refusals
    assert words in refusal.reason
    assert refusal.node


def test_masks_and_their_gradients_stay_as_they_are() -> None:
    keep = torch.ones(N, M, dtype=torch.bool).tril(3)

    def masked(q: Any, k: Any, v: Any) -> Any:
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    inputs = qkv()
    got, report, _ = run(grad(masked), inputs)
    torch.testing.assert_close(got, grad(masked)(*inputs), rtol=0, atol=0)
    (site,) = report.sites
    assert site.verdict == "exact"
    assert "stays as it was" in site.reason


def _call(graph: torch.fx.Graph, target: Any, given: dict[str, Any], values: tuple[torch.Tensor, ...]) -> Any:
    """A call with its arguments by name, in the schema's order, and its first results."""
    schema = target._schema.arguments
    args = tuple(given.get(a.name) for a in schema if not a.kwarg_only)
    node = graph.call_function(target, args, {a.name: given.get(a.name) for a in schema if a.kwarg_only})
    node.meta["val"] = values
    results = []
    for at, value in enumerate(values):
        result = graph.call_function(operator.getitem, (node, at))
        result.meta["val"] = value
        results.append(result)
    return results


def fused_graph(forward: Any, **changed: str) -> torch.fx.Graph:
    """A device's fused attention and its backward, as they stand below autograd; ``changed``: backward arguments."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        q, g = (torch.empty(B, H, N, D) for _ in range(2))
        k, v = (torch.empty(B, H, M, D) for _ in range(2))
        lse = torch.empty(B, H, N)
    nodes = {}
    for name, value in (("query", q), ("key", k), ("value", v), ("g", g)):
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = value
    setting = {"dropout_p": 0.0, "is_causal": True, "compute_log_sumexp": True, "scale": 0.3}
    out, saved = _call(graph, forward.default, {**nodes, **setting}, (q, lse))
    given = {**nodes, **setting, "out": out, "logsumexp": saved, "grad_out": nodes["g"], "grad_out_": nodes["g"]}
    given.update({name: given[other] for name, other in changed.items()})
    graph.output(tuple(_call(graph, joint.FUSED[forward].default, given, (q, k, v))))
    return graph


@pytest.mark.parametrize("forward", joint.FUSED, ids=str)
def test_fused_operators_of_every_device(forward: Any) -> None:
    (site,) = match(fused_graph(forward), training=False).sites
    assert site.gradients is not None
    assert (site.causal, site.scale, site.gradients.g.node.name) == (True, 0.3, "g")
    assert [gradient.node.args[1] for gradient in site.gradients.given if gradient is not None] == [0, 1, 2]
    (refusal,) = match(fused_graph(forward, key="value"), training=False).refusals
    assert "that of another attention" in refusal.reason
