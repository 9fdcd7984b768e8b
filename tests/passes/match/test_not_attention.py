"""What looks like attention and is none: it is refused with its reason, or not reported; value and gradients stay."""

from __future__ import annotations

from collections.abc import Callable

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
    hand,
    in_both_modes,
    qkv,
    routed,
    run,
    scores,
    total,
    weights,
)
from matching import INF, rand

# ---------------------------------------------------------------------------------------------------------------------
# refused: name -> (function, words of the reason, inputs)

Refused = tuple[Function, str, Callable[[], list[torch.Tensor]]]


def mixed() -> list[torch.Tensor]:
    return qkv(rand(H, H))


def slots(q, k, v):
    made = torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=-2) + 1e-8
    return torch.einsum("bhij,bhjd->bhid", made / made.sum(dim=-1, keepdim=True), v)


def straight_through(q, k, v):
    soft = weights(q, k)
    hard = F.one_hot(soft.argmax(-1), M).to(soft.dtype)
    return (hard - soft.detach() + soft) @ v


def best_three(q, k, v):
    made = scores(q, k)
    return made.masked_fill(made < made.topk(3, -1).values[..., -1:], -INF).softmax(-1) @ v


def scattered(q, k, v):
    value, place = scores(q, k).topk(3, -1)
    return torch.full((B, H, N, M), -INF, dtype=q.dtype).scatter(-1, place, value).softmax(-1) @ v


def renormalised(q, k, v):
    made = weights(q, k) * (torch.arange(M) < 5)
    return made / total(made) @ v


def without_nan(q, k, v):
    made = scores(q, k).masked_fill(ROW, -INF).softmax(-1)
    return torch.where(made.isnan(), 0.0, made) @ v


REFUSED: dict[str, Refused] = {
    "talking heads, before": (
        lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k), w).softmax(-1) @ v, "heads are mixed", mixed,
    ),
    "talking heads, after": (
        lambda q, k, v, w: torch.einsum("bhij,hg->bgij", weights(q, k), w) @ v, "heads are mixed", mixed,
    ),
    "talking heads, by a linear layer": (
        lambda q, k, v, w: F.linear(weights(q, k).permute(0, 2, 3, 1), w).permute(0, 3, 1, 2) @ v,
        "heads are mixed", mixed,
    ),
    "talking heads, by a convolution": (
        lambda q, k, v, w: F.conv2d(scores(q, k), w[:, :, None, None]).softmax(-1) @ v, "conv2d", mixed,
    ),
    "slot attention": (slots, "pass through add", qkv),
    "slot attention without epsilon": (
        lambda q, k, v: (lambda a: a / total(a))(scores(q, k).softmax(-2)) @ v, "used elsewhere", qkv,
    ),
    "router, experts that look at the token": (
        lambda x, w, e: torch.einsum("te,ted->td", (x @ w).softmax(-1), e), "einsum", routed(6, 3, 5),
    ),
    "router, experts first": (
        lambda x, w, e: torch.einsum("te,etd->td", (x @ w).softmax(-1), e), "einsum", routed(3, 6, 5),
    ),
    "router, bmm of every token": (
        lambda x, w, e: torch.bmm((x @ w).softmax(-1)[:, None], e)[:, 0], "mixes the query and key", routed(6, 3, 5),
    ),
    "router with a bias": (
        lambda x, w, e: ((x @ w) + 1.0).softmax(-1) @ e, "a number is added", routed(3, 5),
    ),
    "router, linear": (lambda x, w, e: F.linear(x, w.mT).softmax(-1) @ e, "made by linear", routed(3, 5)),
    "expected value of a classifier": (lambda x, w, e: (x @ w).softmax(-1) @ e, "is a vector", routed(3)),
    "soft mixture of experts": (
        lambda x, w, e: (lambda s: s.softmax(1) @ ((s.softmax(0).mT @ x) @ e))(x @ w), "used elsewhere", routed(D, 5),
    ),
    "hard attention, straight through": (straight_through, "weights are used elsewhere", qkv),
    "hard attention, Gumbel": (
        lambda q, k, v: F.gumbel_softmax(scores(q, k), hard=True) @ v, "weights are used elsewhere", qkv,
    ),
    "temperature of every key": (
        lambda q, k, v: (scores(q, k) / k.square().mean(-1)[..., None, :]).softmax(-1) @ v, "along the keys", qkv,
    ),
    "softmax over both axes": (
        lambda q, k, v: scores(q, k).flatten(-2).softmax(-1).unflatten(-1, (N, M)) @ v, "mixes the query and key", qkv,
    ),
    "linear attention": (lambda q, k, v: q.softmax(-1) @ (k.mT @ v), "the scores are an input", qkv),
    "finite fill, -1": (
        lambda q, k, v: scores(q, k).masked_fill(HIDDEN, -1.0).softmax(-1) @ v, "set to -1.0: that replaces", qkv,
    ),
    "finite fill, -100": (
        lambda q, k, v: scores(q, k).masked_fill(HIDDEN, -100.0).softmax(-1) @ v, "set to -100.0: that replaces", qkv,
    ),
    "finite fill, just too small": (
        lambda q, k, v: torch.where(HIDDEN, -9999.0, scores(q, k)).softmax(-1) @ v, "set to -9999.0", qkv,
    ),
    "integer mask": (lambda q, k, v: (scores(q, k) + HIDDEN.long()).softmax(-1) @ v, "torch.int64 is added", qkv),
    "bool mask added": (lambda q, k, v: (scores(q, k) + HIDDEN).softmax(-1) @ v, "torch.bool is added", qkv),
    "mask multiplied": (lambda q, k, v: (scores(q, k) * ~HIDDEN).softmax(-1) @ v, "varies along the keys", qkv),
    "NaN replaced in the weights": (without_nan, "weights are used elsewhere", qkv),
    "hidden weights set to zero": (
        lambda q, k, v: scores(q, k).masked_fill(ROW, -INF).softmax(-1).masked_fill(ROW, 0.0) @ v, "masked_fill", qkv,
    ),
    "softmax over queries": (lambda q, k, v: scores(q, k).softmax(-2) @ v, "runs over axis -2", qkv),
    "transposed after the softmax": (
        lambda q, k, v: scores(k, q).softmax(-1).mT @ v, "runs over axis -1", qkv,
    ),
    "double softmax": (lambda q, k, v: weights(q, k).softmax(-1) @ v, "pass through softmax", qkv),
    "softmin": (lambda q, k, v: F.softmin(scores(q, k), -1) @ v, "pass through neg", qkv),
    "weights scaled": (lambda q, k, v: (weights(q, k) * 0.5) @ v, "pass through mul", qkv),
    "weights renormalised": (renormalised, "pass through mul", qkv),
    "weights less their mean": (lambda q, k, v: (weights(q, k) - 1 / M) @ v, "pass through sub", qkv),
    "weights thresholded": (
        lambda q, k, v: (lambda w: torch.where(w > 0.1, w, 0.0))(weights(q, k)) @ v, "used elsewhere", qkv,
    ),
    "weights squared as a matrix": (
        lambda q, k, v: (lambda w: w @ w)((q @ q.mT).softmax(-1)), "multiplied by themselves", qkv,
    ),
    "scores detached": (lambda q, k, v: scores(q, k).detach().softmax(-1) @ v, "pass through detach", qkv),
    "only the largest scores": (best_three, "scores are used elsewhere", qkv),
    "only the largest scores, scattered": (scattered, "pass through scatter", qkv),
    "exponentials over a sum of the queries": (
        lambda q, k, v: hand(q, k, v, lambda e: e.sum(-2, keepdim=True)), "runs over axis -2", qkv,
    ),
}  # fmt: skip


@in_both_modes(REFUSED, each=4)
def test_refused(name: str, training: bool) -> None:
    function, words, inputs = REFUSED[name]
    report = run(function, inputs(), training, tolerance=0)
    assert not report.sites, str(report)
    assert report.refusals
    assert all(words in refusal.reason for refusal in report.refusals), str(report)


def test_a_difference_of_weights_is_refused_twice_and_a_difference_of_attentions_is_two_sites() -> None:
    def of_weights(q, k, v):
        return (weights(q, k) - 0.2 * weights(q.flip(-1), k)) @ v

    def of_attentions(q, k, v):
        return weights(q, k) @ v - 0.2 * (weights(q.flip(-1), k) @ v)

    refused = run(of_weights, qkv(), True, tolerance=0)
    assert (len(refused.sites), len(refused.refusals)) == (0, 2)
    found = run(of_attentions, qkv(), True, tolerance=1e-9)
    assert (len(found.sites), len(found.refusals)) == (2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# nothing to report: no softmax, or none that feeds a product


def sparsemax(q, k, v):
    z = scores(q, k)
    ordered = z.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = (ordered * torch.arange(1, M + 1) > excess).sum(-1, keepdim=True)
    return (z - excess.gather(-1, count - 1) / count).clamp(min=0) @ v


def chosen_experts(x, w, e):
    gates, experts = (x @ w).softmax(-1).topk(2, -1)
    return (gates[..., None] * e[experts]).sum(1)


NOTHING: dict[str, tuple[Function, Callable[[], list[torch.Tensor]]]] = {
    "sigmoid attention": (lambda q, k, v: scores(q, k).sigmoid() @ v, qkv),
    "rectified attention": (lambda q, k, v: scores(q, k).relu() @ v / M, qkv),
    "softplus over its sum": (lambda q, k, v: hand(q, k, v, total, F.softplus), qkv),
    "hard attention, largest score": (
        lambda q, k, v: F.one_hot(scores(q, k).argmax(-1), M).to(q.dtype) @ v + q.sum(), qkv,
    ),
    "softmax times values": (lambda q, k, v: (q * k[:, :, :N]).softmax(-1) * v[:, :, :N], qkv),
    "part of the weights as a gate": (lambda q, k, v: weights(q, k)[..., :D] * v[:, :, :N], qkv),
    "sparsemax": (sparsemax, qkv),
    "squares over their sum": (lambda q, k, v: hand(q, k, v, lambda e: total(e) + 1e-9, torch.square), qkv),
    "softmax plus one": (lambda q, k, v: hand(q, k, v, lambda e: 1 + total(e)), qkv),
    "softmax plus one, normalised last": (
        lambda q, k, v: (lambda e: (e @ v) / (1 + total(e)))(scores(q, k).exp()), qkv,
    ),
    "sum and epsilon": (lambda q, k, v: hand(q, k, v, lambda e: total(e) + 1e-6), qkv),
    "sum, bounded": (lambda q, k, v: hand(q, k, v, lambda e: total(e).clamp(min=1e-6)), qkv),
    "sum of some keys": (lambda q, k, v: hand(q, k, v, lambda e: total(e[..., :4])), qkv),
    "sum of other exponentials": (lambda q, k, v: hand(q, k, v, lambda e: total(scores(q.flip(-1), k).exp())), qkv),
    "powers of two": (lambda q, k, v: hand(q, k, v, total, torch.exp2), qkv),
    "router, best experts": (chosen_experts, routed(3, 5)),
    "router, sum over experts": (
        lambda x, w, e: ((x @ w).softmax(-1)[..., None] * e).sum(1), routed(6, 3, 5),
    ),
    "classifier": (lambda x, w, e: F.cross_entropy(x @ w, torch.arange(6) % 3) + e.sum(), routed(1)),
    "classifier, by hand": (
        lambda x, w, e: e.sum() - (x @ w).softmax(-1).log()[torch.arange(6), torch.arange(6) % 3].mean(), routed(1),
    ),
    "one query by sums": (lambda q, k, v: ((q[..., :1, :] * k).sum(-1).softmax(-1)[..., None] * v).sum(-2), qkv),
}  # fmt: skip


@in_both_modes(NOTHING, each=4)
def test_nothing_is_reported(name: str, training: bool) -> None:
    function, inputs = NOTHING[name]
    report = run(function, inputs(), training, tolerance=0)
    assert (report.sites, report.refusals) == ((), ())


# ---------------------------------------------------------------------------------------------------------------------
# weights that pass through anything are reported

REPORTED: dict[str, Refused] = {
    "weights detached": (lambda q, k, v: weights(q, k).detach() @ v + q.sum() + k.sum(), "pass through detach", qkv),
    "NaN set to zero": (
        lambda q, k, v: scores(q, k).masked_fill(ROW, -INF).softmax(-1).nan_to_num() @ v, "through nan_to_num", qkv,
    ),
    "weights cut off": (lambda q, k, v: weights(q, k).clamp(min=0.01) @ v, "pass through clamp", qkv),
}  # fmt: skip


@in_both_modes(REPORTED)
def test_reported(name: str, training: bool) -> None:
    function, words, inputs = REPORTED[name]
    (refusal,) = run(function, inputs(), training, tolerance=0).refusals
    assert words in refusal.reason
