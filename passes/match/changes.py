"""What happens to the scores between their product and the softmax, as an operator gets it: tensors and one text.

    s ← s + m                          (kind ``add``)
    s ← s where kept, else fill        (kind ``replace``)

in the order in which the model does it. A tensor may have one row where all queries have the same. Under ``causal`` it
says what happens to keys up to their query; the others are hidden: ``fill`` is added, or put in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

Kind = Literal["add", "replace"]


class Change(NamedTuple):
    """One step; tensors of the steps come in their order, one for each that is ``given``."""

    kind: Kind
    fill: float = -float("inf")
    """What hidden scores become, or what is added to those that ``causal`` hides."""
    causal: bool = False
    given: bool = True
    """Whether it has a tensor, bool [B|1, H|1, n_q|1, n_k|1] for ``replace``; else it is causal and nothing more."""


class Changes(NamedTuple):
    """All steps."""

    steps: tuple[Change, ...] = ()
    zero: bool = False
    """A row in which every score is -inf is 0, as in torch's own attention; else it is what softmax makes of it."""

    def text(self) -> str:
        """The argument of an operator; :meth:`of` reads it."""
        words = ["zero" if self.zero else "softmax"]
        for step in self.steps:
            words.append(f"{step.kind} {step.fill!r}{' causal' * step.causal}{' alone' * (not step.given)}")
        return "; ".join(words)

    @staticmethod
    def of(text: str) -> Changes:
        """The inverse of :meth:`text`."""
        return _parsed(text)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Changes:
    first, *rest = text.split("; ")
    return Changes(tuple(_step(words.split()) for words in rest), first == "zero")


def _step(words: Sequence[str]) -> Change:
    return Change(cast(Kind, words[0]), float(words[1]), "causal" in words[2:], "alone" not in words[2:])


NOTHING = Changes()
"""Scores go into the softmax as they are."""
