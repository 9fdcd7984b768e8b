"""Sampled rows and weights of a call beside exact attention's in float64, for ``explain``; units as in ``measure``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from polyattn.report.measure import TINY, Tensors, relative
from polyattn.report.plots import Samples
from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.families.moments import mean_of
from polyattn.rewriter.masks.mask import Mask
from polyattn.runtime import exact, execute
from polyattn.site_plan import SitePlan

KEYS = 64
"""Keys that are drawn for a call, the same for all of its rows."""
LARGEST = 3
"""Keys of largest weight that are added for each row."""
COLUMNS = 64
"""Keys whose approximate weights one run of the kernels yields."""
ELEMENTS = 1 << 24
"""Elements that the one-hot values of such a run have at most: heads go together as far as that allows."""
GRADIENT_PAIRS = 1 << 24
"""Pairs of a query and a key up to which gradients of whole heads are computed exactly; beyond, dQ of sampled rows."""
GRADIENT_HEADS = 2
"""Key heads, of one batch element, whose gradients are compared."""


def _draw(count: int, some: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``some`` numbers below ``count``, sorted, int64; all where there are no more."""
    if count <= some:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:some].sort()[0]


def _distinct(numbers: torch.Tensor) -> torch.Tensor:
    """Each of the numbers once, sorted, int64."""
    return torch.tensor(sorted(set(numbers.tolist())), dtype=torch.long)


@torch.no_grad()
def sample(
    state: int,
    tensors: Tensors,
    out: torch.Tensor,
    plan: SitePlan,
    fit: Fit | None,
    rows: int,
    generator: torch.Generator,
    keep: torch.Tensor | None = None,
) -> Samples:
    """Put rows of a low-rank call beside exact ones, and weights of these rows at some keys. Memory is linear in n.

    Approximate weights are outputs of the same kernels for the values 1 at one key and 0 elsewhere. The call is run
    once more, and these after it.

    Args:
        state: number of the run-time state, for the samples.
        tensors: q [batch, heads, n_q, d], k [batch, kv_heads, n_k, d], v [batch, kv_heads, n_k, e] of the call.
        out: its output, [batch, heads, n_q, e].
        plan: how it was computed.
        fit: what the features of its heads were; None where nothing is fitted.
        rows: so many rows are drawn, at random over batch elements, heads and positions.
        keep: which keys took part, bool [batch, n_k]; None: all.
    """
    q, k, v = tensors
    (batch, heads, n_q), groups = q.shape[:3], q.shape[1] // k.shape[1]
    flat = _draw(batch * heads * n_q, rows, generator)
    keys = _draw(k.shape[2], KEYS, generator)
    where = torch.stack([flat // (heads * n_q), flat // n_q % heads, flat % n_q], 1)
    key_heads = where[:, 0] * k.shape[1] + where[:, 1] // groups
    errors = torch.zeros(len(flat), dtype=torch.float64)
    pairs: list[tuple[torch.Tensor, ...]] = []
    for c in _distinct(key_heads).tolist():
        mine = (key_heads == c).nonzero().squeeze(1)
        b, h = divmod(c, k.shape[1])
        kept, part_of = (k[b, h].double(), v[b, h].double()), None if keep is None else keep[b]
        apart = (kept[1] - mean_of(kept[1], part_of)).norm(dim=-1)
        unit = (apart if part_of is None else apart.masked_fill(~part_of, 0)).max().clamp_min(TINY)
        for part in mine.split(max(1, exact.PAIRS // k.shape[2])):
            at = where[part].to(q.device)
            queries = q[at[:, 0], at[:, 1], at[:, 2]].double()
            weights = exact.weights(queries, kept[0], at[:, 2], plan, part_of)
            got = out[at[:, 0], at[:, 1], at[:, 2]].double()
            errors[part] = ((got - weights @ kept[1]).norm(dim=-1) / unit).cpu()
            pairs.extend(_pairs(part, where[part, 2], weights, keys, plan.mask, part_of))
    row, key, drawn, weights = (torch.cat(some) for some in zip(*pairs, strict=True))
    grouped, place = execute.grouped(q, k, v), (key_heads, where[:, 1] % groups, where[:, 2])
    # Which rows were made exact, the call's own values and all of its rows decide.
    fitted, radius = (None, None) if fit is None else (fit.values, fit.radius)
    by_head = execute.grouped_keep(keep, k.shape[1])
    left = execute.exact_rows(grouped, plan, fitted, radius, by_head)[tuple(x.to(q.device) for x in place)].cpu()
    approximate = torch.where(left[row], weights, _approximate(grouped, plan, fitted, place, row, key, by_head))
    near = execute.near_pairs(grouped, plan, fitted, by_head, int(key_heads[0])) if plan.tiled else None
    return Samples(state, where, errors, left, row, key, drawn, weights, approximate, near)


def _pairs(
    rows: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    mask: Mask,
    keep: torch.Tensor | None,
) -> list[tuple[torch.Tensor, ...]]:
    """The keys that are looked at, and seen, from each row: (row, key, drawn, exact weight), each [pairs].

    Args:
        rows: numbers of s rows; positions: where they stand.
        weights: their exact weights, [s, n_k].
        keys: those that were drawn for all rows.
    """
    found: list[tuple[torch.Tensor, ...]] = []
    largest = weights.topk(min(LARGEST, weights.shape[1]))[1].cpu()
    for number, row in enumerate(rows.tolist()):
        extra = largest[number][~torch.isin(largest[number], keys)]
        some = torch.cat([keys, extra])
        drawn = torch.arange(len(some)) < len(keys)
        visible = mask.visible(positions[number : number + 1], some)[0]
        visible = visible if keep is None else visible & keep[some.to(keep.device)].cpu()
        some, drawn = some[visible], drawn[visible]
        of_row = weights[number, some.to(weights.device)].cpu()
        found.append((torch.full_like(some, row), some, drawn, of_row))
    return found


def _approximate(
    grouped: exact.Grouped,
    plan: SitePlan,
    fitted: torch.Tensor | None,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    row: torch.Tensor,
    key: torch.Tensor,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """The kernels' weights of pairs of a row and a key, float64 [p], on the CPU.

    Args:
        fitted: what is fitted to the heads, ``Fit.values``.
        heads: the key head of each row, among those of all batch elements, its group and its position, each [s].
        row, key: numbers of p rows, and positions of keys.
    """
    (q, k, v), (key_heads, group, position) = grouped, heads
    made = torch.zeros(len(row), dtype=torch.float64)
    step, used = max(1, ELEMENTS // (k.shape[1] * COLUMNS)), _distinct(key_heads)
    for first in range(0, len(used), step):
        some = used[first : first + step]
        columns = [_distinct(key[key_heads[row] == c]) for c in some.tolist()]
        mine = some.to(q.device)
        theirs = None if fitted is None else fitted[mine % len(fitted)]
        for at in range(0, max(map(len, columns)), COLUMNS):
            values = k.new_zeros(len(some), k.shape[1], COLUMNS)
            for number, keys in enumerate(columns):
                part = keys[at : at + COLUMNS].to(k.device)
                values[number, part, torch.arange(len(part), device=k.device)] = 1
            seen = None if keep is None else keep[mine]
            result = execute.for_values((q[mine], k[mine], v[mine]), values, plan, theirs, seen)
            for number, (c, keys) in enumerate(zip(some.tolist(), columns, strict=True)):
                part = keys[at : at + COLUMNS]
                pairs = ((key_heads[row] == c) & torch.isin(key, part)).nonzero().squeeze(1)
                place = (group[row[pairs]], position[row[pairs]], torch.searchsorted(part, key[pairs]))
                made[pairs] = result[number][tuple(x.to(q.device) for x in place)].double().cpu()
    return made


@torch.no_grad()
def with_gradients(
    samples: Samples,
    g: torch.Tensor,
    tensors: Tensors,
    gradients: Sequence[torch.Tensor | None],
    plan: SitePlan,
    generator: torch.Generator,
    keep: torch.Tensor | None = None,
) -> Samples:
    """Add the relative errors of a backward's gradients: those of all rows of a few heads, or, where that would be too
    much, those of dQ of the sampled rows. Memory is linear in n.

    Args:
        g: gradient of the output, [batch, heads, n_q, e].
        tensors: q, k and v of the call.
        gradients: dQ, dK and dV, in their shapes; None where one was not asked for.
    """
    q, k, v = tensors
    (n_q, n_k), groups = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    got: dict[str, list[torch.Tensor]] = {"dQ": [], "dK": [], "dV": []}
    wanted: dict[str, list[torch.Tensor]] = {"dQ": [], "dK": [], "dV": []}
    affordable = GRADIENT_PAIRS // (groups * n_q * n_k)

    def exactly(b: int, h: int, rows: torch.Tensor) -> Tensors:
        c = h // groups
        mine, keys, values, gs = (x.double() for x in (q[b, h, rows], k[b, c], v[b, c], g[b, h, rows]))
        return exact.rows_backward(mine, keys, values, gs, rows, plan, None if keep is None else keep[b])

    def compare(name: str, have: torch.Tensor | None, wants: torch.Tensor) -> None:
        if have is not None:
            got[name].append(have.double().flatten())
            wanted[name].append(wants.flatten())

    dq, dk, dv = gradients
    if affordable:
        b = int(torch.randint(q.shape[0], (), generator=generator))
        chosen = torch.randperm(k.shape[1], generator=generator)[: min(GRADIENT_HEADS, affordable)].sort()[0].tolist()
        everything = torch.arange(n_q, device=q.device)
        for c in chosen:
            keys, values = (torch.zeros_like(x[b, c], dtype=torch.float64) for x in (k, v))
            for h in range(c * groups, (c + 1) * groups):
                made = exactly(b, h, everything)
                compare("dQ", None if dq is None else dq[b, h], made[0])
                keys, values = keys + made[1], values + made[2]
            compare("dK", None if dk is None else dk[b, c], keys)
            compare("dV", None if dv is None else dv[b, c], values)
        of = f"{len(chosen) * groups} of {q.shape[1]} heads of batch element {b}"
    else:
        for b, h in sorted({(b, h) for b, h, _ in samples.rows.tolist()}):
            mine = (samples.rows[:, :2] == torch.tensor([b, h])).all(1)
            rows = samples.rows[mine, 2].to(q.device)
            compare("dQ", None if dq is None else dq[b, h, rows], exactly(b, h, rows)[0])
        of = f"the sampled rows; exact dK and dV of a head take {groups * n_q * n_k:.2g} pairs of tokens"
    errors = {
        name: float(relative(torch.cat(parts), torch.cat(wanted[name]), (0,))) for name, parts in got.items() if parts
    }
    return dataclasses.replace(samples, gradients=errors, gradients_of=of if errors else "")
