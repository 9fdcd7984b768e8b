"""Fits of a site: how one is made of a call's tensors, and kept."""

from __future__ import annotations

import dataclasses
import functools

import torch

from polyattn.options import Options
from polyattn.rewriter.families.family import Fit, Sample
from polyattn.rewriter.families.registry import families
from polyattn.runtime import policy, registry
from polyattn.runtime.centring import centre
from polyattn.runtime.execute import accumulator, grouped, grouped_keep
from polyattn.runtime.registry import CallRecord, Entry
from polyattn.runtime.saved_fits import taken
from polyattn.site_plan import SitePlan

ELEMENTS = 4
"""Batch elements that a fit looks at."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(
    site: str,
    tensors: Tensors,
    plan: SitePlan,
    options: Options,
    number: int | None,
    times: int,
    keep: torch.Tensor | None = None,
) -> Fit:
    """A fit to each key head, in the accumulator's dtype, of the first batch elements of a call.

    It belongs to a head, not to a sequence. Random choices come from a generator of their own, seeded by
    ``Options.seed``, the site and how often it was fitted before (``times``).
    """
    q, k, _ = grouped(*(x[:ELEMENTS] for x in tensors))
    by_key_head = grouped_keep(None if keep is None else keep[:ELEMENTS], tensors[1].shape[1])
    centred = centre(q, k, plan, keep=by_key_head)
    factors = torch.ones_like(k[..., 0]) if centred.factors is None else centred.factors
    elements = len(q) // tensors[1].shape[1]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(elements, len(x) // elements, *x.shape[1:]).transpose(0, 1)

    queries, keys, weights = by_head(centred.q.flatten(1, 2)), by_head(centred.k), by_head(factors)
    sample = Sample(queries, keys, weights, plan.scale, plan.mask, plan.near)
    generator = torch.Generator().manual_seed(registry.seed(options, site, f"fit {times}" if times else "fit"))
    made = plan.family.fit(sample, generator)
    return dataclasses.replace(made, values=made.values.to(q.dtype), call=number)


def kept(
    entry: Entry,
    record: CallRecord,
    tensors: Tensors,
    plan: SitePlan,
    options: Options,
    keep: torch.Tensor | None = None,
) -> Fit:
    """The fit of the call that is run again, or the site's, which the first call makes or takes from a file."""
    if record.fit is not None:
        return record.fit
    if entry.state.fit is None:
        with entry.fitting:
            if entry.state.fit is None:
                loaded = taken(entry.key, plan, tensors[1])
                if loaded is not None:
                    registry.update(entry, functools.partial(dataclasses.replace, fit=loaded))
                else:
                    anew(entry, record, tensors, plan, options, keep)
    fit = entry.state.fit
    assert fit is not None, "it was made just now"
    return fit


def anew(
    entry: Entry,
    record: CallRecord,
    tensors: Tensors,
    plan: SitePlan,
    options: Options,
    keep: torch.Tensor | None = None,
) -> Fit:
    """Fit to the present call, and keep that."""
    made = make(entry.key.site, tensors, plan, options, record.number, entry.state.counters.fits, keep)
    registry.update(entry, functools.partial(policy.fitted, fit=made))
    return made


def nothing(k: torch.Tensor, options: Options) -> torch.Tensor:
    """What an operator returns in the place of a fit where nothing is fitted: zeros of the same shape."""
    return k.new_zeros(packed_shape(k, options), dtype=accumulator(k.dtype))


def packed_shape(k: torch.Tensor, options: Options) -> tuple[int, ...]:
    """The shape of what is fitted to the heads of keys [batch, kv_heads, n, d]; (0,) where nothing is."""
    family = next((made for f in families(options) if (made := f.of(options)).fitted), None)
    if options.policy == "exact" or family is None:
        return (0,)
    shape = family.packed_shape(k.shape[1], k.shape[-1])
    return (k.shape[0] * shape[0], *shape[1:]) if family.by_element else shape
