"""Programs in tiles as people read them: in index notation, for their values have three axes and more.

    KP[I,J,a] = Σ_j OMEGA[I,J,j] KAPPA[J,j,a]

An index that is not on the left is summed over.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from polyattn.rewriter.algebra.expr import Expr, Factor, Index, Indicator, Map, Term
from polyattn.rewriter.algebra.programs import Program
from polyattn.rewriter.algebra.tensor import KEY_TILE, QUERY_TILE, Tensor
from polyattn.rewriter.notation.symbols import Style

_GREEK = {"MU": r"\mu", "KAPPA": r"\kappa", "OMEGA": r"\Omega", "DELTA": r"\Delta", "LAMBDA": r"\Lambda"}
_LATEX = {**_GREEK, "KBAR": r"\bar K"}


def in_tiles(program: Program) -> bool:
    """Whether values of a program are over tiles."""
    kinds = {i.kind for _, x in program.expressions() for t in x.terms for i in t.indices}
    return bool(kinds & {QUERY_TILE, KEY_TILE})


def write(label: str, x: Expr, style: Style) -> str:
    """``label[indices] = sum of terms``."""
    left = _name(label, style) + _indices(x.indices, style)
    return f"{left} = {expression(x, style)}"


def expression(x: Expr, style: Style) -> str:
    """The right side of a definition."""
    text = ""
    for term in x.terms:
        negative = term.coefficient.could_extract_minus_sign()
        made = _term(Term(-term.coefficient if negative else term.coefficient, term.factors), x, style)
        minus = " - " if style.latex else " − "
        text += (minus if negative else " + ") + made if text else (minus.strip() + made if negative else made)
    return text


def _term(term: Term, x: Expr, style: Style) -> str:
    bound = sorted(term.bound(x.out), key=lambda i: ("IiJjab".find(i.kind.letter), i.number))
    parts = []
    if bound:
        over = "".join(_index(i) for i in bound)
        parts.append(rf"\sum_{{{over}}}" if style.latex else f"Σ_{over}")
    if term.coefficient != 1:
        parts.append(sympy.latex(term.coefficient) if style.latex else str(term.coefficient))
    parts += [_factor(f, style) for f in term.factors]
    return (r" \, " if style.latex else " ").join(parts)


def _factor(factor: Factor, style: Style) -> str:
    tensor = factor.tensor
    at = _indices(factor.indices, style)
    if isinstance(tensor, Map) and tensor.function == "reciprocal":
        inner = _name(tensor.argument.name, style) + at
        return rf"\frac{{1}}{{{inner}}}" if style.latex else f"1/{inner}"
    if isinstance(tensor, Map):
        inner = _name(tensor.argument.name, style) + at
        return rf"\{tensor.function}({inner})" if style.latex else f"{tensor.function}({inner})"
    return _tensor(tensor, style) + at


def _tensor(tensor: Tensor, style: Style) -> str:
    if isinstance(tensor, Indicator) and style.latex:
        return rf"M_{{\mathrm{{{tensor.which}}}}}" if tensor.which in ("near", "far") else "M"
    return _name(tensor.name, style)


def _name(label: str, style: Style) -> str:
    if not style.latex:
        return label
    derivative, plain = (r"\mathrm{d}", label[1:]) if label[:1] == "d" and label[1:].isupper() else ("", label)
    known = _LATEX.get(plain)
    if known is None:
        head, _, rest = plain.partition("_")
        known = rf"\mathrm{{{head}}}" + (rf"_{{{rest}}}" if rest else "") if len(head) > 1 or rest else head
    return derivative + known


def _indices(indices: Iterable[Index], style: Style) -> str:
    listed = [_index(i) for i in indices]
    if not listed:
        return ""
    return "_{" + " ".join(listed) + "}" if style.latex else f"[{','.join(listed)}]"


def _index(index: Index) -> str:
    return index.kind.letter + "'" * index.number
