"""``explain(model, *args)``: run a model once through the compiler and say what became of its attention.

While it runs, every low-rank call is sampled: rows, weights and gradients are compared with exact attention's.

The run is isolated: random generators, buffers, gradients and arguments are as before, and the compiled code is
thrown away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from polyattn.errors import OptionValueError
from polyattn.options import Options
from polyattn.report.model import Report, SiteReport
from polyattn.report.plots import Samples
from polyattn.report.sampling import sample, with_gradients
from polyattn.rewriter.families.family import Fit
from polyattn.rewriter.masks.mask import Mask
from polyattn.runtime import registry, replay
from polyattn.runtime.observe import observing
from polyattn.runtime.registry import Entry
from polyattn.site_plan import SitePlan

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    backward: bool | str = "auto",
    samples: int = 64,
    **kwargs: Any,
) -> Report:
    """Report what polyattn does to the attention of a model, decided by running it once on these inputs.

    Args:
        model: a module or a function, compiled or not.
        args, kwargs: its inputs.
        options: as for ``torch.compile(model, backend="polyattn", options=...)``; ``inner`` is "eager" unless it is
        given.
        backward: "auto" runs the backward as well when an output requires grad; True and False decide it. It is that
        of the sum of the outputs, each with fixed weights over its last axis: a plain sum after a normalisation has no
        gradient.
        samples: number of rows of each low-rank attention that are compared with exact attention's
        (``SiteReport.samples``); 0: none. It costs a few forwards more.

    Returns:
        one report over all graphs of the model (``Report.graphs`` > 1 means graph breaks).
    Raises:
        OptionValueError, UnknownOptionError: bad options, or ``samples`` below 0.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise OptionValueError(f"samples={samples!r}: it must be an integer >= 0")
    chosen = _eager_unless_told(options)
    found: list[Report] = []
    lock = threading.Lock()

    def keep(report: Report) -> None:
        with lock:
            found.append(report)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        from polyattn.backend import compile_graph

        return compile_graph(gm, example_inputs, chosen, keep)

    def known(site: str) -> bool:
        with lock:
            return any(site == mine.identifier for report in found for mine in report.sites)

    target = getattr(model, "_orig_mod", model)
    sampler = _Sampler(known, chosen, samples)
    with _isolated(target), observing(sampler) if samples else contextlib.nullcontext():
        inputs, named = pytree.tree_map(_copy, (args, kwargs))
        compiled = torch.compile(target, backend=backend, **_SEPARATE)
        outputs = compiled(*inputs, **named)
        _run_backward(target, outputs, (inputs, named), backward)
    report = Report.merged(found, chosen)
    sites = tuple(dataclasses.replace(site, samples=sampler.of(site)) for site in report.sites)
    return dataclasses.replace(report, sites=sites)


@dataclasses.dataclass
class _Seen:
    """The last low-rank call of a state."""

    place: str
    """The site, as :func:`polyattn.runtime.registry.place` names it."""
    plan: SitePlan
    shapes: tuple[torch.Size, ...]
    mark: torch.Tensor
    """Some elements of its q, k and v, by which its backward is known: a compiler may have made them anew."""
    samples: Samples


class _Sampler:
    """Observes the calls of some sites and keeps samples of the last low-rank one of each state, but no tensor of a
    call."""

    def __init__(self, known: Callable[[str], bool], options: Options, rows: int) -> None:
        self._known, self._options, self._rows = known, options, rows
        self._lock = threading.Lock()
        self._seen: dict[Entry, _Seen] = {}

    def _generator(self, place: str, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(registry.seed(self._options, place, what))

    def forward(
        self,
        entry: Entry,
        tensors: Tensors,
        out: torch.Tensor,
        plan: SitePlan | None,
        fit: Fit | None,
        keep: torch.Tensor | None,
    ) -> None:
        """Sample a low-rank call; forget the samples of a state that has become exact."""
        if not self._known(entry.key.site):
            return
        if plan is None:
            with self._lock:
                self._seen.pop(entry, None)
            return
        with self._lock:
            if replay.inside_backward() and entry in self._seen:
                return  # a checkpoint runs a call again
        place = entry.key.place
        taken = sample(0, tensors, out, plan, fit, self._rows, self._generator(place, "samples"), keep)
        mark = replay.fingerprint(*tensors)
        with self._lock:
            self._seen.pop(entry, None)  # the last call comes last
            self._seen[entry] = _Seen(place, plan, tuple(x.shape for x in tensors), mark, taken)

    def backward(
        self,
        g: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        mask: Mask,
        gradients: Sequence[torch.Tensor | None],
        keep: torch.Tensor | None,
    ) -> None:
        """Add the errors of a backward's gradients to the samples of its forward."""
        q, k, v = tensors
        seen = self._matching((q, k, v), mask)
        if seen is None:
            return
        generator = self._generator(seen.place, "gradients")
        taken = with_gradients(seen.samples, g, (q, k, v), gradients, seen.plan, generator, keep)
        with self._lock:
            seen.samples = taken

    def _matching(self, tensors: Tensors, mask: Mask) -> _Seen | None:
        """The last call with these tensors whose gradients were not seen yet: backwards run in reverse order."""
        shapes = tuple(x.shape for x in tensors)
        with self._lock:
            open_calls = [seen for seen in self._seen.values() if not seen.samples.gradients]
        mark = None
        for seen in reversed(open_calls):
            if seen.shapes != shapes or seen.plan.mask.hides != mask.hides or seen.mark.device != tensors[0].device:
                continue
            mark = replay.fingerprint(*tensors) if mark is None else mark
            if float((mark - seen.mark).norm()) <= replay.NEAR[tensors[0].dtype] * float(seen.mark.norm()):
                return seen
        return None

    def of(self, site: SiteReport) -> tuple[Samples, ...]:
        """The samples of a site, in the order of its states."""
        with self._lock:
            found = [(number, self._seen.get(entry)) for number, entry in enumerate(registry.entries(site.identifier))]
        return tuple(dataclasses.replace(seen.samples, state=number) for number, seen in found if seen is not None)


def _eager_unless_told(options: Options | Mapping[str, Any] | None) -> Options:
    chosen = Options.make(options)
    told = isinstance(options, Options) or (options is not None and "inner" in options)
    return chosen if told else dataclasses.replace(chosen, inner="eager")


def _copy(value: Any) -> Any:
    """Copy a tensor argument, so that the run may write to it without touching the caller's."""
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
    total = sum(_weighted(value.abs() if value.is_complex() else value).sum() for value in tensors)
    assert isinstance(total, torch.Tensor), "an output requires grad"
    torch.autograd.grad(total, leaves, allow_unused=True)


def _weighted(value: torch.Tensor) -> torch.Tensor:
    """The value times fixed weights over its last axis, from 1/2 to 3/2."""
    if value.ndim == 0:
        return value
    weights = torch.rand(value.shape[-1], generator=torch.Generator().manual_seed(0)) + 0.5
    return value * weights.to(value.device, value.dtype)


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
    """Leave random generators and buffers as they were; compiled code of this run does not count against later
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
