"""What does not look like attention and is: found, with its mask and sizes, value and gradients of eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lookalikes import (
    HIDDEN,
    ROW,
    B,
    D,
    Function,
    H,
    M,
    N,
    in_both_modes,
    qkv,
    routed,
    run,
    scores,
    total,
)
from matching import INF, rand


def cosine(q, k, v, t):
    return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * t.clamp(max=4.6).exp()).softmax(-1) @ v


def channels(q, k, v, t):
    q, k, v = (x[:, :, :N].mT for x in (q, k, v))
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * t).softmax(-1) @ v


def windows(q, k, v):
    k, v = (F.pad(x[:, :, :N], (0, 0, 1, 1)).unfold(2, 3, 1).mT for x in (k, v))
    return ((q[:, :, :, None] @ k.mT).softmax(-1) @ v)[:, :, :, 0]


def skewed(q, k, v, r):
    k, v = k[:, :, :N], v[:, :, :N]
    relative = F.pad(q @ r.mT, (1, 0)).view(B, H, N + 1, N)[:, :, 1:]
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    return ((q @ k.mT + relative) * 0.5).masked_fill(later, -INF).softmax(-1) @ v


ALL = (B * H, N, M)
ATTENTION: dict[str, tuple[Function, str, Callable[[], list[torch.Tensor]], tuple[int, int, int]]] = {
    "cosine attention": (cosine, "none", lambda: qkv(rand(H, 1, 1)), ALL),
    "temperature of every query": (
        lambda q, k, v: (scores(q, k) * q.mean(-1, keepdim=True)).softmax(-1) @ v, "none", qkv, ALL,
    ),
    "channels as tokens": (channels, "none", lambda: qkv(rand(H, 1, 1)), (B * H, D, D)),
    "local windows": (windows, "none", qkv, (B * H * N, 1, 3)),
    "relative positions by skewing": (skewed, "causal + bias", lambda: qkv(rand(N, D)), (B * H, N, N)),
    "integers times a large number": (
        lambda q, k, v: (scores(q, k) + HIDDEN.long() * -1e5).softmax(-1) @ v, "bias", qkv, ALL,
    ),
    "transposed before and after": (lambda q, k, v: scores(k, q).softmax(-2).mT @ v, "none", qkv, ALL),
    "values on the left": (lambda q, k, v: (v.mT @ scores(k, q).softmax(-2)).mT, "none", qkv, ALL),
    "experts that do not look at the token": (
        lambda x, w, e: (x @ w).softmax(-1) @ e, "none", routed(3, 5), (1, 6, 3),
    ),
    "slots that mix tokens": (lambda x, w, e: ((x @ w).softmax(0).mT @ x) @ e, "none", routed(D, 5), (1, 3, 6)),
}  # fmt: skip


@in_both_modes(ATTENTION)
def test_attention_after_all(name: str, training: bool) -> None:
    function, mask, inputs, sizes = ATTENTION[name]
    report = run(function, inputs(), training, tolerance=1e-9)
    assert not report.refusals, str(report)
    (site,) = report.sites
    assert (site.verdict, site.mask) == ("exact", mask)
    shape = site.compiled_shape
    assert (int(shape["batch"]) * int(shape["heads"]), shape["n_q"], shape["n_k"]) == sizes


FILLS = [-INF, torch.finfo(torch.float64).min, -1e9, -1e4]


@pytest.mark.parametrize(
    ("fill", "training"), [*((fill, False) for fill in FILLS), *((fill, True) for fill in FILLS if fill > -INF)]
)
def test_rows_in_which_nothing_is_seen(fill: float, training: bool) -> None:
    report = run(lambda q, k, v: scores(q, k).masked_fill(ROW, fill).softmax(-1) @ v, qkv(), training, 1e-9)
    assert [site.mask for site in report.sites] == ["mask"]


def test_rows_of_nan_that_are_replaced_in_the_output() -> None:
    """Without the gradient of v: eager's is NaN, of no gradient times a weight of NaN, and ours is finite."""

    def output(q, k, v):
        out = scores(q, k).masked_fill(ROW, -INF).softmax(-1) @ v.detach()
        return torch.where(out.isnan(), 0.0, out)

    report = run(output, qkv(), True, 1e-9)
    assert [site.mask for site in report.sites] == ["mask"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("fill", FILLS)
def test_rows_that_an_added_mask_hides(fill: float, training: bool) -> None:
    added = torch.zeros(N, M, dtype=torch.float64).masked_fill(ROW, fill)
    report = run(lambda q, k, v: (scores(q, k) + added).softmax(-1) @ v, qkv(), training, 1e-9)
    assert [site.mask for site in report.sites] == ["bias"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_the_exponential_of_a_log_softmax_is_equal(training: bool) -> None:
    report = run(lambda q, k, v: scores(q, k).log_softmax(-1).exp() @ v, qkv(), training, 1e-9)
    assert not report.refusals


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_softmax_by_hand_with_a_detached_maximum(training: bool) -> None:
    def function(q, k, v):
        made = scores(q, k)
        e = (made - made.detach().amax(-1, keepdim=True)).exp()
        return (e / total(e)) @ v

    (site,) = run(function, qkv(), training, 1e-9).sites
    assert site.mask == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_smallest_number_times_two_hides_a_row(dtype: torch.dtype) -> None:
    def function(q, k, v):
        filled = (q @ k.mT).masked_fill(ROW, torch.finfo(q.dtype).min)
        return (filled * 2.0).softmax(-1) @ v

    inputs = [x.detach().to(dtype) for x in qkv()]
    assert function(*inputs)[:, :, 2].isnan().all()
    run(function, inputs, False, tolerance=3e-2)
