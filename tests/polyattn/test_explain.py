"""explain and its report: text, dict, page, command line, isolation."""

from __future__ import annotations

import json
import pathlib
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

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
    assert "REFUSED" in text
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


def test_the_module_is_callable(x: torch.Tensor) -> None:
    import polyattn.explain as module

    assert len(module(Model(), x, options=EXACT).sites) == 1  # type: ignore[operator]


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
        if name == "attention" and "polyattn.ops" not in sys.modules:
            continue
        assert hasattr(polyattn, name) or name == "attention"
    assert polyattn.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = polyattn.nothing  # type: ignore[attr-defined]
