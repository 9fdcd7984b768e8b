"""``torch.compile(model, backend="polyattn")``: passes, inner compiler, and the way back when something goes wrong.

The entry point ``torch_dynamo_backends`` names :func:`polyattn`. An exception inside the passes, or inside the inner
compiler while it works on the rewritten graph, leaves the user's graph untouched: it is compiled by the inner compiler
alone, the report says why (``Report.failure``), and one warning is logged. Mistakes of the user (options,
``expect_sites``) raise.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.fx as fx

from polyattn.errors import ExpectSitesError, OptionValueError
from polyattn.inner import compile_inner
from polyattn.options import Options
from polyattn.report.model import Report, SiteReport

log = logging.getLogger("polyattn")

_lock = threading.Lock()
_reports: list[Report] = []
_graph_ids = itertools.count()


def polyattn(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, as Dynamo hands them over.
        options: the ``options=`` of ``torch.compile``; names and values are those of :class:`polyattn.Options`.
        mode: the ``mode=`` of ``torch.compile``, handed to inductor.

    Raises:
        UnknownOptionError, OptionValueError: see :class:`polyattn.Options`.
        ExpectSitesError: fewer attention sites than ``expect_sites`` (torch wraps all three in BackendCompilerFailed).
    """
    chosen = Options.make(options)
    if mode is not None:
        chosen = _with_mode(chosen, mode)
    return compile_graph(gm, example_inputs, chosen, _keep)


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, keep: Callable[[Report], None]
) -> Callable[..., Any]:
    """Rewrite and compile one graph; ``keep`` receives its report. Safe to call from several threads."""
    with _lock:
        graph_id = str(next(_graph_ids))
    rewritten: fx.GraphModule | None = None
    report = Report(graph_id=graph_id, options=options)
    try:
        rewritten, report = _passes(gm, example_inputs, options, graph_id)
    except Exception as error:
        report = _failed(report, error, "rewriting")
    _check_expectation(report, options)
    if rewritten is not None:
        try:
            compiled = compile_inner(rewritten, example_inputs, options)
        except OptionValueError:
            raise
        except Exception as error:
            if _steers_dynamo(error):
                raise
            report = _failed(Report(graph_id=graph_id, options=options), error, "compiling the rewritten graph")
            rewritten = None
    if rewritten is None:
        compiled = compile_inner(gm, example_inputs, options)
    _tell(report)
    keep(report)
    return compiled


def _passes(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, graph_id: str
) -> tuple[fx.GraphModule | None, Report]:
    import torch

    from polyattn.passes import pipeline
    from polyattn.runtime import masked, ops, policy  # noqa: F401  (registers an operator)

    result = pipeline.run(
        gm,
        example_inputs,
        op=torch.ops.polyattn.attention.default,
        backward_op=torch.ops.polyattn.attention_backward.default,
        masked_op=torch.ops.polyattn.masked_attention.default,
        graph_id=graph_id,
        options=options.key(),
        version=ops.VERSION,
        why_exact=functools.partial(policy.why_site_is_exact, options=options),
    )
    sites = tuple(SiteReport.of(identifier, site, options) for identifier, site in result.sites)
    return result.graph, Report(graph_id=graph_id, options=options, sites=sites, refusals=result.refusals)


def _failed(report: Report, error: Exception, doing: str) -> Report:
    message = (
        f"{type(error).__name__} while {doing}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    )
    log.warning("polyattn: fallback to the untouched graph: %s", message)
    log.debug("polyattn: the exception", exc_info=error)
    return Report(graph_id=report.graph_id, options=report.options, failure=message)


def _steers_dynamo(error: Exception) -> bool:
    """Exceptions by which an inner compiler asks Dynamo to start over: they are no failures."""
    from torch._dynamo import exc

    return isinstance(error, (exc.RestartAnalysis, exc.SkipFrame))


def _check_expectation(report: Report, options: Options) -> None:
    expected = options.expect_sites
    if expected is None or len(report.sites) >= expected:
        return
    reasons = [str(refusal) for refusal in report.refusals] + ([report.failure] if report.failure else [])
    why = "; ".join(reasons) if reasons else "no softmax in it feeds a contraction"
    raise ExpectSitesError(f"expect_sites={expected}, but this graph holds {len(report.sites)} attention sites: {why}")


def _tell(report: Report) -> None:
    for site in report.sites:
        log.info("polyattn: %s: %s, %s mask, %s", site.where, site.spelling, site.mask, site.shape_text)
    for refusal in report.refusals:
        log.info("polyattn: refused %s", refusal)


def _with_mode(options: Options, mode: str) -> Options:
    import dataclasses

    return dataclasses.replace(options, inner_options={"mode": mode, **(options.inner_options or {})})


def _keep(report: Report) -> None:
    with _lock:
        _reports.append(report)


def reports() -> list[Report]:
    """One report per graph that this process compiled with this backend, in order."""
    with _lock:
        return list(_reports)


def reset() -> None:
    """Forget all reports and all run-time state of the sites (fits, loaded ones too, audits, verdicts); compiled graphs
    stay valid."""
    from polyattn.runtime import registry, saved_fits

    with _lock:
        _reports.clear()
    registry.reset()
    saved_fits.reset()
