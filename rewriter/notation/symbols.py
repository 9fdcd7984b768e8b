"""Symbols: names and coefficients as text and as LaTeX (as far as matplotlib's mathtext goes)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_GREEK = {"α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\epsilon"}
_HAT, _PRIME = "\u0302", "′"


@dataclass(frozen=True)
class Symbol:
    """A name as text and as LaTeX."""

    text: str
    latex: str


def symbol(label: str) -> Symbol:
    """The symbol of a label: digits go below, a hat onto the first letter (``t2̂`` → t̂₂), ``'`` becomes ′."""
    primes = _PRIME * (label.count("'") + label.count(_PRIME))
    bare = label.replace("'", "").replace(_PRIME, "").replace(_HAT, "")
    base, _, word = bare.partition("_")
    found = re.fullmatch(r"(.*?)(\d*)", base)
    assert found is not None
    name, digits = found.groups()
    hat = _HAT if _HAT in label else ""
    text = name + hat + digits.translate(SUBSCRIPTS) + (f"_{word}" if word else "") + primes
    latex = _GREEK.get(name, name)
    latex = rf"\hat{{{latex}}}" if hat else latex
    below = digits + (rf"\mathrm{{{word}}}" if word else "")
    return Symbol(text, latex + (f"_{{{below}}}" if below else "") + "'" * len(primes))


@dataclass(frozen=True)
class Style:
    """The marks in which text and LaTeX differ."""

    latex: bool

    def name(self, of: Symbol) -> str:
        """A symbol in this style."""
        return of.latex if self.latex else of.text

    def mark(self, text: str, latex: str) -> str:
        """The text or its LaTeX."""
        return latex if self.latex else text

    def join(self, parts: Sequence[str], text: str, latex: str) -> str:
        """Parts with an operator between them."""
        return f" {latex if self.latex else text} ".join(parts)

    def power(self, base: str, exponent: int) -> str:
        """A base with its exponent, which 1 does not show."""
        if exponent == 1:
            return base
        return f"{base}^{{{exponent}}}" if self.latex else base + str(exponent).translate(_SUPERSCRIPTS)

    def coefficient(self, value: sympy.Expr) -> str:
        """A coefficient without its sign: number first, then symbols by name."""
        if isinstance(value, sympy.Add):
            signs = [" - " if part.could_extract_minus_sign() else " + " for part in value.args]
            joined = "".join(sign + self.coefficient(abs_(part)) for sign, part in zip(signs, value.args, strict=True))
            return f"({joined.removeprefix(' + ').strip()})"
        number, rest = value.as_coeff_Mul()
        powers = sorted(rest.as_powers_dict().items(), key=lambda item: str(item[0])) if rest != 1 else []
        top = [self.power(self.name(symbol(str(b))), int(x)) for b, x in powers if x > 0]
        below = [self.power(self.name(symbol(str(b))), int(-x)) for b, x in powers if x < 0]
        head = [str(number)] if number != 1 or not top else []
        text = " ".join(head + top)
        return text + (f"/{' '.join(below)}" if below else "")


TEXT, LATEX = Style(False), Style(True)


def abs_(value: sympy.Expr) -> sympy.Expr:
    """The value without a leading minus."""
    return -value if value.could_extract_minus_sign() else value
