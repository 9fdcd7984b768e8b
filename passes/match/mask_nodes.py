"""What handlers of masks ask of a node: arguments, dtype, number of axes, sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an aten call, wherever it stands."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value."""
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def rank_of(node: Any) -> int:
    """The number of axes of a node's value."""
    return int(node.meta["val"].dim())


def is_one(size: Any) -> bool:
    """Whether a size is the number 1; symbolic sizes are not."""
    return isinstance(size, int) and size == 1


def same_statically(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of sizes are equal for all sizes; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
