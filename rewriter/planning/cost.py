"""Costs as people read them: polynomials in n, d, e, r, r′ and C, and the terms that decide (math.md §7).

``n_q`` and ``n_k`` are both written n.  A term's weight is its degree in d when e grows like d and the number of
features and chunks as their rule says (``ApproximateRule.growth``: r like d^g for a polynomial of degree g); the
leading terms are the heaviest ones of the highest power of n.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from polyattn.rewriter.algebra.tensor import CHUNK, D1, E1, N_K, N_Q, R1, D, E, N, R
from polyattn.rewriter.notation.symbols import LATEX, TEXT, Style, symbol

_WIDE = sympy.Symbol("(e+1)", positive=True)
"""Stands for e + 1, the width of V̂."""

Monomials = dict[sympy.Expr, sympy.Expr]
"""Products of symbols with their numbers."""


def per_token(cost: sympy.Expr) -> sympy.Expr:
    """The cost with as many queries as keys."""
    return sympy.expand(cost.subs({N_Q: N, N_K: N}))


def token_power(cost: sympy.Expr) -> int:
    """The degree in n."""
    return int(sympy.degree(per_token(cost), N)) if per_token(cost).has(N) else 0


def _monomials(x: sympy.Expr) -> Monomials:
    """The polynomial with m e + m written as m (e + 1) wherever it holds both."""
    found: Monomials = {}
    for term in sympy.Add.make_args(sympy.expand(x)):
        number, rest = term.as_coeff_Mul()
        if number != 0:
            found[rest] = found.get(rest, sympy.Integer(0)) + number
    for rest in sorted(found, key=str):
        plain = rest / E
        if not plain.has(E) and rest.has(E) and found.get(plain, 0) >= found[rest] > 0:
            number = found.pop(rest)
            found[plain * _WIDE] = number
            found[plain] -= number
            if found[plain] == 0:
                del found[plain]
    return found


Growth = Mapping[sympy.Symbol, int]
"""Degrees in d of the sizes that a rule brings in."""
_ORDER = {R: 2, CHUNK: 2, R1: 1}
"""The degrees by which terms are sorted as they are written, whatever the rule."""
_OTHER = 2
"""The degree of a size that is not named: the number of features of a rule without a degree."""


def _weight(x: sympy.Expr, growth: Growth) -> int:
    weights = {D: 1, E: 1, _WIDE: 1, D1: 1, E1: 1, **growth}
    return sum(int(power) * weights.get(base, _OTHER * base.is_Symbol) for base, power in x.as_powers_dict().items())


def weight(sizes: Iterable[sympy.Expr], growth: Growth) -> int:
    """The weight of a product of sizes."""
    return sum(_weight(_WIDE if size == E + 1 else size, growth) for size in sizes)


def leading(cost: sympy.Expr, growth: Growth) -> sympy.Expr:
    """The terms of the highest power of n that weigh most."""
    flat = per_token(cost)
    power = token_power(flat)
    heavy = _monomials(flat.coeff(N, power))
    top = max((_weight(m, growth) for m in heavy), default=0)
    chosen = sum((c * m for m, c in heavy.items() if _weight(m, growth) == top), sympy.Integer(0))
    return sympy.expand((N**power * chosen).subs(_WIDE, E + 1))


def write(cost: sympy.Expr, style: Style = TEXT) -> str:
    """The cost in powers of n: ``n (12 r (e+1) + 2 r) + 2 r (e+1)``."""
    flat = per_token(cost)
    parts = []
    for power in range(token_power(flat), -1, -1):
        inner = _monomials(flat.coeff(N, power))
        if not inner:
            continue
        token = N**power
        if len(inner) == 1:
            ((rest, number),) = inner.items()
            parts.append(_product(number, token * rest, style))
        else:
            listed = _sum(inner, style)
            parts.append(f"{_product(sympy.Integer(1), token, style)} ({listed})" if power else listed)
    return " + ".join(parts) or "0"


def write_leading(cost: sympy.Expr, growth: Growth, style: Style = TEXT) -> str:
    """The leading terms, each with its n: ``8 n r (e+1)``, and whether anything is left."""
    top = leading(cost, growth)
    inner = _monomials(top)
    rest = "" if sympy.expand(per_token(cost) - top) == 0 else " + …" if style is TEXT else r" + \ldots"
    return _sum(inner, style) + rest


def _sum(inner: Monomials, style: Style) -> str:
    order = sorted(inner, key=lambda m: (-_weight(m, _ORDER), str(m)))
    text = ""
    for m in order:
        sign = (" - " if style.latex else " − ") if inner[m] < 0 else " + "
        text += sign + _product(abs(inner[m]), m, style)
    return text.removeprefix(" + ").strip()


def _product(number: sympy.Expr, rest: sympy.Expr, style: Style) -> str:
    powers = rest.as_powers_dict() if rest != 1 else {}
    first, last = [N, CHUNK, R, R1], [_WIDE, E, D, E1, D1]
    ranks = sorted((s for s in powers if s not in first and s not in last), key=str)
    names = [s for s in (*first, *ranks, *last[:3]) if s in powers] + sorted(powers.keys() & {D1, E1}, key=str)
    space = r" \, " if style is LATEX else " "

    def product(sign: int) -> list[str]:
        held = [(s, sign * int(powers[s])) for s in names if sign * powers[s] > 0]
        return [style.power("(e+1)" if s == _WIDE else style.name(symbol(str(s))), p) for s, p in held]

    above, below = product(1), product(-1)
    head = [str(number)] if number != 1 or not above else []
    text = space.join(head + above)
    if not below:
        return text
    return f"{text} / {below[0] if len(below) == 1 else f'({space.join(below)})'}"


def sizes(shape: Mapping[str, int], ranks: Mapping[sympy.Symbol, int | float]) -> dict[sympy.Symbol, int | float]:
    """Numbers for the symbols: ``n_q``, ``n_k`` (or ``n``), ``d``, ``e``; for a site with chunks ``chunk``.

    Args:
        ranks: numbers of the rule's sizes, the number of features first.
    """
    n_q = shape.get("n_q", shape.get("n", 0))
    d = shape["d"]
    found: dict[sympy.Symbol, int | float] = {
        N_Q: n_q,
        N_K: shape.get("n_k", n_q),
        N: n_q,
        D: d,
        E: shape.get("e", d),
    }
    return found | dict(ranks) | {CHUNK: shape.get("chunk", min(next(iter(ranks.values())), n_q))}
