"""``explain(model, *args)``: run a model once through the compiler and say what became of its attention.

The run is isolated: random generators, buffers, gradients and arguments are as before, and the compiled code is
thrown away.
The module itself can be called, so that ``polyattn.explain(...)`` works however it was imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from polyattn.options import Options
from polyattn.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    backward: bool | str = "auto",
    **kwargs: Any,
) -> Report:
    """What polyattn does to the attention of a model, decided by running it once on these inputs.

    Args:
        model: a module or a function, compiled or not.
        args, kwargs: its inputs.
        options: as for ``torch.compile(model, backend="polyattn", options=...)``; ``inner`` is "eager" unless it is
        given.
        backward: "auto" runs the backward as well when an output requires grad; True and False decide it.

    Returns:
        one report over all graphs of the model (``Report.graphs`` > 1 means graph breaks).
    """
    chosen = _eager_unless_told(options)
    found: list[Report] = []
    lock = threading.Lock()

    def keep(report: Report) -> None:
        with lock:
            found.append(report)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        from polyattn.backend import compile_graph

        return compile_graph(gm, example_inputs, chosen, keep)

    target = getattr(model, "_orig_mod", model)
    with _isolated(target):
        inputs, named = pytree.tree_map(_copy, (args, kwargs))
        compiled = torch.compile(target, backend=backend, **_SEPARATE)
        outputs = compiled(*inputs, **named)
        _run_backward(target, outputs, (inputs, named), backward)
    return Report.merged(found, chosen)


def _eager_unless_told(options: Options | Mapping[str, Any] | None) -> Options:
    chosen = Options.make(options)
    told = isinstance(options, Options) or (options is not None and "inner" in options)
    return chosen if told else dataclasses.replace(chosen, inner="eager")


def _copy(value: Any) -> Any:
    """A tensor argument that the run may write to without touching the caller's."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _run_backward(model: Any, outputs: Any, inputs: Any, backward: bool | str) -> None:
    tensors = [value for value in pytree.tree_leaves(_plain(outputs)) if torch.is_tensor(value) and value.requires_grad]
    if not backward or (backward == "auto" and not tensors):
        return
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    leaves = [
        value for value in [*pytree.tree_leaves(inputs), *parameters] if torch.is_tensor(value) and value.requires_grad
    ]
    if not leaves:  # a function over parameters of its own: run the backward for its effect on the sites alone
        leaves = _graph_leaves(tensors)
    total = sum(value.abs().sum() if value.is_complex() else value.sum() for value in tensors)
    assert isinstance(total, torch.Tensor), "an output requires grad"
    torch.autograd.grad(total, leaves, allow_unused=True)


def _plain(outputs: Any) -> Any:
    """Outputs as containers that pytree knows: mappings with attributes (as model libraries return) become dicts."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    return dict(outputs) if isinstance(outputs, Mapping) else outputs


def _graph_leaves(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    stack: list[Any] = [value.grad_fn for value in tensors]
    seen: set[Any] = set()
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.append(function.variable)
        stack.extend(next_function for next_function, _ in function.next_functions)
    return found


@contextlib.contextmanager
def _isolated(model: Any) -> Iterator[None]:
    """Random generators and buffers as before; compiled code of this run does not count against later
    recompilations."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    saved = [buffer.detach().clone() for buffer in buffers]
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    with torch.random.fork_rng(devices=devices), _fresh_compiler_limits():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)


@contextlib.contextmanager
def _fresh_compiler_limits() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1_000_000, accumulated_recompile_limit=1_000_000):
        yield


# where torch has it: cache entries of this run do not count for the user's own torch.compile of the same code
_SEPARATE: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


class _CallableModule(types.ModuleType):
    """``polyattn.explain`` is this module once it is imported; calling it calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
