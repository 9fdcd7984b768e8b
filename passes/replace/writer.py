"""Adds calls to a graph before the node that they replace, and removes what only that node used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.errors import PolyattnError
from polyattn.passes.match.axes import same_sizes, shape
from polyattn.passes.prepare.dead import remove_dead

META = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "from_node",
    "seq_nr",
    "custom",
    "recompute",
    "ac_graph_id",
)
"""What a new node takes over: its source line, its module, its region of activation checkpointing."""


def autocast_regions(node: fx.Node) -> list[tuple[str, torch.dtype | None, bool]]:
    """The autocast regions of its graph that a node stands in, outermost first: device, dtype, whether it is on."""
    regions: list[Any] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is torch.amp.autocast_mode._enter_autocast:
            regions.append(other.args[:3])
        elif other.target is torch.amp.autocast_mode._exit_autocast:
            regions.pop()
    return regions


class GraphWriter:
    """Adds calls before a node, with its source line."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.meta = {key: node.meta[key] for key in META if key in node.meta}

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a call before the node whose place it takes; returns the new node."""
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(target, args)
        made.meta.update(self.meta)
        return made

    def replace(self, made: fx.Node) -> None:
        """Put a new node in the place of this one; what only it used goes as well."""
        self.node.replace_all_uses_with(made)
        remove_dead(self.node)


class ValuedWriter(GraphWriter):
    """Gives every call its fake value too, for the passes that read it."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node)
        self.regions = autocast_regions(node)

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a call before the node whose place it takes; returns the new node."""
        made = super().call(target, *args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.regions:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            with self.node.meta["val"].fake_mode, torch.no_grad():
                made.meta["val"] = target(*values)
        return made

    def permute(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        """A node with its axes in another order; itself where the order is the present one."""
        if list(order) == list(range(len(order))):
            return node
        return self.call(torch.ops.aten.permute.default, node, list(order))


class SpliceError(PolyattnError):
    """The sizes of a site cannot be expressed in its graph."""


class SizedWriter(GraphWriter):
    """Broadcasts and folds the batch axes of a site; finds symbolic sizes in the graph, without specialising them.

    Args:
        node: the node that is replaced.
        operands: nodes whose sizes may be read.
    """

    def __init__(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        super().__init__(node)
        self.operands = operands

    def size(self, size: Any) -> Any:
        """A number where the size is static, else a node that has it, else None."""
        if isinstance(size, int):
            return size
        for node in self.node.graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("val"), torch.SymInt) and same_sizes([node.meta["val"]], [size]):
                return node
        for operand in self.operands:
            for axis, mine in enumerate(shape(operand)):
                if same_sizes([mine], [size]):
                    return self.call(torch.ops.aten.sym_size.int, operand, axis)
        return None

    def sizes(self, sizes: Sequence[Any]) -> list[Any]:
        """Arguments of a reshape to these sizes; at most one of them may have no name in the graph (it becomes -1).

        Raises:
            SpliceError: two or more have none.
        """
        found = [self.size(size) for size in sizes]
        if found.count(None) > 1:
            raise SpliceError(f"the sizes {tuple(map(str, sizes))} are not available in the graph")
        return [-1 if size is None else size for size in found]

    def spread(self, node: fx.Node, have: Sequence[Any], want: Sequence[Any]) -> fx.Node:
        """A tensor [*have, ·, ·] broadcast to [*want, ·, ·]; ``want`` may have more axes, in front.

        Raises:
            SpliceError: a size to broadcast to has no name in the graph.
        """
        own = [None] * (len(want) - len(have)) + list(have)
        wide = [
            -1 if mine is not None and same_sizes([mine], [size]) else self.size(size)
            for mine, size in zip(own, want, strict=True)
        ]
        if None in wide:
            raise SpliceError(f"the size of the batch axes {tuple(map(str, want))} is not available in the graph")
        return self.call(torch.ops.aten.expand.default, node, [*wide, -1, -1])

    def fold(self, node: fx.Node, batch: Sequence[Any], pair: Sequence[Any]) -> fx.Node:
        """A tensor [*batch, *pair], or with those elements in another grouping, as [B, H, *pair].

        Raises:
            SpliceError: as :meth:`sizes`.
        """
        if len(batch) <= 2:
            lead = [*batch, *[1] * (2 - len(batch))]
            return self.call(torch.ops.aten.reshape.default, node, self.sizes([*lead, *pair]))
        return self.call(torch.ops.aten.reshape.default, node, [-1, *self.sizes([batch[-1], *pair])])
