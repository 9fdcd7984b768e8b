"""The masks of a call: what they show of its keys, exact attention under them, and the rows in which they hide all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from polyattn.options import Options
from polyattn.passes.match.changes import Changes
from polyattn.rewriter.masks.mask import Mask
from polyattn.runtime import exact, masked, policy, visibility, written
from polyattn.runtime.exact import ExactSoftmax
from polyattn.runtime.execute import accumulator
from polyattn.runtime.state import SiteState
from polyattn.runtime.written import Operands, ScoreMask
from polyattn.site_plan import ExactPlan, SitePlan


def nothing_hidden(masks: Sequence[Any], q: Any, k: Any) -> tuple[Any, Any]:
    """Memory for what a call hides: which keys take part, bool [B, n_k], and which rows see none, bool [B, n_q];
    nothing where a call has no masks."""
    made = [q.new_zeros(*((x.shape[0], x.shape[2]) if masks else (0,)), dtype=torch.bool) for x in (k, q)]
    return made[0], made[1]


class Masks(NamedTuple):
    """What is known of the masks of a call."""

    given: ScoreMask | None
    """As the operator got them; None where there are none."""
    mask: Mask
    """Causal or none."""
    keep: torch.Tensor | None = None
    """Which keys take part, bool [B, n_k]; None: all."""
    lost: torch.Tensor | None = None
    """Which queries see no key, bool [B, n_q]; None: none."""
    other: bool = False
    """They are neither causal nor key padding, or it was no use to look."""

    @classmethod
    def of(
        cls, masks: Sequence[torch.Tensor], changes: str, mask: Mask, q: torch.Tensor, k: torch.Tensor, useful: bool
    ) -> Masks:
        """The masks of a forward.

        Args:
            mask: what is known when compiling.
            useful: whether the call can be low rank, so that it matters what they show.
        """
        if not masks:
            return cls(None, mask)
        given = ScoreMask.of(Changes.of(changes), masks, (*q.shape[:-1], k.shape[-2]))
        seen = visibility.look(given, mask, q, k) if useful or given.one_row else None
        return cls(given, mask, other=True) if seen is None else cls(given, *seen)

    @classmethod
    def again(
        cls,
        masks: Sequence[torch.Tensor],
        changes: str,
        executed: SitePlan | ExactPlan | None,
        mask: Mask,
        keep: torch.Tensor,
        lost: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
    ) -> Masks:
        """The masks of a backward, from how its forward was executed and what :meth:`hidden` returned there."""
        if not masks or executed is None:
            return cls(None, mask)
        given = ScoreMask.of(Changes.of(changes), masks, (*q.shape[:-1], k.shape[-2]))
        other = isinstance(executed, ExactPlan) and executed.other
        gone = lost if bool(lost.any()) else None
        return cls(given, executed.mask, keep if executed.padding else None, gone, other)

    def decide(self, shape: Mapping[str, int], plans: tuple[SitePlan, ...], options: Options) -> SiteState:
        """The state of a site under these masks before its first call; ``plans`` are its forms in order."""
        if self.other:
            return policy.other_mask(shape, plans[0], options)
        return policy.decide(shape, plans[0], options, plans[1:])

    def hidden(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the backward needs to know: tensors of the shapes of :func:`nothing_hidden`."""
        keep, lost = nothing_hidden([] if self.given is None else [self.given], q, k)
        return (
            keep if self.keep is None else keep.copy_(self.keep),
            lost if self.lost is None else lost.copy_(self.lost),
        )

    def exact(self, tensors: Operands, scale: float) -> tuple[torch.Tensor, torch.Tensor, ExactPlan | None]:
        """Exact attention of [B, H, n, ·] tensors, its log-sum-exp, and how it was computed."""
        if self.given is not None and (self.other or not masked.kernel_takes_masks(tensors[0])):
            return *masked.forward(tensors, self.given, scale), ExactPlan(self.mask, other=True)
        plan = None if self.given is None else ExactPlan(self.mask, self.keep is not None)
        return *exact.forward(*tensors, ExactSoftmax(scale, self.mask), self.keep), plan

    def exact_backward(
        self, g: torch.Tensor, tensors: Operands, out: torch.Tensor, stat: torch.Tensor, scale: float
    ) -> Operands:
        """Gradients of :meth:`exact`."""
        if self.given is not None and self.other:
            return masked.backward(g, tensors, self.given, out, stat, scale)
        return exact.backward(g, tensors, out, stat, ExactSoftmax(scale, self.mask), self.keep)

    @property
    def _rows(self) -> torch.Tensor | None:
        """Those rows, bool [B, 1, n_q, 1]; None where there are none."""
        return None if self.lost is None else self.lost[:, None, :, None]

    def write_lost(self, out: torch.Tensor, tensors: Operands, scale: float) -> None:
        """Write the rows of an output [B, H, n_q, e] that see no key, as eager attention has them."""
        if self._rows is None or self.given is None:
            return
        if self.given.silent:
            out.masked_fill_(self._rows, 0)
        else:
            written.write_rows(out, self._rows, tensors, self.given, scale)

    def without_lost(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the rows [B, H, n_q, ·] that is 0 in those that see no key."""
        return x if self._rows is None else x.masked_fill(self._rows, 0)

    def add_lost_gradients(
        self, made: Sequence[torch.Tensor | None], g: torch.Tensor, tensors: Operands, scale: float
    ) -> list[torch.Tensor | None]:
        """Gradients of q, k and v with what the rows that see no key add to them."""
        results = list(made)
        if self._rows is None or self.given is None or self.given.silent:
            return results
        wide = accumulator(g.dtype)
        results = [None if x is None else x.to(wide) for x in results]
        written.add_gradients(results, g, self._rows, tensors, self.given, scale)
        return results
