"""Landmarks and core of skeleton features, fitted to the queries and keys of each head (math.md §2).

    exp(s q·k) ≈ Φ(q) Z R(k)ᵀ,   Φ(q)_ρ = exp(s q·κ_ρ),   R(k)_σ = exp(s k·λ_σ)

κ are keys and λ queries, drawn by what of the softmax rows P the ones before them leave (adaptive sampling of columns
and of rows) and then moved to the centroid of the tokens nearest to them, keys weighted by the attention they get. The
core is a generalised Nyström approximation in the measure of the output: with rows I, columns J and row sums z,

    Z = pinv(Φ_I / z_I) · P_IJ · pinv(R_J)ᵀ,   P_IJ = exp(s Q_I K_Jᵀ) B_J / z_I,   R_J with the weights B of the keys

with a ridge on each side; the pair is taken that errs least on fresh rows. Where a near field is exact, only far pairs
count: near entries of P_IJ are exact at first and then, ``ROUNDS`` times, what the model has there.

Gram matrices and their factors are in float64. P meets the features once, after these were made orthonormal, and only
there float32 is enough. The fit belongs to a head, not to a sequence, and is used again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from polyattn.rewriter.pairs import Pairs

RIDGES = (1e-2, 3e-3, 1e-3, 1e-4)
"""Of the largest singular value of the features, whose columns are scaled to length one before."""
SAMPLES, CANDIDATES, WITNESSES, BLOCK = 8, 4, 2, 64
"""Per landmark: rows and columns of the core; tokens it is drawn from; entries of each. Landmarks drawn at a time."""
MASS_ROWS, LLOYD, VALIDATION, ROUNDS = 256, 16, 128, 2
"""Rows that say which keys get attention; tokens per landmark in clustering; rows that choose ridges; imputations."""
LIMIT, FAINT = 70.0, -40.0
"""Logarithms: the largest feature of a fitted token, and the least length of a column of features."""


class Skeleton(NamedTuple):
    """Landmarks of keys and of queries [heads, m, d], core [heads, m, m]; and what is known of the fit."""

    keys: torch.Tensor
    queries: torch.Tensor
    core: torch.Tensor
    error: torch.Tensor
    """Σ_j |P̃_ij − P_ij|, mean over the validation rows, [heads]; inf where numbers overflow."""
    radius: torch.Tensor
    """Largest norm of a shifted query, [heads]; no query beyond it was fitted, and such rows err several times more.
    It does not tell of the wild rows on other sequences, of which the approximate row sum is about 0 or negative."""


def fit(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    m: int,
    generator: torch.Generator,
    causal: bool = False,
    near: int | None = None,
) -> Skeleton:
    """Fit the skeleton of every head, one head at a time; results are float64.

    Kernels form exp(s q·κ), exp(s k·λ) and the core in float32, whose exp overflows at 88. Landmarks are shrunk until
    no token fitted has a logit above ``LIMIT`` with one of them, and the core lies in float32's range for logits to
    about ±80. Beyond that nothing is NaN: the error says what the shrunken landmarks cost, inf if no core works.

    Args:
        q: queries [heads, elements, n_q, d]; k: keys [heads, elements, n_k, d], both shifted (codegen/shift.py); a
            query attends to the keys of its own batch element.
        weights: of the keys, [heads, elements, n_k].
        scale: factor of the logits.
        m: landmarks on each side; no more than there are queries or keys are used, the rest repeat them.
        causal: a query attends to the keys up to its own position.
        near: tokens per chunk; pairs of one chunk, and of adjacent ones unless causal, are computed exactly elsewhere.
            None: no pair is.
        generator: draws rows and columns; torch's own generators are left alone.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    by_head = zip(*(x.detach().to(dtype) for x in (q, k, weights)), strict=True)
    made = [_Head(a, b, c, scale, generator, causal, near).fit(m) for a, b, c in by_head]
    return Skeleton(*(torch.stack(x).double() for x in zip(*made, strict=True)))


class _Head:
    """Tokens of one head, those of all batch elements in a row: q [n_q, d] times the scale, k and its weights [n_k]."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: torch.Tensor,
        scale: float,
        generator: torch.Generator,
        causal: bool,
        near: int | None,
    ) -> None:
        self.pairs = Pairs(q.shape[1], k.shape[1], causal, near)
        self.q, self.k, self.logs = q.flatten(0, 1) * scale, k.flatten(0, 1), weights.flatten().log()
        self.whole = len(q) == 1 and not causal
        self.scale, self.generator = scale, generator

    def fit(self, m: int) -> tuple[torch.Tensor, ...]:
        """The parts of a :class:`Skeleton`."""
        n_q, n_k = len(self.q), len(self.k)
        every = torch.arange(n_k, device=self.q.device)
        some, i, fresh = (self.draw(count, n_q) for count in (MASS_ROWS, SAMPLES * m, VALIDATION))
        mass = self.rows(some, every)[0].masked_fill(~self.pairs.far(some, every), 0).mean(0)
        mass = mass / mass.sum().clamp_min(1e-30)
        j = self.choose(mass + 1 / n_k, SAMPLES * m)
        drawn = (j if len(j) == n_k else every)[: min(len(j), CANDIDATES * m)]  # among the columns, in random order
        j = every if len(j) == n_k else j
        p, z = self.rows(i, j)
        keys = self.adaptive(p[: WITNESSES * m, drawn], m)
        queries = self.adaptive(p[: CANDIDATES * m, drawn[: WITNESSES * m]].mT, m)
        part = self.draw(LLOYD * m, n_k)
        kappa = centroids(self.k[part], mass[part] + 0.1 / n_k, self.k[j[drawn[keys]]], m)
        part = self.draw(LLOYD * m, n_q)
        lam = centroids(self.q[part], torch.ones_like(self.q[part, 0]), self.q[i[queries]], m) / self.scale
        kappa = kappa * (LIMIT / (self.q @ kappa.mT).amax(0).clamp_min(LIMIT))[:, None]
        lam = lam * (LIMIT / (self.scale * self.k @ lam.mT).amax(0).clamp_min(LIMIT))[:, None]
        core, error = self.core(kappa, lam, i, j, p, z, fresh)
        return kappa, lam, core, error, self.q.norm(dim=1).amax() / abs(self.scale)

    def core(
        self,
        kappa: torch.Tensor,
        lam: torch.Tensor,
        i: torch.Tensor,
        j: torch.Tensor,
        p: torch.Tensor,
        z: torch.Tensor,
        fresh: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The core [m, m] and its error on fresh rows; near entries of p [rows i, columns j] are overwritten."""
        left = _Side(self.q[i].double() @ kappa.double().mT - z.double())
        right = _Side(self.scale * self.k[j].double() @ lam.double().mT + self.logs[j, None].double())
        u, v, check = left.orthonormal.to(p.dtype), right.orthonormal.to(p.dtype), _Check(self, kappa, lam, fresh)
        met = u.mT @ (p @ v)  # [m, m]
        ridges = check.ridges(left, right, met)
        if self.pairs.near is not None:
            blocks = self.blocks(i, j)
            x, y = left.x.to(p.dtype), right.x.to(p.dtype)
            for _ in range(ROUNDS):
                model = x @ _solution(left, right, met, ridges).to(p.dtype)
                for rows, columns, local in blocks:
                    old = p[rows[:, None], columns]
                    new = torch.where(local, model[rows] @ y[columns].mT, old)
                    p[rows[:, None], columns] = new
                    met += u[rows].mT @ ((new - old) @ v[columns])
            ridges = check.ridges(left, right, met)
        core = _solution(left, right, met, ridges)
        core = (core * (-left.logs[:, None] - right.logs).exp()).to(p.dtype)
        error = check.error(check.phi @ core)
        return core.nan_to_num(0, 0, 0), error

    def draw(self, count: int, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator)[: min(count, n)].to(self.q.device)

    def choose(self, share: torch.Tensor, count: int) -> torch.Tensor:
        """Indices drawn by their share, each once."""
        share = share.double().cpu()
        return torch.multinomial(share, min(count, len(share)), generator=self.generator).to(self.q.device)

    def logits(self, i: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.logs, self.q[i], self.k.mT)

    def rows(self, i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax rows at columns j, [i, j], and the logarithms of their sums, [i, 1].

        Columns that a row does not attend to are not 0 but exp of their logits by the sum; the sum is, for a row that
        attends to few keys, at least that of as many average ones.
        """
        every = torch.arange(len(self.k), device=self.q.device)
        entries, sums, step = [], [], max(1, 2**24 // len(every))
        for part in (i[at : at + step] for at in range(0, len(i), step)):
            logits = self.logits(part)
            top = logits.amax(1, keepdim=True)
            a = logits.sub_(top).exp_()
            total = a.sum(1, keepdim=True)
            if not self.whole:
                native = self.pairs.seen(part, every)
                total = (total * native.to(a.dtype).mean(1, keepdim=True)).maximum((a * native).sum(1, keepdim=True))
            entries.append((a if len(j) == len(every) else a[:, j]).div_(total))
            sums.append(top + total.log())
        return torch.cat(entries), torch.cat(sums)

    def adaptive(self, p: torch.Tensor, m: int) -> torch.Tensor:
        """Columns of p, at most m, each block of them drawn by what the ones before it leave of the squares."""
        rest, picks = p.clone(), torch.empty(0, dtype=torch.long, device=p.device)
        while len(picks) < min(m, p.shape[1]):
            share = rest.square().sum(0).double() + 1e-30
            share[picks] = 0
            new = self.choose(share, min(BLOCK, min(m, p.shape[1]) - len(picks)))
            basis = torch.linalg.qr(rest[:, new])[0]
            rest.addmm_(basis, basis.mT @ rest, alpha=-1)
            picks = torch.cat([picks, new])
        return picks

    def blocks(self, i: torch.Tensor, j: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows and columns of p, together all near pairs, and which of a block's pairs are; those of the same chunks
        that a causal mask hides are taken for near as well, for they are alike and not needed."""
        pairs, near = self.pairs, self.pairs.near or 1
        size = near * -(-64 * len(self.q) // (len(i) * near))  # tokens; some 64 rows of the sample
        element, start = i // pairs.per_query, i % pairs.per_query // size * size
        found, at = [], j % pairs.per_key
        for e, first in sorted(set(zip(element.tolist(), start.tolist(), strict=True))):
            rows = torch.where((element == e) & (start == first))[0]
            columns = torch.where((j // pairs.per_key == e) & (at >= first - near) & (at < first + size + near))[0]
            gap = pairs.gap(i[rows], j[columns])
            found.append((rows, columns, (gap <= 0 if pairs.causal else gap <= 1) & (gap >= -1)))
        return found


class _Side:
    """Features of sampled tokens, [samples, m], columns scaled to length one; given by their logarithms, in float64."""

    def __init__(self, logs: torch.Tensor) -> None:
        top = logs.amax(0)
        x = logs.sub_(top).exp_()
        norms = x.norm(dim=0)
        self.logs = (top + norms.log()).clamp_min(FAINT)
        self.x = x.mul_((top - self.logs).exp())
        gram = self.x.mT @ self.x
        vector = torch.ones_like(gram[:, :1])
        for _ in range(20):
            vector = gram @ vector
            vector = vector / vector.norm().clamp_min(1e-30)
        largest, eye = (gram @ vector).norm(), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.factors = [torch.linalg.cholesky(gram + (ridge**2 * largest + 1e-30) * eye) for ridge in RIDGES]
        self.orthonormal = torch.linalg.solve_triangular(self.factors[-1], self.x.mT, upper=False).mT
        """By the factor of the least ridge."""


def _met(left: _Side, right: _Side, met: torch.Tensor) -> torch.Tensor:
    """Φᵀ P R, [m, m], of the same for orthonormal features."""
    product: torch.Tensor = left.factors[-1] @ met.double() @ right.factors[-1].mT
    return product


def _solution(left: _Side, right: _Side, met: torch.Tensor, ridges: tuple[int, int]) -> torch.Tensor:
    """The core [m, m] between features of length one: least squares on both sides, each with its ridge."""
    half = torch.cholesky_solve(_met(left, right, met), left.factors[ridges[0]])
    return torch.cholesky_solve(half.mT, right.factors[ridges[1]]).mT


class _Check:
    """Fresh rows: their softmax, and what a core makes of them, in the dtype in which kernels compute."""

    def __init__(self, head: _Head, kappa: torch.Tensor, lam: torch.Tensor, fresh: torch.Tensor) -> None:
        every = torch.arange(len(head.k), device=head.q.device)
        logits = head.logits(fresh)
        native, self.far = head.pairs.seen(fresh, every), head.pairs.far(fresh, every)
        self.wanted = logits.masked_fill(~native, -math.inf).softmax(1)
        self.near = logits.exp().masked_fill(self.far | ~native, 0)
        self.phi = (head.q[fresh] @ kappa.mT).exp()
        self.psi = (head.scale * head.k @ lam.mT + head.logs[:, None]).exp()

    def error(self, left: torch.Tensor) -> torch.Tensor:
        """Σ_j |P̃_ij − P_ij|, mean over rows, of features times core [rows, m]; inf where numbers overflow."""
        found = torch.where(self.far, left @ self.psi.mT, self.near)
        found = found / found.sum(1, keepdim=True)
        return (found - self.wanted).abs().sum(1).mean().nan_to_num(math.inf, math.inf)

    def ridges(self, left: _Side, right: _Side, met: torch.Tensor) -> tuple[int, int]:
        """Which ridge of each side errs least."""
        phi, best, chosen = self.phi.double() * (-left.logs).exp(), math.inf, (0, 0)
        products = _met(left, right, met)
        for a, factor in enumerate(left.factors):
            rows = torch.cholesky_solve(phi.mT, factor).mT @ products
            for b, other in enumerate(right.factors):
                core = torch.cholesky_solve(rows.mT, other).mT * (-right.logs).exp()
                error = float(self.error(core.to(self.phi.dtype)))
                if error < best:
                    best, chosen = error, (a, b)
        return chosen


def centroids(x: torch.Tensor, mass: torch.Tensor, start: torch.Tensor, m: int) -> torch.Tensor:
    """Centroids [m, d] of weighted tokens x [n, d]: one step of Lloyd's; fewer starts than m repeat."""
    start = start[torch.arange(m, device=x.device) % len(start)]
    nearest = torch.cdist(x, start).argmin(1)
    sums = torch.zeros_like(start).index_add_(0, nearest, x * mass[:, None])
    masses = torch.zeros_like(start[:, 0]).index_add_(0, nearest, mass)
    return torch.where(masses[:, None] > 0, sums / masses.clamp_min(1e-30)[:, None], start)
