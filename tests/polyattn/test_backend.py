"""The backend end to end: entry point, dynamic sizes, checkpointing, threads, failures, options."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import polyattn
from polyattn.backend import compile_graph
from polyattn.backend import polyattn as backend
from polyattn.errors import ExpectSitesError, OptionValueError, UnknownOptionError
from polyattn.runtime import registry

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EXACT = {"policy": "exact", "inner": "eager"}


class Block(torch.nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(dim, 3 * dim, dtype=torch.float64)
        self.out = torch.nn.Linear(dim, dim, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c))


class Model(torch.nn.Module):
    def __init__(self, layers: int = 2, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def tokens(n: int = 12) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_trains_alike(compiled: Callable[..., Any], model: torch.nn.Module, x: torch.Tensor) -> None:
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        rtol=1e-8, atol=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_one_graph_two_sites_equal_gradients(checkpointed: bool) -> None:
    model = Model(checkpointed=checkpointed)
    assert_trains_alike(torch.compile(model, backend=backend, options=EXACT), model, tokens())
    (report,) = polyattn.reports()
    assert len(report.sites) == 2
    assert all(site.verdict == "exact" for site in report.sites)


def test_through_inductor() -> None:
    model = Model()
    compiled = torch.compile(model, backend=backend, options={"policy": "exact", "inner": "inductor"})
    assert_trains_alike(compiled, model, tokens())
    (report,) = polyattn.reports()
    assert report.failure is None
    assert len(report.sites) == 2


def test_no_recompilation_after_the_second_length() -> None:
    model = Model()
    compiled = torch.compile(model, backend=backend, options=EXACT)
    for n in (12, 17, 9, 33, 20):
        assert_trains_alike(compiled, model, tokens(n))
    assert len(polyattn.reports()) == 2


def test_dynamic_compiles_once() -> None:
    model = Model()
    compiled = torch.compile(model, backend=backend, options=EXACT, dynamic=True)
    for n in (12, 17, 9, 33):
        assert_trains_alike(compiled, model, tokens(n))
    (report,) = polyattn.reports()
    assert len(report.sites) == 2


def test_six_blocks_compiled_one_by_one_keep_six_states() -> None:
    blocks = [Block() for _ in range(6)]
    x = tokens()
    for block in blocks:
        x = torch.compile(block, backend=backend, options=EXACT)(x)
    states = [
        state for report in polyattn.reports() for site in report.sites for state in registry.states(site.identifier)
    ]
    assert len(states) == 6


def test_two_threads_compile_at_once() -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        try:
            model = Model(layers=1)
            barrier.wait()
            for n in (12, 17):
                assert_trains_alike(torch.compile(model, backend=backend, options=EXACT), model, tokens(n))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(report.failure is None for report in polyattn.reports())
    identifiers = [site.identifier for report in polyattn.reports() for site in report.sites]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("name", ["normalize", "match", "splice"])
def test_an_exception_inside_leaves_the_graph_untouched(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from polyattn.passes import pipeline

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(pipeline, name, broken)
    model = Model()
    with caplog.at_level(logging.WARNING, logger="polyattn"):
        assert_trains_alike(torch.compile(model, backend=backend, options=EXACT), model, tokens())
    (report,) = polyattn.reports()
    assert report.failure is not None
    assert "RuntimeError" in report.failure
    assert "injected" in report.failure
    assert not report.sites
    assert "FAILED" in str(report)
    assert len([record for record in caplog.records if record.name == "polyattn"]) == 1


def test_a_failing_inner_compiler_gets_the_untouched_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import polyattn.backend as module

    original = module.compile_inner

    def fails_on_the_operator(gm: torch.fx.GraphModule, *args: Any) -> Any:
        if any("polyattn" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("injected")
        return original(gm, *args)

    monkeypatch.setattr(module, "compile_inner", fails_on_the_operator)
    model = Model()
    with caplog.at_level(logging.WARNING, logger="polyattn"):
        assert_trains_alike(torch.compile(model, backend=backend, options=EXACT), model, tokens())
    assert "compiling the rewritten graph" in str(polyattn.reports()[0].failure)
    assert len(caplog.records) == 1


def test_expect_sites() -> None:
    compiled = torch.compile(Model(), backend=backend, options={**EXACT, "expect_sites": 3})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="expect_sites=3") as caught:
        compiled(tokens())
    assert isinstance(caught.value.inner_exception, ExpectSitesError)
    torch._dynamo.reset()
    torch.compile(Model(), backend=backend, options={**EXACT, "expect_sites": 2})(tokens())


def test_expect_sites_names_the_refusals() -> None:
    def function(q: torch.Tensor) -> torch.Tensor:
        return (q @ q.transpose(-2, -1)).softmax(-2) @ q

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"test_backend\.py.*axis -2"):
        torch.compile(function, backend=backend, options={**EXACT, "expect_sites": 1})(tokens())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"polcy": "exact"}, UnknownOptionError, "did you mean 'policy'"),
        ({"degree": 7}, OptionValueError, "1 to 4"),
        ({"inner_options": {"no_such_thing": 1}}, OptionValueError, "no option 'no_such_thing'"),
        ({"inner_options": {"mode": "fast"}}, OptionValueError, "fast"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words) as caught:
        torch.compile(Model(), backend=backend, options=options)(tokens())
    assert isinstance(caught.value.inner_exception, error)


def test_inner_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx as module

    seen: list[Any] = []

    def spy(gm: torch.fx.GraphModule, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(module, "compile_fx", spy)
    options = {"policy": "exact", "inner_options": {"mode": "max-autotune-no-cudagraphs", "epilogue-fusion": False}}
    torch.compile(Model(), backend=backend, options=options)(tokens())
    assert seen == [{"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}]


def test_refused_attention_runs_as_written() -> None:
    def function(q: torch.Tensor) -> torch.Tensor:
        return (q @ q.transpose(-2, -1)).softmax(-2) @ q

    x = tokens()
    torch.testing.assert_close(torch.compile(function, backend=backend, options=EXACT)(x), function(x), rtol=0, atol=0)
    (report,) = polyattn.reports()
    assert not report.sites
    assert len(report.refusals) == 1
    assert report.refusals[0].where.endswith("in function")


def test_info_gives_one_line_per_site(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="polyattn"):
        torch.compile(Model(), backend=backend, options=EXACT)(tokens())
    lines = [record.getMessage() for record in caplog.records if record.name == "polyattn"]
    assert len([line for line in lines if "test_backend.py:" in line]) == 2


def test_autocast_around_the_call() -> None:
    model = Model().to(torch.float32)
    x = tokens().float()
    compiled = torch.compile(model, backend=backend, options=EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    assert len(polyattn.reports()[0].sites) == 2


def test_called_without_dynamo() -> None:
    found: list[polyattn.Report] = []
    gm = torch.fx.symbolic_trace(lambda q: F.scaled_dot_product_attention(q, q, q))
    q = torch.randn(1, 2, 5, 4)
    compiled = compile_graph(gm, [q], polyattn.Options(policy="exact", inner="eager"), found.append)
    torch.testing.assert_close(compiled(q), gm(q))
    assert len(found[0].sites) == 1


_NO_COMPILER = """
import logging, torch
logging.basicConfig(level=logging.WARNING, format="%(name)s|%(message)s")
from polyattn.backend import polyattn as backend
for n in (3, 4):
    torch._dynamo.reset()
    q = torch.randn(1, 2, n, 4)
    f = lambda q: torch.softmax(q @ q.transpose(-2, -1), -1) @ q
    torch.testing.assert_close(torch.compile(f, backend=backend, options={"policy": "exact"}, dynamic=False)(q), f(q))
print("ran")
"""


def test_without_a_compiler_it_runs_eager_with_one_warning() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _NO_COMPILER],
        env={**os.environ, "CXX": "/no/such/compiler"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ran" in result.stdout
    assert result.stderr.count("polyattn|no working C++ compiler") == 1, result.stderr


def test_entry_point() -> None:
    if "polyattn" not in torch._dynamo.list_backends():
        pytest.skip("the package is not installed")
    model = Model()
    assert_trains_alike(torch.compile(model, backend="polyattn", options=EXACT), model, tokens())
