"""Polynomials in place of exp, chosen for the logits of each head (math.md §3 "Rotation", §4).

    p(S) = c_0 + c_1 S_1 + c_2 S_2² + … + c_g S_g^g,   S_m = s q'·k' over the last w_m coordinates

In full forms every S_m is the logit s q·k, and p a polynomial of it: Taylor's, of least relative error on an interval,
or fitted to softmax rows. In nested forms queries and keys are first multiplied by matrices that leave q·k as it is and
sort the coordinates by how much they contribute; monomials of high degree are then needed in the last ones only.

Full forms of even degree are positive for every real logit. Nested forms and odd degrees are not: each row's
denominator has to be checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.monomials import Basis, taylor
from polyattn.rewriter.families.balance import Balance
from polyattn.rewriter.masks.mask import NONE, Mask
from polyattn.rewriter.masks.pairs import Pairs

ROWS = 192
"""Sampled rows of a head."""
ANCHOR = 0.1
"""How much a row's mean ratio counts beside the differences from it, which the softmax does not see the scale of."""
LARGEST = 4.0
"""Interval of minimax polynomials, at most: beyond it none of degree 4 has a small relative error."""
FLOOR = 1e-3
"""Of c_0: what a full form of even degree never falls below."""


@functools.cache
def minimax(bound: float, degree: int) -> tuple[tuple[float, ...], float]:
    """The polynomial of least relative error max_{|x| ≤ bound} |p(x) e^{−x} − 1|, and that error (math.md §4).

    Remez's exchange: the functions x^m e^{−x} are a Chebyshev system, so that the best p is the one whose error has
    degree + 2 extrema of equal size and alternating sign.
    """
    grid = bound * np.cos(np.linspace(math.pi, 0, 4001))
    basis = np.polynomial.chebyshev.chebvander(grid / bound, degree) * np.exp(-grid)[:, None]
    at = np.searchsorted(grid, bound * np.cos(np.linspace(math.pi, 0, degree + 2))).clip(0, len(grid) - 1)
    solution = np.zeros(degree + 2)
    for _ in range(60):
        signs = (-1.0) ** np.arange(degree + 2)
        solution = np.linalg.solve(np.column_stack([basis[at], signs]), np.ones(degree + 2))
        error = basis @ solution[:-1] - 1
        found = _alternating(error, degree + 2)
        if found is None or np.array_equal(found, at):
            break
        at = found
    power = np.polynomial.chebyshev.cheb2poly(solution[:-1]) / bound ** np.arange(degree + 1)
    error = basis @ solution[:-1] - 1
    return tuple(map(float, power)), float(np.abs(error).max())


def _alternating(error: np.ndarray, count: int) -> np.ndarray | None:
    """Positions of extrema with alternating signs, one of each stretch of one sign; None if there are not ``count``."""
    change = np.flatnonzero(np.diff(np.sign(error)) != 0) + 1
    stretches = np.split(np.arange(len(error)), change)
    peaks = np.array([s[np.abs(error[s]).argmax()] for s in stretches])
    while len(peaks) > count:
        peaks = peaks[1:] if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else peaks[:-1]
    return peaks if len(peaks) == count else None


def choose(spectrum: torch.Tensor, scale: float, degree: int, d: int, rank: int) -> Basis:
    """The nested form with at most ``rank`` features that leaves out least, for all heads of a site together.

    Of (Σ_a x_a)^m / m! with independent x_a of variances t_a = s² σ_a², about (Σ_a t_a)^m / m! is there: widths grow
    where they add most of it for each feature more.
    """
    widths = [d] + [0] * (degree - 1)
    kept = (scale * spectrum.double()).square().flip(1).cumsum(1)  # of the last 1, 2, … coordinates
    whole = sum((kept[:, -1] ** m / math.factorial(m) for m in range(2, degree + 1)), torch.zeros_like(kept[:, 0]))
    sums = torch.cat([torch.zeros_like(kept[:, :1]), kept], 1)
    basis = Basis(d, tuple(widths))
    while True:
        options = []
        for m in range(2, degree + 1):
            width = widths[m - 1]
            if width < widths[m - 2]:
                wider = Basis(d, (*widths[: m - 1], width + 1, *widths[m:]))
                gain = (sums[:, width + 1] ** m - sums[:, width] ** m) / math.factorial(m) / whole.clamp_min(1e-300)
                if monomials.rank(wider) <= rank:
                    options.append((float(gain.mean()) / math.comb(width + m - 1, m - 1), -m, wider))
        if not options:
            return basis
        basis = max(options)[2]
        widths = list(basis.widths)


class Rows(NamedTuple):
    """Sampled rows of every head: the queries, all keys, and what the softmax makes of them."""

    q: torch.Tensor
    """[heads, rows, d]"""
    k: torch.Tensor
    """[heads, keys, d]"""
    p: torch.Tensor
    """Softmax rows [heads, rows, keys]."""
    logs: torch.Tensor
    """log P_ij − s q_i·k_j, [heads, rows, keys]: log weight of the key minus the row's log-sum; −inf where masked."""
    near: torch.Tensor
    """Pairs that stay exact, [rows, keys]."""
    scale: float

    @property
    def mass(self) -> torch.Tensor:
        """What the keys get of the rows, [heads, keys]; none of what near pairs get."""
        return self.p.masked_fill(self.near, 0).mean(1)


def sample(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    generator: torch.Generator,
    mask: Mask = NONE,
    near: int | None = None,
) -> Rows:
    """Draw rows of every head and compute them.

    Args:
        q: queries [heads, elements, n_q, d]; k: keys [heads, elements, n_k, d], both shifted; a query attends to the
            keys of its own batch element.
        weights: of the keys, [heads, elements, n_k]; 0 for keys that are computed exactly elsewhere.
        mask: which keys a query attends to.
        near: chunk length where pairs that are near under the mask stay exact; None: no pair is.
    """
    pairs = Pairs(q.shape[2], k.shape[2], mask, near)
    q, k, weights = (x.detach().double().flatten(1, 2) for x in (q, k, weights))
    drawn = torch.randperm(q.shape[1], generator=generator)[:ROWS].to(q.device)
    every = torch.arange(k.shape[1], device=q.device)
    rows, seen = q[:, drawn], pairs.seen(drawn, every)
    plain = torch.where(seen, 0.0, -math.inf).to(q.dtype) + weights.log()[:, None]
    logits = plain + scale * rows @ k.mT
    total = logits.logsumexp(2, keepdim=True)
    total = total.masked_fill(total == -math.inf, 0)
    return Rows(rows, k, (logits - total).exp(), plain - total, seen & ~pairs.far(drawn, every), scale)


def coefficients(kind: str, data: Rows, change: Balance, basis: Basis) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of each head, float64 [heads, degree + 1], and the mean error Σ_j |P̃_ij − P_ij| of its rows.

    Args:
        kind: ``taylor``, ``minimax`` or ``least_squares``.
        change: what queries and keys are multiplied by; it matters to nested forms only.
    """
    rules: dict[str, Callable[[_SampledHead], np.ndarray]] = {
        "taylor": lambda head: np.array(taylor(basis.degree)),
        "minimax": lambda head: np.array(minimax(head.bound, basis.degree)[0]),
        "least_squares": lambda head: head.least_squares(basis),
    }
    found, errors = [], []
    for h in range(len(data.q)):
        head = _SampledHead(data, change, basis, h)
        c = rules[kind](head)
        found.append(torch.as_tensor(c, dtype=torch.float64))
        errors.append(head.error(c))
    return torch.stack(found).to(data.q.device), torch.tensor(errors, dtype=torch.float64)


class _SampledHead:
    """One head's sampled rows, with P_ij S_m^m / exp(S) of each degree: what a coefficient adds to the row.

    On the CPU, where the small systems of equations are solved.
    """

    def __init__(self, data: Rows, change: Balance, basis: Basis, h: int) -> None:
        some = (data.p[h].sum(1) > 0).cpu()  # the others see no key but those that have no weight
        rows, self.p, logs = (x[h].cpu()[some] for x in (data.q, data.p, data.logs))
        keys = data.k[h].cpu()
        far = logs.exp().masked_fill(data.near.cpu()[some], 0)
        q, k, d = rows @ change.q[h].cpu(), keys @ change.k[h].cpu(), basis.d
        terms = [far]
        for m, width in enumerate(basis.widths, 1):
            terms.append(far * (data.scale * q[:, d - width :] @ k[:, d - width :].mT) ** m)
        self.terms = torch.stack(terms, 1)  # [rows, degree + 1, keys]
        self.far = far > 0
        logits = (data.scale * rows @ keys.mT).masked_fill(~self.far, 0)
        # on a grid, so that solutions are used again
        largest = float(logits.abs().max()) if logits.numel() else 0.0
        self.bound = min(LARGEST, 2.0 ** (math.ceil(4 * math.log2(max(0.125, largest))) / 4))
        self.sums = self.terms.sum(2)
        self.near = self.p.masked_fill(self.far, 0).sum(1)

    def least_squares(self, basis: Basis) -> np.ndarray:
        """Coefficients with a small Σ_ij (P̃_ij − P_ij)², by least squares again and again; no worse than the others.

        With r_i = near_i + Σ_m c_m f_im the sum of row i, P̃_ij − P_ij is (Σ_m c_m T_imj − P_ij r_i) / r_i where j is
        far and P_ij (1 − r_i) / r_i where it is near: quadratic in c for given divisors, which are those found before.
        """
        if not bool(self.far.any()):
            return np.array(taylor(basis.degree))
        f, p = self.sums, self.p.masked_fill(~self.far, 0)
        gram = self.terms @ self.terms.mT
        u = (self.terms @ p[..., None])[..., 0]
        p2, near2 = p.square().sum(1), self.p.masked_fill(self.far, 0).square().sum(1)
        hold = near2 + ANCHOR * self.p.square().sum(1)
        square = f[:, :, None] * f[:, None]
        forms = gram - u[:, :, None] * f[:, None] - f[:, :, None] * u[:, None] + (p2 + hold)[:, None, None] * square
        lines = self.near[:, None] * (u - p2[:, None] * f) + (hold * (1 - self.near))[:, None] * f
        divisor = torch.ones_like(self.near)
        tried = [np.array(taylor(basis.degree)), np.array(minimax(self.bound, basis.degree)[0])]
        for _ in range(4):
            share = divisor.square().reciprocal()
            h = (forms * share[:, None, None]).sum(0).numpy()
            g = (lines * share[:, None]).sum(0).numpy()
            size = np.sqrt(np.maximum(h.diagonal(), 1e-300))
            scaled = h / size[:, None] / size
            c = np.linalg.solve(scaled + 1e-11 * np.eye(len(g)), g / size) / size
            if len(set(basis.widths)) == 1 and basis.degree % 2 == 0:
                c = positive(c, h, g)
            divisor = (self.near + f @ torch.as_tensor(c)).clamp_min(0.2)
            tried.append(c)
        losses = [float(self.off(c).square().sum()) for c in tried]
        # the last one, where it is as good as any: it depends least on what came before
        return next(c for c, loss in zip(tried[::-1], losses[::-1], strict=True) if loss <= (1 + 1e-6) * min(losses))

    def off(self, c: np.ndarray) -> torch.Tensor:
        """P̃ − P of the sampled rows; what has no positive sum is taken for far off."""
        made = torch.einsum("imj,m->ij", self.terms, torch.as_tensor(c)) + self.p.masked_fill(self.far, 0)
        total = made.sum(1, keepdim=True)
        return torch.where(total > 0, made / total - self.p, 2.0)

    def error(self, c: np.ndarray) -> float:
        return float(self.off(c).abs().sum(1).mean()) if len(self.p) else 0.0


def positive(c: np.ndarray, h: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The coefficients, or, where p is not positive on all of the line, others that are, of low c'Hc − 2 g'c.

    Where the least p touches zero it is (x − t)² s(x) with s ≥ 0: the best of these over a grid of t, with
    a small constant added; of p with a larger constant; and of what lies between p and Taylor's polynomial.
    """

    def lowest(x: np.ndarray) -> float:
        if x[-1] <= 0:
            return -math.inf
        roots = np.roots(np.polynomial.polynomial.polyder(x)[::-1])
        real = roots[np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots))].real
        return float(np.polynomial.polynomial.polyval(real, x).min()) if len(real) else -math.inf

    def loss(x: np.ndarray) -> float:
        return float(x @ h @ x - 2 * g @ x)

    def holds(x: np.ndarray) -> bool:
        return bool(x[0] > 0 and lowest(x) >= FLOOR * x[0])

    if holds(c):
        return c
    plain = np.array(taylor(len(c) - 1))
    options = [plain]
    for root in np.concatenate([-np.geomspace(0.05, 200, 200), np.geomspace(0.05, 200, 200)]):
        square = np.array([root**2, -2 * root, 1.0])
        shifted = np.array([np.pad(square, (m, len(c) - 3 - m)) for m in range(len(c) - 2)])
        inner, size = shifted @ h @ shifted.T, np.sqrt(np.maximum((shifted @ h * shifted).sum(1), 1e-300))
        eye = 1e-11 * np.eye(len(size))
        touching = np.linalg.solve(inner / size[:, None] / size + eye, shifted @ g / size) / size @ shifted
        options.append(touching + np.eye(len(c))[0] * 2 * FLOOR * abs(touching[0]))
    if c[-1] > 0:
        options.append(c + np.eye(len(c))[0] * (max(0.0, -lowest(c)) * (1 + FLOOR) + 2 * FLOOR * abs(c[0])))
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(plain + middle * (c - plain)) else (low, middle)
    options.append(plain + low * (c - plain))
    return min((x for x in options if holds(x)), key=loss)
