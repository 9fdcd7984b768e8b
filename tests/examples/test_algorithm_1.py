"""Example 01: every number that it shows is asserted in small; the full run is marked long."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LOSSES = ("cross-entropy", "L2", "weighted log cosh")
GRADIENTS = ("consistent", "substituted")
BOUND_AT_DEGREE_4 = {"consistent": 2e-3, "substituted": 2e-4}
"""Of every relative error of dX, dW and dW_V against float64 autograd; logits lie within about ±0.7."""


@pytest.fixture(scope="module")
def shown(load_file: Callable[[str, Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``(results, what was printed, the plot)`` of one quick run."""
    import contextlib
    import io

    plot = tmp_path_factory.mktemp("algorithm_1") / "deep" / "plot.png"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(EXAMPLES))
        example = load_file("example_01_algorithm_1", EXAMPLES / "01_algorithm_1.py")
        results = example.main(["--quick", "--tokens", "40", "--layers", "2", "--out", str(plot)])
    return results, printed.getvalue(), plot


def test_every_layer_is_a_low_rank_site_of_the_papers_form(shown: Any) -> None:
    report = shown[0]["report"]
    assert [site.verdict for site in report.sites] == ["low_rank", "low_rank"]
    assert [site.spelling for site in report.sites] == ["softmax(X W Xᵀ) X W_V"] * 2
    assert not report.refusals


def test_errors_decrease_with_the_degree(shown: Any) -> None:
    found = shown[0]["errors"]
    assert shown[0]["exceptions"] == []
    assert set(found) == {
        (loss, gradient, degree) for loss in LOSSES for gradient in GRADIENTS for degree in (1, 2, 3, 4)
    }
    for loss in LOSSES:
        for gradient in GRADIENTS:
            for where in found[loss, gradient, 1]:
                errors = [found[loss, gradient, degree][where] for degree in (1, 2, 3, 4)]
                assert errors == sorted(errors, reverse=True), (loss, gradient, where)
                assert errors[3] < errors[0] / 100


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_degree_4_is_within_the_bound_and_no_exact_attention_ran(shown: Any, gradient: str) -> None:
    for loss in LOSSES:
        errors = shown[0]["errors"][loss, gradient, 4]
        assert set(errors) == {(layer, of) for layer in (0, 1) for of in ("dX", "dW", "dW_V")}
        assert max(errors.values()) < BOUND_AT_DEGREE_4[gradient]
        assert min(errors.values()) > 1e-9, "equal gradients mean that exact attention ran"


def test_the_substituted_gradient_is_the_closer_one(shown: Any) -> None:
    for loss in LOSSES:
        for degree in (1, 2, 3, 4):
            worst = {g: max(shown[0]["errors"][loss, g, degree].values()) for g in GRADIENTS}
            assert worst["substituted"] < worst["consistent"]


def test_dX_has_the_five_terms_of_the_paper(shown: Any) -> None:
    terms = shown[0]["terms"]
    assert len(terms.exact) == len(terms.low_rank) == 5
    assert all("exp(S)" in text for text in terms.exact.values())
    assert max(terms.exact_errors.values()) < 1e-12
    for text in terms.low_rank.values():
        assert "exp(" not in text, "no pair of tokens is left"
        assert "Φ2(Q)" in text
        assert "Φ2(X)" in text
    assert max(terms.low_rank_errors.values()) < 2e-2
    assert set(terms.gradient_errors) == {"dX", "dW", "dW_V"}
    assert 1e-6 < max(terms.gradient_errors.values()) < 1e-2
    printed = shown[1]
    for name in terms.exact:
        assert name in printed


def test_heads_and_mask(shown: Any) -> None:
    variants = shown[0]["variants"]
    assert {name for name, _, _ in variants} == {"2 heads, concatenated, causal mask", "GELU in place of the MLP"}
    for (name, gradient, _), worst in variants.items():
        bound = 0.15 if gradient == "consistent" else 1e-2
        assert all(1e-7 < error < bound for error in worst.values()), (name, gradient, worst)


def test_prompt_tuning_computes_less(shown: Any) -> None:
    tuned = shown[0]["prompt"]
    both, weights, prompt = (
        tuned[name] for name in ("prompt and weights", "weights alone", "prompt alone (prompt tuning)")
    )
    assert (both.weights_without, weights.weights_without, prompt.weights_without) == (0, 0, 9)
    assert prompt.around == both.around / 2, "the gradients of weights are half of the products"
    assert prompt.total < both.total
    assert prompt.needs == both.needs == ((True, True, True),) * 2
    assert weights.needs == ((True, False, True), (True, True, True)), "nothing needs dK where X is frozen"
    assert weights.attention < both.attention
    assert prompt.prompt_error == pytest.approx(both.prompt_error)
    assert 1e-8 < prompt.prompt_error < 1e-2


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_backward_for_queries_alone_costs_less_than_half(
    load_file: Callable[[str, Path], Any], monkeypatch: pytest.MonkeyPatch, gradient: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    extensions = load_file("example_paper_extensions", EXAMPLES / "paper_extensions.py")
    every, alone = (
        extensions.backward_flops(wanted, 4096, 4096, 16, 16, 2, gradient) for wanted in (("dQ", "dK", "dV"), ("dQ",))
    )
    assert alone < every / 2
    everything, dx = extensions.algebra_flops(4096, 16)
    products, scaling = 2 * (2 * 4096 * 16 * 16), 4096 * 16
    assert everything - dx == products + scaling, "dW and dW_V are products of X with what dX has anyway"


def test_theorem_4_2_in_small(shown: Any) -> None:
    results, printed, plot = shown
    assert set(results["growth"]) == {(g, degree, depth) for g in GRADIENTS for degree in (1, 2) for depth in (1, 2)}
    for gradient in GRADIENTS:
        for depth in (1, 2):
            errors = [results["growth"][gradient, degree, depth][0] for degree in (1, 2)]
            assert errors[1] < errors[0] / 3
    times = results["times"]
    assert {timing.plan for timing in times.timings} == {"exact", *GRADIENTS}
    assert all(timing.width == math.log2(timing.tokens) for timing in times.timings)
    assert all(len(timing.seconds) == 3 for timing in times.timings)
    assert all(0 < timing.error < 0.15 for timing in times.timings if timing.plan != "exact")
    assert all(entry <= bound for _, _, bound, entry, _ in times.regime), "entries are bounded as the theorem asks"
    fits = {fit.plan: fit for fit in times.fits}
    assert 2.0 < fits["exact"].expected < 2.3
    assert 1.0 < fits["consistent"].expected < fits["substituted"].expected < 1.7
    assert plot.read_bytes().startswith(b"\x89PNG")
    for words in ("measured exponent of n", "expected from the FLOPs", "threads", "Every error decreases"):
        assert words in printed


def test_a_line_is_fitted(load_file: Callable[[str, Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    line = load_file("example_theorem_4_2", EXAMPLES / "theorem_4_2.py").line
    slope, error = line([1.0, 3.0, 5.0, 7.0], [0.0, 1.0, 2.0, 3.0])
    assert slope == pytest.approx(2.0)
    assert error == pytest.approx(0.0, abs=1e-12)
    slope, error = line([0.0, 1.0, 0.0], [0.0, 1.0, 2.0])
    assert slope == pytest.approx(0.0)
    assert error == pytest.approx(math.sqrt((2 / 3) / 1 / 2))
    assert math.isnan(line([0.0, 1.0], [0.0, 1.0])[1])


def test_the_model_knows_nothing_of_polyattn() -> None:
    assert "polyattn" not in (EXAMPLES / "paper_model.py").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_full_run(load_file: Callable[[str, Path], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    results = load_file("example_01_full", EXAMPLES / "01_algorithm_1.py").main(["--out", str(tmp_path / "plot.png")])
    assert results["exceptions"] == []
    assert {name for name, _, _ in results["variants"]} >= {"2 heads, added", "2 heads, concatenated", "causal mask"}
    assert all(error < 0.1 for worst in results["variants"].values() for error in worst.values())
    slopes = {fit.plan: fit.slope for fit in results["times"].fits}
    assert slopes["consistent"] < slopes["exact"]
    assert slopes["substituted"] < slopes["exact"]
