"""The log of a derivation: each rule with what it changes in matrices and what that costs, then why the costs differ.

Nothing in it is written by hand but the words: formulas come from the programs and the plans, FLOPs from the plans.
"""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy

from polyattn.errors import RewriteError
from polyattn.passes.derive.derive import AppliedRule
from polyattn.passes.derive.forms import Form
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Expr, Factor, Term
from polyattn.rewriter.algebra.programs import Program, is_pair
from polyattn.rewriter.algebra.tensor import NEAR_SHARE, Indicator, Kind, Leaf, Map, Poly, Tensor
from polyattn.rewriter.notation import indices, printer
from polyattn.rewriter.notation.recipe import Block, Recipe, recipe
from polyattn.rewriter.notation.recipe import RecipeLine as Line
from polyattn.rewriter.notation.symbols import LATEX
from polyattn.rewriter.planning import cost
from polyattn.rewriter.planning.cost import write, write_leading
from polyattn.rewriter.planning.order import plan
from polyattn.rewriter.planning.plan import Node, walk
from polyattn.rewriter.planning.plan import cost as cost_of
from polyattn.rewriter.rules.rule import ApproximateRule

WIDTH = 118
_RATIO = ("substituted", "consistent")
CHANGED = {"new": "  new   ", "gone": "  gone  ", "same": "  same  "}


def formulas(program: Program) -> list[str]:
    """The formulas of a program in LaTeX."""
    return [line.write(LATEX) for line in printer.lines(program)]


@dataclass(frozen=True)
class Log:
    """Writes the log of one form, rule and gradient."""

    form: Form
    rule: ApproximateRule
    gradient: str

    def write(
        self,
        steps: Sequence[AppliedRule],
        programs: Mapping[str, Program],
        costs: Mapping[str, sympy.Expr],
        shape: Mapping[str, int] | None = None,
    ) -> str:
        """The whole log; ``programs`` are the results of both gradients, this one's among them."""
        lines = self._head()
        before: dict[str, str] = {}
        for number, step in enumerate(steps, 1):
            after = {line.name.text: str(line) for line in printer.lines(step.program)}
            lines += ["", f"{number}. {step.rule}: {step.note}"]
            lines += _changes(before, after) if before else _wrapped(after.values(), "     ")
            lines += self._cost(step.program)
            before = after
        lines += ["", "the result", *_wrapped(before.values(), "     ")]
        if any(indices.in_tiles(program) for program in programs.values()):
            for name, program in programs.items():
                lines += ["", *self._definitions(name, program)]
            lines += ["", *self._costs(costs)]
        else:
            recipes = {name: recipe(program) for name, program in programs.items()}
            lines += ["", *self._comparison(recipes), "", *self._totals(recipes, costs)]
        if shape is not None:
            lines += ["", *self._numbers(costs, shape)]
        return "\n".join(line.rstrip() for line in lines)

    def _head(self) -> list[str]:
        text = [
            f"derivation of {self.form.text}: {self.rule.title}, {self.gradient} gradient",
            "Per head: n tokens, queries and keys of width d, values of width e, cotangent G of O. "
            f"{self.rule.features_note}",
            "An index that is not on the left is summed over: a token of a query is place i of tile I, of a key place "
            "j of tile J; a and b are columns of keys and of values."
            if self.rule.keeps_names
            else "A product a b binds before ∘ (elementwise) and ⊘ (row-wise Kronecker); parentheses are computed "
            "first; 1 is a column of ones; a hat marks one column more.",
            "FLOPs are those of the program as it stands, in the best order that the planner finds for it.",
        ]
        return [line for part in text for line in textwrap.wrap(part, WIDTH, break_on_hyphens=False)]

    # -- steps -------------------------------------------------------------------------------------------------------

    def _cost(self, program: Program) -> list[str]:
        what = ", ".join(program.outputs)
        reason = ""
        try:
            _no_lone_token(program)
            made = plan(program)
            total, square = made.cost(), made.token_degree() == 2
            if indices.in_tiles(program):
                square = _far_pairs(program)
                total = sympy.expand(total.subs(NEAR_SHARE, 1)) if square else total
        except RewriteError as error:
            reason = str(error)
            try:
                made = plan(_dense(program))
                total, square = made.cost(), True
            except RewriteError as second:
                return textwrap.wrap(f"FLOPs of {what}: no order: {second}", WIDTH, initial_indent="   ")
        lines = [f"   FLOPs of {what}: {write_leading(total, self.rule.growth)}"]
        lines += _wrapped(["= " + write(total)], "      ")
        if reason:
            lines[0] += "   (n × n matrices)"
            shown = f"no order is linear in n yet: {_shown(reason, program)}"
            lines += textwrap.wrap(shown, WIDTH, initial_indent="      ", subsequent_indent="        ")
        elif square:
            lines[0] += "   (n × n matrices: two token axes remain)"
        return lines

    # -- the plans of both gradients ---------------------------------------------------------------------------------

    def _comparison(self, recipes: Mapping[str, Recipe]) -> list[str]:
        first, *_ = recipes.values()
        lines = ["the order of contraction, line by line, with FLOPs (elementwise work is in the sums)"]
        forward = self._block(first.blocks[0])
        lines += ["", "forward, O", *("  " + line for line in forward)]
        for blocks in zip(*(r.blocks[1:] for r in recipes.values()), strict=True):
            columns = [
                [f"{b.output}, {name}", *("  " + line for line in self._block(b))]
                for name, b in zip(recipes, blocks, strict=True)
            ]
            lines += ["", *_beside(columns)]
        return lines

    def _block(self, block: Block) -> list[str]:
        rows = [
            (f"{step.name.text} = {step.tree}{_running(step)}", write(step.flops) if step.flops != 0 else "")
            for step in block.steps
        ]
        rows.append(("sum", write_leading(block.flops, self.rule.growth)))
        wide = max(_width(row[0]) for row in rows)
        return [f"{_padded(left, wide)}   {right}".rstrip() for left, right in rows]

    def _definitions(self, name: str, program: Program) -> list[str]:
        """What every definition of a program in tiles costs, in the order in which they are computed."""
        labels = [d.label for d in program.defs]
        made = plan(Program(program.defs, {**{x: ir.of(program[x]) for x in labels}, **program.outputs}))
        lines, known = [f"what each definition costs, {name} gradient, FLOPs"], list[Node]()
        wide = max(map(len, made.outputs))
        for label, n in made.outputs.items():
            work = cost_of([n], made.near, known)
            known += list(walk([n]))
            if work != 0:
                lines += _wrapped([f"{label.ljust(wide)}  {write(work)}"], "  ", " " * (wide + 6))
        return lines

    def _costs(self, costs: Mapping[str, sympy.Expr]) -> list[str]:
        lines = ["totals, FLOPs per head; a backward is given all that the forward computed"]
        wide = max(map(len, costs))
        for name, value in costs.items():
            lines += _wrapped([f"{name.ljust(wide)}  {write(value)}"], "  ", " " * (wide + 6))
        return lines

    def _totals(self, recipes: Mapping[str, Recipe], costs: Mapping[str, sympy.Expr]) -> list[str]:
        lines = ["the largest state (a value without a token axis)"]
        for name, made in recipes.items():
            states = [step for b in made.blocks for step in b.steps if not any(k.token for k in step.axes)]
            largest = max(states, key=lambda s: cost.weight([k.size for k in s.axes], self.rule.growth))
            lines.append(f"  {name}: {largest.name.text} = {largest.tree}, {_shape(largest.axes)}")
        lines += ["", "totals, FLOPs per head; a backward is given all that the forward computed"]
        wide = max(map(len, costs))
        for name, value in costs.items():
            lines.append(f"  {name.ljust(wide)}  {write_leading(value, self.rule.growth)}")
            lines += _wrapped(["= " + write(value)], " " * (wide + 4))
        r = self.rule.rank
        heavy = [cost.leading(costs[f"{name} backward"].coeff(r) * r, self.rule.growth) for name in _RATIO]
        ratio = _quotient(sympy.cancel(heavy[0] / heavy[1]))
        lines.append(f"  {' / '.join(_RATIO)} backward, leading terms in {r}: {ratio}")
        return lines

    def _numbers(self, costs: Mapping[str, sympy.Expr], shape: Mapping[str, int]) -> list[str]:
        sizes = cost.sizes(shape, self.rule.ranks(shape))
        used = {s for value in costs.values() for s in value.free_symbols}
        lines = ["in numbers, " + ", ".join(f"{s} = {sizes[s]}".replace("'", "′") for s in sizes if s in used)]
        wide = max(map(len, costs))
        values = {name: float(value.subs(sizes)) for name, value in costs.items()}
        exact = values["exact forward"], values["exact backward"]
        for name, value in values.items():
            share = value / exact[0 if name.endswith("forward") else 1]
            lines.append(
                f"  {name.ljust(wide)}  {value:9.3e}" + (f"   {share:.3g} of exact" if "exact" not in name else "")
            )
        return lines


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What a step changes: a formula and, under it, what it becomes; then what is new, gone and as it was."""
    lines: list[str] = []
    for name in after:
        if name in before and before[name] != after[name]:
            lines += _wrapped([before[name]], "     ")
            head, _, formula = after[name].partition(" = ")
            lines += _wrapped([formula], " " * (5 + _width(head) + 1) + "→ ", " " * (5 + _width(head) + 3))
    for name in after:
        if name not in before:
            lines += _wrapped([after[name]], CHANGED["new"])
    gone = [before[name] for name in before if name not in after]
    for text in gone:
        lines += _wrapped([text], CHANGED["gone"])
    same = [name for name in after if before.get(name) == after[name]]
    if not lines:
        return ["     no formula changes"]
    return lines + ([CHANGED["same"] + ", ".join(same)] if same else [])


def _no_lone_token(program: Program) -> None:
    """Refuse what ``order.plan`` takes for granted: under M_far each token has a factor of its own."""
    terms = [term for _, x in program.expressions() for term in x.terms]
    if any(isinstance(f.tensor, Poly) for term in terms for f in term.factors):
        return  # the planner says so
    for term in terms:
        masks = [f for f in term.factors if isinstance(f.tensor, Indicator) and f.tensor.which == "far"]
        held = {index for f in term.factors if f not in masks for index in f.indices}
        if any(index not in held for mask in masks for index in mask.indices):
            raise RewriteError("a token occurs under M_far alone")


def _far_pairs(program: Program) -> bool:
    """Whether a program in tiles still has pairs of tokens that are not near."""
    terms = (term for _, x in program.expressions() for term in x.terms)
    return any(
        any(isinstance(f.tensor, Indicator) and f.tensor.which == "far" for f in term.factors)
        and any(is_pair(f.tensor) for f in term.factors)
        for term in terms
    )


def _dense(program: Program) -> Program:
    """The program with n × n matrices as they stand: polynomials are elementwise functions, masks are matrices."""

    def change(factor: Factor) -> Expr | None:
        tensor = factor.tensor
        new: Tensor
        if isinstance(tensor, Poly):
            new = Map(f"p{tensor.coefficients}", tensor.score)
        elif isinstance(tensor, Indicator):
            new = Leaf(tensor.name, tensor.axes)
        else:
            return None
        return Expr(factor.indices, (Term(sympy.Integer(1), (Factor(new, factor.indices),)),))

    return program.rewrite(lambda x: ir.map_factors(x, change))


def _shown(reason: str, program: Program) -> str:
    """The planner's reason with functions of scores by the names of the log."""
    names = printer.Notation(program)
    for _, x in program.expressions():
        for term in x.terms:
            for factor in term.factors:
                if isinstance(factor.tensor, (Map, Poly)):
                    _, pieces = names.factor(factor)
                    reason = reason.replace(factor.tensor.name, str(pieces[0].tree))
    return reason


def _running(step: Line) -> str:
    if step.scan is None:
        return ""
    return ", running sum " + ("up to the chunk of i" if step.scan == "i" else "from after the chunk of j")


def _shape(axes: Sequence[Kind]) -> str:
    return " × ".join(write(kind.size) for kind in axes)


def _quotient(x: sympy.Expr) -> str:
    top, below = sympy.fraction(x)
    return write(top) if below == 1 else f"{write(top)} / {write(below)}"


# -- columns of text -------------------------------------------------------------------------------------------------


def _width(text: str) -> int:
    return sum(not unicodedata.combining(ch) for ch in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _beside(columns: Sequence[list[str]]) -> list[str]:
    """Blocks side by side, or one after the other where they are too wide for that."""
    wide = [max(map(_width, column)) for column in columns]
    if sum(wide) + 4 * (len(wide) - 1) > WIDTH + 2:
        return [line for number, column in enumerate(columns) for line in ([""] if number else []) + column]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return ["    ".join(_padded(cell, w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]


def _wrapped(texts: Iterable[str], first: str, following: str | None = None) -> list[str]:
    """Formulas broken at their outermost sums so that they fit."""
    lines: list[str] = []
    for text in texts:
        rest = " " * (_width(first) + 4) if following is None else following
        line = first
        for number, part in enumerate(_summands(text)):
            if number and _width(line) + 1 + _width(part) > WIDTH:
                lines.append(line)
                line = rest + part
            else:
                line += (" " if number else "") + part
        lines.append(line)
    return lines


def _summands(text: str) -> list[str]:
    """The text cut before each + and − that no parenthesis encloses."""
    parts, depth, current = [], 0, ""
    for word in text.split(" "):
        if depth == 0 and word in ("+", "−", "=") and current and word != "=":
            parts.append(current)
            current = word
        else:
            current = f"{current} {word}" if current else word
        depth += word.count("(") + word.count("[") - word.count(")") - word.count("]")
    return [*parts, current]
