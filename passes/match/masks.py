"""Masks built inside the graph: what :mod:`polyattn.passes.match.mask_meaning` makes of them, with every handler."""

from __future__ import annotations

from polyattn.passes.match import mask_arithmetic, mask_views  # noqa: F401  (they register what operators do)
from polyattn.passes.match.mask_meaning import step
from polyattn.passes.match.mask_values import StepFunction, Unprovable, Varies, Visible, describe, known, visible

__all__ = ["StepFunction", "Unprovable", "Varies", "Visible", "describe", "known", "step", "visible"]
