"""Masks: which keys a query sees, which of them it meets one by one, and what sums over the others are needed.

A low-rank form has one sum over keys for all queries only where every query sees every key. A mask splits the pairs of
tokens, M = M_near + M_far: near pairs keep their exponential, far ones enter through states (math.md §3, §6). What the
states are, a mask says once (:class:`Sums`); the algebra, the scheduler, the targets and the exact kernels ask it.
"""

from __future__ import annotations

import enum
from typing import ClassVar

import sympy
import torch

from polyattn.rewriter.algebra.tensor import KEY, QUERY, Indicator


class Sums(enum.Enum):
    """Over which keys (or queries) the states of a low-rank form are summed."""

    TOTAL = "all tokens: one state, complete after a loop over them"
    RUNNING = "all chunks before a query's own (after a key's own): running sums"
    ELSEWHERE = "all chunks but a token's own and its neighbours: totals without near chunks"
    TILES = "tiles of similar tokens: for each pair of tiles, where the call has not found the pair to be near"


class Mask:
    """Base of the masks: values without state, equal when of one class, so that they are keys of caches."""

    name: ClassVar[str]
    """As options, reports and names of forms say it."""
    sums: ClassVar[Sums]
    near_chunks: ClassVar[int]
    """In how many chunks the tokens lie that a token meets one by one; 0: it meets none."""
    title: ClassVar[str]
    """After "attention", in the header of an emitted file."""
    prefix: ClassVar[str] = ""
    """Of names of forms."""
    suffix: ClassVar[str] = ""
    """Of formulas, inside the softmax: ``softmax(s Q Kᵀ{suffix}) V``."""
    remark: ClassVar[str] = ""
    """Of formulas, after them."""
    split: ClassVar[str] = ""
    """What M_near and M_far are, in the log of a derivation."""
    gaps: ClassVar[tuple[int, int]] = (0, 0)
    """Least and greatest number of chunks that a query is after a key where they are near, or hidden beside such."""
    whole: ClassVar[str | None] = None
    """Which :class:`Indicator` the form holds; None for no factor on pairs of tokens."""
    hides: ClassVar[bool] = False
    """Whether a query does not see every key."""
    is_causal: ClassVar[bool] = False
    """The argument of torch's fused attention."""
    share: ClassVar[sympy.Rational] = sympy.Integer(1)
    """The part of the pairs that exact attention computes."""

    @property
    def exact(self) -> Mask:
        """The mask of exact attention to the same keys."""
        return self

    @property
    def tiled(self) -> bool:
        """Whether tokens are in tiles of similar ones."""
        return self.sums is Sums.TILES

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def chunked(self) -> bool:
        """Whether loops walk chunks, inside of which (or next to which) pairs are met one by one."""
        return self.near_chunks > 0

    @property
    def indicator(self) -> Indicator | None:
        """The factor on a pair of tokens in the form; None where there is none."""
        return None if self.whole is None else Indicator(self.whole, (QUERY, KEY))

    def visible(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Which keys at positions ``columns`` [..., c] queries at ``rows`` [..., s] see: bool, [..., s, c]."""
        return (rows[..., :, None] >= 0) | (columns[..., None, :] >= 0)

    def seen(self, rows: torch.Tensor, n_k: int) -> torch.Tensor | None:
        """Which of all keys queries at positions ``rows`` [s] see, bool [s, n_k]; None: every one."""
        return self.visible(rows, torch.arange(n_k, device=rows.device)) if self.hides else None

    def near(self, rows: torch.Tensor, columns: torch.Tensor, chunk: int) -> torch.Tensor:
        """Which of the pairs are met one by one, bool [..., s, c], with chunks of ``chunk`` tokens."""
        return ~self.visible(rows, columns) & False

    def sums_of(self, x: torch.Tensor, n_q: int) -> torch.Tensor:
        """Sums over the keys that each query sees: key-side values [heads, n_k, ...] → [heads, n_q or 1, ...]."""
        return x.sum(1, keepdim=True)


class NoMask(Mask):
    """Every query sees every key."""

    name, title = "none", "without a mask"
    sums, near_chunks = Sums.TOTAL, 0


class Causal(Mask):
    """Query i sees keys j ≤ i (torch's ``is_causal``, also for n_q ≠ n_k); keys of its own chunk are near (§6)."""

    name, title, prefix, suffix = "causal", "under a causal mask, in chunks", "causal_", ", causal"
    sums, near_chunks, gaps, whole = Sums.RUNNING, 1, (-1, 0), "causal"
    hides = is_causal = True
    share = sympy.Rational(1, 2)
    split = "M = M_near + M_far: j in the chunk of i, j in an earlier chunk (§6)"

    def visible(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """See :meth:`Mask.visible`."""
        return columns[..., None, :] <= rows[..., :, None]

    def near(self, rows: torch.Tensor, columns: torch.Tensor, chunk: int) -> torch.Tensor:
        """See :meth:`Mask.near`: pairs of one chunk that are visible."""
        return (rows[..., :, None] // chunk == columns[..., None, :] // chunk) & self.visible(rows, columns)

    def sums_of(self, x: torch.Tensor, n_q: int) -> torch.Tensor:
        """See :meth:`Mask.sums_of`: prefix sums."""
        last = torch.arange(n_q, device=x.device).clamp_max(x.shape[1] - 1)
        return x.cumsum(1)[:, last]


class LocalWindow(Mask):
    """Every query sees every key, and those of its own chunk and of the two next to it are near (math.md §3)."""

    name, title, prefix = "local window", "with an exact band of neighbouring chunks", "local_window_"
    remark = ", near pairs apart"
    sums, near_chunks, gaps, whole = Sums.ELSEWHERE, 3, (-1, 1), "all"
    split = "M = M_near + M_far: j in the chunk of i or next to it, j elsewhere (§3, exact near field)"

    def near(self, rows: torch.Tensor, columns: torch.Tensor, chunk: int) -> torch.Tensor:
        """See :meth:`Mask.near`."""
        return (rows[..., :, None] // chunk - columns[..., None, :] // chunk).abs() <= 1


class NearTiles(Mask):
    """Every query sees every key; each call finds which pairs of its tiles of similar tokens are near (math.md §8)."""

    name, title, prefix = "near tiles", "with exact pairs of tiles", "tiled_"
    remark = ", near pairs of tiles apart"
    sums, near_chunks, whole = Sums.TILES, 0, "all"
    split = "M = M_near + M_far: pairs of tiles that a call computes exactly, the others (§8)"

    @property
    def exact(self) -> Mask:
        """See :attr:`Mask.exact`."""
        return NoMask()


class CausalNearTiles(Causal):
    """Query i sees keys j ≤ i: those of its own segment one by one, earlier ones by tiles of earlier blocks (§8)."""

    title, prefix = "under a causal mask, with exact pairs of tiles", "causal_tiled_"
    remark = ", near pairs of tiles apart"
    sums, near_chunks, gaps = Sums.TILES, 0, (0, 0)
    split = (
        "M = M_near + M_far: j in the segment of i or in a near tile of an earlier block, j in another tile of one "
        "(§8); below, one block"
    )

    @property
    def exact(self) -> Mask:
        """See :attr:`Mask.exact`."""
        return Causal()


NONE, CAUSAL, LOCAL_WINDOW = NoMask(), Causal(), LocalWindow()
NEAR_TILES, CAUSAL_NEAR_TILES = NearTiles(), CausalNearTiles()
MASKS: tuple[Mask, ...] = (NONE, CAUSAL, LOCAL_WINDOW)
"""Those whose near pairs are known by position; the others are for families that find theirs."""
