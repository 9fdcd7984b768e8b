"""polyattn: softmax attention of unmodified models, rewritten to low rank, forward and backward.

    torch.compile(model, backend="polyattn", options={...})     # no import needed
    polyattn.explain(model, *inputs)                            # what happened, and why
    polyattn.attention(q, k, v, causal=True)                    # the same as a function
    polyattn.measure(q, k, v)                                   # how far that is from exact attention

Names are imported when they are first used: importing ``polyattn`` loads neither torch nor any layer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from polyattn.backend import reports, reset
    from polyattn.errors import (
        DeviceError,
        DoubleBackwardError,
        DtypeError,
        EmitError,
        ExpectSitesError,
        FitError,
        LiftError,
        OptionValueError,
        PolyattnError,
        RewriteError,
        ScheduleError,
        ShapeError,
        UnknownOptionError,
    )
    from polyattn.explain import explain
    from polyattn.measure import Errors, measure
    from polyattn.ops import attention
    from polyattn.options import Options
    from polyattn.passes.site import Refusal
    from polyattn.report import Report, SiteReport
    from polyattn.saved import fits, load_fits, refresh

_HOME = {
    "reports": "polyattn.backend",
    "reset": "polyattn.backend",
    "explain": "polyattn.explain",
    "Errors": "polyattn.measure",
    "measure": "polyattn.measure",
    "attention": "polyattn.ops",
    "Options": "polyattn.options",
    "fits": "polyattn.saved",
    "load_fits": "polyattn.saved",
    "refresh": "polyattn.saved",
    "Refusal": "polyattn.passes.site",
    "Report": "polyattn.report",
    "SiteReport": "polyattn.report",
    "DeviceError": "polyattn.errors",
    "DoubleBackwardError": "polyattn.errors",
    "DtypeError": "polyattn.errors",
    "EmitError": "polyattn.errors",
    "ExpectSitesError": "polyattn.errors",
    "FitError": "polyattn.errors",
    "LiftError": "polyattn.errors",
    "OptionValueError": "polyattn.errors",
    "PolyattnError": "polyattn.errors",
    "RewriteError": "polyattn.errors",
    "ScheduleError": "polyattn.errors",
    "ShapeError": "polyattn.errors",
    "UnknownOptionError": "polyattn.errors",
}

__all__ = [
    "DeviceError",
    "DoubleBackwardError",
    "DtypeError",
    "EmitError",
    "Errors",
    "ExpectSitesError",
    "FitError",
    "LiftError",
    "OptionValueError",
    "Options",
    "PolyattnError",
    "Refusal",
    "Report",
    "RewriteError",
    "ScheduleError",
    "ShapeError",
    "SiteReport",
    "UnknownOptionError",
    "__version__",
    "attention",
    "explain",
    "fits",
    "load_fits",
    "measure",
    "refresh",
    "reports",
    "reset",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'polyattn' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # a submodule of the same name (explain) would otherwise take its place
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
