"""The rule ``adjoint``: reverse accumulation on a program, a definition for a definition (math.md §2b).

T = c x y …  gives  dx += c dT y …,   exp:  dx += dT exp(x),   T = y / x:  dx −= dT T / x

Every definition T of the forward gets one of its own, dT, in the order in which derivatives flow; what the forward
names is read, not written out again. Tracing (``differentiate``) finds the same gradients, with sums distributed over
the names: the form for programs whose pairs of tokens are to be contracted in another order than that of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Kind, Leaf, Map, Tensor, Term, base_tensors
from polyattn.rewriter.algebra.programs import Program, prune
from polyattn.rewriter.algebra.verify import output_axes
from polyattn.rewriter.rules.rule import Rule

ONE = sympy.Integer(1)


@dataclass(frozen=True)
class Adjoint(Rule):
    """A forward becomes forward and backward: every definition gets its derivative, from the output to the inputs."""

    wanted: tuple[str, ...] = ("Q", "K", "V")
    """Names of the inputs that have gradients; all others are constants."""
    seed: str = "G"
    """Name of the gradient of the output."""

    name = "adjoint"
    formula = "T = c x y …  ⇒  dx += c dT y …"
    source = "math.md §2b, consistent gradient"
    note = "reverse accumulation: the derivative of every definition, from the output to the inputs (§2b)"

    def check(self, program: Program) -> str | None:
        """Refuses a program that computes more than a forward, and inputs that it does not have."""
        others = [name for name in program.outputs if name != "O"]
        if others:
            return f"the program has outputs beside O: {', '.join(others)}"
        missing = [name for name in self.wanted if name not in _leaves(program)]
        return f"the program has no input {missing[0]}" if missing else None

    def axes(self, program: Program) -> dict[str, tuple[Kind, ...]]:
        """The output, and gradients that have the axes of their inputs."""
        leaves = _leaves(program)
        return {**output_axes(program), **{f"d{name}": leaves[name].kinds for name in self.wanted}}

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        return prune(_Reverse(program, self.wanted, self.seed).run())


def _leaves(program: Program) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}

    def visit(tensor: Tensor) -> None:
        if isinstance(tensor, Leaf):
            found.setdefault(tensor.label, tensor)
        for inner in base_tensors(tensor):
            visit(inner)

    for _, x in program.expressions():
        for term in x.terms:
            for factor in term.factors:
                visit(factor.tensor)
    return found


class _Reverse:
    def __init__(self, program: Program, wanted: tuple[str, ...], seed: str) -> None:
        self.program, self.wanted = program, wanted
        out = program.outputs["O"]
        kinds = tuple(index.kind for index in out.indices)
        self.found: dict[str, list[Term]] = {}
        """For each definition or input, the terms of its derivative at the indices ``fresh(kinds)``."""
        self.active = self._active()
        self.out = Def("OUT", out) if len(out.terms) != 1 or len(out.terms[0].factors) != 1 else None
        self.seed = Leaf(seed, kinds)

    def _active(self) -> set[str]:
        """Names of what depends on an input that has a gradient."""
        active = set(self.wanted)
        for definition in self.program.defs:
            if any(_inner(f.tensor) in active for t in definition.expr.terms for f in t.factors):
                active.add(definition.label)
        return active

    def run(self) -> Program:
        """The program with derivatives after the definitions."""
        defs = list(self.program.defs)
        outputs = dict(self.program.outputs)
        if self.out is not None:
            defs.append(self.out)
            outputs["O"] = ir.of(self.out)
            self.flow(self.out.expr, self.seed, self.out)
        else:
            self.flow(outputs["O"], self.seed, None)
        for definition in reversed(self.program.defs):
            if definition.label in self.found:
                made = Def("d" + definition.label, self._expr(definition, definition.label))
                defs.append(made)
                self.flow(definition.expr, made, definition)
        leaves = _leaves(self.program)
        for name in self.wanted:
            if name not in self.found:
                raise RewriteError(f"the output does not depend on {name}")
            outputs["d" + name] = self._expr(leaves[name], name)
        return Program(tuple(defs), outputs)

    def _expr(self, tensor: Tensor, name: str) -> Expr:
        return ir.collect(Expr(ir.fresh(tensor.kinds, ()), tuple(self.found[name])))

    def flow(self, x: Expr, derivative: Tensor, whole: Def | None) -> None:
        """What the derivative of an expression adds to those of its factors.

        Args:
            whole: the definition of the expression, which its quotients read.
        """
        for term in x.terms:
            for position, factor in enumerate(term.factors):
                label = _inner(factor.tensor)
                if label is None or label not in self.active:
                    continue
                rest = tuple(f for p, f in enumerate(term.factors) if p != position)
                incoming = Factor(derivative, x.indices)
                coefficient = term.coefficient
                if isinstance(factor.tensor, Map):
                    if whole is not None and len(x.terms) == 1 and not term.bound(x.out):
                        coefficient = ONE
                        value: tuple[Factor, ...] = (Factor(whole, x.indices),)
                    else:
                        value = term.factors
                    inverse = factor.tensor.function == "reciprocal"
                    value = (*value, factor) if inverse else value
                    self.add(label, factor, Term(-coefficient if inverse else coefficient, (incoming, *value)))
                else:
                    self.add(label, factor, Term(coefficient, (incoming, *rest)))

    def add(self, label: str, factor: Factor, term: Term) -> None:
        """Add a term, over the indices of a factor, to the derivative of what the factor reads."""
        if len(set(factor.indices)) != len(factor.indices):
            raise RewriteError(f"{factor} has one index on two axes, which has no derivative here")
        target = ir.fresh((index.kind for index in factor.indices), ())
        safe = ir.fresh((index.kind for index in factor.indices), (*term.indices, *target))
        moved = term.rename(dict(zip(factor.indices, safe, strict=True)))
        moved = ir.avoid(moved, moved.indices - set(safe), frozenset(target))
        made = moved.rename(dict(zip(safe, target, strict=True)))
        self.found.setdefault(label, []).append(made)


def _inner(tensor: Tensor) -> str | None:
    """The name of the definition or input that a factor is, or is a function of; None for others."""
    inner = tensor.argument if isinstance(tensor, Map) else tensor
    return inner.label if isinstance(inner, (Def, Leaf)) else None


ADJOINT = Adjoint()
