"""Rows of attention as the model wrote them: masks and biases applied to the rounded scores, softmax, torch's autograd.

For rows that no kernel computes as eager attention does: those in which a mask hides every key, above all. A few rows
are formed at a time, so that memory stays linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from polyattn.errors import ShapeError
from polyattn.passes.match.changes import Change, Changes

ROWS = 256
"""How many rows of scores are formed at once, over all heads."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
T = TypeVar("T")


def fit(mask: torch.Tensor, scores: tuple[int, ...]) -> torch.Tensor:
    """A mask as [B|1, H|1, n_q|1, n_k|1]; axes that only repeat have size 1.

    Raises:
        ShapeError: it does not broadcast to the scores [B, H, n_q, n_k].
    """
    four = mask[(None,) * (4 - mask.ndim)]
    if four.ndim > 4 or any(have not in (1, want) for have, want in zip(four.shape, scores, strict=True)):
        raise ShapeError(f"a mask of shape {tuple(mask.shape)} does not broadcast to the scores {scores}")
    for axis in range(4):
        if four.stride(axis) == 0 and four.shape[axis] > 1:
            four = four.narrow(axis, 0, 1)
    return four


class ScoreMask(NamedTuple):
    """What happens to scores: steps in order, each with its tensor [B|1, H|1, n_q|1, n_k|1] or None; a part of a call
    has them as [heads, rows, n_k|1]."""

    steps: tuple[tuple[Change, torch.Tensor | None], ...]
    zero: bool = False
    """See :class:`polyattn.passes.match.changes.Changes`."""

    @classmethod
    def of(cls, changes: Changes, tensors: Sequence[torch.Tensor], scores: tuple[int, ...]) -> ScoreMask:
        """The mask of a call with scores [B, H, n_q, n_k].

        Raises:
            ShapeError: a tensor does not broadcast to them.
        """
        given = iter(tensors)
        return cls(
            tuple((step, fit(next(given), scores) if step.given else None) for step in changes.steps), changes.zero
        )

    @property
    def one_row(self) -> bool:
        """Whether all queries have the same, beside what is causal."""
        return all(x is None or x.shape[2] == 1 for _, x in self.steps)

    @property
    def silent(self) -> bool:
        """Whether a row in which everything is hidden is 0, without a gradient, as it is known without a look."""
        return self.zero and all(step.kind == "replace" and step.fill == -torch.inf for step, _ in self.steps)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ScoreMask:
        """The mask with other tensors."""
        steps = tuple((step, None if x is None else function(x)) for step, x in self.steps)
        return self._replace(steps=steps)

    def apply(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Scores [..., rows, n_k] after all steps; ``rows`` are the positions of their queries, int64 [rows]."""
        after = torch.arange(scores.shape[-1], device=rows.device) > rows[:, None]
        for step, tensor in self.steps:
            if step.kind == "add":
                added = scores.new_zeros(()) if tensor is None else tensor
                scores = scores + (torch.where(after, step.fill, added) if step.causal else added)
            else:
                kept = torch.ones_like(after) if tensor is None else tensor
                scores = torch.where(kept & ~after if step.causal else kept, scores, step.fill)
        return scores


class RowsOfHeads(NamedTuple):
    """Some rows of some heads of one batch element."""

    batch: int
    heads: slice
    keys: slice
    """The key heads that serve these heads."""
    rows: torch.Tensor
    """Positions, int64 [rows]."""

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor [B, H, n_q, ·], by key head: [key heads, groups · rows, ·]."""
        return self._by_key_head(x[self.batch, self.heads][:, self.rows])

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """The key heads of a tensor [B, kv_heads, n_k, ·] that serve these rows."""
        return x[self.batch, self.keys]

    def _by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        serving = self.keys.stop - self.keys.start
        return x.reshape(serving, x.shape[0] // serving * x.shape[1], x.shape[2])

    def operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Operands:
        """What these rows are computed of."""
        return self.of_queries(q), self.of_keys(k), self.of_keys(v)

    def output(self, operands: Operands, mask: ScoreMask, scale: float) -> torch.Tensor:
        """Attention as it stood in the model: [key heads, groups · rows, e]."""
        q, k, v = operands
        groups = (self.heads.stop - self.heads.start) // (self.keys.stop - self.keys.start)
        scores = mask.mapped(self._of_mask).apply(q @ k.mT * scale, self.rows.repeat(groups))
        weights = torch.softmax(scores, -1)
        if mask.zero:
            weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
        return weights.to(v.dtype) @ v

    def _of_mask(self, x: torch.Tensor) -> torch.Tensor:
        """As ``of_queries``, of a tensor whose axes may have size 1; the last one may stay so."""
        some = x[self.batch if x.shape[0] > 1 else 0]
        some = some[self.heads] if some.shape[0] > 1 else some
        some = some[:, self.rows] if some.shape[1] > 1 else some
        return self._by_key_head(some.expand(self.heads.stop - self.heads.start, len(self.rows), -1))

    def write(self, into: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows as ``of_queries`` reads them."""
        target = into[self.batch, self.heads]
        target.index_copy_(1, self.rows, rows.reshape(target.shape[0], len(self.rows), target.shape[-1]).to(into.dtype))


def _parts(alone: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Iterator[RowsOfHeads]:
    """The rows ``alone``, bool [B|1, H|1, n_q|1, 1], a few at a time; heads go together where their rows are the
    same."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    together = alone.shape[1] == 1
    for b in range(q.shape[0]):
        for h in range(alone.shape[1]):
            flags = alone[b if alone.shape[0] > 1 else 0, h, :, 0].expand(q.shape[2])
            mine = slice(0, heads) if together else slice(h, h + 1)
            keys = slice(0, k.shape[1]) if together else slice(h // groups, h // groups + 1)
            rows, step = flags.nonzero().squeeze(1), max(1, ROWS // (mine.stop - mine.start))
            for at in range(0, len(rows), step):
                yield RowsOfHeads(b, mine, keys, rows[at : at + step])


def write_rows(out: torch.Tensor, alone: torch.Tensor, tensors: Operands, mask: ScoreMask, scale: float) -> None:
    """Write the rows ``alone``, bool [B|1, H|1, n_q|1, 1], of an output [B, H, n_q, e]."""
    for part in _parts(alone, tensors[0], tensors[1]):
        part.write(out, part.output(part.operands(*tensors), mask, scale))


def add_gradients(
    made: Sequence[torch.Tensor | None],
    g: torch.Tensor,
    alone: torch.Tensor,
    tensors: Operands,
    mask: ScoreMask,
    scale: float,
) -> None:
    """Gradients of :func:`write_rows`: those of the rows of q are written to ``made``, what k and v get is added.

    Args:
        made: gradients of q, k and v, of their shapes; None where one is not wanted.
        g: gradient of the output.
    """
    dq, dk, dv = made

    def run() -> None:
        for part in _parts(alone, tensors[0], tensors[1]):
            some_q, some_k, some_v = (x.detach().requires_grad_() for x in part.operands(*tensors))
            out = part.output((some_q, some_k, some_v), mask, scale)
            got = torch.autograd.grad(out, (some_q, some_k, some_v), part.of_queries(g))
            if dq is not None:
                part.write(dq, got[0])
            if dk is not None:
                part.of_keys(dk).add_(got[1])
            if dv is not None:
                part.of_keys(dv).add_(got[2])

    with_autograd(run)


def with_autograd(function: Callable[[], T]) -> T:
    """What a function returns, run with autograd on: inside an operator it is off, but not in a thread of its own,
    whatever the caller is in the middle of."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
