"""Added masks and biases in training: what an operator of our own replaces, and what stays as it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import polyattn.runtime.masked  # noqa: F401  (registers the operator)
from polyattn.backend import compile_graph
from polyattn.options import Options
from polyattn.passes.match.anchors import match
from polyattn.passes.match.site import Site
from polyattn.passes.prepare.normalize import normalize
from polyattn.passes.replace.training import stays
from polyattn.report.model import Report

pytestmark = pytest.mark.usefixtures("fresh_compiler")

B, H, N, M, D, E = 2, 3, 10, 7, 8, 6
INF = float("inf")
MIN = torch.finfo(torch.float64).min
OP = torch.ops.polyattn.masked_attention.default
LOOKS = torch.ops.polyattn.attention.default
"""The operator that looks at its masks in each call, where compiling does not know that low rank would cost more."""


def rand(*size: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def qkv(*lead: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    lead = lead or (B, H)
    return [rand(*lead, *size, dtype=dtype) for size in ((N, D), (M, D), (M, E))]


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(D)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores(q, k) + mask, -1).to(q.dtype) @ v


def rows(fill: float, *lead: int) -> torch.Tensor:
    """A mask with holes, and with two rows that it hides."""
    mask = torch.zeros(*lead, N, M, dtype=torch.float64)
    mask[..., 5:] = fill
    mask[..., 2, :] = fill
    mask[..., 7, :] = fill
    return mask


def padding(fill: float) -> torch.Tensor:
    """One batch element with padding, one that is nothing else."""
    mask = torch.zeros(B, 1, 1, M, dtype=torch.float64)
    mask[0, ..., 4:] = fill
    mask[1] = fill
    return mask


Compiled = tuple[Callable[..., Any], list[torch.fx.GraphModule], list[Report]]


def compiled(function: Callable[..., Any], dynamic: bool = False, inner: str = "eager") -> Compiled:
    """The compiled function; the graphs (with ``inner="eager"``) and the reports of its compilation."""
    graphs: list[torch.fx.GraphModule] = []
    reports: list[Report] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        made = compile_graph(gm, example_inputs, Options(inner=inner), reports.append)
        if inner == "eager":
            graphs.append(made.__self__)  # type: ignore[attr-defined]
        return made

    return torch.compile(function, backend=backend, dynamic=dynamic), graphs, reports


def calls(graphs: list[torch.fx.GraphModule]) -> list[Any]:
    """The operators in the graphs and in the bodies of checkpoints."""
    modules = {id(m): m for gm in graphs for m in gm.modules() if isinstance(m, torch.fx.GraphModule)}
    return [node.target for gm in modules.values() for node in gm.graph.nodes if node.op == "call_function"]


def outcome(function: Callable[..., Any], inputs: list[Any]) -> tuple[torch.Tensor, ...]:
    out = function(*inputs)
    needing = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    g = rand(*out.shape, seed=1, grad=False).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, needing, g))


def check_replaced(function: Callable[..., Any], inputs: list[Any], dynamic: bool = False) -> None:
    attend, graphs, reports = compiled(function, dynamic)
    found, wanted = outcome(attend, inputs), outcome(function, inputs)
    (report,) = reports
    assert report.failure is None, str(report)
    assert not report.refusals, str(report)
    (site,) = report.sites
    assert site.verdict == "exact"
    assert "stays as it was" not in site.reason
    assert [target for target in calls(graphs) if target in (OP, LOOKS)] in ([[OP], [LOOKS]] if dynamic else [[OP]])
    assert not {str(target) for target in calls(graphs)} & {"aten.softmax.int", "aten._softmax.default"}
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)


ADDED: dict[str, tuple[Callable[..., Any], Callable[[], list[Any]]]] = {
    "padding, smallest number": (plain, lambda: [*qkv(), padding(MIN)]),
    "padding, -1e4": (plain, lambda: [*qkv(), padding(-1e4)]),
    "padding, -inf": (plain, lambda: [*qkv(), padding(-INF)]),
    "rows": (plain, lambda: [*qkv(), rows(MIN, B, 1)]),
    "rows, -inf": (plain, lambda: [*qkv(), rows(-INF)]),
    "rows of some heads": (plain, lambda: [*qkv(), rows(MIN, H) * torch.tensor([0.0, 1, 1]).view(3, 1, 1)]),
    "one row for all": (plain, lambda: [*qkv(), rand(1, M, grad=False)]),
    "keys only": (plain, lambda: [*qkv(), rand(M, grad=False)]),
    "made of truth values": (
        lambda q, k, v, keep: plain(q, k, v, (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min),
        lambda: [*qkv(), torch.arange(M) < torch.tensor([[0], [5]])],
    ),
    "causal and padding": (
        lambda q, k, v, pad: plain(q, k, v, torch.full((N, M), MIN, dtype=q.dtype).triu(1) + pad),
        lambda: [*qkv(), padding(MIN)],
    ),
    "causal and padding, one after the other": (
        lambda q, k, v, pad: (scores(q, k) + pad + torch.full((N, M), -INF, dtype=q.dtype).triu(1)).softmax(-1) @ v,
        lambda: [*qkv(), padding(MIN)],
    ),
    "masked_fill and padding": (
        lambda q, k, v, pad, drop: (scores(q, k) + pad).masked_fill(drop, -INF).softmax(-1) @ v,
        lambda: [*qkv(), padding(-1e4), rows(1.0).bool()],
    ),
    "masked_fill with a number, and padding": (
        lambda q, k, v, pad, drop: (scores(q, k) + pad).masked_fill(drop, -1e9).softmax(-1) @ v,
        lambda: [*qkv(), padding(MIN), rows(1.0).bool()],
    ),
    "subtracted": (
        lambda q, k, v, bias: (scores(q, k) - bias).softmax(-1) @ v,
        lambda: [*qkv(), rand(H, N, M, grad=False)],
    ),
    "before the scale": (
        lambda q, k, v, bias: ((q @ k.mT + bias) * 0.3).softmax(-1) @ v,
        lambda: [*qkv(), rows(MIN)],
    ),
    "of transposed scores": (
        lambda q, k, v, bias: (k @ q.mT + bias.mT).softmax(-2).mT @ v,
        lambda: [*qkv(), rows(MIN, B, 1)],
    ),
    "alibi": (
        lambda q, k, v, slopes: plain(q, k, v, slopes[:, None, None] * torch.arange(M)),
        lambda: [*qkv(), torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)],
    ),
    "five axes": (plain, lambda: [*qkv(2, B, H), rows(MIN, B, 1)]),
    "three axes": (plain, lambda: [*qkv(B * H), rows(MIN, B * H)]),
    "one head": (plain, lambda: [rand(N, D), rand(M, D), rand(M, E), rows(MIN)]),
    "detached bias": (
        lambda q, k, v, bias: plain(q, k, v, bias.detach() * 2),
        lambda: [*qkv(), rand(H, N, M, grad=False)],
    ),
    "bias made of parameters without their gradients": (
        lambda q, k, v, bias: plain(q, k, v, _without_gradient(bias, q)),
        lambda: [*qkv(), rand(H, N, M, grad=False)],
    ),
    "a mask like the scores": (
        lambda q, k, v: plain(q, k, v, torch.zeros_like(scores(q, k)).masked_fill(torch.ones(N, M).tril(2) == 0, MIN)),
        qkv,
    ),
}


def _without_gradient(bias: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return bias * q.mean()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ADDED)
def test_replaced(name: str, dynamic: bool) -> None:
    function, inputs = ADDED[name]
    check_replaced(function, inputs(), dynamic)


def test_through_inductor() -> None:
    attend, _, reports = compiled(plain, inner="inductor")
    inputs = [*qkv(), rows(MIN, B, 1)]
    for x, y in zip(outcome(attend, inputs), outcome(plain, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert reports[0].failure is None


def test_sizes_may_change() -> None:
    attend, _, reports = compiled(plain, dynamic=True)
    for n in (10, 13, 31):
        inputs = [rand(B, H, n, D), rand(B, H, n + 1, D), rand(B, H, n + 1, E), torch.zeros(B, 1, n, n + 1).double()]
        inputs[3][:, :, 4] = MIN
        for x, y in zip(outcome(attend, inputs), outcome(plain, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert len(reports) == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_mask_that_is_wider_than_the_scores(grad: bool, low: torch.dtype, autocast: bool) -> None:
    """The smallest number of float32 is no -inf: rows that it hides are means of the values, and not NaN."""
    dtype = torch.float32 if autocast else low
    inputs = [x.detach().requires_grad_(grad) for x in qkv(dtype=dtype)]
    mask = rows(0.0).float()
    mask[2], mask[7], mask[:, 5:] = (torch.finfo(torch.float32).min,) * 3
    with torch.autocast("cpu", low, enabled=autocast):
        attend, graphs, _ = compiled(plain)
        found, wanted = attend(*inputs, mask), plain(*inputs, mask)
    assert calls(graphs).count(OP) == int(grad)
    assert not found.isnan().any()
    if autocast and not grad and low == torch.float16:
        # autocast of torch's attention makes a float16 mask, whose smallest number does not swallow the scores
        found, wanted = (x[:, :, 8:] for x in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=8 * torch.finfo(low).eps)
    if grad:
        made, meant = (torch.autograd.grad(x.float().square().sum(), inputs) for x in (found, wanted))
        for x, y in zip(made, meant, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=float(y.abs().max()) * 8 * torch.finfo(low).eps)


def test_activation_checkpointing() -> None:
    def function(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return checkpoint(lambda q, k, v, mask: plain(q.sin(), k, v, mask * 2), q, k, v, mask, use_reentrant=False)

    check_replaced(function, [*qkv(), rows(-1e9, B, 1)])


# -- what stays --------------------------------------------------------------------------------------------------------


def _through_a_checkpoint(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return checkpoint(lambda q, k, v, bias: plain(q, k, v, bias), q, k, v, bias.sin(), use_reentrant=False)


def _out_of_a_checkpoint(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return plain(q, k, v, checkpoint(lambda bias: bias.sin(), bias, use_reentrant=False))


def _written_into(q: Any, k: Any, v: Any, bias: Any) -> Any:
    whole = torch.zeros(H, N, M, dtype=q.dtype)
    whole[:, 1:] = bias[:, 1:]
    return plain(q, k, v, whole)


NEEDING: dict[str, Callable[..., Any]] = {
    "as it is": plain,
    "gathered": lambda q, k, v, bias: plain(q, k, v, bias.flatten(1)[:, torch.arange(N * M)].view(H, N, M)),
    "beside a mask": lambda q, k, v, bias: plain(q, k, v, torch.full((N, M), MIN, dtype=q.dtype).triu(1) + bias),
    "after a mask": lambda q, k, v, bias: (
        (scores(q, k) + torch.full((N, M), -1e4, dtype=q.dtype).triu(2) + bias).softmax(-1) @ v
    ),
    "of the queries": lambda q, k, v, bias: plain(q, k, v, q[..., :M].sin()) + bias.sum(),
    "written into a mask": _written_into,
    "into a checkpoint": _through_a_checkpoint,
    "out of a checkpoint": _out_of_a_checkpoint,
}


@pytest.mark.parametrize("name", NEEDING)
def test_a_bias_that_needs_a_gradient_stays(name: str) -> None:
    check_stays(NEEDING[name], [*qkv(), rand(H, N, M)], "the bias needs a gradient")


def check_stays(function: Callable[..., Any], inputs: list[Any], words: str) -> None:
    attend, graphs, reports = compiled(function)
    for x, y in zip(outcome(attend, inputs), outcome(function, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    (site,) = reports[0].sites
    assert "in training it stays as it was" in site.reason
    assert words in site.reason
    assert OP not in calls(graphs)


def test_a_bias_of_a_layer_that_is_trained_stays() -> None:
    class Biased(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(rand(H, N, M))

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return plain(q, k, v, self.bias * 2)

    check_stays(Biased(), qkv(), "the bias needs a gradient")


@pytest.mark.parametrize("view", [False, True])
def test_a_mask_that_is_changed_afterwards_stays(view: bool) -> None:
    """Eager attention does not need its mask again in the backward."""

    def function(q: Any, k: Any, v: Any, mask: Any) -> Any:
        out = plain(q, k, v, mask[None])
        (mask[0] if view else mask).zero_()
        return out

    attend, graphs, reports = compiled(function)
    for x, y in zip(outcome(attend, [*qkv(), rows(MIN)]), outcome(function, [*qkv(), rows(MIN)]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    (site,) = reports[0].sites
    assert "in training it stays as it was: the mask is changed in place later" in site.reason
    assert OP not in calls(graphs)


def test_dropped_weights_stay() -> None:
    attend, graphs, reports = compiled(
        lambda q, k, v, mask: torch.nn.functional.dropout((scores(q, k) + mask).softmax(-1), 0.3) @ v
    )
    with torch.random.fork_rng(devices=[]):
        attend(*qkv(), rows(MIN))
    (site,) = reports[0].sites
    assert "in training it stays as it was: the operator for added masks does not drop weights" in site.reason
    assert OP not in calls(graphs)


def test_another_device_stays() -> None:
    """A node without data stands in for one on a GPU."""
    sites: list[Site] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        normal = normalize(gm, example_inputs)
        sites.extend(match(normal.graph, training=False).sites)
        return gm.forward

    torch.compile(plain, backend=backend)(*qkv(), rows(MIN))
    (site,) = sites
    assert stays(site, frozenset()) == ""
    site.q.node.meta["val"] = torch.empty(B, H, N, D, device="meta")
    assert "not verified on meta" in stays(site, frozenset())
    assert "differs from softmax" in stays(site, None)


# -- memory ------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_a_training_step_forms_no_matrix_of_scores() -> None:
    n = 2048
    inputs = [rand(2, 8, n, 4, seed=at, dtype=torch.float32) for at in range(3)]
    mask = torch.zeros(2, 1, 1, n)
    mask[0, ..., n // 2 :] = torch.finfo(torch.float32).min
    attend, graphs, _ = compiled(plain)
    attend(*[x[:, :, :64] for x in inputs], mask[..., :64])
    attend(*inputs, mask)
    saved: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        (out,) = graphs[-1](*_ordered(graphs[-1], inputs, mask))
        out.sum().backward()
    assert mode.largest == max(saved) == inputs[0].numel()
    assert inputs[0].grad is not None


def _ordered(gm: torch.fx.GraphModule, inputs: list[torch.Tensor], mask: torch.Tensor) -> list[Any]:
    """The arguments of a graph, by its placeholders' names."""
    named = {"q": inputs[0], "k": inputs[1], "v": inputs[2], "mask": mask}
    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        name = node.name.removeprefix("l_").removesuffix("_")
        found.append(named[name] if name in named else inputs[0].shape[2])
    return found
