"""What a rule is: a formula with its source, a check that gives a reason, and a rewrite (math.md)."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import Leaf, Program


@dataclass(frozen=True)
class Rule:
    """An exact rule: both sides are equal."""

    name: str
    formula: str
    """``lhs → rhs``."""
    source: str
    """Where it is proved: a section of math.md, a lemma of the paper."""
    note: str
    """What the log of a derivation says of it."""
    rewrite: Callable[[Program], Program] = field(repr=False)
    check: Callable[[Program], str | None] = field(default=lambda program: None, repr=False)
    """Why a program cannot be rewritten; None where it can."""

    def apply(self, program: Program) -> Program:
        """The program after the rule.

        Raises:
            RewriteError: the side condition fails; the message is the reason.
        """
        reason = self.check(program)
        if reason is not None:
            raise RewriteError(f"{self.name}: {reason}")
        return self.rewrite(program)


class ApproximateRule(abc.ABC):
    """An approximate rule, exp(S) → features: it has a domain and a bound, and brings inputs and symbols with it.

    Rules are frozen values: derivations and kernels are cached by them.
    """

    name = "approximate"
    formula: str
    source: str
    domain: str
    """Where the bound holds."""
    bound: str
    """How far the right side is from exp(S) there."""

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """The features in a few words, for headers of logs and emitted files."""

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """What the log of a derivation says of the step."""

    @property
    @abc.abstractmethod
    def features_note(self) -> str:
        """A sentence on the features, for the head of a log."""

    @property
    def inputs_note(self) -> str:
        """A line on the tensors of :attr:`inputs`, for the header of an emitted file; empty without any."""
        return ""

    @property
    def inputs(self) -> tuple[Leaf, ...]:
        """Tensors that the rule brings into a program, constants of the differentiation."""
        return ()

    @property
    def scalars(self) -> tuple[sympy.Symbol, ...]:
        """Symbols that the rule brings into a program."""
        return ()

    @property
    @abc.abstractmethod
    def rank(self) -> sympy.Symbol:
        """The symbol of the number of features."""

    @property
    @abc.abstractmethod
    def growth(self) -> Mapping[sympy.Symbol, int]:
        """Degrees in d of the sizes in a cost, by which its leading terms are told: of ranks and of chunks."""

    @abc.abstractmethod
    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        """Numbers for the rule's sizes, the rank first, for a shape with ``d`` and, where it matters, ``rank``."""

    @property
    @abc.abstractmethod
    def then(self) -> tuple[Rule, ...]:
        """The exact rules that bring what stands in place of exp into features."""

    @property
    def after_differentiation(self) -> tuple[Rule, ...]:
        """Exact rules for what tracing names on the way of a gradient, before :attr:`then`."""
        return ()

    @abc.abstractmethod
    def rewrite(self, program: Program) -> Program:
        """Replace exp of a score everywhere except in the near field.

        Raises:
            RewriteError: a score that the rule has no features for.
        """
