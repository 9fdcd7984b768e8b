"""Chains of views, tidied where decompositions leave axes of size one wandering about.

    permute(unsqueeze(permute(x)))      → x squeezed, permuted once, unsqueezed
    view(view(x, a), b)                 → view(x, b), and so behind a squeeze or unsqueeze
    squeeze(view(x, [.., 1, ..]))       → view(x, [.., ..])

Below autograd an einsum is such a chain around one bmm; matching reads the pair (query, key) off the last two axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import TRANSPOSE, one, packet, shape
from polyattn.passes.match.mask_nodes import argument
from polyattn.passes.replace.writer import ValuedWriter

_aten = torch.ops.aten
_SIZED = {_aten.view, _aten.reshape, _aten._unsafe_view}
_RANKS = {_aten.unsqueeze, _aten.squeeze}
_MOVES = TRANSPOSE | _RANKS


def tidy_views(graph: fx.Graph) -> None:
    """Rewrite the chains of a normalised graph."""
    moved: dict[fx.Node, tuple[fx.Node, list[int | None]]] = {}
    for node in list(graph.nodes):
        if packet(node) in _MOVES:
            _move(node, moved)
    for node in list(graph.nodes):
        if packet(node) in _SIZED | _RANKS:
            _regroup(node)


def _move(node: fx.Node, moved: dict[fx.Node, tuple[fx.Node, list[int | None]]]) -> None:
    """Follow the axes of the chain's root through this step; of a longer chain write one step of each kind."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    plain: list[int | None] = [None if one(size) else axis for axis, size in enumerate(shape(source))]
    root, axes = moved.get(source, (source, plain))
    axes = _moved(node, axes)
    moved[node] = root, axes
    singles = [axis for axis, size in enumerate(shape(root)) if one(size)]
    kept = [axis for axis in range(len(shape(root))) if axis not in singles]
    order = [kept.index(axis) for axis in axes if axis is not None]
    if root is source and (packet(node) in _RANKS or order != sorted(order)):
        return
    write = ValuedWriter(node)
    made = root
    if order == sorted(order) and len(axes) == len(shape(root)) and _places(axes) == singles:
        write.replace(root)
        return
    if singles:
        made = write.call(_aten.squeeze.dims, made, singles)
    made = write.permute(made, order)
    for place in _places(axes):
        made = write.call(_aten.unsqueeze.default, made, place)
    moved[made] = root, axes
    write.replace(made)


def _places(axes: list[int | None]) -> list[int]:
    return [place for place, axis in enumerate(axes) if axis is None]


def _moved(node: fx.Node, axes: list[int | None]) -> list[int | None]:
    """The axes after one step, None for those of size one."""
    kind, rank = packet(node), len(axes)
    if kind is _aten.unsqueeze:
        place = int(argument(node, 1, "dim")) % (rank + 1)
        return [*axes[:place], None, *axes[place:]]
    if kind is _aten.squeeze:
        return [axis for place, axis in enumerate(axes) if place not in _squeezed(node, _places(axes), rank)]
    if kind is _aten.permute:
        order = [int(dim) % rank for dim in argument(node, 1, "dims")]
    elif kind is _aten.transpose:
        order = list(range(rank))
        first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = second, first
    elif kind is _aten.mT:
        order = [*range(rank - 2), rank - 1, rank - 2]
    else:
        order = list(reversed(range(rank)))
    return [axes[place] for place in order]


def _squeezed(node: fx.Node, ones: list[int], rank: int) -> list[int]:
    """The axes that a squeeze takes away, of those of size one."""
    dims: Any = node.args[1] if len(node.args) > 1 else ones
    dims = [dims] if isinstance(dims, int) else dims
    return [place for place in ones if place in [int(dim) % rank for dim in dims]]


def _regroup(node: fx.Node) -> None:
    """A view of a view, or a squeeze or unsqueeze of one, is one view."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if packet(node) in _SIZED:
        if packet(source) in _SIZED | _RANKS:
            node.target, node.args = _aten.reshape.default, (source.args[0], *node.args[1:])
        return
    if packet(source) not in _SIZED:
        return
    sizes: list[Any] = list(argument(source, 1, "size"))
    rank = len(sizes)
    if packet(node) is _aten.unsqueeze:
        sizes.insert(int(argument(node, 1, "dim")) % (rank + 1), 1)
    else:
        gone = _squeezed(node, [place for place, size in enumerate(shape(source)) if one(size)], rank)
        sizes = [size for place, size in enumerate(sizes) if place not in gone]
    node.target, node.args, node.kwargs = _aten.reshape.default, (source.args[0], sizes), {}
