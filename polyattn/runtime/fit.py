"""What is fitted to the heads of a site."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Fit:
    """A fit, and what is known of it."""

    values: torch.Tensor
    """As :class:`polyattn.runtime.execute.Setting` has it."""
    widths: tuple[int, ...]
    """Of a nested polynomial; nothing for the full form."""
    radius: torch.Tensor | None
    """The largest norm of a shifted query that the fit saw, [kv_heads]; None: not known."""
    error: tuple[float, ...]
    """Of each key head, the mean error of softmax rows that the fit did not see, Σ_j |P̃_ij − P_ij|."""
    call: int | None
    """Number of the call that it was made of; None where it was loaded."""
