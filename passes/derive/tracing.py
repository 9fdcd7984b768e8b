"""The rules of tracing: what a form computes, and what its gradients are, is read off graphs that torch traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from polyattn.passes.derive.forms import Form, Function
from polyattn.passes.derive.lift import Lifter, kinds_by_size, trace
from polyattn.rewriter.algebra.expr import Indicator, Kind, Leaf, Tensor, base_tensors
from polyattn.rewriter.algebra.interpret import Interpreter
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.rules.rule import Rule


@dataclass(frozen=True)
class Lift(Rule):
    """A form becomes a program; the program before it is empty."""

    form: Form
    backward: bool
    """Whether the program computes the gradients too."""

    name = "lift"
    formula = "f → O = f(Q, K, V), dX for every input X"
    source = "math.md §1: the autograd graph of exact attention, as torch traces it"

    @property
    def note(self) -> str:
        """See :attr:`Rule.note`."""
        return f"{self.form.text}{' and its autograd graph, traced' if self.backward else ''} (math.md §1)"

    def check(self, program: Program) -> str | None:
        """Refuses a program that holds something already."""
        return f"the program has outputs already: {', '.join(program.outputs)}" if program.outputs else None

    def axes(self, program: Program) -> Mapping[str, tuple[Kind, ...]]:
        """The output, and gradients that have the axes of their inputs."""
        return _axes(self.form) if self.backward else {"O": self.form.out}

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        form = self.form
        return _lift(form, form.function, form.inputs, form.scalars, self.backward)


@dataclass(frozen=True)
class Differentiate(Rule):
    """A forward becomes forward and backward: its vjp, traced, with what an approximate rule brought in constant."""

    form: Form
    inputs: tuple[Leaf, ...]
    scalars: tuple[sympy.Symbol, ...]

    name = "differentiate"
    formula = "O → O, dX for every input X"
    source = "math.md §2b, consistent gradient"
    note = "the vjp of the substituted forward, traced (§2b)"

    def check(self, program: Program) -> str | None:
        """Refuses a program that computes more than a forward."""
        others = [name for name in program.outputs if name != "O"]
        return f"the program has outputs beside O: {', '.join(others)}" if others else None

    def axes(self, program: Program) -> Mapping[str, tuple[Kind, ...]]:
        """The output, and gradients that have the axes of their inputs."""
        return _axes(self._form(program))

    def _form(self, program: Program) -> Form:
        """The form with the axes that rules have given its tensors."""
        found: dict[str, Tensor] = {}

        def visit(tensor: Tensor) -> None:
            if isinstance(tensor, (Leaf, Indicator)):
                found.setdefault(tensor.name, tensor)
            for inner in base_tensors(tensor):
                visit(inner)

        for _, x in program.expressions():
            for term in x.terms:
                for factor in term.factors:
                    visit(factor.tensor)
        inputs = [found.get(t.name, t) for t in self.form.inputs if not isinstance(t, Indicator)]
        masks = [t for t in found.values() if isinstance(t, Indicator)]
        out = tuple(index.kind for index in program.outputs["O"].indices)
        return dataclasses.replace(self.form, inputs=(*inputs, *sorted(masks, key=lambda m: m.name)[::-1]), out=out)

    def rewrite(self, program: Program) -> Program:
        """See :meth:`Rule.rewrite`."""
        form = self._form(program)
        inputs = [*form.inputs, *self.inputs]
        scalars = [*form.scalars, *(c.name for c in self.scalars)]

        def forward(env: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return Interpreter(env, env).program(program)["O"]

        return _lift(form, forward, inputs, scalars, backward=True)


def _axes(form: Form) -> dict[str, tuple[Kind, ...]]:
    gradients = {f"d{t.name}": t.kinds for t in form.inputs if t.name in form.differentiable}
    return {"O": form.out, **gradients}


def _lift(form: Form, function: Function, inputs: Sequence[Tensor], scalars: Sequence[str], backward: bool) -> Program:
    """Trace a function {name: tensor} → O (and its vjp) on tiny inputs and lift the graph."""
    size = kinds_by_size([k for t in inputs for k in t.kinds] + list(form.out))
    generator = torch.Generator().manual_seed(0)

    def dense(tensor: Tensor) -> torch.Tensor:
        return torch.rand([size[k] for k in tensor.kinds], dtype=torch.float64, generator=generator)

    names = [t.name for t in inputs]
    values = [dense(t) for t in inputs] + [torch.full((), 0.5, dtype=torch.float64) for _ in scalars]
    wanted = form.differentiable

    def forward(*args: torch.Tensor) -> torch.Tensor:
        return function(dict(zip([*names, *scalars], args, strict=True)))

    def joint(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        env = dict(zip([*names, *scalars], args[:-1], strict=True))
        free = {name: env[name] for name in wanted}
        pulled = torch.func.vjp(lambda part: function({**env, **part}), free)
        out, pull = pulled[0], pulled[1]
        (gradients,) = pull(args[-1])
        return (out, *(gradients[name] for name in wanted))

    leaves: list[Tensor | sympy.Symbol] = [*inputs, *(sympy.Symbol(s, positive=True) for s in scalars)]
    if not backward:
        return Lifter(leaves).lift(trace(forward, values).graph, ["O"])
    graph = trace(joint, [*values, dense(form.cotangent)]).graph
    return Lifter([*leaves, form.cotangent]).lift(graph, ["O", *("d" + name for name in wanted)])
