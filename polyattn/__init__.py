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
    from polyattn.options import Options
    from polyattn.passes.match.site import Refusal
    from polyattn.report.explain import explain
    from polyattn.report.measure import Errors, measure
    from polyattn.report.model import Report, SiteReport
    from polyattn.runtime.ops import attention
    from polyattn.runtime.saved_fits import fits, load_fits, refresh

_HOME = {
    "reports": "polyattn.backend",
    "reset": "polyattn.backend",
    "explain": "polyattn.report.explain",
    "Errors": "polyattn.report.measure",
    "measure": "polyattn.report.measure",
    "attention": "polyattn.runtime.ops",
    "Options": "polyattn.options",
    "fits": "polyattn.runtime.saved_fits",
    "load_fits": "polyattn.runtime.saved_fits",
    "refresh": "polyattn.runtime.saved_fits",
    "Refusal": "polyattn.passes.match.site",
    "Report": "polyattn.report.model",
    "SiteReport": "polyattn.report.model",
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
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
