"""Values without tokens in the loops of the CPU target: sums that are read, their multiples and products, weights."""

from __future__ import annotations

import sympy

from polyattn.codegen.cpu.draft import Draft
from polyattn.codegen.cpu.layout import Layout, Value, einsum, ordered
from polyattn.codegen.cpu.plan import Body, product, state_key, weighted
from polyattn.codegen.spec import FEATURES, accumulates, letters
from polyattn.errors import EmitError
from polyattn.rewriter.planning.plan import Node, walk


def changes(n: Node) -> bool:
    """Whether a value differs from step to step, being made of a running sum."""
    return any(m.scanned for m in walk([n]))


class States:
    """Writes what loops read of states: once before a loop, or in every step where it changes."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._values: dict[Node, Value] = {}
        self._weighted: dict[tuple[str, str], Value] = {}

    def value(self, n: Node, body: Body) -> Value:
        """The value of a tile that is there, of a table of weights, or of a state."""
        if n in body.values:
            return body.values[n]
        if n.op == "weights":
            return Value(self.draft.table(n.attr), letters(n))
        return self.state(n, body)

    def state(self, n: Node, body: Body) -> Value:
        """A value without tokens.

        Raises:
            EmitError: an operation on states that this target has no code for.
        """
        if accumulates(n):
            value, weights = body.walk.total(self.draft.states[state_key(n)]), product(n).scale
            return value if weights is None else self.weigh(value, weights.attr, n.scanned, body)
        if n in self._values:
            return self._values[n]
        if n.op == "input":
            self._values[n] = Value(str(n.attr), letters(n))
            return self._values[n]
        weights, rest = weighted(n)
        if weights is not None:
            return self.weigh(self.state(rest, body), weights.attr, changes(n), body)
        if n.op in ("contract", "sum"):
            operands = [self.state(a, body) for a in n.args]
            name = body.unused("of_states") if changes(n) else f"of_states_{len(self._values) + 1}_before"
            made = Value(name, ordered(letters(n)))
            (body.values if changes(n) else self._values)[n] = made
            code = einsum(operands, made.layout) if n.op == "contract" else self.total(n, operands, made.layout)
            self._write(f"{name} = {code}", made.layout, changes(n), body)
            return made
        raise EmitError(f"the CPU target has no code for the state {n} = {n.op}{n.args}")

    def weigh(self, value: Value, coefficients: tuple[sympy.Expr, ...], changes: bool, body: Body) -> Value:
        """A state times weights of its monomials."""
        key, known = (value.name, self.draft.table(coefficients)), body.weighted if changes else self._weighted
        if key not in known:
            table = Value(key[1], tuple(x for x in value.layout if x in FEATURES))
            known[key] = Value(f"{value.name}_{key[1]}", value.layout)
            code = f"{known[key].name} = {value.name} * {table.spread(value.layout)}"
            self._write(code, value.layout, changes, body)
        return known[key]

    def _write(self, code: str, layout: Layout, changes: bool, body: Body) -> None:
        (body.lines if changes else body.before).append(f"{code}  # {self.draft.sizes.shape(layout)}")

    def total(self, n: Node, values: list[Value], layout: Layout) -> str:
        """The expression of a sum of multiples of values in a layout.

        Raises:
            EmitError: a value is added with its axes in the place of others.
        """
        coefficients, orders = n.attr
        for a, order in zip(n.args, orders, strict=True):
            named = tuple(None if p is None else letters(a)[p] for p in order)
            if any(x is not None and x != y for x, y in zip(named, letters(n), strict=True)):
                raise EmitError(f"the CPU target has no code for the sum {n} over axes of other kinds")
        text = ""
        for c, value in zip(coefficients, values, strict=True):
            term, negative = value.spread(layout), sympy.sympify(c).could_extract_minus_sign()
            factor = self.draft.number(-c if negative else c)
            term = term if factor == "1" else f"({factor}) * {term}" if " " in factor else f"{factor} * {term}"
            text += (" - " if text else "-") + term if negative else (" + " if text else "") + term
        return text
