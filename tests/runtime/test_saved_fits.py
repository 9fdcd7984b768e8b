"""Fits that outlive a process, are made anew when they fail, or when somebody asks."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites import Model, all_states, only_state
from torch.utils.checkpoint import checkpoint

import polyattn
from polyattn.errors import FitError, OptionValueError
from polyattn.rewriter.families.family import Fit
from polyattn.runtime import registry

SKELETON: dict[str, Any] = {"features": "skeleton", "rank": 24, "inner": "eager"}
LOW: dict[str, Any] = {**SKELETON, "policy": "low_rank", "audit_every": 2}


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None) -> None:
    """Nothing compiled, nothing decided."""


def tokens(seed: int = 0, n: int = 90) -> torch.Tensor:
    return torch.randn(1, n, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(turned: bool, seed: int = 0, n: int = 300) -> list[torch.Tensor]:
    """Queries and keys along one direction of four, or, turned, along another: what fits one misses the other."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    sizes = torch.tensor([0.1, 0.1, 0.1, 3.0] if turned else [3.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    return [x.requires_grad_() for x in (q * sizes, k * sizes, v)]


def off(tensors: list[torch.Tensor], out: torch.Tensor) -> float:
    exact = F.scaled_dot_product_attention(*tensors)
    return float(((out - exact).norm() / exact.norm()).detach())


# -- made anew ---------------------------------------------------------------------------------------------------------


def test_a_fit_whose_audit_fails_is_made_anew() -> None:
    def attend(tensors: list[torch.Tensor], **more: Any) -> float:
        return off(tensors, polyattn.attention(*tensors, options={**SKELETON, "audit_every": 2, "rank": 64, **more}))

    first = attend(heads(False), policy="auto", tolerance=0.05)
    state = only_state()
    kept = state.fit
    assert first < 0.01
    assert (state.verdict, state.fits) == ("low_rank", 1)
    between = attend(heads(True), policy="auto", tolerance=0.05)
    assert between > 0.1, "no audit, the old fit"
    assert state.fit is kept
    second = attend(heads(True, 1), policy="auto", tolerance=0.05)
    assert second < between / 3, "audited, fitted anew, audited again"
    assert (state.verdict, state.fits, state.audits, state.fit.call) == ("low_rank", 2, 2, 3)
    registry.reset()
    for tensors in (heads(False), heads(True), heads(True, 1)):
        last = attend(tensors, policy="auto", tolerance=0.05, refit=False)
    assert only_state().verdict == "exact"
    assert last < 1e-12


def test_a_head_without_a_low_rank_form_becomes_exact_though_it_is_fitted_anew() -> None:
    def attend(size: float) -> torch.Tensor:
        q, k, v = heads(False)
        return polyattn.attention(size * q, size * k, v, options={**SKELETON, "audit_every": 1, "rank": 8})

    attend(0.3)
    state = only_state()
    assert state.verdict == "low_rank"
    sharp = torch.randn(1, 1, 300, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = polyattn.attention(9 * sharp, 9 * sharp, sharp, options={**SKELETON, "audit_every": 1, "rank": 8})
    assert state.verdict == "low_rank", "another line of this file is another site"
    for _ in range(2):
        attend(30.0)
    assert (state.verdict, state.fits) == ("exact", 2)
    assert bool(out.isfinite().all())


def test_fits_that_do_not_help_are_made_ever_more_rarely() -> None:
    made = []
    for step in range(20):
        tensors = heads(step % 2 == 0, step)
        polyattn.attention(*tensors, options={**LOW, "rank": 8, "tolerance": 1e-9, "audit_every": 1})
        made.append(only_state().fits)
    assert made[-1] == 5, made  # at calls 1, 2, 4, 8 and 16
    assert [made[at - 1] for at in (1, 2, 4, 8, 16)] == [1, 2, 3, 4, 5], made


def test_a_recompute_takes_the_fit_of_its_first_run() -> None:
    """Between a forward and its backward another call fits anew."""

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return polyattn.attention(*tensors, options={**LOW, "rank": 8, "audit_every": 1, "tolerance": 1e-9})

    first, other = heads(False), heads(True)
    wanted = torch.autograd.grad(attend(*first).square().sum(), first)
    kept = only_state().fit
    registry.reset()
    out = checkpoint(attend, *first, use_reentrant=False)
    attend(*other)
    state = only_state()
    assert state.fits == 2
    assert not torch.equal(state.fit.values, kept.values)
    for x, y in zip(torch.autograd.grad(out.square().sum(), first), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    assert (state.calls, state.fits) == (2, 2)


def test_many_rows_without_a_denominator_ask_for_a_new_fit() -> None:
    options = {**LOW, "audit_rows": 0, "audit_every": 1}

    def attend(tensors: list[torch.Tensor]) -> None:
        polyattn.attention(*tensors, options=options)

    attend(heads(False))
    state = only_state()
    attend(heads(False))
    assert (state.fits, state.exact_rows) == (1, 0)
    state.change(fit=Fit(-state.fit.values, (), None, state.fit.error, 1))  # cores of the other sign
    landmarks = 2 * 4
    state.fit.values[..., :landmarks] *= -1
    attend(heads(False))
    assert (state.fits, state.exact_rows) == (2, 0)


# -- kept --------------------------------------------------------------------------------------------------------------


def through_a_file(model: torch.nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(polyattn.fits(model), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "more", [{}, {"features": "polynomial", "polynomial": "least_squares", "degree": 3, "rank": 30}]
)
def test_a_model_goes_on_with_fits_from_a_file(more: dict[str, Any]) -> None:
    # Which rows are audited depends on how many graphs came before: here no audit may ask for a new fit.
    options = {**LOW, **more, "tolerance": 10.0, "relative_tolerance": 10.0}
    torch.manual_seed(0)
    model = Model()
    compiled = torch.compile(model, backend="polyattn", options=options)
    wanted = compiled(tokens())
    later = compiled(tokens(1))
    saved = through_a_file(model)
    assert list(saved) == ["project.weight#0"]
    copied = copy.deepcopy(model)
    torch.compiler.reset()
    polyattn.reset()
    polyattn.load_fits(copied, saved)
    again = torch.compile(copied, backend="polyattn", options=options)
    torch.testing.assert_close(again(tokens(1)), later, rtol=0, atol=0)
    state = only_state()
    assert (state.fits, state.calls, state.audits) == (0, 1, 1), "not made here, and audited"
    torch.testing.assert_close(again(tokens()), wanted, rtol=0, atol=0)
    assert polyattn.fits(again).keys() == saved.keys(), "a compiled model is as good"


def test_reset_forgets_what_was_loaded() -> None:
    model = Model()
    torch.compile(model, backend="polyattn", options=LOW)(tokens())
    polyattn.load_fits(model, polyattn.fits(model))
    torch.compiler.reset()
    polyattn.reset()
    torch.compile(model, backend="polyattn", options=LOW)(tokens())
    assert only_state().fits == 1


def test_a_loaded_fit_that_fails_is_made_anew_at_once() -> None:
    model = Model()
    torch.compile(model, backend="polyattn", options=LOW)(tokens())
    saved = polyattn.fits(model)
    polyattn.reset()
    saved["project.weight#0"]["values"].mul_(0.5)
    polyattn.load_fits(model, saved)
    torch.compile(model, backend="polyattn", options={**LOW, "tolerance": 1e-2})(tokens())
    assert only_state().fits == 1
    assert only_state().error < 1e-2


def test_a_fit_made_with_other_options_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    torch.compile(model, backend="polyattn", options=LOW)(tokens())
    saved = polyattn.fits(model)
    torch.compiler.reset()
    polyattn.reset()
    polyattn.load_fits(model, saved)
    with caplog.at_level(logging.WARNING, "polyattn"):
        torch.compile(model, backend="polyattn", options={**LOW, "rank": 16})(tokens())
    assert "project.weight#0 was made with rank=24 instead of 16" in caplog.text
    assert only_state().fitted.shape[1] == 16


def test_names_that_a_model_does_not_have_are_an_error() -> None:
    model = Model()
    torch.compile(model, backend="polyattn", options=LOW)(tokens())
    saved = polyattn.fits(model)
    with pytest.raises(FitError, match=r"parameters that the model does not have.*project\.weight"):
        polyattn.load_fits(torch.nn.Linear(2, 2), saved)
    with pytest.raises(FitError, match="not a fit"):
        polyattn.load_fits(model, {"project.weight#0": {"values": torch.zeros(2)}})


def test_refresh_forgets_the_fits_of_one_model_or_of_all() -> None:
    models = [Model(), Model()]
    compiled = [torch.compile(m, backend="polyattn", options=LOW) for m in models]
    for run in compiled:
        run(tokens())
    first, second = all_states()
    assert polyattn.refresh(compiled[0]) == 1
    assert first.fit is None
    assert second.fit is not None
    compiled[0](tokens(1))
    assert (first.fits, second.fits) == (2, 1)
    assert polyattn.refresh() == 2
    assert polyattn.fits(models[0]) == {}


def test_the_option_is_checked() -> None:
    with pytest.raises(OptionValueError, match="refit"):
        polyattn.Options(refit=1)
