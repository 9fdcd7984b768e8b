"""Which earlier call a recomputation repeats, so that it takes that call's plan.

Activation checkpointing runs a forward operator again, inside the backward pass: ``torch.utils.checkpoint`` in eager
code, the partitioner's recomputed nodes in compiled code. Between the two runs an audit of another call may have
changed the site's plan, and gradients of one function must not be applied to the output of another. A recomputation

1. runs while autograd executes a backward (:func:`inside_backward`): an ordinary call does not, and
2. is given the tensors of its first run, up to rounding (a compiler may fuse the recomputed producers differently).

So every call leaves a :class:`Fingerprint` of its tensors with its plan, and a call inside a backward takes the plan
of the nearest one. A call inside a backward that is near to none is an ordinary call (a model run by a hook).
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

import torch

from polyattn.rewriter.families.family import Fit
from polyattn.site_plan import SitePlan

KEPT = 256
"""Calls of a site that are remembered: a recomputation further back than that counts as a call of its own."""
SAMPLES = 32
NEAR = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative distance within which two runs had the same tensors, by dtype: a few hundred roundings, in half precision
a few."""


def inside_backward() -> bool:
    """Whether autograd is executing a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


@functools.lru_cache(maxsize=64)
def _positions(shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Indices of SAMPLES elements, spread over all axes by a multiplicative generator."""
    size = 1
    for extent in shape:
        size *= extent
    flat = torch.tensor([(number * 2654435761 + 97) % size for number in range(1, SAMPLES + 1)])
    return tuple(axis.to(device) for axis in torch.unravel_index(flat, shape))


def fingerprint(*tensors: torch.Tensor) -> torch.Tensor:
    """Some elements of each tensor; NaN and infinities are replaced, so that they compare. Nothing is synchronised."""
    parts = [x.detach()[_positions(tuple(x.shape), x.device)] for x in tensors]
    sample = torch.cat(parts)
    wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
    return torch.nan_to_num(wide, nan=0.0, posinf=1.0, neginf=-1.0)


@dataclass
class Call:
    """One call of a site: which tensors it got, which plan it took and which fit, how often it was run again."""

    shapes: tuple[torch.Size, ...]
    sample: torch.Tensor
    low_rank: bool
    fit: Fit | None = None
    plan: SitePlan | None = None
    runs: int = 0


class Calls:
    """The last calls of a site. Not synchronised: its owner holds the lock."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque(maxlen=KEPT)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, low_rank: bool, fit: Fit | None, *tensors: torch.Tensor, plan: SitePlan | None = None) -> None:
        """Remember a call and the plan that it took; None: the one that its site had, or exact."""
        self._calls.append(Call(tuple(x.shape for x in tensors), fingerprint(*tensors), low_rank, fit, plan))

    def find(self, *tensors: torch.Tensor) -> Call | None:
        """The call that these tensors repeat; None when no remembered call had them.

        Of calls with equal tensors it is the last one that has been run again least often: backward passes run in
        reverse order.
        """
        shapes = tuple(x.shape for x in tensors)
        found = [call for call in self._calls if call.shapes == shapes and call.sample.device == tensors[0].device]
        if not found:
            return None
        sample = fingerprint(*tensors)
        distances = (torch.stack([call.sample for call in found]) - sample).norm(dim=-1) / sample.norm().clamp_min(
            1e-30
        )
        steps = torch.nan_to_num(distances * (100 / NEAR[tensors[0].dtype]), nan=101.0).clamp(max=101).int().tolist()
        step, _, last = min(
            (step, call.runs, -number) for number, (step, call) in enumerate(zip(steps, found, strict=True))
        )
        if step > 100:
            return None
        call = found[-last]
        call.runs += 1
        return call
