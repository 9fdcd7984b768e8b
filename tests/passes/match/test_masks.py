"""The meaning of a mask, found from its structure, equals what the mask evaluates to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from polyattn.passes.match.masks import StepFunction, Unprovable, Visible, describe, step, visible

INF = float("inf")
N, M = 5, 7


def trace(build: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """The node that makes the mask, and its real value."""
    gm = make_fx(lambda: build(), pre_dispatch=True, tracing_mode="fake")()
    return gm.graph.output_node().args[0], build()


def dense(value: StepFunction, like: torch.Tensor) -> torch.Tensor:
    rows, columns = like.shape[-2:]
    table = [[float(value.at(j - i)) for j in range(columns)] for i in range(rows)]
    return torch.tensor(table, dtype=torch.float64).expand(like.shape)


def index(n: int) -> torch.Tensor:
    return torch.arange(n)


def packed() -> torch.Tensor:
    """Causal inside sequences that begin where positions jump; these positions never do."""
    positions = torch.arange(M)[None].expand(2, -1)
    sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, i, j = torch.arange(2)[:, None, None, None], torch.arange(M)[None, None, :, None], torch.arange(M)
    same = sequence[batch, i] == sequence[batch, j[None, None, None]]
    return same.new_ones((), dtype=torch.bool) & same & (positions[batch, j[None, None, None]] <= positions[batch, i])


GOOD: dict[str, Callable[[], torch.Tensor]] = {
    "ones": lambda: torch.ones(N, M),
    "tril": lambda: torch.ones(N, M).tril(),
    "triu_diagonal": lambda: torch.full((N, M), -INF).triu(2),
    "tril_minus_two": lambda: torch.ones(N, M).tril(-2),
    "band": lambda: torch.ones(N, M).tril(1).triu(-2),
    "not": lambda: ~torch.ones(N, M, dtype=torch.bool).tril(),
    "logical_not": lambda: torch.ones(N, M).tril().logical_not(),
    "transposed": lambda: torch.ones(M, N).tril(1).transpose(0, 1),
    "T": lambda: torch.ones(M, N).triu(1).T,
    "view": lambda: torch.ones(N, M).tril().view(1, 1, N, M),
    "unsqueeze": lambda: torch.ones(N, M).tril()[None, None],
    "expand": lambda: torch.ones(N, M).tril().expand(2, 3, N, M),
    "slice": lambda: torch.ones(9, 9).tril()[:N, :M],
    "one_minus": lambda: 1 - torch.ones(N, M).tril(),
    "times": lambda: (1.0 - torch.ones(N, M).tril()) * -1e9,
    "where": lambda: torch.where(torch.ones(N, M).tril() == 1, 0.0, -INF),
    "masked_fill": lambda: torch.zeros(N, M).masked_fill(torch.ones(N, M).triu(1).bool(), -INF),
    "and": lambda: torch.ones(N, M).tril().bool() & torch.ones(N, M).triu(-1).bool(),
    "arange_ge": lambda: index(N)[:, None] >= index(M)[None, :],
    "arange_lt": lambda: index(N)[:, None] < index(M)[None, :],
    "arange_ne": lambda: index(N)[:, None] != index(M)[None, :],
    "arange_swapped": lambda: index(M) <= index(N).unsqueeze(-1),
    "arange_shifted": lambda: index(N).view(N, 1) + 2 >= index(M),
    "arange_difference": lambda: (index(M)[None, :] - index(N)[:, None]) > 1,
    "arange_start": lambda: torch.arange(2, N + 2)[:, None] > index(M)[None, :],
    "zeros_like": lambda: torch.zeros_like(torch.ones(N, M)),
    "packed": packed,
    "counted": lambda: torch.ones(N, dtype=torch.long).cumsum(0)[:, None] >= index(M)[None, :],
    "indexed": lambda: (index(N) + 1)[index(N)][:, None] > index(M)[None, :],
    "literal": lambda: torch.where(torch.ones(N, M).tril() == 1, torch.zeros(()), torch.tensor(-3.0)),
    "integers": lambda: torch.ones(N, M, dtype=torch.long).tril() * 3,
}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_meaning_equals_evaluation(name: str) -> None:
    node, value = trace(GOOD[name])
    assert torch.equal(dense(step(node), value), value.double()), describe(step(node))


BAD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "random": (lambda: torch.rand(N, M), "rand"),
    "one_row": (lambda: torch.ones(1, M).tril() * torch.ones(N, M), "broadcast along"),
    "cumsum": (lambda: torch.ones(N, M).cumsum(0), "cumsum"),
    "diff_that_jumps": (
        lambda: torch.diff(index(M).expand(N, M), prepend=index(M).expand(N, M)[:, :1] - 2) == 1,
        "continue the count",
    ),
    "indexed_from_the_end": (lambda: index(M)[index(N) - 1][:, None] > index(M)[None, :], "from the end"),
    "sums": (lambda: (index(N)[:, None] + index(M)[None, :]) > 3, "compare query positions"),
    "position": (lambda: index(M), "a position"),
    "step_two": (lambda: torch.arange(0, 2 * N, 2)[:, None] >= index(M)[None, :], "count up by one"),
    "slice_from_one": (lambda: torch.ones(9, 9).tril()[1 : N + 1, :M], "does not start at 0"),
    "floor": (lambda: torch.ones(N, M).tril().floor(), "floor"),
    "reshaped": (lambda: torch.ones(N, M).tril().reshape(M, N), "reshaped"),
    "trailing_axis": (lambda: torch.ones(N, M).tril()[..., None].expand(N, M, 2) > index(2), "trailing axis"),
    "reversed": (lambda: torch.ones(N, M).tril().flip(0), "flip"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_not_a_step_function_is_unprovable(name: str) -> None:
    build, words = BAD[name]
    node, _ = trace(build)
    with pytest.raises(Unprovable, match=words):
        step(node)


def test_inputs_are_unprovable() -> None:
    gm = make_fx(lambda mask: mask == 0, tracing_mode="fake")(torch.ones(2, 2))
    with pytest.raises(Unprovable, match="not known when compiling"):
        step(gm.graph.output_node().args[0])


def test_causal_is_exactly_the_diagonal() -> None:
    def hidden(value: Any) -> bool:
        return value == 0

    bands = {d: step(trace(lambda d=d: torch.ones(N, M).tril(d))[0]) for d in (-1, 0, 1)}
    verdicts = {d: visible(value, keep=1, hidden=hidden) for d, value in bands.items()}
    assert verdicts == {-1: None, 0: Visible(True, fill=0.0), 1: None}
    assert visible(StepFunction.constant(0.0), keep=0.0, hidden=lambda v: v == -INF) == Visible(False)
    assert visible(StepFunction.constant(True), keep=1, hidden=hidden) is None, "a boolean is no number"


KEEP = torch.tensor([[True, True, False, True, False, True], [True] * 6, [False] * 6])
Q = K = KEEP.shape[1]
ATOMS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda m: m[:, None, None],
    lambda m: m.view(3, 1, 1, K).expand(3, 1, Q, K),
    lambda m: m[:, None, :, None],
    lambda m: m[:, None].expand(-1, Q, -1)[:, None],
    lambda m: m[torch.arange(3)[:, None, None, None], torch.arange(K)],
    lambda m: m.unsqueeze(-1).transpose(1, 2).unsqueeze(1),
    lambda m: torch.ones(Q, K, dtype=torch.bool).tril(),
    lambda m: torch.ones(Q, K, dtype=torch.bool).triu(1),
    lambda m: torch.arange(Q)[:, None] >= 0,
    lambda m: torch.arange(K) < m.sum(1)[:, None, None, None],
    lambda m: (m.to(torch.float32)[:, None, None] * -1e9) < -1.0,
)
JOINS: tuple[Callable[..., torch.Tensor], ...] = (
    lambda a, b, c: a & b,
    lambda a, b, c: a | b,
    lambda a, b, c: ~a,
    lambda a, b, c: torch.where(a, b, c),
    lambda a, b, c: a.masked_fill(b.expand_as(a & b)[:1, :1] if a.dim() < b.dim() else b, True) if a.dim() == 4 else a,
    lambda a, b, c: a == b,
    lambda a, b, c: (a & b & c).tril(),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), min_size=1, max_size=4), st.integers(0, 20), st.booleans())
def test_what_structure_tells_is_true(program: list[tuple[int, ...]], first: int, keep: bool) -> None:
    """Random masks of padding, positions and each other: what they are known to show, they show."""

    def build(m: torch.Tensor) -> torch.Tensor:
        made = [ATOMS[first % len(ATOMS)](m)]
        for kind, *operands in program:
            a, b, c = ((made + [atom(m) for atom in ATOMS])[at % (len(made) + len(ATOMS))] for at in operands)
            made.append(JOINS[kind % len(JOINS)](made[-1] if kind % 2 else a, b, c))
        return made[-1].expand(3, 1, Q, K)

    try:
        value = build(KEEP)
    except RuntimeError:  # shapes that do not fit
        return
    node = make_fx(build, pre_dispatch=True, tracing_mode="fake")(KEEP).graph.output_node().args[0]
    try:
        found = visible(step(node).within(Q, K), keep=keep, hidden=lambda v: v != keep)
    except Unprovable:
        return
    if found is None:
        return
    shown = (value == keep)[:, 0]
    wanted = shown[:, -1:].expand(-1, Q, -1) if found.keyed else torch.ones_like(shown)
    assert torch.equal(shown, wanted & torch.ones(Q, K, dtype=torch.bool).tril() if found.causal else wanted)
