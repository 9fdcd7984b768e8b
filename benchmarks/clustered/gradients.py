"""The substituted gradient of clustered attention: dS = P̃ ∘ (G Vᵀ − ρ) with approximate weights P̃ in place of P.

Near weights are exact. Far ones are P̃_ij = P_ib ω_aj of order 0, or P_ib ω_aj (1 + δ · κ_j) of order 1, for a query i
in tile a and a key j in tile b: P_ib is the weight of the pseudo-key, ω_aj = exp(μ_a · k_j) / D_ab, κ_j = k_j − c_ab.
The consistent gradient is autograd's of ``fields.output``.

Shapes: H heads; A, B tiles of queries and of keys; T tokens of a tile; d, e widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clustered.fields import far_bias, near_rows, output_in_tiles, pooled, second_order
from clustered.moments import PseudoKeys, centred, key_moments, pair_weights, query_moments
from clustered.plan import Plan

Gradients = tuple[Tensor, Tensor, Tensor]
"""dQ, dK, dV"""


@dataclass(frozen=True)
class Operands:
    """What the backward pass reads, in tiles."""

    q: Tensor
    """[H, A, T, d]"""
    k: Tensor
    """[H, B, T, d]"""
    v: Tensor
    """[H, B, T, e]"""
    g: Tensor
    """[H, A, T, e]: the gradient of the output, zero where no token is."""
    rho: Tensor
    """[H, A, T, 1]: g · output."""
    log_sum: Tensor
    """[H, A, T, 1]: the logarithm of the sum of weights, +inf where no token is, so that all weights of it are 0."""


def substituted(q: Tensor, k: Tensor, v: Tensor, g: Tensor, plan: Plan, order: Literal[0, 1]) -> Gradients:
    """dQ [H, n, d], dK [H, m, d] and dV [H, m, e] for a gradient g [H, n, e] of the output.

    Order 0 is exactly the gradient of its weights; it has a moment of keys and values, [d, e], for every pair of tiles.
    Order 1 has no such moment: those inside pairs are pooled over the far pairs of a tile, and P_ib is the output's,
    with the factor 1 + s.
    """
    q_t, k_t, v_t, g_t = plan.queries.gather(q), plan.keys.gather(k), plan.keys.gather(v), plan.queries.gather(g)
    out, log_sum = output_in_tiles(q_t, k_t, v_t, plan, corrected=order == 1)
    log_sum = log_sum.masked_fill(~plan.queries.valid[..., None], float("inf"))
    x = Operands(q_t, k_t, v_t, g_t, (g_t * out).sum(3, keepdim=True), log_sum)
    far = far_of_order_1(x, plan) if order == 1 else far_of_order_0(x, plan)
    dq, dk, dv = (f + e for f, e in zip(far, near(x, plan), strict=True))
    return plan.queries.scatter(dq, q.shape[1]), plan.keys.scatter(dk, k.shape[1]), plan.keys.scatter(dv, k.shape[1])


def far_of_order_0(x: Operands, plan: Plan) -> Gradients:
    """The far pairs' part with weights P_ib ω_aj, in tiles: equal to the dense form."""
    mu = query_moments(x.q, plan.queries.valid).mu
    delta = (x.q - mu[:, :, None]) * plan.queries.valid[..., None]
    omega, log_mass = pair_weights(mu, x.k, plan.keys.valid)  # [H, B, A, T], [H, A, B]
    pseudo = PseudoKeys(log_mass, *((omega @ y).transpose(1, 2) for y in (x.k, x.v)))
    p = (delta @ pseudo.key.mT + far_bias(pseudo, plan.near)[:, :, None] - x.log_sum).exp()  # [H, A, T, B]
    ds = p * (x.g @ pseudo.value.mT - x.rho)
    gamma = p.mT @ x.g  # [H, A, B, e]
    inner = gamma.transpose(1, 2) @ x.v.mT - (gamma * pseudo.value).sum(3).mT[..., None]  # [H, B, A, T]
    kappa = x.k[:, None] - pseudo.key[..., None, :]  # [H, A, B, T, d]
    nu = x.v[:, None] - pseudo.value[..., None, :]  # [H, A, B, T, e]
    cross = (kappa * omega.transpose(1, 2)[..., None]).mT @ nu  # [H, A, B, d, e]
    turned = torch.einsum("hatb,hatd,hate->habde", p, delta, x.g)
    dq = ds @ pseudo.key + torch.einsum("hatb,hate,habde->hatd", p, x.g, cross)
    dk = (omega * inner).mT @ mu[:, None] + omega.mT @ (ds.mT @ x.q).transpose(1, 2)
    dk = dk + torch.einsum("hbaj,habje,habde->hbjd", omega, nu, turned)
    return dq, dk, omega.mT @ gamma.transpose(1, 2)


def far_of_order_1(x: Operands, plan: Plan) -> Gradients:
    """The far pairs' part with weights of order 1, in tiles, moments inside pairs pooled over the far pairs of a tile.

    The mean over a tile of queries of Σ_b P_ib g_i · X_ab, X_ab = Σ_j ω_aj ν_j κ_jᵀ with ν_j = v_j − v_ab, is exact;
    only deviations from it see the pooled M_a.
    """
    valid = plan.queries.valid[..., None]
    queries, keys = query_moments(x.q, plan.queries.valid), key_moments(x.k, x.v, plan.keys.valid)
    size_a, size_b = (y.size.clamp_min(1)[..., None, None] for y in (queries, keys))
    mu = queries.mu
    delta = (x.q - mu[:, :, None]) * valid
    omega, log_mass = pair_weights(mu, x.k, plan.keys.valid)  # [H, B, A, T], [H, A, B]
    pseudo = PseudoKeys(log_mass, *((omega @ y).transpose(1, 2) for y in (x.k, x.v)))
    bias = far_bias(pseudo, plan.near)
    cross, sigma = pooled(bias, keys)
    s = second_order(delta, sigma)
    p = (delta @ pseudo.key.mT + bias[:, :, None] - x.log_sum).exp() * (1 + s)  # [H, A, T, B]
    ds = p * (x.g @ pseudo.value.mT - x.rho)
    gamma, ds_delta = p.mT @ x.g, ds.mT @ delta  # [H, A, B, e], [H, A, B, d]
    mass, ds_sum = p.sum(2), ds.sum(2)  # [H, A, B]

    def tile_deviations(y: Tensor) -> Tensor:
        """Deviations of y [H, A, T, ...] from its mean over the tokens of each tile."""
        return (y - y.sum(2, keepdim=True) / size_a) * valid

    by_value = omega * (gamma.transpose(1, 2) @ x.v.mT - (gamma * pseudo.value).sum(3).mT[..., None])
    by_key = omega * (ds_delta.transpose(1, 2) @ x.k.mT - (ds_delta * pseudo.key).sum(3).mT[..., None])

    delta_cross = delta @ cross
    dq = ds @ pseudo.key + (by_value @ x.k).sum(1)[:, :, None] / size_a * valid
    dq = dq + tile_deviations(p.sum(3, keepdim=True) * x.g) @ cross.mT
    dq = dq + (delta_cross * x.g).sum(3, keepdim=True) * (p @ pseudo.key)
    dq = dq + ds.sum(3, keepdim=True) * (delta @ sigma)

    of_queries = (delta.mT @ tile_deviations(x.g) / size_a).flatten(2)  # cov(q, g) of each tile
    turned = (mass.mT @ of_queries).unflatten(2, (x.k.shape[-1], x.v.shape[-1])) / size_b  # [H, B, d, e]
    spread = (ds_sum.mT @ queries.sigma.flatten(2)).unflatten(2, queries.sigma.shape[2:]) / size_b  # [H, B, d, d]
    mean_mu = (mass.mT @ mu) / mass.sum(1)[..., None].clamp_min(1e-30)  # [H, B, d]
    k0, v0 = centred(x.k, plan.keys.valid)[1], centred(x.v, plan.keys.valid)[1]
    ds_q = ds_delta + ds_sum[..., None] * mu[:, :, None]
    dk = (by_value + by_key).mT @ mu[:, None] + omega.mT @ ds_q.transpose(1, 2)
    dk = dk + v0 @ turned.mT + k0 @ spread + ((k0 @ turned) * v0).sum(3, keepdim=True) * mean_mu[:, :, None]
    return dq, dk, omega.mT @ gamma.transpose(1, 2) + k0 @ turned


def near(x: Operands, plan: Plan) -> Gradients:
    """The near pairs' part, exact, in tiles."""
    t, d = x.q.shape[2:]
    t_k, e = x.v.shape[2:]
    dq, dk, dv = (torch.zeros_like(y) for y in (x.q, x.k, x.v))
    dq_rows, dk_rows, dv_rows = dq.view(-1, t, d), dk.view(-1, t_k * d), dv.view(-1, t_k * e)
    q_rows, g_rows, rho_rows, log_rows = (y.flatten(0, 1) for y in (x.q, x.g, x.rho, x.log_sum))
    for some in near_rows(plan.near, plan.keys.valid):
        shape, tiles = (len(some.rows), some.tiles.shape[1] * t_k), some.tiles.flatten()
        k_near, v_near = x.k.flatten(0, 1)[tiles].view(*shape, d), x.v.flatten(0, 1)[tiles].view(*shape, e)
        q, g = q_rows[some.rows], g_rows[some.rows]
        p = (q @ k_near.mT + some.bias.to(q.dtype) - log_rows[some.rows]).exp()
        ds = p * (g @ v_near.mT - rho_rows[some.rows])
        dq_rows[some.rows] = ds @ k_near
        dk_rows.index_add_(0, tiles, (ds.mT @ q).view(-1, t_k * d))
        dv_rows.index_add_(0, tiles, (p.mT @ g).view(-1, t_k * e))
    return dq, dk, dv
