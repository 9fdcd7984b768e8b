"""Dynamo graph → aten graph: every spelling becomes a few ``aten`` calls, before autograd and before decompositions.

``normalize(gm, example_inputs)`` interprets the graph under ``make_fx(..., pre_dispatch=True)`` with the fake
tensors that
Dynamo made (so symbolic sizes survive and nothing is specialised). What the trace must not lose, and how it is kept:

* source lines, module stacks: ``preserve_node_meta``; names, sources and metadata of placeholders: copied over;
* ``_enter_autocast``, ``_set_grad_enabled``: recorded by pre-dispatch tracing as calls, in order;
* higher-order operators (activation checkpointing, ``autograd.Function``, flex attention, ...): kept as calls;
  bodies of
  ``tag_activation_checkpoint`` are normalised themselves and keep their ``.meta``; all others are left as they are;
* tensors held by the graph module (``get_attr``): lifted to inputs for the trace, and put back afterwards;
* transforms of torch.func (grad, vjp, vmap, ...): such a graph is traced below autograd instead, so that an attention
  and its gradients stand in it side by side (:mod:`polyattn.passes.match.joint`);
* in-place calls on tensors the graph itself has just made (``scores.masked_fill_(...)``) become their functional form;
  every other in-place call stays in the graph, and matching takes care around it.

The input graph is never changed. Any exception is the caller's to handle (it then runs the untouched graph).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.fx.traceback
import torch.utils._pytree as pytree
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)

_TRACE_LOCK = threading.RLock()  # make_fx and preserve_node_meta keep module-level state
_TRANSFORMS = ("torch._functorch", "torch._C._functorch")
_PLACEHOLDER_META = ("tensor_dict", "grapharg", "steal_arg", "nn_module_stack", "stack_trace")


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The same computation in pre-autograd aten operators, as a new module; every node holds its fake value in
    ``meta["val"]``.

    Args:
        gm: a graph as Dynamo hands it to a backend (or any ``symbolic_trace``); it is not modified.
        example_inputs: one value per placeholder: tensors, parameters, fake tensors, symbolic or plain numbers.
    """
    with _TRACE_LOCK:
        mode = detect_fake_mode(list(example_inputs)) or FakeTensorMode(allow_non_fake_inputs=False)
        fakes = [_fake(mode, value) for value in example_inputs]
        result = _trace(gm, fakes, mode, pre_dispatch=not has_transforms(gm))
    _copy_placeholders(gm, result)
    result.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
        _unregister_constants(result, set(gm._param_name_to_source))  # type: ignore[arg-type]
    functionalize_fresh(result.graph)
    for node in result.graph.nodes:
        body = checkpoint_body(node)
        if body is not None:
            functionalize_fresh(body.graph)
            body.recompile()
    result.graph.lint()
    result.recompile()
    return result


def has_transforms(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph calls transforms of torch.func (grad, vjp, jacrev, vmap, …)."""
    calls = (node.target for node in gm.graph.nodes if node.op == "call_function")
    return any((getattr(target, "__module__", None) or "").startswith(_TRANSFORMS) for target in calls)


def checkpoint_body(node: fx.Node) -> fx.GraphModule | None:
    """The body of a ``tag_activation_checkpoint`` call, or None for any other node."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    body = node.args[0]
    if not (isinstance(body, fx.Node) and body.op == "get_attr"):
        return None
    module = _attribute(node.graph.owning_module, str(body.target))
    return module if isinstance(module, fx.GraphModule) else None


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """The fake tensor that Dynamo (and later AOTAutograd) uses for an example input."""
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        return value
    tracing = TracingContext.try_get()
    contexts: Any = tracing.tensor_to_context if tracing is not None else {}
    context = contexts.get(value)
    if context is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(value, symbolic_context=context, source=context.tensor_source, trace=False)


class _Tracer(fx.Interpreter):
    """Runs a Dynamo graph while make_fx records; higher-order operators become calls, tensors of the module inputs."""

    def __init__(self, gm: fx.GraphModule, held: dict[str, Any], mode: FakeTensorMode, pre_dispatch: bool) -> None:
        super().__init__(gm)
        self.held = held
        self.mode = mode
        self.pre_dispatch = pre_dispatch
        self.outside: list[tuple[str, torch.dtype, bool]] = []
        """What autocast was outside the regions that the trace is in: the values inside have the region's dtypes."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.held[target] if target in self.held else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, HigherOrderOperator):
            return self._higher_order(target, args, kwargs)
        made = super().call_function(target, args, kwargs)
        if target is torch.amp.autocast_mode._enter_autocast:  # make_fx has only recorded it
            device, dtype, enabled = args[:3]
            self.outside.append((device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)))
            _set_autocast(device, dtype, enabled)
        elif target is torch.amp.autocast_mode._exit_autocast:
            _set_autocast(*self.outside.pop())
        return made

    def leave_regions(self) -> None:
        """Autocast as it was before the trace, also where that ended inside a region."""
        while self.outside:
            _set_autocast(*self.outside.pop())

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A submodule with the inputs that stand for its tensors (Dynamo inlines modules; other tracers keep them)."""
        module = self.fetch_attr(target)
        tensors = {name: self.held[f"{target}.{name}"] for name in _tensors(module)}
        return torch.func.functional_call(module, tensors, args, kwargs)

    def _higher_order(self, target: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        proxies = get_proxy_mode()
        assert proxies is not None, "a trace is running"
        tracer: Any = proxies.tracer
        with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
            if target is torch.ops.higher_order.tag_activation_checkpoint and isinstance(args[0], fx.GraphModule):
                inner = [_detached_fake(self.mode, value) for value in args[1:]]
                body = _trace(args[0], inner, self.mode, self.pre_dispatch)
                body.meta.update(args[0].meta)
                args = (body, *args[1:])
                result = pytree.tree_map(lambda node: _value(node), body.graph.output_node().args[0])
            else:
                result = self._current.meta["example_value"]
            result = pytree.tree_map(lambda value: _detached_fake(self.mode, value), result)
        root = tracer.root

        def proxy(value: Any) -> Any:
            if isinstance(value, torch.nn.Module):
                name = tracer.get_fresh_qualname("body")
                root.register_module(name, value)
                return tracer.create_proxy("get_attr", name, (), {})
            return tracer.unwrap_proxy(value)

        proxy_args, proxy_kwargs = pytree.tree_map(proxy, (tuple(args), kwargs))
        out = tracer.create_proxy("call_function", target, proxy_args, proxy_kwargs)
        return track_tensor_tree(result, out, constant=None, tracer=tracer)

    def run_node(self, n: fx.Node) -> Any:
        self._current = n
        return super().run_node(n)


def _set_autocast(device: str, dtype: torch.dtype | None, enabled: bool) -> None:
    torch.set_autocast_enabled(device, enabled)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, fx.Node) else node


def _detached_fake(mode: FakeTensorMode, value: Any) -> Any:
    """A new fake tensor of our mode with the same metadata (Dynamo's own values belong to other fake modes)."""
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        fresh = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        return fresh.requires_grad_(value.requires_grad and value.dtype.is_floating_point)


def _trace(gm: fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode, pre_dispatch: bool) -> fx.GraphModule:
    """make_fx of the graph; tensors held by the module come back as attributes of the result."""
    held: dict[str, torch.Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(value := _attribute(gm, str(node.target)), torch.Tensor):
            held[str(node.target)] = value
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            held.update({f"{node.target}.{name}": value for name, value in _tensors(module).items()})
    names = list(held)
    count = len(fakes)

    def run(*values: Any) -> Any:
        tracer = _Tracer(gm, dict(zip(names, values[count:], strict=True)), mode, pre_dispatch)
        try:
            return tracer.run(*values[:count])
        finally:
            tracer.leave_regions()

    extra = [mode.from_tensor(value, static_shapes=True) for value in held.values()]
    with contextlib.ExitStack() as stack:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not mode:
            stack.enter_context(mode)
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        result = make_fx(run, pre_dispatch=pre_dispatch, tracing_mode="real")(*fakes, *extra)
    placeholders = [node for node in result.graph.nodes if node.op == "placeholder"]
    for name, node in zip(names, placeholders[count:], strict=True):
        _hold(result, name, held[name])
        with result.graph.inserting_before(node):
            attribute = result.graph.get_attr(name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        result.graph.erase_node(node)
    result.recompile()
    return result


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _hold(gm: fx.GraphModule, target: str, value: torch.Tensor) -> None:
    """Give ``gm`` the attribute ``target`` (dots make submodules), a parameter or a buffer as it was."""
    *path, name = target.split(".")
    module: torch.nn.Module = gm
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _unregister_constants(gm: fx.GraphModule, known: set[str]) -> None:
    """Constants of the trace (``torch.tensor(2.0)``) are no buffers of the model: AOTAutograd asks Dynamo for their
    source."""
    for name in [name for name in gm._buffers if name.startswith("_tensor_constant") and name not in known]:
        value = gm._buffers.pop(name)
        object.__setattr__(gm, name, value)


def _copy_placeholders(source: fx.GraphModule, result: fx.GraphModule) -> None:
    """Names, sources and metadata of the placeholders: AOTAutograd and the report read them."""
    old = [node for node in source.graph.nodes if node.op == "placeholder"]
    new = [node for node in result.graph.nodes if node.op == "placeholder"]
    for before, after in zip(old, new, strict=True):
        after.target = before.target
        after.type = before.type
        after._rename(before.name)
        for key in _PLACEHOLDER_META:
            if key in before.meta:
                after.meta[key] = before.meta[key]
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source


# ---------------------------------------------------------------------------------------------------------------------
# In-place calls


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a call writes to (by its schema)."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    if not schema.is_mutable or node.target is torch.ops.aten.detach_.default:  # changes no value
        return []
    written: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            written.extend(item for item in pytree.tree_leaves(value) if isinstance(item, fx.Node))
    return written


def roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the node whose storage it may share: views and in-place results point to what they view."""
    table: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        table[node] = node
        aliased = _aliased_argument(node)
        if aliased is not None:
            table[node] = table[aliased]
    return table


def _aliased_argument(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function":
        return None
    target: Callable[..., Any] | str = node.target
    if isinstance(target, torch._ops.OpOverload):
        aliases = any(value.alias_info is not None for value in target._schema.returns)
        maybe = target.overloadpacket in _MAYBE_VIEWS
        if (aliases or maybe) and node.args and isinstance(node.args[0], fx.Node):
            return node.args[0]
        return None
    if getattr(target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


_aten = torch.ops.aten
_MAYBE_VIEWS = {_aten.reshape, _aten.contiguous, _aten.to, _aten.dropout, _aten.flatten, _aten.numpy_T, _aten.matrix_H}


_FUNCTIONAL = {"add_", "sub_", "mul_", "div_", "masked_fill_", "tril_", "triu_"}  # elementwise, not touched by autocast


def functionalize_fresh(graph: fx.Graph) -> int:
    """``x.op_(...)`` → ``x = x.op(...)`` where x was made in this graph and shares storage with no other live node.

    Returns the number of calls replaced. Side conditions: x is no input, attribute or view; nothing views x; the
    functional operator exists with the same overload and gives the same dtype and shape.
    """
    count = 0
    table = roots(graph)
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node, root in table.items():
        sharing.setdefault(root, []).append(node)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        written = mutated_arguments(node)
        if len(written) != 1 or not node.args or written[0] is not node.args[0]:
            continue
        functional = _functional(node)
        base = written[0]
        # in-place results that earlier steps of this loop already turned into values of their own are bases themselves
        if functional is None or base.op != "call_function" or table[base] is not base:
            continue
        others = [other for other in sharing[base] if other not in (base, node)]
        if any(order[other] < order[node] for other in others) or mutated_arguments(base):
            continue
        node.target = functional
        base.replace_all_uses_with(node, delete_user_cb=_after(node, order))
        table[node] = node
        sharing[base] = [base]
        sharing[node] = [node, *others]
        for other in others:
            table[other] = node
        count += 1
    return count


def _after(node: fx.Node, order: dict[fx.Node, int]) -> Callable[[fx.Node], bool]:
    return lambda user: user is not node and order[user] > order[node]


def _functional(node: fx.Node) -> Any:
    """The functional overload of an in-place aten call with an unchanged result, or None."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or name not in _FUNCTIONAL:
        return None
    functional = getattr(getattr(_aten, name[:-1]), target._overloadname, None)
    tensors = [value for value in map(_value, pytree.tree_leaves((node.args, node.kwargs))) if torch.is_tensor(value)]
    result = node.meta.get("val")
    if functional is None or not torch.is_tensor(result) or not result.dtype.is_floating_point:
        return None
    return functional if all(value.dtype in (result.dtype, torch.bool) for value in tensors) else None
