"""measure: errors of outputs and gradients against dense references in float64; what it leaves as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import dense
import pytest
import torch

import polyattn
from polyattn.errors import DtypeError, OptionValueError, ShapeError, UnknownOptionError
from polyattn.runtime import registry

D = 6


def operands(
    n_q: int = 40, n_k: int = 40, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_q + heads)
    q = torch.randn(2, heads, n_q, D, generator=generator, dtype=torch.float64)
    k = torch.randn(2, kv_heads, n_k, D, generator=generator, dtype=torch.float64)
    v = torch.randn(2, kv_heads, n_k, 5, generator=generator, dtype=torch.float64)
    return (0.6 * q).to(dtype), (0.6 * k).to(dtype), v.to(dtype)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = q @ k.mT / math.sqrt(D)
    if causal:
        score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -math.inf)
    return score.softmax(-1) @ v


def low_rank(tensors: Any, causal: bool, degree: int, chunk: int = 8) -> torch.Tensor:
    return dense.dense_polynomial(*tensors, degree, causal, chunk, False, "call")


OPTIONS = {"degree": 2, "causal_chunk": 8}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_errors_are_those_of_the_dense_polynomial(causal: bool, kv_heads: int) -> None:
    tensors = operands(kv_heads=kv_heads)
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = polyattn.measure(*tensors, "smooth", causal=causal, options=OPTIONS)
    exact, made = softmax_attention(*leaves, causal), low_rank(leaves, causal, 2)
    v = tensors[2].repeat_interleave(4 // kv_heads, 1)
    centre = v.mean(2, keepdim=True)
    rows = (made - exact).norm(dim=-1) / (v - centre).norm(dim=-1).amax(-1, keepdim=True)
    torch.testing.assert_close(found.additive_max, rows.amax(-1).detach())
    torch.testing.assert_close(found.additive, rows.detach().quantile(0.985, dim=-1))
    relative = ((made - exact).square().sum((2, 3)) / (exact - centre).square().sum((2, 3))).sqrt()
    torch.testing.assert_close(found.relative, relative.detach())
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = exact.detach() @ mix
    wanted, got = torch.autograd.grad(exact, leaves, g), torch.autograd.grad(made, leaves, g)
    for error, x, y in zip((found.dq, found.dk, found.dv), got, wanted, strict=True):
        assert error is not None
        torch.testing.assert_close(error, (x - y).norm(dim=(2, 3)) / y.norm(dim=(2, 3)))
    assert found.dk is not None
    assert found.dk.shape == (2, kv_heads)
    assert float(found.additive.min()) > 1e-5  # not of exact attention with itself
    assert (found.verdict, found.cotangent) == ("low_rank", "smooth")


def test_a_given_gradient_and_white_noise() -> None:
    tensors = operands()
    noise = torch.randn(2, 4, 40, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    white = polyattn.measure(*tensors, "white", seed=3)
    given = polyattn.measure(*tensors, noise)
    other = polyattn.measure(*tensors, "white", seed=4)
    assert white.dq is not None
    assert other.dq is not None
    torch.testing.assert_close(white.dq, given.dq, rtol=0, atol=0)
    assert not torch.equal(white.dq, other.dq)
    assert (white.cotangent, given.cotangent) == ("white", "given")


def test_more_queries_than_keys_and_a_scale() -> None:
    q, k, v = operands(n_q=30, n_k=50)
    found = polyattn.measure(q, k, v, scale=0.1)
    again = polyattn.measure(q * 0.1 * math.sqrt(D), k, v)
    torch.testing.assert_close(found.relative, again.relative)
    assert (found.dq, found.dk, found.dv, found.cotangent) == (None, None, None, "none")


def test_half_precision_adds_its_rounding() -> None:
    tensors = operands(dtype=torch.bfloat16)
    rough = polyattn.measure(*tensors, "smooth")
    fine = polyattn.measure(*(x.double() for x in tensors), "smooth")
    torch.testing.assert_close(rough.additive_max, fine.additive_max, rtol=0, atol=4e-3)
    assert not torch.equal(rough.additive_max, fine.additive_max)


@pytest.mark.parametrize("options", [{}, {"features": "skeleton", "rank": 16}], ids=["taylor", "fitted"])
def test_calls_leave_nothing_behind_and_repeat(options: dict[str, Any]) -> None:
    tensors = operands()
    before, generator = registry.entries(), torch.get_rng_state()
    first = polyattn.measure(*tensors, "white", options=options)
    polyattn.measure(*(2 * x for x in tensors), options=options)  # would leave another fit
    second = polyattn.measure(*tensors, "white", options=options)
    assert first.to_dict() == second.to_dict()
    assert registry.entries() == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(not x.requires_grad for x in tensors)


def test_the_state_is_forgotten_when_the_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise ValueError("on purpose")

    before = registry.entries()
    monkeypatch.setattr(polyattn.Errors, "of", fail)
    with pytest.raises(ValueError, match="on purpose"):
        polyattn.measure(*operands())
    assert registry.entries() == before


def test_works_without_grad_mode() -> None:
    tensors = operands()
    wanted = polyattn.measure(*tensors, "smooth").to_dict()
    with torch.no_grad():
        assert polyattn.measure(*tensors, "smooth").to_dict() == wanted
    with torch.inference_mode():
        assert polyattn.measure(*(x.clone() for x in tensors), "smooth").to_dict() == wanted


def test_options_decide_what_runs() -> None:
    tensors = operands()
    exact = polyattn.measure(*tensors, "smooth", options={"policy": "exact"})
    assert (exact.verdict, exact.reason) == ("exact", "policy='exact'")
    assert float(exact.additive_max.max()) < 1e-12
    assert exact.dq is not None
    assert float(exact.dq.max()) < 1e-12
    worse, better = (polyattn.measure(*tensors, options={"degree": degree}) for degree in (1, 4))
    assert float(better.relative.max()) < float(worse.relative.max()) / 20
    whole = polyattn.measure(*tensors, options=polyattn.Options(policy="low_rank", degree=4, audit_rows=0))
    assert whole.to_dict() == better.to_dict()


def test_outputs_of_another_origin() -> None:
    q, k, v = operands()
    exact = softmax_attention(q, k, v, False)
    pooled = v.repeat_interleave(2, 1).mean(2, keepdim=True).expand_as(exact)
    found = polyattn.Errors.of(pooled, exact, v)
    torch.testing.assert_close(found.relative, torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ShapeError, match="must be"):
        polyattn.Errors.of(pooled[:, :, 1:], exact, v)


def test_text_and_dict() -> None:
    found = polyattn.measure(*operands(), "smooth")
    text = str(found)
    assert "98.5% of rows" in text
    assert text.count("\n1, ") == 4
    assert f"{float(found.additive_max.max()):.2e}" in text.split("largest")[1]
    assert "smooth gradient" in text
    read = json.loads(json.dumps(found.to_dict()))
    assert read["dk"] == found.dk.tolist()  # type: ignore[union-attr]
    assert "dQ" not in str(polyattn.measure(*operands()))


def test_many_heads_are_cut_short() -> None:
    text = str(polyattn.measure(*operands(n_q=4, n_k=4, heads=20, kv_heads=20)))
    assert "(16 more heads)" in text


def test_bad_inputs_have_named_errors() -> None:
    q, k, v = operands()
    for bad in ((q[0], k[0], v[0]), (q[:1], k, v), (q[:, :3], k, v), (q, k, v[:, :1]), (q[:, :, :0], k, v)):
        with pytest.raises(ShapeError):
            polyattn.measure(*bad)
    with pytest.raises(ShapeError, match="g has shape"):
        polyattn.measure(q, k, v, q)
    with pytest.raises(DtypeError, match="floating"):
        polyattn.measure(q, k, v, torch.ones(2, 4, 40, 5, dtype=torch.long))
    with pytest.raises(DtypeError, match="one dtype"):
        polyattn.measure(q.float(), k, v)
    with pytest.raises(OptionValueError, match="'smooth', 'white' or None"):
        polyattn.measure(q, k, v, "rough")
    with pytest.raises(OptionValueError, match="seed"):
        polyattn.measure(q, k, v, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(UnknownOptionError, match="degree"):
        polyattn.measure(q, k, v, options={"degre": 2})


def test_the_function_is_there_after_its_module_was_imported() -> None:
    import polyattn.report.measure

    assert isinstance(polyattn.measure(*operands()), polyattn.Errors)
