"""Landmarks and core of skeleton features, fitted to the queries and keys of each head (math.md §2).

    exp(s q·k) ≈ Φ(q) Z R(k)ᵀ,   Φ(q)_ρ = exp(s q·κ_ρ),   R(k)_σ = exp(s k·λ_σ)

κ are keys and λ queries, drawn by what of the softmax rows P the ones before them leave (adaptive sampling of columns
and of rows) and then moved to the centroid of the tokens nearest to them, each token weighted by the square of its
column or row of P: by what of the Frobenius norm it stands for. The core is a generalised Nyström approximation in the
measure of the output: with rows I, columns J and row sums z,

    Z = pinv(Φ_I / z_I) · P_IJ · pinv(R_J)ᵀ,   P_IJ = exp(s Q_I K_Jᵀ) B_J / z_I,   R_J with the weights B of the keys

with the same ridge on both sides, that of ``RIDGES`` that errs least on fresh rows. It is judged by squares, as the
output is: Σ_j |P̃_ij − P_ij| counts the many entries that no value tells apart and takes too large a ridge. Where a near
field is exact, only far pairs count: near entries of P_IJ are exact at first and then, ``ROUNDS`` times, what the model
has there.

Gram matrices and their factors are in float64, for they hold the squares of the ridges; features are in the dtype in
which kernels form them. P meets them once, after they were made orthonormal, and only there float32 is enough. The fit
belongs to a head, not to a sequence, and is used again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from polyattn.rewriter.masks.mask import NONE, Mask
from polyattn.rewriter.masks.pairs import Pairs

RIDGES = (3e-3, 1e-4)
"""Descending. Of the largest singular value of the features, whose columns are scaled to length one before."""
SAMPLES, CANDIDATES, WITNESSES, BLOCK = 8, 4, 2, 64
"""Per landmark: rows and columns of the core; tokens it is drawn from; entries of each. Landmarks drawn at a time."""
MASS_ROWS, LLOYD, VALIDATION, ROUNDS = 256, 2, 128, 2
"""Rows that say which keys get attention; steps of clustering; rows that choose the ridge; imputations."""
LIMIT, FAINT = 70.0, -40.0
"""Logarithms: the largest feature of a fitted token, and the least length of a column of features."""


class Landmarks(NamedTuple):
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
    mask: Mask = NONE,
    near: int | None = None,
) -> Landmarks:
    """Fit the skeleton of every head, one head at a time; results are float64.

    Kernels form exp(s q·κ), exp(s k·λ) and the core in float32, whose exp overflows at 88. Landmarks are shrunk until
    no token fitted has a logit above ``LIMIT`` with one of them, and the core lies in float32's range for logits to
    about ±80. Beyond that nothing is NaN: the error says what the shrunken landmarks cost, inf if no core works.

    Args:
        q: queries [heads, elements, n_q, d]; k: keys [heads, elements, n_k, d], both centred; a
            query attends to the keys of its own batch element.
        weights: of the keys, [heads, elements, n_k]; a key of weight 0 is not attended to.
        scale: factor of the logits.
        m: landmarks on each side; no more than there are queries or keys are used, the rest repeat them.
        mask: which keys a query attends to.
        near: tokens per chunk; pairs that are near under the mask are computed exactly elsewhere. None: no pair is.
        generator: draws rows and columns; torch's own generators are left alone.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    by_head = zip(*(x.detach().to(dtype) for x in (q, k, weights)), strict=True)
    made = [_Head(a, b, c, scale, generator, mask, near).fit(m) for a, b, c in by_head]
    return Landmarks(*(torch.stack(x).double() for x in zip(*made, strict=True)))


class _Head:
    """Tokens of one head, those of all batch elements in a row: q [n_q, d] times the scale, k and its weights [n_k]."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        weights: torch.Tensor,
        scale: float,
        generator: torch.Generator,
        mask: Mask,
        near: int | None,
    ) -> None:
        self.pairs = Pairs(q.shape[1], k.shape[1], mask, near)
        self.q, self.k, self.logs = q.flatten(0, 1) * scale, k.flatten(0, 1), weights.flatten().log()
        self.whole = len(q) == 1 and not mask.hides
        self.scale, self.generator = scale, generator

    def fit(self, m: int) -> tuple[torch.Tensor, ...]:
        """The parts of a :class:`Landmarks`."""
        n_q, n_k = len(self.q), len(self.k)
        radius = self.q.norm(dim=1).amax() / abs(self.scale)
        if bool(self.logs.isneginf().all()):  # nothing is left to approximate
            marks = self.k.new_zeros(m, self.k.shape[1])
            return marks, marks, self.k.new_zeros(m, m), self.k.new_zeros(()), radius
        every = torch.arange(n_k, device=self.q.device)
        some, i, fresh = (self.draw(count, n_q) for count in (MASS_ROWS, SAMPLES * m, VALIDATION))
        mass = self.rows(some, every)[0].masked_fill(~self.pairs.far(some, every), 0).mean(0)
        mass = mass / mass.sum().clamp_min(1e-30)
        j, order = self.choose((mass + 1 / n_k).masked_fill(self.logs.isneginf(), 0), SAMPLES * m).sort()
        drawn = order.argsort()[: CANDIDATES * m]  # columns in the order in which they were drawn
        p, z = self.rows(i, j)
        keys = self.adaptive(p[: WITNESSES * m, drawn], m)
        queries = self.adaptive(p[: CANDIDATES * m, drawn[: WITNESSES * m]].mT, m)
        of_rows, of_columns = self.squares(p, i, j, WITNESSES * m)
        kappa = centroids(self.k[j], of_columns, self.k[j[drawn[keys]]], m)
        lam = centroids(self.q[i], of_rows, self.q[i[queries]], m) / self.scale
        kappa = kappa * (LIMIT / (self.q @ kappa.mT).amax(0).clamp_min(LIMIT))[:, None]
        lam = lam * (LIMIT / (self.scale * self.k @ lam.mT).amax(0).clamp_min(LIMIT))[:, None]
        core, error = self.core(kappa, lam, i, j, p, z, fresh)
        return kappa, lam, core, error, radius

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
        left = _Side(torch.addmm(z, self.q[i], kappa.mT, beta=-1))
        right = _Side(torch.addmm(self.logs[j, None], self.k[j], lam.mT, alpha=self.scale))
        u, v, check = left.orthonormal, right.orthonormal, _Check(self, kappa, lam, fresh)
        met = u.mT @ (p @ v)  # [m, m]
        ridge = check.ridge(left, right, met)
        if self.pairs.near is not None:
            blocks = self.blocks(i, j)
            for _ in range(ROUNDS):
                model = left.x @ _solution(left, right, met, ridge).to(p.dtype)
                for rows, columns, local in blocks:
                    old = p[rows[:, None], columns]
                    new = torch.where(local, model[rows] @ right.x[columns].mT, old)
                    p[rows[:, None], columns] = new
                    met += u[rows].mT @ ((new - old) @ v[columns])
            ridge = check.ridge(left, right, met)
        core = _solution(left, right, met, ridge)
        core = (core * (-left.logs[:, None] - right.logs).exp()).to(p.dtype)
        error = check.error(check.phi @ core)
        return core.nan_to_num(0, 0, 0), error

    def draw(self, count: int, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator)[: min(count, n)].to(self.q.device)

    def choose(self, share: torch.Tensor, count: int) -> torch.Tensor:
        """Indices drawn by their share, each once and none whose share is 0."""
        share = share.double().cpu()
        count = min(count, int(share.count_nonzero()))
        return torch.multinomial(share, count, generator=self.generator).to(self.q.device)

    def logits(self, i: torch.Tensor) -> torch.Tensor:
        return (self.q[i] @ self.k.mT).add_(self.logs)

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
        return (entries[0], sums[0]) if len(entries) == 1 else (torch.cat(entries), torch.cat(sums))

    def squares(
        self, p: torch.Tensor, i: torch.Tensor, j: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows and of the columns of p, their sums over far pairs, each as a share of all, with a little added.

        Where not all pairs are far, rows count alike and columns by ``count`` rows: masks take longer than sums.
        """
        masked = not self.whole or self.pairs.near is not None
        rows, columns = [], torch.zeros_like(p[0])
        for at in range(0, count if masked else len(p), 256):  # parts that stay in the cache
            part = p[at : at + 256].square()
            if masked:
                part = part.masked_fill_(~self.pairs.far(i[at : at + 256], j), 0)
            columns += part.sum(0)
            rows.append(part.sum(1))
        of_rows = torch.ones_like(p[:, 0]) if masked else torch.cat(rows)
        by_side = ((x / x.sum().clamp_min(1e-30) + 1e-6 / len(x)) for x in (of_rows, columns))
        return next(by_side), next(by_side)

    def adaptive(self, p: torch.Tensor, m: int) -> torch.Tensor:
        """Columns of p, at most m, each block of them drawn by what the ones before it leave of the squares."""
        m = min(m, p.shape[1])
        rest, picks, basis = p.square().sum(0), torch.empty(0, dtype=torch.long, device=p.device), p[:, :0]
        while len(picks) < m:
            share = rest.clamp_min(0).double() + 1e-30
            share[picks] = 0
            new = self.choose(share, min(max(BLOCK, m // 8), m - len(picks)))
            block = p[:, new]
            block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
            rest -= (block.mT @ p).square().sum(0)
            picks, basis = torch.cat([picks, new]), torch.cat([basis, block], 1)
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
            found.append((rows, columns, pairs.hidden_alike(i[rows], j[columns])))
        return found


class _Side:
    """Features of sampled tokens, [samples, m], columns scaled to length one; given by their logarithms."""

    def __init__(self, logs: torch.Tensor) -> None:
        top = logs.amax(0).clamp_min(torch.finfo(logs.dtype).min)
        x = logs.sub_(top).exp_()
        wide = x.double()
        gram = _gram(wide)
        self.logs = (top + 0.5 * gram.diagonal().log()).clamp_min(FAINT)
        size = (top - self.logs).exp()
        wide, gram = wide * size, gram * size * size[:, None]  # in float64 wide was x
        self.x = wide.to(x.dtype)
        vector = torch.ones_like(gram[:, :1])
        for _ in range(20):
            vector = gram @ vector
            vector = vector / vector.norm().clamp_min(1e-30)
        largest, eye = (gram @ vector).norm(), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.factors = [torch.linalg.cholesky(gram + (ridge**2 * largest + 1e-30) * eye) for ridge in RIDGES]
        orthonormal = torch.linalg.solve_triangular(self.factors[-1], wide.mT, upper=False).mT
        self.orthonormal = orthonormal.to(x.dtype)
        """By the factor of the least ridge. In float32 this solve would let a head of error 5e-4 err 4 times more."""


def _gram(x: torch.Tensor) -> torch.Tensor:
    """xᵀx, [m, m], of which only one triangle is computed."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    step = max(64, x.shape[1] // 4)
    for at in range(0, len(gram), step):
        gram[at:, at : at + step] = x[:, at:].mT @ x[:, at : at + step]
    return gram.tril() + gram.tril(-1).mT


def _met(left: _Side, right: _Side, met: torch.Tensor) -> torch.Tensor:
    """Φᵀ P R, [m, m], of the same for orthonormal features."""
    product: torch.Tensor = left.factors[-1] @ met.double() @ right.factors[-1].mT
    return product


def _solution(left: _Side, right: _Side, met: torch.Tensor, ridge: int) -> torch.Tensor:
    """The core [m, m] between features of length one: least squares on both sides with the same ridge."""
    half = torch.cholesky_solve(_met(left, right, met), left.factors[ridge])
    return torch.cholesky_solve(half.mT, right.factors[ridge]).mT


class _Check:
    """Fresh rows: their softmax, and what a core makes of them, in the dtype in which kernels compute."""

    def __init__(self, head: _Head, kappa: torch.Tensor, lam: torch.Tensor, fresh: torch.Tensor) -> None:
        every = torch.arange(len(head.k), device=head.q.device)
        fresh = fresh[(head.pairs.seen(fresh, every) & ~head.logs.isneginf()).any(1)]  # others have no softmax
        logits = head.logits(fresh)
        native, self.far = head.pairs.seen(fresh, every), head.pairs.far(fresh, every)
        self.wanted = logits.masked_fill(~native, -math.inf).softmax(1)
        self.near = logits.exp().masked_fill(self.far | ~native, 0)
        self.phi = (head.q[fresh] @ kappa.mT).exp()
        self.psi = (head.scale * head.k @ lam.mT + head.logs[:, None]).exp()

    def difference(self, left: torch.Tensor) -> torch.Tensor:
        """P̃ − P of features times core [rows, m], [rows, n_k]."""
        found = torch.where(self.far, left @ self.psi.mT, self.near)
        return found.div_(found.sum(1, keepdim=True)).sub_(self.wanted)

    def error(self, left: torch.Tensor) -> torch.Tensor:
        """Σ_j |P̃_ij − P_ij|, mean over rows; inf where numbers overflow."""
        return self.difference(left).abs_().sum(1).mean().nan_to_num(math.inf, math.inf)

    def ridge(self, left: _Side, right: _Side, met: torch.Tensor) -> int:
        """Which ridge errs least, by the squares."""
        phi, products = self.phi.double() * (-left.logs).exp(), _met(left, right, met)
        errors = []
        for one, other in zip(left.factors, right.factors, strict=True):
            rows = torch.cholesky_solve(phi.mT, one).mT @ products
            rows = torch.cholesky_solve(rows.mT, other).mT * (-right.logs).exp()
            errors.append(
                float(self.difference(rows.to(self.phi.dtype)).square_().sum().nan_to_num(math.inf, math.inf))
            )
        return errors.index(min(errors))


def centroids(x: torch.Tensor, mass: torch.Tensor, start: torch.Tensor, m: int) -> torch.Tensor:
    """Centroids [m, d] of weighted tokens x [n, d]: steps of Lloyd's; fewer starts than m repeat."""
    made, weighted = start[torch.arange(m, device=x.device) % len(start)], x * mass[:, None]
    for _ in range(LLOYD):
        nearest = torch.cdist(x, made).argmin(1)
        sums = torch.zeros_like(made).index_add_(0, nearest, weighted)
        masses = torch.zeros_like(made[:, 0]).index_add_(0, nearest, mass)
        made = torch.where(masses[:, None] > 0, sums / masses.clamp_min(1e-30)[:, None], made)
    return made
