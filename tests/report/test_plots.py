"""Samples of explain beside dense references, and what is drawn and said of them."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import sys
import xml.etree.ElementTree
from typing import Any

import dense
import pytest
import torch
import torch.nn.functional as F

import polyattn
from polyattn.errors import OptionValueError, PolyattnError
from polyattn.report import plots
from polyattn.report.plots import Samples
from polyattn.report.sampling import sample
from polyattn.runtime import execute, fits
from polyattn.site_plan import SitePlan

pytestmark = pytest.mark.usefixtures("fresh_compiler")

N, D, CHUNK = 48, 4, 16
LOW = {"policy": "low_rank", "audit_rows": 0, "causal_chunk": CHUNK}


def operands(heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, D), (kv_heads, D), (kv_heads, 3))
    q, k, v = (torch.randn(2, h, N, d, generator=generator, dtype=torch.float64) for h, d in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def only(report: polyattn.Report) -> Samples:
    ((samples,),) = [site.samples for site in report.sites]
    return samples


def exact_weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    score = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(D)
    return (score.masked_fill(torch.ones_like(score).triu(1).bool(), -math.inf) if causal else score).softmax(-1)


def polynomial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return dense.dense_polynomial(q, k, v, 2, causal, CHUNK, False, "call")


def polynomial_weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    ones = torch.eye(N, dtype=torch.float64).expand(2, k.shape[1], -1, -1)
    return polynomial(q, k, ones, causal)


def at_pairs(weights: torch.Tensor, samples: Samples) -> torch.Tensor:
    batch, head, position = samples.rows[samples.row].T
    return weights[batch, head, position, samples.key]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_samples_are_those_of_dense_attention(causal: bool, kv_heads: int) -> None:
    q, k, v = operands(kv_heads=kv_heads)
    samples = only(polyattn.explain(attend, q, k, v, causal, options=LOW))
    q, k, v = q.detach(), k.detach(), v.detach()
    exact, made = exact_weights(q, k, causal), polynomial_weights(q, k, causal)
    torch.testing.assert_close(samples.exact, at_pairs(exact, samples))
    torch.testing.assert_close(samples.approximate, at_pairs(made, samples), rtol=1e-9, atol=1e-12)
    assert float((samples.exact - samples.approximate).abs().max()) > 1e-4
    values = v.repeat_interleave(4 // kv_heads, 1)
    unit = (values - values.mean(2, keepdim=True)).norm(dim=-1).amax(-1, keepdim=True)
    errors = ((made - exact) @ values).norm(dim=-1) / unit
    torch.testing.assert_close(samples.errors, errors[tuple(samples.rows.T)])
    assert samples.rows.tolist() == sorted(samples.rows.tolist())
    assert len(samples.rows) == 64
    assert set(samples.rows[:, 1].tolist()) == {0, 1, 2, 3}
    assert not causal or bool((samples.key <= samples.rows[samples.row, 2]).all())


def gradient_errors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, g: torch.Tensor) -> list[Any]:
    """Of whole tensors [2, heads, N, ·]: exact gradients and those through the polynomial."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    spread = [leaves[0], *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in leaves[1:])]
    exact = exact_weights(spread[0], spread[1], causal) @ spread[2]
    made = polynomial(*leaves, causal)
    return [torch.autograd.grad(out, leaves, g) for out in (exact, made)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gradient_errors_are_those_of_autograd(causal: bool, kv_heads: int) -> None:
    q, k, v = operands(heads=2, kv_heads=kv_heads)
    cotangents: list[torch.Tensor] = []

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(q, k, v, causal)
        out.register_hook(cotangents.append)
        return out.sin()

    samples = only(polyattn.explain(model, q, k, v, options=LOW))
    (g,) = cotangents
    assert samples.gradients_of.startswith("2 of 2 heads of batch element ")
    b = int(samples.gradients_of[-1])
    exact, made = gradient_errors(q, k, v, causal, g)
    for error, x, y in zip(samples.gradients.values(), made, exact, strict=True):
        assert error == pytest.approx(float((x[b] - y[b]).norm() / y[b].norm()), rel=1e-8)
        assert error > 1e-4
    assert list(samples.gradients) == ["dQ", "dK", "dV"]


def test_long_calls_compare_queries_of_the_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("polyattn.report.sampling"), "GRADIENT_PAIRS", N * N)
    q, k, v = operands()  # two queries share a key head: more pairs than that
    samples = only(polyattn.explain(lambda *x: attend(*x, False).square().sum(), q, k, v, options=LOW))
    g = 2 * polynomial(q, k, v, False).detach()
    exact, made = gradient_errors(q, k, v, False, g)
    x, y = (found[0][tuple(samples.rows.T)] for found in (made, exact))
    assert samples.gradients == {"dQ": pytest.approx(float((x - y).norm() / y.norm()), rel=1e-8)}
    assert "sampled rows; exact dK and dV" in samples.gradients_of


def test_only_gradients_that_were_asked_for() -> None:
    q, k, v = operands()
    q.requires_grad_(False)
    k.requires_grad_(False)
    assert list(only(polyattn.explain(attend, q, k, v, False, options=LOW)).gradients) == ["dV"]
    v.requires_grad_(False)
    samples = only(polyattn.explain(attend, q, k, v, False, options=LOW))
    assert (dict(samples.gradients), samples.gradients_of) == ({}, "")


def test_a_sum_after_a_normalisation_has_a_gradient() -> None:
    q, k, v = operands(heads=2)
    cotangents: list[torch.Tensor] = []

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(q, k, v, False)
        out.register_hook(cotangents.append)
        return F.layer_norm(out, (3,))

    polyattn.explain(model, q, k, v, options=LOW)
    assert float(cotangents[0].abs().mean()) > 1e-2


@pytest.mark.parametrize(
    "more",
    [{"features": "skeleton", "rank": 24}, {"local_window": 4}, {"outlier_keys": 4}, {"polynomial": "least_squares"}],
    ids=["skeleton", "local_window", "outlier_keys", "fitted"],
)
def test_weights_of_other_forms_make_the_output(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # With all keys drawn, Σ_j P̃_ij v_j is the output of the real call.
    outs: list[torch.Tensor] = []
    module = importlib.import_module("polyattn.report.explain")
    original = module._Sampler.forward

    def spy(self: Any, entry: Any, tensors: Any, out: torch.Tensor, *how: Any) -> None:
        outs.append(out.clone())
        original(self, entry, tensors, out, *how)

    monkeypatch.setattr(module._Sampler, "forward", spy)
    q, k, v = operands()
    samples = only(polyattn.explain(attend, q, k, v, False, options={**LOW, **more}, backward=False))
    assert len(samples.exact) == 64 * N
    assert int(samples.left.sum()) < 32
    values = v.detach().repeat_interleave(2, 1)[tuple(samples.rows[:, :2].T)]
    made = (samples.approximate.view(64, 1, N) @ values).squeeze(1)
    torch.testing.assert_close(made, outs[0][tuple(samples.rows.T)], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(samples.approximate.view(64, N).sum(1), torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize(("many", "all_exact"), [(4, True), (40, False)], ids=["a_few", "too_many"])
def test_rows_that_the_call_made_exact_are_exact(many: int, all_exact: bool) -> None:
    q, k, v = (x.detach() for x in operands())
    options = polyattn.Options(features="skeleton", rank=16)
    plan = SitePlan.of(options, False, 1 / math.sqrt(D), D, "cpu")
    fit = fits.make("a site", (q, k, v), plan, options, 1, 0)
    far = q[0].flatten(0, 1)[:many]
    far *= 5 / far.norm(dim=-1, keepdim=True)  # the fit saw queries up to 4
    made = execute.forward(*execute.grouped(q, k, v), plan, fit.values, fit.radius)
    samples = sample(0, (q, k, v), made.out.view(2, 4, N, 3), plan, fit, 10_000, torch.Generator())
    assert len(samples.rows) == 2 * 4 * N  # all there are
    assert torch.equal(samples.left, made.denominators.flatten() <= 0)
    assert bool(samples.left[:many].all()) == all_exact
    same = (samples.approximate - samples.exact).abs().view(-1, N).amax(1) < 1e-9
    assert torch.equal(same, samples.left)
    assert torch.equal(samples.errors < 1e-9, samples.left)


@pytest.mark.parametrize("options", [{"policy": "exact"}, {"audit_rows": 64}], ids=["exact", "too_short"])
def test_exact_sites_have_none(options: dict[str, Any]) -> None:
    q, k, v = operands()
    (site,) = polyattn.explain(attend, q, k, v, False, options=options).sites
    assert (site.verdict, site.samples, site.sketch(), site.to_dict()["samples"]) == ("exact", (), "", [])
    assert "sampled" not in str(site)
    with pytest.raises(PolyattnError, match="no samples to plot"):
        site.plot()


def test_the_number_of_rows() -> None:
    q, k, v = operands()
    assert len(only(polyattn.explain(attend, q, k, v, False, options=LOW, samples=7)).errors) == 7
    assert polyattn.explain(attend, q, k, v, False, options=LOW, samples=0).sites[0].samples == ()
    for bad in (-1, True, 2.0):
        with pytest.raises(OptionValueError, match="samples"):
            polyattn.explain(attend, q, k, v, False, samples=bad)  # type: ignore[arg-type]


# -- text and figures ------------------------------------------------------------------------------------------------


def two_sites(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v, False) + attend(2 * q, k, v, True)


def made(**changes: Any) -> Samples:
    generator = torch.Generator().manual_seed(0)
    exact = (10 * torch.randn(64, generator=generator, dtype=torch.float64)).exp().clamp(max=1)
    values: dict[str, Any] = {
        "state": 0,
        "rows": torch.stack([torch.zeros(4), torch.zeros(4), torch.tensor([1, 5, 9, 30])], 1).long(),
        "errors": torch.tensor([1e-3, 2e-3, 0.0, 4e-2], dtype=torch.float64),
        "left": torch.tensor([False, False, True, False]),
        "row": torch.arange(4).repeat_interleave(16),
        "key": torch.arange(16).repeat(4),
        "drawn": torch.arange(64) % 16 < 14,
        "exact": exact,
        "approximate": torch.cat([-exact[:7], torch.zeros(2, dtype=torch.float64), 1.1 * exact[9:]]),
        "gradients": {"dQ": 1.2e-2, "dV": 3e-3},
        "gradients_of": "2 of 8 heads",
    }
    return Samples(**{**values, **changes})


def test_lines_say_quantiles_negative_weights_and_gradients() -> None:
    rows, gradients = plots.lines(made())
    assert rows.startswith(
        "4 sampled rows (1 of them exact): error 1.5e-03 in the median, 90 % below 2.9e-02, largest 4.0e-02; "
    )
    assert rows.endswith("12 % of sampled weights negative")  # 7 of 56 drawn ones
    assert gradients == "relative error of gradients: dQ 1.2e-02, dV 3.0e-03 (2 of 8 heads)"
    assert len(plots.lines(made(gradients={}))) == 1
    assert "none of sampled weights" in plots.lines(made(approximate=made().exact))[0]


def test_sketch_counts_everything() -> None:
    text = plots.sketch([made(errors=torch.tensor([1e-3, math.nan, 0.0, 4e-2], dtype=torch.float64))], 2e-2)
    top, bottom = text.split("log10 of approximate")
    assert "tolerance -1.7" in top
    assert [int(line.split()[-1]) for line in top.splitlines()[1:]] == [1, 0, 0, 1, 1, 1]
    assert "not finite 1" in top
    assert "no error 1" in top
    assert "not positive 9" in bottom
    assert "0.00,   0.25 " + 50 * "#" + " 55" in bottom


def test_figures_are_written_and_repeat(tmp_path: pathlib.Path) -> None:
    mpl = pytest.importorskip("matplotlib")
    before = mpl.rcParams.copy()
    for name in ("a.svg", "b.svg", "deep/c.png", "d.pdf"):
        plots.draw([made()], "a site", 2e-2, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "deep" / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "d.pdf").read_bytes()[:4] == b"%PDF"
    root = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
    assert sum(node.tag.endswith("use") for node in root.iter()) > 60  # a mark for each weight and row
    assert mpl.rcParams.copy() == before


def test_figures_count_what_a_logarithm_cannot_show() -> None:
    pytest.importorskip("matplotlib")
    left, right = plots.draw([made()], "a site", 2e-2).axes
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert any("7 negative, 2 zero" in text for text in legend)
    assert right.get_title() == "error of rows: 1 of 4 above the tolerance"
    assert any("tolerance 0.02" in text.get_text() for text in right.get_legend().get_texts())
    left, right = plots.draw([made(), made(state=1)], "two", 2e-2).axes
    assert {"layer 0", "layer 1"} <= {text.get_text() for text in left.get_legend().get_texts()}
    nothing = torch.full((64,), math.nan, dtype=torch.float64)
    broken = made(approximate=nothing, errors=nothing[:4])
    left, right = plots.draw([broken], "nothing but NaN", 2e-2).axes
    assert any("64 not a number" in text.get_text() for text in left.get_legend().get_texts())
    assert "4 of 4 above" in right.get_title()


def test_reports_plot_and_embed(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    report = polyattn.explain(two_sites, *operands(), options=LOW)
    paths = report.plot(tmp_path / "figures")
    assert [path.name for path in paths] == ["site-1.svg", "site-2.svg"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("samples as text") == 2
    read = json.loads(json.dumps(report.to_dict()))["sites"][0]["samples"][0]
    assert read["errors"] == report.sites[0].samples[0].errors.tolist()
    assert set(read["gradients"]) == {"dQ", "dK", "dV"}
    assert str(report).count("64 sampled rows") == 2
    assert polyattn.explain(two_sites, *operands(), options={"policy": "exact"}).plot(tmp_path) == []


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = polyattn.explain(two_sites, *operands(), options=LOW)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (lambda: report.sites[0].plot(), lambda: report.plot(tmp_path)):
        with pytest.raises(PolyattnError, match=r"pip install 'polyattn\[plot\]'"):
            plot()
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page
    assert "samples as text" in page
    assert "sampled rows" in str(report)
