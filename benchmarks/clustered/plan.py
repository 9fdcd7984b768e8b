"""What a call of clustered attention holds constant: its tiles, and which pairs of them are near.

Shapes: H heads, n queries, m keys, d and e widths of keys and values, A and B tiles of queries and of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clustered.moments import key_moments, pseudo_keys, query_moments, scores
from clustered.tiles import Tiles, features, k_means, refine, split, tree

Grouping = Literal["tree", "refined tree", "k-means"]


@dataclass(frozen=True)
class Setting:
    """How tiles are made, and which pairs of them are near."""

    width_q: int = 64
    """Tokens of a tile of queries."""
    width_k: int = 64
    """Tokens of a tile of keys."""
    tau: float = 4.3e-3
    """A pair is near where its score exceeds this."""
    grouping: Grouping = "tree"
    """``k-means`` makes one cluster per so many tokens as a tile holds, of any size, and cuts it into tiles."""
    exponent: float = 0.5
    """Exponent of tr Σ_a C_b in the score."""
    ratio: float | None = None
    """The relative tolerance over the additive one (``moments.scores``)."""


@dataclass(frozen=True)
class Plan:
    """Tiles of queries, tiles of keys, and which pairs of them are near, [H, A, B]."""

    queries: Tiles
    keys: Tiles
    near: Tensor


def group(q: Tensor, k: Tensor, v: Tensor, setting: Setting, valid: Tensor | None = None) -> tuple[Tiles, Tiles]:
    """Tiles of the queries [H, n, d] and of the keys [H, m, d]; keys that are not valid [H, m] are in none."""
    of_q, of_k = features(q, k, v, valid)
    if setting.grouping == "k-means":
        count_q, count_k = q.shape[1] // setting.width_q, k.shape[1] // setting.width_k
        queries, _ = split(k_means(of_q, count_q), count_q, setting.width_q)
        keys, _ = split(k_means(of_k, count_k), count_k, setting.width_k, valid)
        return queries, keys
    queries, keys = tree(of_q, setting.width_q), tree(of_k, setting.width_k, valid)
    if setting.grouping == "refined tree":
        queries, keys = refine(queries, of_q), refine(keys, of_k)
    return queries, keys


def near_pairs(q: Tensor, k: Tensor, v: Tensor, queries: Tiles, keys: Tiles, setting: Setting) -> Tensor:
    """[H, A, B]: the pairs of these tiles that are near; of tiles without tokens none are."""
    q_t, k_t, v_t = queries.gather(q), keys.gather(k), keys.gather(v)
    of_q, of_k = query_moments(q_t, queries.valid), key_moments(k_t, v_t, keys.valid)
    score = scores(of_q, of_k, pseudo_keys(of_q.mu, k_t, v_t, keys.valid), setting.exponent, setting.ratio)
    return (score > setting.tau) & queries.valid.any(2)[:, :, None]


@torch.no_grad()
def make(q: Tensor, k: Tensor, v: Tensor, setting: Setting, valid: Tensor | None = None) -> Plan:
    """The plan of a call; keys that are not valid [H, m] have no weight (key padding)."""
    queries, keys = group(q, k, v, setting, valid)
    return Plan(queries, keys, near_pairs(q, k, v, queries, keys, setting))


def near_shares(plan: Plan, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Shares of n × m, per head [H]: pairs of tokens in near pairs of tiles, and these with empty places of tiles."""
    queries, keys = (tiles.sizes().to(torch.float64) for tiles in (plan.queries, plan.keys))
    pairs = torch.einsum("hab,ha,hb->h", plan.near.to(torch.float64), queries, keys)
    area = plan.queries.index.shape[2] * plan.keys.index.shape[2]
    return pairs / (n * m), plan.near.sum((1, 2)) * area / (n * m)
