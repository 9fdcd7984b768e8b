"""What a match must know about the whole graph: order, regions of autocast and no_grad, and mutation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import NotAttention
from polyattn.passes.prepare.normalize import mutated_arguments, roots

_LOW = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts; float64 it leaves alone


class Context:
    """Facts about a normalised graph, computed once per match."""

    def __init__(self, graph: fx.Graph, parameters: frozenset[fx.Node]) -> None:
        self.parameters = parameters
        self.order: dict[fx.Node, int] = {}
        self._region: dict[fx.Node, int] = {}
        self._roots = roots(graph)
        self._writes: list[tuple[int, fx.Node]] = []
        self._casts: list[dict[str, torch.dtype | None]] = [{}]
        stack: list[dict[str, torch.dtype | None]] = []
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name == "_enter_autocast":
                device, dtype, enabled = node.args[:3]
                stack.append(self._casts[-1])
                chosen = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))
                self._casts.append({**self._casts[-1], str(device): chosen if enabled else None})
            elif name == "_exit_autocast":
                self._casts.append(stack.pop() if stack else {})
            elif name == "_set_grad_enabled":
                self._casts.append(self._casts[-1])
            self._region[node] = len(self._casts) - 1
            self._writes.extend((position, self._roots[written]) for written in mutated_arguments(node))

    def autocast(self, node: fx.Node) -> torch.dtype | None:
        """The dtype that autocast gives a contraction here, or None (outside autocast, and for float64)."""
        value = node.meta["val"]
        region = self._casts[self._region[node]]
        device = value.device.type
        if device in region:
            dtype = region[device]
        else:
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return dtype if value.dtype in _LOW else None

    def check_one_region(self, path: Sequence[fx.Node], node: fx.Node) -> None:
        """All of an attention runs under the same grad mode and autocast."""
        if len({self._region[step] for step in path}) > 1:
            raise NotAttention("the attention crosses the border of a no_grad or autocast region", node)

    def check_stable(self, path: Sequence[fx.Node], operands: Sequence[fx.Node], out: fx.Node) -> None:
        """Nothing on the path is written to; q, k and v are not written to between their use and ``out``."""
        start = min((self.order[step] for step in path), default=self.order[out])
        fresh = {self._roots[step] for step in path} - {self._roots[operand] for operand in operands}
        held = {self._roots[operand] for operand in operands}
        for position, root in self._writes:
            if root in fresh or (root in held and start <= position < self.order[out]):
                raise NotAttention("a tensor of the attention is changed in place on the way", out)

    def check_unmutated(self, value: Any, node: fx.Node) -> None:
        """No value that a mask is made of is ever written to (its structure would not tell its contents)."""
        written = {root for _, root in self._writes}
        stack, seen = [value], set()
        while stack:
            item = stack.pop()
            if not isinstance(item, fx.Node) or item in seen:
                continue
            seen.add(item)
            if self._roots[item] in written:
                raise NotAttention("the mask is changed in place after it was made", node)
            stack.extend(item.all_input_nodes)
