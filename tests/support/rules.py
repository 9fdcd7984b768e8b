"""Short names of masks, rules and forms for parametrised tests."""

from __future__ import annotations

from polyattn.passes.derive.forms import FORMS, Form, softmax
from polyattn.passes.derive.kernels import Kernels
from polyattn.passes.derive.kernels import kernels as kernels_of
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.families.skeleton.rule import SkeletonRule
from polyattn.rewriter.masks.mask import CAUSAL, LOCAL_WINDOW, NONE, Mask
from polyattn.rewriter.rules.rule import ApproximateRule


def mask_of(causal: bool, window: bool = False) -> Mask:
    """The mask of two switches."""
    return CAUSAL if causal else LOCAL_WINDOW if window else NONE


def rule_of(degree: int | None) -> ApproximateRule:
    """The polynomial rule of a degree; None: skeleton features."""
    return SkeletonRule() if degree is None else PolynomialRule(degree)


def form_of(name: str) -> Form:
    """The form of a name."""
    return FORMS[name]


def kernels(causal: bool, degree: int | None, gradient: str, key_bias: bool = False, window: bool = False) -> Kernels:
    """The kernels of softmax attention."""
    return kernels_of(softmax(mask_of(causal, window), key_bias), rule_of(degree), gradient)
