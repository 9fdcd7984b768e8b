"""What the operations of a plan do to tensors, in plain torch; leading axes (heads, groups) are carried along."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import sympy
import torch

from polyattn.codegen import tables
from polyattn.codegen.tables import Scalars
from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.interpret import take_part
from polyattn.rewriter.planning.plan import Node

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Operations:
    """Operations on tensors in the dtype and on the device of the inputs.

    Args:
        inputs: name → tensor.
        scalars: values of the symbols in coefficients.
        basis: the monomials that features are.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor], scalars: Scalars, basis: monomials.Basis) -> None:
        self.inputs, self.scalars, self.basis = inputs, scalars, basis
        sample = next(iter(inputs.values()))
        self.dtype, self.device = sample.dtype, sample.device

    def constant(self, n: Node) -> torch.Tensor:
        """Weights of monomials."""
        return tables.weights([tables.value(c, self.scalars) for c in n.attr], self.basis, self.dtype, self.device)

    def _number(self, c: sympy.Expr) -> float:
        return tables.number(c, self.scalars)

    def apply(self, n: Node, args: list[torch.Tensor]) -> torch.Tensor:
        """The value of a node from those of its arguments.

        Raises:
            ScheduleError: an operation that has no value of its own.
        """
        if n.op == "contract":
            return self.contract(n, args)
        if n.op == "features":
            return monomials.generate(args[0], self.basis.below(n.attr))
        if n.op == "map":
            return args[0].exp() if n.attr == "exp" else args[0].reciprocal()
        if n.op == "gather":
            position, degree = n.attr
            selected = monomials.selection(self.basis.below(degree))
            axis = args[0].ndim - len(n.args[0].axes) + position
            taken = args[0]
            if (selected < 0).any():  # what is not among the columns of a nested form is zero
                taken = torch.cat([taken, torch.zeros_like(taken.narrow(axis, 0, 1))], axis)
                selected = np.where(selected < 0, taken.shape[axis] - 1, selected)
            sigma = torch.as_tensor(selected, device=self.device)
            taken = taken.index_select(axis, sigma.flatten())
            return taken.reshape(*taken.shape[:axis], *sigma.shape, *taken.shape[axis + 1 :])
        if n.op == "part":
            return take_part(args[0], *n.attr)
        if n.op == "concat":
            return self._concat(n, args)
        if n.op == "sum":
            return self._sum(n, args)
        raise ScheduleError(f"no tensor is the value of {n.op}")

    def _concat(self, n: Node, args: list[torch.Tensor]) -> torch.Tensor:
        widths, constants = n.attr
        pending = iter(args)
        wide = args[next(p for p, w in enumerate(w for w, c in zip(widths, constants, strict=True) if c is None) if w)]
        columns = []
        for width, constant in zip(widths, constants, strict=True):
            if constant is not None:
                columns.append(torch.full_like(wide[..., :1], self._number(constant)))
            else:
                x = next(pending)
                columns.append(x if width is not None else x.unsqueeze(-1))
        return torch.cat(columns, dim=-1)

    def _sum(self, n: Node, args: list[torch.Tensor]) -> torch.Tensor:
        coefficients, orders = n.attr
        total: torch.Tensor | None = None
        for c, order, x, source in zip(coefficients, orders, args, n.args, strict=True):
            batch = x.ndim - len(source.axes)
            present = [p for p in order if p is not None]
            y = x.permute(*range(batch), *(batch + p for p in present))
            for position, p in enumerate(order):
                if p is None:
                    y = y.unsqueeze(batch + position)
            y = y if c == 1 else y * self._number(c)
            total = y if total is None else total + y
        assert total is not None
        return total

    def contract(self, n: Node, args: list[torch.Tensor]) -> torch.Tensor:
        """A sum of products."""
        patterns, result = n.attr
        inputs = ",".join("..." + "".join(_LETTERS[p] for p in pattern) for pattern in patterns)
        return torch.einsum(f"{inputs}->...{''.join(_LETTERS[p] for p in result)}", *args)
