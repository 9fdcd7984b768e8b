"""The audit of a call: random rows computed exactly and compared, in the two units of math.md §5.

Rows are drawn after the call's tensors exist, afresh for every audit, from a generator of polyattn's own that is seeded
by ``Options.seed``, the site and the number of the call: runs repeat, torch's generators are left alone.
"""

from __future__ import annotations

import functools
import logging
import math

import torch

from polyattn.options import Options
from polyattn.rewriter.families.moments import mean_of
from polyattn.runtime import exact, policy, registry
from polyattn.runtime.exact import Grouped
from polyattn.runtime.policy import AuditErrors
from polyattn.runtime.registry import CallRecord, Entry
from polyattn.site_plan import SitePlan

log = logging.getLogger("polyattn")


def judge(entry: Entry, record: CallRecord, errors: AuditErrors, options: Options) -> bool:
    """Record what an audit measured; whether the site may keep its form.

    Under ``policy="auto"`` a form whose audit fails gives way to the next one that its options allow, at last to exact
    attention. Under ``policy="low_rank"`` it stays, and the first failed audit is logged as a warning.
    """
    assert record.number is not None, "recomputations are not audited"
    site = entry.key.site
    state = registry.update(entry, functools.partial(policy.measured, number=record.number, errors=errors))
    if policy.holds(errors, options):
        return True
    found = (
        f"worst row {errors.additive:.2e} (tolerance {options.tolerance:.0e}), "
        f"relative {errors.relative:.2e} (relative_tolerance {options.relative_tolerance:.0e})"
    )
    if options.policy == "auto":
        reason = f"audit of call {record.number}: {found}"
        following = registry.update(entry, functools.partial(policy.next_form, options=options, reason=reason))
        if state.counters.audits > 1:
            form = following.plan.family.describe() if following.low_rank else "exact"
            log.info("polyattn: %s: %s from call %s on: %s", site, form, record.number, found)
        return False
    if registry.first_warning(entry):
        log.warning("polyattn: %s: policy='low_rank' keeps a low-rank form whose audit failed: %s", site, found)
    return True


def rows(site: str, what: object, q: torch.Tensor, options: Options) -> list[int]:
    """Rows to audit, as flat indices of [heads, groups, n_q]: drawn with replacement, others for another ``what``."""
    generator = torch.Generator().manual_seed(registry.seed(options, site, what))
    count = q.shape[0] * q.shape[1] * q.shape[2]
    return torch.randint(count, (options.audit_rows,), generator=generator).tolist()


def measure(
    tensors: Grouped, out: torch.Tensor, plan: SitePlan, drawn: list[int], keep: torch.Tensor | None = None
) -> AuditErrors:
    """Errors of some rows of a grouped output: the worst row's, and RMS relative to what is not mean pooling.

    Args:
        keep: which keys take part, bool [batch · kv_heads, n_k]; None: all.
    """
    q, k, v = tensors
    groups, n = q.shape[1:3]
    by_head: dict[int, set[int]] = {}
    for flat in drawn:
        by_head.setdefault(flat // n, set()).add(flat % n)
    worst, error2, spread2 = [], [], []
    for head, chosen in sorted(by_head.items()):
        h, g = divmod(head, groups)
        at = torch.tensor(sorted(chosen), device=q.device)
        mine = None if keep is None else keep[h]
        wanted = exact.rows_forward(q[h, g, at], k[h], v[h], at, plan, mine)
        centre = mean_of(v[h], mine)[0]
        around = v[h] if mine is None else v[h][mine]
        if not len(around):  # no key takes part: zero, as it must be
            continue
        difference = (out[h, g, at] - wanted).norm(dim=-1)
        worst.append(difference.max() / (around - centre).norm(dim=-1).max().clamp_min(1e-30))
        error2.append(difference.square().sum())
        spread2.append((wanted - centre).square().sum())
    if not worst:
        return AuditErrors(0.0, 0.0)
    error = float(torch.stack(worst).max())  # keeps NaN, which Python's max may drop
    total2, around2 = float(torch.stack(error2).sum()), float(torch.stack(spread2).sum())
    return AuditErrors(error, math.sqrt(total2 / max(around2, 1e-300)))
