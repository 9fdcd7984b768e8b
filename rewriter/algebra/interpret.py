"""The dense meaning of the algebra, in plain torch: what every rule, plan and kernel is compared with.

It materialises everything (n × n matrices included) and is differentiable, so that it also serves to trace the
autograd graph of a substituted forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from polyattn.errors import RewriteError
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.expr import (
    Concat,
    Def,
    Expr,
    Factor,
    Feature,
    Index,
    Indicator,
    Kind,
    Leaf,
    Map,
    Poly,
    Select,
    StackedPart,
    Tensor,
    Weights,
)
from polyattn.rewriter.algebra.programs import Program


class Interpreter:
    """Evaluates tensors and expressions of a program on dense inputs.

    Args:
        inputs: leaf name → tensor (mask names ``M``, ``M_near``, ``M_far`` included, as 0/1 tensors).
        scalars: symbol name → number or 0-d tensor (the scale, the polynomial's coefficients).
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor], scalars: Mapping[str, torch.Tensor | float]) -> None:
        self.inputs = inputs
        self.scalars = scalars
        self._values: dict[str, torch.Tensor] = {}
        self._like = next(iter(inputs.values()))

    def program(self, program: Program) -> dict[str, torch.Tensor]:
        """The outputs of a program by name."""
        for definition in program.defs:
            self._values[definition.label] = self.expr(definition.expr)
        return {name: self.expr(expr) for name, expr in program.outputs.items()}

    def coefficient(self, value: sympy.Expr) -> torch.Tensor | float:
        """A coefficient as a number, or as a 0-d tensor where a scalar is one.

        Raises:
            RewriteError: it holds a root or a negative power of a scalar, which no trace lifts again.
        """
        if not value.free_symbols:
            return float(value)
        total: torch.Tensor | float = 0.0
        for summand in sympy.Add.make_args(sympy.expand(value)):
            product: torch.Tensor | float = 1.0
            for part in sympy.Mul.make_args(summand):
                base, exponent = part.as_base_exp()
                if part.free_symbols and not (exponent.is_Integer and exponent >= 0):
                    raise RewriteError(f"the coefficient {value} is no polynomial of scalars")
                if not part.free_symbols:
                    base, exponent = part, 1
                known = self.scalars[base.name] if isinstance(base, sympy.Symbol) else float(base)
                for _ in range(int(exponent)):
                    product = known * product if not (isinstance(product, float) and product == 1.0) else known
            total = product if isinstance(total, float) and total == 0.0 else total + product
        return total

    def tensor(self, tensor: Tensor) -> torch.Tensor:
        """The dense value of a tensor, axes in the order of its kinds."""
        if isinstance(tensor, (Leaf, Indicator)):
            return self.inputs[tensor.name]
        if isinstance(tensor, Def):
            if tensor.label not in self._values:
                self._values[tensor.label] = self.expr(tensor.expr)
            return self._values[tensor.label]
        if isinstance(tensor, Map):
            argument = self.tensor(tensor.argument)
            return argument.exp() if tensor.function == "exp" else argument.reciprocal()
        if isinstance(tensor, Poly):
            return self._poly(self.tensor(tensor.score), tensor.coefficients)
        if isinstance(tensor, Feature):
            return monomials.generate(
                source := self.tensor(tensor.source), monomials.full(source.shape[-1], tensor.degree)
            )
        if isinstance(tensor, Weights):
            numbers = [float(self.coefficient(c)) for c in tensor.coefficients]
            return torch.as_tensor(monomials.weights(numbers, self._basis(tensor.degree))).to(self._like)
        if isinstance(tensor, Select):
            basis = self._basis(tensor.degree)
            sigma = torch.as_tensor(monomials.selection(basis))
            full = torch.zeros(*sigma.shape, monomials.rank(basis)).to(self._like)
            return full.scatter(2, sigma.unsqueeze(2), 1.0)
        if isinstance(tensor, Concat):
            columns = [self.expr(part) for part in tensor.parts]
            tokens = max(p.shape[0] for p in columns if p.ndim)
            # a part without factors is a constant column
            wide = [p if p.ndim == 2 else p.unsqueeze(1) if p.ndim else p.expand(tokens, 1) for p in columns]
            return torch.cat(wide, dim=1)
        if isinstance(tensor, StackedPart):
            return take_part(self.tensor(tensor.whole), tensor.part, tensor.widths)
        raise RewriteError(f"no dense meaning for {type(tensor).__name__}")

    def _basis(self, degree: int) -> monomials.Basis:
        return monomials.full(next(v for k, v in self.inputs.items() if k in ("Q", "K", "X")).shape[-1], degree)

    def _poly(self, x: torch.Tensor, coefficients: tuple[sympy.Expr, ...]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for power, value in enumerate(coefficients):
            if value != 0:
                term = self.coefficient(value) * (x if power == 1 else x.pow(power))
                total = term if total is None else total + term
        return torch.zeros_like(x) if total is None else total

    def expr(self, x: Expr) -> torch.Tensor:
        """The dense value of an expression, axes in the order of its open indices."""
        out = x.indices
        if not x.terms:
            raise RewriteError("an expression without terms has no shape")
        # Terms with the same bound tokens are added before the sum: a trace then sees one contraction, not several.
        groups: dict[tuple[Index, ...], torch.Tensor] = {}
        for term in x.terms:
            every = sorted(term.bound(out), key=repr)
            bound = tuple(index for index in every if index.kind.token)
            inner = tuple(index for index in every if not index.kind.token)
            value = self._product(term.factors, (*out, *bound, *inner)) * self.coefficient(term.coefficient)
            if inner:
                value = value.sum(dim=tuple(range(-len(inner), 0)))
            groups[bound] = groups[bound] + value if bound in groups else value
        total: torch.Tensor | None = None
        for bound, value in groups.items():
            reduced = value.sum(dim=tuple(range(len(out), len(out) + len(bound)))) if bound else value
            total = reduced if total is None else total + reduced
        assert total is not None
        return total

    def _product(self, factors: tuple[Factor, ...], order: tuple[Index, ...]) -> torch.Tensor:
        value: torch.Tensor | None = None
        for factor in factors:
            dense = self.tensor(factor.tensor)
            axes = list(factor.indices)
            present = [index for index in order if index in axes]
            dense = dense.permute([axes.index(index) for index in present]) if axes != present else dense
            for position, index in enumerate(order):
                if index not in axes:
                    dense = dense.unsqueeze(position)
            value = dense if value is None else value * dense
        return torch.ones((), dtype=self._like.dtype) if value is None else value


def take_part(whole: torch.Tensor, part: int, widths: Sequence[Kind | None]) -> torch.Tensor:
    """Columns of a stack: a part without a kind is one column and loses its axis; at most one part has a kind."""
    singles = [kind is None for kind in widths]
    wide = whole.shape[-1] - sum(singles)
    start = sum(1 if single else wide for single in singles[:part])
    return whole[..., start] if singles[part] else whole[..., start : start + wide]
