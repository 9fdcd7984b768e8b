"""Lift: an aten graph of matrices → the algebra, with named axes.

Both the forward of a site and its autograd graph come through here: the graph is what ``make_fx`` traces of
``torch.func.vjp``, so no backward formula is written down anywhere.  Contractions become named intermediates
(``Def``); factors that do not depend on what is summed are hoisted out of them (diag(a) U Vᵀ = diag(a) (U Vᵀ)).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sympy
import torch
from functorch import make_fx
from torch import fx

from polyattn.errors import LiftError
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.algebra.expr import Def, Expr, Factor, Kind, Map, Poly, Tensor, Term
from polyattn.rewriter.algebra.programs import Program, is_pair
from polyattn.rewriter.rules.inline import inline_pairs

aten = torch.ops.aten


def trace(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The aten graph of a function of (tiny, dense) inputs.

    It is taken in a thread of its own: the caller's modes (autograd below an operator, autocast, fake tensors) are
    local to its thread and must not change what is traced.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        module: fx.GraphModule = pool.submit(lambda: make_fx(function)(*inputs)).result()
    return module


class Lifter:
    """Turns the nodes of one traced graph into expressions.

    Args:
        inputs: for each placeholder its tensor in the algebra, or a sympy symbol for a scalar.
    Raises:
        LiftError: an operation without a meaning in the algebra; the message names it.
    """

    def __init__(self, inputs: Sequence[Tensor | sympy.Symbol]) -> None:
        self.inputs = list(inputs)
        self.defs: list[Def] = []
        self._by_key: dict[str, Def] = {}
        self._names: set[str] = set()

    def lift(self, graph: fx.Graph, names: Sequence[str]) -> Program:
        """The program of a graph whose output is a tuple of tensors called ``names``."""
        env: dict[fx.Node, Any] = {}
        pending = iter(self.inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                source = next(pending)
                env[node] = ir.scale(ir.scalar(1), source) if isinstance(source, sympy.Symbol) else ir.of(source)
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: env[n])
                env[node] = self._call(node.target, args, dict(node.kwargs), node)
            elif node.op == "output":
                values = fx.node.map_arg(node.args[0], lambda n: env[n])
                values = values if isinstance(values, (tuple, list)) else (values,)
                outputs = dict(zip(names, values, strict=True))
                return Program(tuple(self.defs), outputs)
            else:
                raise LiftError(f"cannot lift a {node.op} node ({node.name}); trace plain aten functions")
        raise LiftError("the graph has no output")

    def _call(self, target: Any, args: Any, kwargs: dict[str, Any], node: fx.Node) -> Any:
        if target is operator.getitem:
            return args[0][args[1]]
        rule = _RULES.get(target)
        if rule is None:
            raise LiftError(f"the algebra has no meaning for {target} (node {node.name})")
        return rule(self, *args, **kwargs)

    # -- contractions become definitions -------------------------------------------------------------------------

    def define(self, x: Expr) -> Expr:
        """Name a contraction; what does not depend on the summed indices stays outside of it."""
        if not any(term.bound(x.out) for term in x.terms):
            return x
        out = tuple(index for index in x.out if index is not None)
        common = [f for f in x.terms[0].factors if set(f.indices) <= set(out) and all(f in t.factors for t in x.terms)]
        # A pair of tokens is hoisted only by what is not itself a pair: P = diag(1/D) A keeps A inside.
        common = [f for f in common if not is_pair(f.tensor)]
        coefficient = x.terms[0].coefficient if len(x.terms) == 1 else sympy.Integer(1)
        terms = []
        for term in x.terms:
            rest = list(term.factors)
            for factor in common:
                rest.remove(factor)
            terms.append(Term(term.coefficient / coefficient, tuple(rest)))
        used = frozenset(index for term in terms for index in term.indices)
        inner = tuple(sorted((index for index in out if index in used), key=lambda index: not index.kind.token))
        core = ir.collect(Expr(inner, tuple(terms)))
        tensor = self._named(core)
        return Expr(x.out, (Term(coefficient, (Factor(tensor, inner), *common)),))

    def _named(self, core: Expr) -> Tensor:
        core = _normal(core)
        if len(core.terms) == 1 and core.terms[0].coefficient == 1:
            factors = core.terms[0].factors
            if len(factors) == 1 and factors[0].indices == core.indices:
                return factors[0].tensor
        key = repr(core)
        if key not in self._by_key:
            label = self._label(core)
            definition = Def(label, core)
            self._by_key[key] = definition
            self.defs.append(definition)
        return self._by_key[key]

    def _label(self, core: Expr) -> str:
        names = sorted(f.tensor.name for f in core.terms[0].factors)
        pair = sum(index.kind.token for index in core.indices) == 2
        known: dict[tuple[str, ...], str] = {
            ("K", "Q"): "S",
            ("G", "V"): "dP",
            ("W", "X"): "Q",
            ("W_V", "X"): "H",
            ("G", "H"): "dP",
        }
        label = known.get(tuple(names))
        if label is None and pair and len(core.terms) == 1:
            label = "S"
        if label is None and not pair:
            has_values = any(n in ("V", "H") for n in names)
            label = (
                "N" if has_values and "G" not in names else "D" if len(core.indices) == 1 and "G" not in names else "t"
            )
        label = label or "t"
        unique, number = label, 1
        while unique in self._names:
            number += 1
            unique = f"{label}{number}"
        self._names.add(unique)
        return unique

    def apply(self, function: str, x: Expr) -> Expr:
        """An elementwise function: its argument is named unless it is a tensor already."""
        inner = inline_pairs(Expr(tuple(index for index in x.out if index is not None), x.terms))
        out = inner.indices
        if len(inner.terms) == 1 and inner.terms[0].coefficient == 1:
            factors = inner.terms[0].factors
            if len(factors) == 1 and factors[0].indices == out:
                return Expr(x.out, (Term(sympy.Integer(1), (Factor(Map(function, factors[0].tensor), out),)),))
        if function == "reciprocal" and len(inner.terms) == 1 and not inner.terms[0].bound(out):
            return Expr(x.out, self._reciprocal_of_product(inner).terms)
        tensor = self._named(inner)
        return Expr(x.out, (Term(sympy.Integer(1), (Factor(Map(function, tensor), out),)),))

    def _reciprocal_of_product(self, x: Expr) -> Expr:
        total = Expr(x.out, (Term(1 / x.terms[0].coefficient, ()),))
        for factor in x.terms[0].factors:
            tensor = factor.tensor
            is_reciprocal = isinstance(tensor, Map) and tensor.function == "reciprocal"
            inverse = tensor.argument if isinstance(tensor, Map) and is_reciprocal else Map("reciprocal", tensor)
            total = ir.multiply(total, Expr(x.out, (Term(sympy.Integer(1), (Factor(inverse, factor.indices),)),)))
        return total


def _normal(x: Expr) -> Expr:
    """Open indices numbered in order, so that equal definitions compare equal."""
    new = ir.fresh((index.kind for index in x.indices), ())
    mapping = dict(zip(x.indices, new, strict=True))
    if all(a == b for a, b in mapping.items()):
        return ir.collect(x)
    renamed = []
    for term in x.terms:
        safe = ir.avoid(term, term.bound(x.out), frozenset(new) | frozenset(mapping))
        renamed.append(safe.rename(mapping))
    return ir.collect(Expr(new, tuple(renamed)))


# -- the meaning of each operation -----------------------------------------------------------------------------------


def _expr(x: Any) -> Expr:
    return x if isinstance(x, Expr) else ir.scalar(x)


def _mm(lifter: Lifter, x: Expr, y: Expr) -> Expr:
    left = Expr((*x.out, None), x.terms)
    right = Expr((None, *y.out), y.terms)
    return lifter.define(ir.sum_over(ir.multiply(left, right), (1,)))


def _sum(lifter: Lifter, x: Expr, dims: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Expr:
    axes = list(range(len(x.out))) if dims is None else list(dims)
    return lifter.define(ir.sum_over(x, axes, keepdim))


def _unsqueeze(lifter: Lifter, x: Expr, dim: int) -> Expr:
    out = list(x.out)
    out.insert(dim % (len(out) + 1), None)
    return Expr(tuple(out), x.terms)


def _squeeze(lifter: Lifter, x: Expr, dim: int | Sequence[int] | None = None) -> Expr:
    rank = len(x.out)
    dims = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % rank for d in dims if x.out[d % rank] is None}
    return Expr(tuple(index for p, index in enumerate(x.out) if p not in gone), x.terms)


def _view(lifter: Lifter, x: Expr, sizes: Sequence[int]) -> Expr:
    """A view that puts in or takes out axes of size one; the tiny sizes of a trace are otherwise larger."""
    kept = [index for index in x.out if index is not None]
    if sum(size != 1 for size in sizes) != len(kept):
        raise LiftError(f"a view that merges or splits axes: {x.out} as {list(sizes)}")
    rest = iter(kept)
    return Expr(tuple(None if size == 1 else next(rest) for size in sizes), x.terms)


def _permute(lifter: Lifter, x: Expr, dims: Sequence[int]) -> Expr:
    return Expr(tuple(x.out[d] for d in dims), x.terms)


def _transpose(lifter: Lifter, x: Expr, a: int, b: int) -> Expr:
    out = list(x.out)
    out[a], out[b] = out[b], out[a]
    return Expr(tuple(out), x.terms)


def _pow(lifter: Lifter, x: Expr, exponent: Any) -> Expr:
    if not isinstance(exponent, (int, float)) or int(exponent) != exponent or exponent < 0:
        raise LiftError(f"the algebra has powers with a whole exponent >= 0 only, got {exponent}")
    if exponent == 0 and len(x.terms) == 1 and len(x.terms[0].factors) == 1:
        # x⁰ keeps its axes (a matrix of ones has a size to be summed over)
        (factor,) = x.terms[0].factors
        return Expr(
            x.out, (Term(sympy.Integer(1), (Factor(Poly(factor.tensor, (sympy.Integer(1),)), factor.indices),)),)
        )
    total = Expr((None,) * len(x.out), ir.scalar(1).terms)
    for _ in range(int(exponent)):
        total = ir.multiply(total, x)
    return total


def _div(lifter: Lifter, x: Any, y: Any) -> Expr:
    if not isinstance(y, Expr):
        return ir.scale(_expr(x), 1 / ir.scalar(y).terms[0].coefficient)
    return ir.multiply(_expr(x), lifter.apply("reciprocal", y))


def _sub(lifter: Lifter, x: Any, y: Any) -> Expr:
    return ir.add(_expr(x), ir.scale(_expr(y), sympy.Integer(-1)))


def _same(lifter: Lifter, x: Expr, *args: Any, **kwargs: Any) -> Expr:
    return x


def _ones_like(lifter: Lifter, x: Expr, **kwargs: Any) -> Expr:
    return Expr((None,) * len(x.out), ir.scalar(1).terms)


_RULES: Mapping[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.t.default: lambda lifter, x: Expr(x.out[::-1], x.terms),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.squeeze.default: _squeeze,
    aten.view.default: _view,
    aten.expand.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.ones_like.default: _ones_like,
    aten.zeros_like.default: lambda lifter, x, **kwargs: Expr((None,) * len(x.out), ()),
    aten.mul.Tensor: lambda lifter, x, y: ir.multiply(_expr(x), _expr(y)),
    aten.mul.Scalar: lambda lifter, x, y: ir.multiply(_expr(x), _expr(y)),
    aten.add.Tensor: lambda lifter, x, y: ir.add(_expr(x), _expr(y)),
    aten.sub.Tensor: _sub,
    aten.neg.default: lambda lifter, x: ir.scale(x, sympy.Integer(-1)),
    aten.div.Tensor: _div,
    aten.exp.default: lambda lifter, x: lifter.apply("exp", x),
    aten.reciprocal.default: lambda lifter, x: lifter.apply("reciprocal", x),
    aten.pow.Tensor_Scalar: _pow,
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
}


def kinds_by_size(kinds: Sequence[Kind]) -> dict[Kind, int]:
    """A small distinct size for every kind, for tracing."""
    return dict(zip(dict.fromkeys(kinds), (2, 3, 5, 7, 11, 13), strict=False))
