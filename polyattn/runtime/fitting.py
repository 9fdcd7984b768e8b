"""The fitted features of a site: how they are made of a call's tensors, and what their shape is."""

from __future__ import annotations

from dataclasses import replace

import torch

from polyattn.options import Options
from polyattn.rewriter.families.polynomial import coefficients as polynomial
from polyattn.rewriter.families.polynomial import monomials
from polyattn.rewriter.families.skeleton import landmarks
from polyattn.runtime.execute import Setting, grouped
from polyattn.runtime.fit import Fit
from polyattn.runtime.guard import seed

ELEMENTS = 4
"""Batch elements that a fit looks at."""


def shape(options: Options, k: torch.Tensor) -> tuple[int, ...]:
    """Of what is fitted to the heads of keys [batch, kv_heads, n, d], as ``Setting.fitted`` has it."""
    if not options.fits or options.policy == "exact":
        return (0,)
    heads, d, degree = k.shape[1], k.shape[-1], options.resolved_degree
    if degree is None:
        m = options.resolved_rank(d)
        return (heads, m, 2 * d + m)
    return (heads, 2 * d + 1, max(d, degree + 1))


def with_fit(setting: Setting, fit: Fit) -> Setting:
    return replace(setting, fitted=fit.values, widths=fit.widths, radius=fit.radius)


def make(
    site: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    setting: Setting,
    options: Options,
    number: int | None,
    times: int,
) -> Fit:
    """A fit to each key head, in the accumulator's dtype, of the first batch elements of a call.

    It belongs to a head, not to a sequence. Random choices come from a generator of their own, seeded by
    ``Options.seed``, the site and how often it was fitted before.
    """
    q, k, _ = grouped(*(x[:ELEMENTS] for x in tensors))
    moved = setting.moved(q, k)
    weights = torch.ones_like(k[..., 0]) if moved.weights is None else moved.weights
    elements = len(q) // tensors[1].shape[1]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(elements, len(x) // elements, *x.shape[1:]).transpose(0, 1)

    operands = by_head(moved.q.flatten(1, 2)), by_head(moved.k), by_head(weights)
    generator = torch.Generator().manual_seed(seed(options, site, f"fit {times}" if times else "fit"))
    made, error, widths, radius = (_skeleton if setting.degree is None else _polynomial)(
        operands, setting, options, generator
    )
    return Fit(made.to(q.dtype), widths, radius, tuple(error.tolist()), number)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each head, queries and keys [heads, elements, tokens, d] and weights of the keys [heads, elements, tokens]."""
Made = tuple[torch.Tensor, torch.Tensor, tuple[int, ...], torch.Tensor | None]
"""What is kept, error of each head, widths of a nested polynomial, radius of each head."""


def _skeleton(operands: Operands, setting: Setting, options: Options, generator: torch.Generator) -> Made:
    q, k, weights = operands
    m, near = options.resolved_rank(k.shape[-1]), setting.chunk if setting.causal or setting.band else None
    made = landmarks.fit(q, k, weights, setting.scale, m, generator, setting.causal, near=near)
    return torch.cat([made.keys, made.queries, made.core], 2), made.error, (), made.radius


def _polynomial(operands: Operands, setting: Setting, options: Options, generator: torch.Generator) -> Made:
    q, k, weights = operands
    degree, d = setting.degree or 0, k.shape[-1]
    near = setting.chunk if setting.causal or setting.band else None
    sample = polynomial.sample(q, k, weights, setting.scale, generator, setting.causal, near)
    turn = polynomial.balance(q, k, sample.mass)
    basis = monomials.full(d, degree)
    if options.rank is not None:
        basis = polynomial.choose(turn.spectrum, setting.scale, degree, d, options.rank)
    c, error = polynomial.coefficients(options.polynomial, sample, turn, basis)
    made = torch.zeros(len(q), 2 * d + 1, max(d, degree + 1), dtype=c.dtype, device=c.device)
    made[:, :d, :d], made[:, d : 2 * d, :d], made[:, -1, : degree + 1] = turn.q, turn.k, c
    return made, error, basis.widths if options.rank is not None else (), None
