"""Every error that polyattn raises on purpose: one class per mistake; the message says what to do."""

from __future__ import annotations


class PolyattnError(Exception):
    """Base class of all errors raised by polyattn on purpose."""


class UnknownOptionError(PolyattnError):
    """An option name that polyattn does not have."""


class OptionValueError(PolyattnError, ValueError):
    """An option has a value outside its domain (for example ``degree=7``)."""


class ShapeError(PolyattnError, ValueError):
    """Tensors whose shapes do not fit together (for example different head dims of q and k)."""


class DtypeError(PolyattnError, TypeError):
    """A dtype that attention is not defined for, or q, k, v of different dtypes."""


class DeviceError(PolyattnError, ValueError):
    """q, k, v on different devices."""


class FitError(PolyattnError, ValueError):
    """Saved fits that do not belong to a model, or are none."""


class ExpectSitesError(PolyattnError):
    """Fewer attention sites were found than ``expect_sites`` demands."""


class DoubleBackwardError(PolyattnError, RuntimeError):
    """The gradient of a gradient was asked for; polyattn's backward is not itself differentiable."""


class LiftError(PolyattnError):
    """A traced graph holds an operation that the algebra has no meaning for."""


class RewriteError(PolyattnError):
    """The algebra could not bring an expression into the form that a rule or the scheduler needs."""


class ScheduleError(PolyattnError):
    """A plan cannot be laid out as loops over tokens without an n x n or n x r matrix."""


class EmitError(ScheduleError):
    """A target has no code for a kernel specification; the message says why."""
