"""The oracle: every formula of math.md §8 by its definition, for one head, on n × n matrices, with loops over clusters.

Shapes: n queries, m keys, A and B clusters of them, d and e widths of keys and values; queries carry the scale. The
last functions take the clusters and near pairs of a plan or of a causal call, over all H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import torch
from torch import Tensor

from clustered.causal import CausalSetting, Segment, key_tiles
from clustered.moments import LARGEST_TRACE
from clustered.plan import Plan, Setting

Gradients = tuple[Tensor, Tensor, Tensor]
"""dQ, dK, dV"""


@dataclass(frozen=True)
class Head:
    """Operands of one head with its clusters."""

    q: Tensor
    """[n, d]"""
    k: Tensor
    """[m, d]"""
    v: Tensor
    """[m, e]"""
    of_q: Tensor
    """[n]: the cluster of each query."""
    of_k: Tensor
    """[m]: the cluster of each key, -1 for one that is not there (key padding)."""
    near: Tensor
    """[A, B]"""

    @property
    def near_entries(self) -> Tensor:
        """[n, m]: entries of near pairs."""
        return self.near[self.of_q][:, self.of_k.clamp_min(0)] & (self.of_k >= 0)


@dataclass(frozen=True)
class Moments:
    """What math.md §8 calls moments."""

    mu: Tensor
    """[A, d]"""
    sigma: Tensor
    """[A, d, d]"""
    logits: Tensor
    """[A, m]: μ_a · k_j − max_j."""
    mass: Tensor
    """[A, B], D_ab"""
    value_sum: Tensor
    """[A, B, e], V_ab"""
    centre: Tensor
    """[A, B, d], c_ab"""
    cross: Tensor
    """[B, d, e], M_b"""
    spread: Tensor
    """[B, d, d], C_b"""
    var: Tensor
    """[B]"""


def moments(x: Head, mu: Tensor | None = None, sigma: Tensor | None = None) -> Moments:
    """All moments; those of queries are given where they are of earlier queries (causal)."""
    (a_count, b_count), d, e = x.near.shape, x.q.shape[1], x.v.shape[1]
    if mu is None or sigma is None:
        mu, sigma = x.q.new_zeros(a_count, d), x.q.new_zeros(a_count, d, d)
        for a in range(a_count):
            mine = x.q[x.of_q == a]
            if len(mine):
                mu[a] = mine.mean(0)
                sigma[a] = (mine - mine.mean(0)).T @ (mine - mine.mean(0)) / len(mine)
    logits = mu @ x.k.T
    logits = logits - logits[:, x.of_k >= 0].amax(1, keepdim=True)
    mass, value_sum, centre = (x.q.new_zeros(a_count, b_count, *more) for more in ((), (e,), (d,)))
    cross, spread, var = (x.q.new_zeros(b_count, *more) for more in ((d, e), (d, d), ()))
    for b in range(b_count):
        mine = x.of_k == b
        if not mine.any():
            continue
        w, k, v = logits[:, mine].exp(), x.k[mine], x.v[mine]
        mass[:, b], value_sum[:, b], centre[:, b] = w.sum(1), w @ v, (w @ k) / w.sum(1, keepdim=True)
        k0, v0 = k - k.mean(0), v - v.mean(0)
        cross[b], spread[b], var[b] = k0.T @ v0 / len(k), k0.T @ k0 / len(k), v0.square().sum(1).mean()
    return Moments(mu, sigma, logits, mass, value_sum, centre, cross, spread, var)


def scores(x: Head, m: Moments, exponent: float, ratio: float | None = None) -> Tensor:
    """[A, B]: lifted share · min(25, tr Σ_a C_b)^exponent · size (``clustered.moments.scores``)."""
    share = m.mass / m.mass.sum(1, keepdim=True)
    around = m.centre - (share[..., None] * m.centre).sum(1, keepdim=True)
    lifted = (share * (torch.einsum("abi,aij,abj->ab", around, m.sigma, around) / 2).exp()).clamp(max=1)
    out = m.value_sum.sum(1) / m.mass.sum(1, keepdim=True)
    present = x.v[x.of_k >= 0]
    unit = (present - present.mean(0)).norm(dim=1).amax()
    if ratio is not None:
        of_each = out[x.of_q]
        unit = torch.minimum(unit, ratio * (of_each - of_each.mean(0)).square().sum(1).mean().sqrt())
    value = m.value_sum / m.mass.clamp_min(1e-300)[..., None]
    size = ((value - out[:, None]).square().sum(-1) + m.var).sqrt() / unit
    trace = torch.einsum("aij,bji->ab", m.sigma, m.spread).clamp(min=0, max=LARGEST_TRACE)
    return torch.where(m.mass > 0, lifted * trace**exponent * size, 0)


def near_weights(x: Head, m: Moments) -> Tensor:
    """[n, m]: exp(q · k), relative to each cluster's max_j μ_a · k_j, on near pairs and 0 elsewhere."""
    shift = (m.mu @ x.k.T - m.logits)[x.of_q]
    return (x.q @ x.k.T - shift).exp() * x.near_entries


def weights(x: Head, m: Moments, order: int) -> Tensor:
    """[n, m], not normalised: exact on near pairs, else exp(δ · c_ab) w_aj p(δ · (k_j − c_ab)) with p of this order."""
    delta = x.q - m.mu[x.of_q]
    at_centre = torch.einsum("id,ibd->ib", delta, m.centre[x.of_q])[:, x.of_k.clamp_min(0)]
    rest = delta @ x.k.T - at_centre
    series = torch.ones_like(rest)
    for power in range(1, order + 1):
        series = series + rest**power / factorial(power)
    far = (at_centre + m.logits[x.of_q]).exp() * series
    return torch.where(x.near_entries, near_weights(x, m), far) * (x.of_k >= 0)


def gradient(p: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Gradients:
    """dQ, dK and dV of softmax attention, with any weights p [n, m] whose rows sum to 1 in place of its own."""
    dp = g @ v.T
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    return ds @ k, ds.T @ q, p.T @ g


def output(x: Head, m: Moments, mask: Tensor | None = None) -> Tensor:
    """[n, e]: far sums with pooled moments, and near pairs, of which a mask [n, m] drops entries (causal)."""
    delta, far = x.q - m.mu[x.of_q], (~x.near).to(x.q.dtype)
    e_b = torch.einsum("id,ibd->ib", delta, m.centre[x.of_q]).exp() * far[x.of_q]
    numerator = torch.einsum("ib,ibe->ie", e_b, m.value_sum[x.of_q])
    denominator = (e_b * m.mass[x.of_q]).sum(1, keepdim=True)
    share = far * m.mass
    share = share / share.sum(1, keepdim=True).clamp_min(1e-300)
    cross = torch.einsum("ab,bde->ade", share, m.cross)[x.of_q]
    spread = torch.einsum("ab,bij->aij", share, m.spread)[x.of_q]
    s = (torch.einsum("id,idf,if->i", delta, spread, delta) / 2).clamp(max=1)[:, None]
    numerator = numerator * (1 + s) + denominator * torch.einsum("id,ide->ie", delta, cross)
    exact = near_weights(x, m)
    if mask is not None:
        exact = exact * mask
    return (numerator + exact @ x.v) / (denominator * (1 + s) + exact.sum(1, keepdim=True))


def head(q: Tensor, k: Tensor, v: Tensor, plan: Plan, number: int) -> Head:
    """One head of operands [H, n, d] with the clusters of a plan."""
    of_q, of_k = plan.queries.labels(q.shape[1]), plan.keys.labels(k.shape[1])
    return Head(q[number], k[number], v[number], of_q[number], of_k[number], plan.near[number])


def planned(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """The output [H, n, e] with the clusters and near pairs of a plan."""
    heads = [head(q, k, v, plan, number) for number in range(len(q))]
    return torch.stack([output(x, moments(x)) for x in heads])


def planned_scores(q: Tensor, k: Tensor, v: Tensor, plan: Plan, setting: Setting) -> Tensor:
    """The scores [H, A, B] of a plan's pairs, 0 for tiles without queries."""
    heads = [head(q, k, v, plan, number) for number in range(len(q))]
    made = [scores(x, moments(x), setting.exponent, setting.ratio) for x in heads]
    return torch.stack(made) * plan.queries.valid.any(2)[:, :, None]


def planned_gradient(q: Tensor, k: Tensor, v: Tensor, g: Tensor, plan: Plan) -> Gradients:
    """The substituted gradient of order 0 with the clusters and near pairs of a plan."""
    found = []
    for number in range(len(q)):
        x = head(q, k, v, plan, number)
        a = weights(x, moments(x), 0)
        found.append(gradient(a / a.sum(1, keepdim=True), x.q, x.k, x.v, g[number]))
    dq, dk, dv = (torch.stack(y) for y in zip(*found, strict=True))
    return dq, dk, dv


def causal(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], setting: CausalSetting) -> Tensor:
    """The causal output [H, n, e] with the choices of a call: the own segment is one more near cluster, with a mask."""
    length, n = setting.segment, q.shape[1]
    of_k = key_tiles(q, k, v, setting).labels(n)
    out = torch.empty_like(v)
    for number in range(len(q)):
        for at in range(0, n, length):
            end, mask = at + length, torch.arange(at + length) <= torch.arange(at, at + length)[:, None]
            if at == 0:
                logits = (q[number, :end] @ k[number, :end].T).masked_fill(~mask, float("-inf"))
                out[number, :end] = logits.softmax(1) @ v[number, :end]
                continue
            segment = segments[at // length - 1]
            of_q = segment.cluster[number][segment.queries.labels(length)[number]]
            near = torch.cat([segment.near[number], torch.ones_like(segment.near[number, :, :1])], 1)
            labels = torch.cat([of_k[number, :at], of_k.new_full((length,), at // setting.width_k)])
            x = Head(q[number, at:end], k[number, :end], v[number, :end], of_q, labels, near)
            given = segment.moments.mu[number], segment.moments.sigma[number]
            out[number, at:end] = output(x, moments(x, *given), mask)
    return out
