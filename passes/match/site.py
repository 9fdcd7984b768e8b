"""What matching yields: an attention site, or the reason why a softmax is not one. Both are values."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.bias import MaskTerm

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a softmax that feeds a contraction, or an SDPA call, is left as it is."""

    reason: str
    """In words, for the person who wrote the model."""
    node: str
    """Name of the operator in the normalised graph."""
    where: str
    """``file.py:123, in forward``: the user's line."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} (at {self.node})"


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of the site as it stands in the graph: its last two axes are (tokens, features), or reversed."""

    node: fx.Node
    transposed: bool = False
    """True when the axes stand as (features, tokens)."""

    @property
    def value(self) -> torch.Tensor:
        """The fake tensor that tracing left: its shape, dtype, device and strides."""
        value = self.node.meta["val"]
        assert isinstance(value, torch.Tensor)
        return value

    @property
    def batch(self) -> tuple[Any, ...]:
        """Sizes of the leading axes."""
        return tuple(self.value.shape[:-2])

    @property
    def tokens(self) -> Any:
        """Number of tokens, possibly symbolic."""
        return self.value.shape[-1 if self.transposed else -2]

    @property
    def features(self) -> Any:
        """Width of a token's row, possibly symbolic."""
        return self.value.shape[-2 if self.transposed else -1]


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients of an attention that stand in its own graph, each of the shape of its operand or None."""

    g: Operand
    """The gradient of the output; its batch axes may be grouped otherwise."""
    dq: Operand | None
    dk: Operand | None
    dv: Operand | None

    @property
    def given(self) -> tuple[Operand | None, ...]:
        """dq, dk and dv in this order, None where the graph has none."""
        return self.dq, self.dk, self.dv


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention: ``out = softmax(scale * q kᵀ [causal]) v``, with q, k, v nodes of the normalised graph."""

    index: int
    q: Operand
    k: Operand
    v: Operand
    out: fx.Node
    """The node that is replaced: shape [*batch, n_q, e], or [*batch, e, n_q] when ``out_transposed``."""
    out_transposed: bool
    batch: tuple[Any, ...]
    """Leading axes of ``out``; q, k and v are broadcast and reshaped (row-major) to them."""
    score_batch: tuple[Any, ...]
    """Leading axes of ``q kᵀ``; a view on the way to the softmax may have regrouped them to ``batch``."""
    grouped: bool
    """True when k and v have fewer heads and serve groups of query heads."""
    scale: float
    """The numbers that the scores are multiplied by."""
    causal: bool
    mask: str
    """``none`` or ``causal``; else what the terms are."""
    where: str
    spelling: str
    owners: tuple[fx.Node, ...]
    shape: dict[str, int | str]
    cast: torch.dtype | None
    """The dtype that autocast gives q, k and v, or None outside autocast."""
    terms: tuple[MaskTerm, ...] = ()
    """Masks and biases, from the softmax back to the product, that are not causal alone; with a causal one among them
    where there are others. Of a site that may be low rank each call looks at what they show."""
    zero_rows: bool = False
    """Rows in which every score is -inf are 0, as in torch's own attention."""
    factors: tuple[MaskTerm, ...] = ()
    """Tensors that the queries are multiplied by (``factor`` 1) or divided by (-1)."""
    sizes: tuple[tuple[fx.Node, int], ...] = ()
    """Dynamic sizes (and what is computed from them) that the scores are multiplied by (1) or divided by (-1)."""
    by_head_dim: bool = False
    """The scores are divided by the root of a head dim that is dynamic, as torch's own attention does."""
    dropout: float = 0.0
    """Probability of dropping a weight."""
    exact: str = ""
    """Why there is no low-rank form; empty where there is one. Such a site becomes ``scaled_dot_product_attention``, or
    the operator for added masks in training."""
    kept: bool = False
    """The site is such a call already and stays."""
    gradients: Gradients | None = None
    """Of attention that arrives already differentiated; replaced together with it."""
    differentiated: bool = True
    """Whether gradients may be asked for, or stand in the graph."""

    @property
    def looks(self) -> bool:
        """Whether each call looks at its masks, because they may be causal or key padding."""
        return bool(self.terms) and not self.exact

    def made_exact(self, reason: str, stays: bool) -> Site:
        """The site without a low-rank form, for a reason that its masks do not give.

        Args:
            stays: whether it stays as it is written, as torch's own attention does.
        """
        return dataclasses.replace(self, exact=reason, causal=False, kept=stays or self.zero_rows)

    @property
    def known_scale(self) -> float:
        """The scale, NaN where it depends on a dynamic size."""
        return math.nan if self.sizes or self.by_head_dim else self.scale


def where(node: fx.Node) -> str:
    """``file.py:123, in forward``: the last line of the user's code that led to this node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    mine = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not mine:
        modules = list((node.meta.get("nn_module_stack") or {}).values())
        return f"unknown line, in {modules[-1][0]}" if modules else "unknown line"
    path, line, function = mine[-1]
    return f"{os.path.basename(path)}:{line}, in {function.strip()}"


def named_shape(**sizes: Any) -> dict[str, int | str]:
    """Sizes by name, static ones as ints and symbolic ones as text; nothing is specialised."""
    return {name: size if isinstance(size, int) else str(size) for name, size in sizes.items()}
