"""explain and its report: text, dict, page, command line, isolation; which calls are sampled."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import polyattn

D = 8


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(D, 3 * D)
        self.norm = torch.nn.BatchNorm1d(D)

    def forward(self, x: torch.Tensor, flip: bool = False) -> torch.Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        x = F.dropout(x, 0.5) + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
        x = (x @ x.transpose(1, 2)).softmax(-2) @ x
        return self.norm(x.transpose(1, 2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))


EXACT = {"policy": "exact"}


def test_text_has_sites_refusals_and_reasons(x: torch.Tensor) -> None:
    text = str(polyattn.explain(Model(), x, options=EXACT))
    assert "1 attention site (1 exact), 1 refused in 1 graph" in text
    assert "test_explain.py:" in text
    assert "in forward" in text
    assert "scaled_dot_product_attention" in text
    assert "n_q=6" in text
    assert "REFUSED, eager fallback: " in text
    assert "axis -2" in text


def test_dict_is_json(x: torch.Tensor) -> None:
    report = polyattn.explain(Model(), x, options=EXACT)
    read = json.loads(json.dumps(report.to_dict()))
    (site,) = read["sites"]
    assert site["verdict"] == "exact"
    assert site["reason"]
    assert len(site["states"]) == 1
    assert read["refusals"][0]["reason"].startswith("the softmax runs over axis -2")


def test_exact_sites_have_no_derivation(x: torch.Tensor) -> None:
    (site,) = polyattn.explain(Model(), x, options=EXACT).sites
    assert (site.derivation, site.kernels, site.forward_graph, site.backward_graph) == ("", {}, None, None)


def test_page(x: torch.Tensor, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.html"
    polyattn.explain(Model(), x, options=EXACT).to_html(path)
    text = path.read_text()
    assert "refused" in text
    assert "<script" not in text
    assert "http" not in text


def test_the_model_and_the_process_are_as_before(x: torch.Tensor) -> None:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    generator = torch.get_rng_state()
    count = len(polyattn.reports())
    polyattn.explain(model, x, options=EXACT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, kept)
    assert len(polyattn.reports()) == count


def test_undecided_before_the_first_run() -> None:
    site = polyattn.SiteReport("none/0", "f.py:1, in f", "sdpa", False, "none", 1.0, {"n_q": 3}, polyattn.Options())
    assert (site.verdict, site.degree, site.error, site.guarantee) == ("undecided", None, None, "none")
    assert "undecided" in str(site)


def test_graph_breaks_are_merged() -> None:
    def function(q: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q, q, q)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q)

    report = polyattn.explain(function, torch.randn(1, 2, 5, 4), options=EXACT)
    assert report.graphs == 2
    assert len(report.sites) == 2


def test_compiled_models_are_explained_too(x: torch.Tensor) -> None:
    assert len(polyattn.explain(torch.compile(Model()), x, options=EXACT).sites) == 1


@pytest.mark.parametrize(("backward", "expected"), [(False, 0), (True, 1), ("auto", 1)])
def test_backward_runs_only_when_asked(backward: bool | str, expected: int, x: torch.Tensor) -> None:
    model, ran = Model(), []
    model.project.weight.register_hook(ran.append)
    polyattn.explain(model, x, options=EXACT, backward=backward)
    assert len(ran) == expected


def test_a_model_without_attention_says_so(x: torch.Tensor) -> None:
    assert "no attention" in str(polyattn.explain(torch.nn.Linear(D, D), x))


def test_the_function_is_there_after_its_module_was_imported(x: torch.Tensor) -> None:
    import polyattn.report.explain

    assert len(polyattn.explain(Model(), x, options=EXACT).sites) == 1


def test_command_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from polyattn.__main__ import main

    (tmp_path / "some_model.py").write_text(
        textwrap.dedent(
            """
            import torch

            def build():
                f = torch.nn.functional.scaled_dot_product_attention
                q = torch.randn(1, 2, 6, 4)
                return (lambda q: f(q, q, q)), q
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    page = tmp_path / "page.html"
    assert main(["explain", "some_model:build", "--policy", "exact", "--html", str(page)]) == 0
    assert "1 attention site" in capsys.readouterr().out
    assert page.exists()
    assert main(["explain", "some_model:missing"]) == 2
    assert "cannot build" in capsys.readouterr().err


def test_public_names() -> None:
    for name in polyattn.__all__:
        if name == "attention" and "polyattn.runtime.ops" not in sys.modules:
            continue
        assert hasattr(polyattn, name) or name == "attention"
    assert polyattn.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = polyattn.nothing  # type: ignore[attr-defined]


# -- samples: what they hold, test_plots.py tests ---------------------------------------------------------------------

N = 48
LOW = {"policy": "low_rank", "audit_rows": 0}


class Twice(torch.nn.Module):
    """Two layers of the same code; the second one's checkpointed if so asked."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 24, dtype=torch.float64) for _ in range(2))
        self.again = again

    def layer(self, number: int, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.layers[number](x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(3 * q, 3 * k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(2):
            x = checkpoint(self.layer, number, x, use_reentrant=False) if self.again else self.layer(number, x)
        return x


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(1, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def twice(again: bool = False) -> Twice:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Twice(again)


def numbers(report: polyattn.Report) -> list[Any]:
    return [[samples.to_dict() for samples in site.samples] for site in report.sites]


def test_explain_repeats_and_leaves_generators_alone(tokens: torch.Tensor) -> None:
    before = torch.get_rng_state()
    model = twice()
    first, second = (polyattn.explain(model, tokens, options=LOW) for _ in range(2))
    assert numbers(first) == numbers(second)
    other = polyattn.explain(model, tokens, options={**LOW, "seed": 1})
    assert numbers(first)[0][0]["rows"] != numbers(other)[0][0]["rows"]
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointed_models_have_the_same_samples(tokens: torch.Tensor) -> None:
    plain, again = (polyattn.explain(twice(again), tokens, options=LOW) for again in (False, True))
    for one, two in zip(numbers(plain), numbers(again), strict=True):
        assert one[0]["gradients"] == pytest.approx(two[0]["gradients"], rel=1e-9)
        assert one[0]["errors"] == pytest.approx(two[0]["errors"], rel=1e-9)
        assert len(one[0]["gradients"]) == 3


def test_what_a_checkpoint_runs_again_and_calls_of_others_are_not_sampled(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, found = importlib.import_module("polyattn.report.explain"), []
    original = module.sample
    monkeypatch.setattr(module, "sample", lambda *args: found.append(args) or original(*args))
    polyattn.explain(twice(True), tokens, options=LOW)
    assert len(found) == 2
    # a call that is not of the model
    other = torch._dynamo.disable(lambda x: x + polyattn.attention(*[torch.ones(1, 1, N, 4)] * 3, options=LOW).mean())
    polyattn.explain(lambda x: other(F.relu(x)), tokens, options=LOW)
    assert len(found) == 2


def test_gradients_belong_to_the_call_with_these_tensors(tokens: torch.Tensor) -> None:
    model = twice()

    def first_only(x: torch.Tensor) -> torch.Tensor:
        return model.layer(0, x) + model.layer(1, x).detach()

    found = numbers(polyattn.explain(first_only, tokens, options=LOW))
    assert [len(samples["gradients"]) for (samples,) in found] == [3, 0]


class Layer(torch.nn.Module):
    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.linear(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(3 * q, 3 * k, v).transpose(1, 2).flatten(2)


class Broken(torch.nn.Module):
    """Each call of a layer is a graph of its own, and all of them are the same."""

    def __init__(self, factors: tuple[float, ...], layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.layers, self.factors = torch.nn.ModuleList(layers), factors

    @torch._dynamo.disable(recursive=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for factor, layer in zip(self.factors, self.layers, strict=True):
            x = layer(factor * x)
        return x


def test_the_last_call_of_a_state_counts(tokens: torch.Tensor) -> None:
    layer = Layer(twice().layers[0])
    (site,) = polyattn.explain(Broken((1.0, 1.5), [layer, layer]), tokens.requires_grad_(), options=LOW).sites
    assert site.calls == 2
    x = torch.compile(layer, backend="polyattn", options={**LOW, "inner": "eager"})(tokens).detach().requires_grad_()
    (alone,) = polyattn.explain(Broken((1.5,), [layer]), x, options=LOW).sites
    torch.testing.assert_close(site.samples[0].errors, alone.samples[0].errors, rtol=1e-6, atol=0)
    assert dict(site.samples[0].gradients) == pytest.approx(dict(alone.samples[0].gradients), rel=1e-6)


def test_a_state_whose_last_call_is_exact_has_no_samples(tokens: torch.Tensor) -> None:
    layer, x = Layer(twice().layers[0]), torch.cat([tokens] * 5, 1).requires_grad_()
    counts = []
    for factors in ((0.1, 0.1), (0.1, 30.0)):
        (site,) = polyattn.explain(Broken(factors, [layer, layer]), x, options={"audit_every": 1}).sites
        assert site.calls == 2
        counts.append((site.verdict, len(site.samples)))
    assert counts == [("low_rank", 1), ("exact", 0)]


def test_states_of_one_site_have_samples_of_their_own(tokens: torch.Tensor) -> None:
    layers: list[torch.nn.Module] = [Layer(linear) for linear in twice().layers]
    report = polyattn.explain(Broken((1.0, 1.0), layers), tokens.requires_grad_(), options=LOW)
    shared = [site for site in report.sites if len(site.states) == 2]
    assert len(shared) == 1
    (site,) = shared
    assert [samples.state for samples in site.samples] == [0, 1]
    assert not torch.equal(site.samples[0].errors, site.samples[1].errors)
    assert all(len(samples.gradients) == 3 for samples in site.samples)
    wanted = numbers(polyattn.explain(twice(), tokens, options=LOW))
    for samples, (one,) in zip(site.samples, wanted, strict=True):
        assert dict(samples.gradients) == pytest.approx(one["gradients"], rel=1e-6)
    assert str(site).count("64 sampled rows") == 2
    assert site.sketch().count("layer 1: ") == 2
