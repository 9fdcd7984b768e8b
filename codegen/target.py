"""What a target is: where kernels run, what it has code for, and what suits it."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch

from polyattn.codegen.phases import Choose
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.rewriter.algebra.monomials import Basis

TILE_ELEMENTS = 1 << 19
"""Elements of one block's feature tile, all heads of a group together."""


class Fused(NamedTuple):
    """A fused exact kernel below autograd.

    ``forward(q, k, v, scale, is_causal)``: output and log-sum-exp [B, H, n_q];
    ``backward(g, q, k, v, out, lse, scale, is_causal)``: dq, dk, dv. Tensors are [B, H, n, wide], their last axis
    contiguous.

    Where ``masked``, both take a mask that is added to the scores as one argument more: [B|1, H|1, n_q|1, n_k|1] with
    any strides, of the dtype of q, or float32 beside a half-precision q. In a row whose scores are all far from 0 the
    backward is wrong: log-sum-exp has rounded away the logarithm of how many they are.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    multiple: int
    """The head dim must be a multiple of this."""
    masked: bool


class TileCosts(NamedTuple):
    """Seconds of heads in tiles, in those of torch's fused exact attention of the same pairs.

    Measured with d = 32 on a CPU of two cores; ``benchmarks/tile_costs.py`` measures them again.
    """

    near: float
    """Of a near pair."""
    far: float
    """Of what there is for every token and tile, times 1 / T_q + 1 / T_k."""
    fixed: float
    """Of what there is for every head whatever its length, in pairs of tokens."""


PLAIN = TileCosts(2.0, 11.0, 1.2e7)
"""Of torch code."""


class Target(abc.ABC):
    """Base of the targets; ``polyattn.codegen.targets.TARGETS`` lists them, the preferred one first."""

    name: ClassVar[str]
    may_fail: ClassVar[bool] = False
    """Whether a device may refuse kernels that were emitted, so that the next target runs them."""
    tiles: ClassVar[bool] = False
    """Whether it has code for programs in tiles."""
    added_masks: ClassVar[bool] = False
    """Whether torch's own attention of its devices takes a mask that is added to the scores, forward and backward, and
    beside half-precision queries in float32 too."""

    def __init__(self) -> None:
        self._failed: set[KernelSpec] = set()

    def runs(self, spec: KernelSpec) -> bool:
        """Whether the target has code for a specification, which has not failed on a device of this process."""
        return self.unsupported(spec) is None and spec not in self._failed

    def fail(self, spec: KernelSpec, device: torch.device, error: Exception) -> None:
        """Remember that a device cannot take a kernel (shared memory, an old Triton), and say so once."""
        if spec not in self._failed:
            self._failed.add(spec)
            logging.getLogger("polyattn").warning(
                "%s kernels of the %s do not run on %s; plain torch runs instead: %s",
                self.name,
                spec.name,
                device,
                error,
            )

    def reset(self) -> None:
        """Forget which kernels have failed."""
        self._failed.clear()

    def tile_costs(self, differentiated: bool, dtype: torch.dtype) -> TileCosts:
        """What programs in tiles cost, of tensors of a dtype: forward alone, or forward and backward."""
        return PLAIN

    @abc.abstractmethod
    def available(self, device: torch.device) -> bool:
        """Whether this target runs kernels on a device."""

    @abc.abstractmethod
    def unsupported(self, spec: KernelSpec) -> str | None:
        """Why this target has no code for a specification; None where it has."""

    @abc.abstractmethod
    def emit(self, spec: KernelSpec) -> str:
        """The text of a specification for this target.

        Raises:
            EmitError: it is unsupported; the message is the reason.
        """

    @abc.abstractmethod
    def run(
        self,
        spec: KernelSpec,
        inputs: Mapping[str, torch.Tensor],
        scalars: Scalars,
        basis: Basis,
        block: int,
        choose: Choose | None = None,
    ) -> dict[str, torch.Tensor]:
        """Outputs of a specification by name; see :func:`polyattn.codegen.targets.run`."""

    def fused(self, q: torch.Tensor) -> Fused | None:
        """The fused exact kernel that takes tensors like this one; None where there is none that can be trusted."""
        return None

    def chunk_length(self, below: int) -> int:
        """Tokens per chunk under a causal mask: long chunks make larger matrix products, short ones fewer FLOPs.

        Every chunk leaves a state in memory, so that about the rank suits a GPU (math.md §6).

        Args:
            below: half of the least power of two that is not less than the rank.
        """
        return min(512, max(64, below))

    def heads_at_once(self, groups: int, elements: int) -> int:
        """How many key heads one run should take, each with ``groups`` heads of queries and feature tiles of
        ``elements``."""
        return max(1, TILE_ELEMENTS // max(1, groups * elements))


def block_length(rank: int, groups: int) -> int:
    """Tokens per block without a mask, so that a feature tile of one head has about TILE_ELEMENTS elements."""
    return max(16, min(2048, TILE_ELEMENTS // max(1, rank * groups)))
