"""What a rule is: a formula with its source, a check that gives a reason, and a rewrite (math.md).

Rules are frozen values: derivations and kernels are cached by them. The verifier runs before and after each of them.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra.expr import Kind, Leaf
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.verify import output_axes, verify


class Rule(abc.ABC):
    """An exact rule: both sides are equal."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """One word, by which logs and the catalogue know it."""

    @property
    @abc.abstractmethod
    def formula(self) -> str:
        """``lhs → rhs``."""

    @property
    @abc.abstractmethod
    def source(self) -> str:
        """Where it is proved: a section of math.md, a lemma of the paper."""

    @property
    @abc.abstractmethod
    def note(self) -> str:
        """What the log of a derivation says of it."""

    def check(self, program: Program) -> str | None:
        """Why a program cannot be rewritten; None where it can. A rule that finds nothing to do leaves it as it is."""
        return None

    @abc.abstractmethod
    def rewrite(self, program: Program) -> Program:
        """The right side in place of the left, wherever it stands; the side condition is taken for granted."""

    def axes(self, program: Program) -> Mapping[str, tuple[Kind, ...]]:
        """The outputs that the rule leaves, with their axes: an identity leaves them as they are."""
        return output_axes(program)

    def apply(self, program: Program) -> Program:
        """The program after the rule.

        Raises:
            RewriteError: the side condition fails, or the program is broken before or after; the message says how.
        """
        try:
            verify(program)
        except RewriteError as error:
            raise RewriteError(f"{self.name} is given a broken program: {error}") from error
        reason = self.check(program)
        if reason is not None:
            raise RewriteError(f"{self.name}: {reason}")
        made = self.rewrite(program)
        try:
            verify(made, self.axes(program))
        except RewriteError as error:
            raise RewriteError(f"{self.name} leaves a broken program: {error}") from error
        return made


class ApproximateRule(Rule):
    """An approximate rule, exp(S) → features: it has a domain and a bound, and brings inputs and symbols with it."""

    name = "approximate"
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
    def features_note(self) -> str:
        """A sentence on the features, for the head of a log."""

    @property
    def gradients(self) -> tuple[str, ...]:
        """The gradients that there is a derivation of: ``consistent``, ``substituted``, ``projected``."""
        return "consistent", "substituted", "projected"

    @property
    def keeps_names(self) -> bool:
        """Whether what the rule names is to stay named: gradients are then derived definition by definition, and
        operands are stacked where code is emitted."""
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the definitions that the choice of near pairs takes, where tokens are in tiles."""
        return ()

    @property
    def before(self) -> tuple[Rule, ...]:
        """The exact rules that bring a program into the form that this one is written for."""
        return ()

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
    def ranks(self, shape: Mapping[str, int]) -> dict[sympy.Symbol, int | float]:
        """Numbers for the rule's sizes, the rank first, for a shape with ``d`` and, where it matters, ``rank``."""

    @abc.abstractmethod
    def then(self, gradient: str) -> tuple[Rule, ...]:
        """The exact rules that bring what stands in place of exp into features, after differentiation if there is."""
