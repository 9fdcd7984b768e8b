"""``polyattn.attention`` and the operator behind it: values, gradients, fallbacks, errors."""

from __future__ import annotations

import math
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from dense import dense_polynomial
from operands import operands
from sites import only_state

import polyattn
from polyattn import errors
from polyattn.runtime import registry
from polyattn.site_plan import SitePlan


@pytest.fixture(autouse=True)
def fresh_states() -> None:
    registry.reset()


def agree(options: dict[str, object], causal: bool, shape: tuple[int, ...], chunk: int, bound: float = 1e-9) -> int:
    """Compare with the dense polynomial; returns how many rows were exact (nothing is compared when there are any)."""
    q, k, v, g = operands(*shape)
    degree, substituted = options["degree"], options.get("gradient") == "substituted"
    assert isinstance(degree, int)
    shift = SitePlan.of(polyattn.Options.make(options), causal, 1.0, 4, "cpu").centring
    wanted = dense_polynomial(q, k, v, degree, causal, chunk, substituted, shift)
    found = polyattn.attention(
        q, k, v, causal=causal, options={**options, "policy": "low_rank", "causal_chunk": chunk, "audit_rows": 0}
    )
    state = only_state()
    if state.exact_rows:
        # An odd polynomial can have a denominator that is not positive: those rows are exact, tested elsewhere.
        return state.exact_rows
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound)
    pairs = zip(torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(wanted, (q, k, v), g), strict=True)
    for name, (x, y) in zip("qkv", pairs, strict=True):
        torch.testing.assert_close(
            x, y, rtol=0, atol=bound * max(1.0, float(y.abs().max())), msg=lambda m, n=name: f"d{n}: {m}"
        )
    return 0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("e", [3, 16, 33])
@pytest.mark.parametrize("d", [3, 16, 33])
def test_low_rank_equals_autograd_through_the_dense_polynomial(d: int, e: int, degree: int, causal: bool) -> None:
    n, chunk = (11, 4) if (d, degree) == (33, 4) else (29, 8)  # 66,045 features
    assert agree({"degree": degree}, causal, (1, 2, 1, n, n, d, e), chunk=chunk) == 0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("d", "e", "degree"), [(3, 16, 4), (16, 3, 3), (33, 16, 2)])
def test_substituted_gradient_is_the_exact_formula_with_the_polynomial(
    d: int, e: int, degree: int, causal: bool
) -> None:
    assert agree({"degree": degree, "gradient": "substituted"}, causal, (1, 2, 1, 45, 45, d, e), chunk=16) == 0


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 2),
    kv=st.integers(1, 2),
    groups=st.integers(1, 3),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    d=st.integers(1, 5),
    e=st.integers(1, 5),
    degree=st.integers(1, 4),
    causal=st.booleans(),
    chunk=st.integers(1, 17),
    gradient=st.sampled_from(["consistent", "substituted"]),
    shift=st.booleans(),
    causal_stats=st.sampled_from(["call", "first_chunk"]),
)
def test_random_shapes(
    batch: int,
    kv: int,
    groups: int,
    n_q: int,
    n_k: int,
    d: int,
    e: int,
    degree: int,
    causal: bool,
    chunk: int,
    gradient: str,
    shift: bool,
    causal_stats: str,
) -> None:
    registry.reset()
    exact_rows = agree(
        {"degree": degree, "gradient": gradient, "centring": shift, "causal_stats": causal_stats},
        causal,
        (batch, kv * groups, kv, n_q, n_k, d, e),
        chunk,
    )
    hypothesis.assume(exact_rows == 0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_policy_is_as_accurate_as_torch(dtype: torch.dtype, causal: bool) -> None:
    q, k, v, g = operands(2, 4, 2, 37, 23, 6, 5, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = F.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True)
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    ours = polyattn.attention(q, k, v, causal=causal, options={"policy": "exact"})
    pairs = [(ours, torchs, truth)]
    pairs += list(
        zip(
            torch.autograd.grad(ours, (q, k, v), g),
            torch.autograd.grad(torchs, (q, k, v), g),
            torch.autograd.grad(truth, wide, g.double()),
            strict=True,
        )
    )
    for mine, other, exact in pairs:
        allowed = 2 * float((other.double() - exact).abs().max()) + 4 * torch.finfo(dtype).eps * float(
            exact.abs().max()
        )
        assert float((mine.double() - exact).abs().max()) <= allowed


def test_half_precision_accumulates_in_float32() -> None:
    q, k, v, g = operands(1, 2, 2, 64, 64, 8, 8, torch.bfloat16, 0.3)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = dense_polynomial(*wide, 2, False, 1, False)
    ours = polyattn.attention(q, k, v, options={"policy": "low_rank"})
    assert ours.dtype == torch.bfloat16
    assert float((ours.double() - truth).abs().max()) <= 2 * torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
    for mine, exact in zip(
        torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(truth, wide, g.double()), strict=True
    ):
        assert float((mine.double() - exact).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * float(
            exact.abs().max()
        )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rows_without_a_positive_denominator_are_computed_exactly(causal: bool) -> None:
    # Degree 1 goes negative for strongly negative logits: every such row must be softmax attention, gradients included.
    q, k, v, g = operands(1, 1, 1, 24, 24, 4, 3, size=0.2)
    with torch.no_grad():
        k.add_(1.0)
        q[..., ::3, :] = -3.0
    options = {"policy": "low_rank", "degree": 1, "causal_chunk": 1, "audit_rows": 0, "centring": False}
    ours = polyattn.attention(q, k, v, causal=causal, options=options)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    state = only_state()
    assert state.exact_rows >= 7
    torch.testing.assert_close(ours[..., 3::3, :], exact[..., 3::3, :], rtol=0, atol=1e-12)
    only = torch.zeros_like(g)
    only[..., 3::3, :] = g[..., 3::3, :]
    for x, y in zip(
        torch.autograd.grad(ours, (q, k, v), only), torch.autograd.grad(exact, (q, k, v), only), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_exact_rows_of_shifted_attention_are_those_without_a_positive_denominator(causal: bool) -> None:
    q, k, v, g = operands(1, 2, 1, 40, 40, 4, 3, size=1.6)
    with torch.no_grad():
        q.add_(1.0)  # a mean query, which some keys then outweigh the others by
    options = {"policy": "low_rank", "degree": 1, "causal_chunk": 4, "audit_rows": 0}
    ours = polyattn.attention(q, k, v, causal=causal, options=options)
    low = dense_polynomial(q, k, v, 1, causal, 4, False, "call")
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    is_exact = (ours - exact).abs().amax(-1) < 1e-12
    is_low = (ours - low).abs().amax(-1) < 1e-9
    assert int((is_exact & ~is_low).sum()) == only_state().exact_rows > 0
    assert bool((is_exact | is_low).all())
    only = g * (is_exact & ~is_low)[..., None]
    for x, y in zip(
        torch.autograd.grad(ours, (q, k, v), only), torch.autograd.grad(exact, (q, k, v), only), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def test_overflowing_features_fall_back_to_exact_with_finite_gradients() -> None:
    q, k, v, g = operands(1, 1, 1, 20, 20, 4, 3, torch.float32)
    with torch.no_grad():
        k[..., 5, :] = 1e30
        q.mul_(1e-30)
    ours = polyattn.attention(q, k, v, options={"policy": "low_rank", "degree": 2, "audit_rows": 0})
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, exact)
    for x, y in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(exact, (q, k, v), g), strict=True):
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * float(y.abs().max()))


def test_auto_falls_back_to_exact_when_the_audit_fails() -> None:
    q, k, v, _ = operands(1, 1, 1, 4096, 4096, 4, 4, torch.float32, size=3.0)
    out = polyattn.attention(q, k, v)
    state = only_state()
    assert state.verdict == "exact"
    assert "audit" in state.reason
    assert state.error is not None
    assert state.error > 2e-2
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_auto_takes_low_rank_where_it_is_cheaper_and_holds() -> None:
    q, k, v, _ = operands(1, 1, 1, 4096, 4096, 4, 4, torch.float32, size=0.4)
    polyattn.attention(q, k, v)
    state = only_state()
    assert (state.verdict, state.guarantee) == ("low_rank", "audited")
    assert state.flops_after < state.flops_before


def test_auto_stays_exact_on_short_sequences() -> None:
    q, k, v, _ = operands(1, 1, 1, 32, 32, 16, 16, torch.float32)
    polyattn.attention(q, k, v)
    state = only_state()
    assert state.verdict == "exact"
    assert "costs" in state.reason


def test_only_the_wanted_gradients_are_computed() -> None:
    # Prompt tuning: with frozen keys and values the operations for dK and dV are gone.
    from rules import kernels

    from polyattn.rewriter.algebra import expr as ir
    from polyattn.rewriter.planning.plan import walk

    plan = kernels(False, 2, "consistent").plan
    known = list(walk([plan.outputs["O"]]))
    sizes = {ir.N_Q: 1000, ir.N_K: 1000, ir.D: 32, ir.E: 32, ir.R: 561, ir.R1: 33}
    one, all_ = (plan.cost(names, known).subs(sizes) for names in (["dQ"], ["dQ", "dK", "dV"]))
    assert one < 0.3 * all_
    q, k, v, g = operands(1, 1, 1, 30, 30, 3, 3)
    k, v = k.detach(), v.detach()
    out = polyattn.attention(q, k, v, options={"policy": "low_rank"})
    (dq,) = torch.autograd.grad(out, (q,), g)
    wanted = dense_polynomial(q, k, v, 2, False, 1, False, "call")
    torch.testing.assert_close(dq, torch.autograd.grad(wanted, (q,), g)[0], rtol=0, atol=1e-9)


def test_random_generators_and_threads_are_left_alone() -> None:
    before = torch.get_rng_state()
    q, k, v, _ = operands(1, 1, 1, 64, 64, 3, 3)
    polyattn.attention(q, k, v, options={"policy": "low_rank"})
    assert torch.equal(before, torch.get_rng_state())


def test_threads_decide_once() -> None:
    q, k, v, _ = operands(1, 1, 1, 64, 64, 3, 3)
    threads = [
        threading.Thread(target=lambda: polyattn.attention(q, k, v, options={"policy": "low_rank"})) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = only_state()
    assert state.calls == 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(1, 1, 4, 5)}, errors.ShapeError, "head dims of q and k differ"),
        ({"v": torch.zeros(1, 1, 5, 3)}, errors.ShapeError, "same tokens"),
        ({"q": torch.zeros(1, 1, 4, 3, dtype=torch.int64)}, errors.DtypeError, "one dtype"),
        (
            {"q": torch.zeros(1, 3, 4, 3), "k": torch.zeros(1, 2, 4, 3), "v": torch.zeros(1, 2, 4, 3)},
            errors.ShapeError,
            "shared",
        ),
        ({"options": {"degre": 2}}, errors.UnknownOptionError, "did you mean 'degree'"),
        ({"options": {"degree": 7}}, errors.OptionValueError, "from 1 to 4"),
        ({"key_mask": torch.ones(4)}, errors.DtypeError, "key_mask must be boolean"),
        ({"key_mask": torch.ones(3, dtype=torch.bool)}, errors.ShapeError, r"key_mask has shape \(3,\)"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, errors.ShapeError, r"does not broadcast to \(1, 4\)"),
    ],
    ids=[
        "head_dims",
        "tokens",
        "dtype",
        "groups",
        "option",
        "degree",
        "mask_dtype",
        "mask_keys",
        "mask_batch",
    ],
)
def test_bad_input_names_the_mistake(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 1, 4, 3) for name in "qkv"}
    with pytest.raises(error, match=words):
        polyattn.attention(**{**arguments, **change})  # type: ignore[arg-type]


def test_integers_are_refused_by_name() -> None:
    x = torch.zeros(1, 1, 4, 3, dtype=torch.int32)
    with pytest.raises(errors.DtypeError, match="float16, bfloat16, float32 or float64"):
        polyattn.attention(x, x, x)


def test_double_backward_is_a_named_error() -> None:
    q, k, v, g = operands(1, 1, 1, 8, 8, 3, 3)
    out = polyattn.attention(q, k, v, options={"policy": "low_rank"})
    (dq,) = torch.autograd.grad(out, (q,), g, create_graph=True)
    with pytest.raises(errors.DoubleBackwardError, match="not differentiable"):
        dq.sum().backward()


def test_operator_is_well_formed() -> None:
    q, k, v, _ = operands(1, 2, 1, 9, 9, 3, 3)
    import polyattn.runtime.ops as ops

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for masks, changes in (([], "softmax"), ([(torch.arange(9) < 5)[None, None, None]], "zero; replace -inf")):
        arguments = (
            q,
            k,
            v,
            masks,
            [],
            0.5,
            False,
            changes,
            True,
            "test",
            polyattn.Options(policy="low_rank").key(),
            ops.VERSION,
        )
        torch.library.opcheck(torch.ops.polyattn.attention.default, arguments, test_utils=checks)


def test_an_audit_does_not_lose_nan() -> None:
    q, k, v, _ = operands(1, 1, 1, 32, 32, 3, 3)
    with torch.no_grad():
        v[..., 5, :] = float("nan")
    polyattn.attention(q, k, v, options={"policy": "low_rank"})
    assert math.isnan(only_state().error or 0.0)


def test_the_audited_forward_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyattn.runtime import execute

    calls = []
    forward = execute.forward

    def counted(*args: object, **named: object) -> object:
        calls.append(1)
        return forward(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "forward", counted)
    q, k, v, _ = operands(1, 1, 1, 40, 40, 3, 3)
    polyattn.attention(q, k, v, options={"policy": "low_rank"})
    assert len(calls) == 1


@pytest.mark.parametrize("policy", ["auto", "low_rank", "exact"])
@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)], ids=["batch", "queries", "keys"])
def test_without_tokens_there_is_nothing_to_compute(shape: tuple[int, ...], policy: str) -> None:
    q, k, v, g = operands(*shape, 4, 3)
    out = polyattn.attention(q, k, v, options={"policy": policy})
    assert out.shape == g.shape
    assert not out.any()
    for x, like in zip(torch.autograd.grad(out, (q, k, v), g), (q, k, v), strict=True):
        assert x.shape == like.shape
        assert not x.any()
