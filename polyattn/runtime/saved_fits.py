"""Fits of a model, to be kept in a file and used by another process, or to be made anew.

    torch.save(polyattn.fits(model), "fits.pt")          # after some calls
    polyattn.load_fits(model, torch.load("fits.pt"))     # before the first call
    polyattn.refresh(model)                              # the next calls fit anew

A fit is known by the parameters that feed its attention: their names in the file, their memory in a process.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping
from typing import Any

import torch

from polyattn.errors import FitError
from polyattn.options import FIT_FIELDS, RENAMED, Options
from polyattn.rewriter.families.family import Fit
from polyattn.runtime import registry
from polyattn.runtime.registry import Key
from polyattn.runtime.state import SiteState
from polyattn.site_plan import SitePlan

log = logging.getLogger("polyattn")
_lock = threading.Lock()
_loaded: dict[tuple[tuple[int, ...], str], tuple[str, Mapping[str, Any]]] = {}
"""Name and saved fit, by pointers of the owners and number of the site in its graph."""


def fits(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """What is fitted to the heads of a model so far, by the names of the parameters that feed an attention.

    Tensors and plain values, so that ``torch.save`` and ``torch.load`` take it. Of several graphs of one model, those
    of training and of inference say, it is the fit that was used most.
    """
    names = _names(model)
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, int] = {}
    for entry in registry.entries():
        name, state = _name(entry.key, names), entry.state
        if name is None or state.fit is None or state.counters.calls < calls.get(name, 0):
            continue
        calls[name] = state.counters.calls
        fit = state.fit
        found[name] = {
            "form": _form(entry.key),
            "values": fit.values.clone(),
            "widths": list(fit.widths),
            "radius": None if fit.radius is None else fit.radius.clone(),
            "error": list(fit.error),
        }
    return found


def load_fits(model: torch.nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Use saved fits where the model's attention has none yet; audits check them like any other.

    Raises:
        FitError: a name that no parameter of the model has, or what :func:`fits` did not make; nothing is loaded then.
    """
    pointers = {name: pointer for pointer, name in _names(model).items()}
    made: dict[tuple[tuple[int, ...], str], tuple[str, Mapping[str, Any]]] = {}
    for name, fit in saved.items():
        owners, _, index = name.rpartition("#")
        missing = [owner for owner in owners.split("+") if owner not in pointers]
        if missing:
            raise FitError(f"the saved fit {name!r} needs parameters that the model does not have: {missing}")
        if not {"form", "values", "widths", "radius", "error"} <= set(fit):
            raise FitError(f"{name!r} is not a fit that polyattn.fits made: it has {sorted(fit)}")
        made[tuple(pointers[owner] for owner in owners.split("+")), index] = name, fit
    with _lock:
        _loaded.update(made)


def refresh(model: torch.nn.Module | None = None) -> int:
    """Forget what is fitted to a model's heads, or to all: the next call of each attention fits anew.

    Returns:
        how many fits were forgotten.
    """
    names = None if model is None else _names(model)
    forgotten = 0
    for entry in registry.entries():
        if names is None or _name(entry.key, names) is not None:
            forgotten += entry.state.fit is not None
            registry.update(entry, _without_fit)
    with _lock:
        for key in [k for k in _loaded if names is None or set(k[0]) <= set(names)]:
            del _loaded[key]
    return forgotten


def _without_fit(state: SiteState) -> SiteState:
    return dataclasses.replace(state.counting(wait=1), fit=None)


def reset() -> None:
    """Forget what was loaded and not used yet."""
    with _lock:
        _loaded.clear()


def taken(where: Key, plan: SitePlan, k: torch.Tensor) -> Fit | None:
    """The loaded fit of a site, if there is one that suits it; keys k [batch, kv_heads, n_k, d]."""
    with _lock:
        name, saved = _loaded.get((where.owners, where.place), ("", None))
    if saved is None:
        return None
    form, values = _form(where), saved["values"]
    given = {RENAMED.get(key, key): value for key, value in saved["form"].items()}
    differ = {key: (given.get(key), value) for key, value in form.items() if given.get(key) != value}
    if differ or tuple(values.shape) != plan.family.packed_shape(k.shape[1], k.shape[-1]):
        said = ", ".join(f"{key}={old!r} instead of {new!r}" for key, (old, new) in differ.items())
        log.warning("polyattn: the saved fit %s was made with %s; fitting anew", name, said or "other shapes")
        return None
    radius = saved["radius"]
    return Fit(
        values.to(k.device, torch.float64 if k.dtype == torch.float64 else torch.float32),
        tuple(saved["widths"]),
        None if radius is None else radius.to(k.device),
        tuple(saved["error"]),
        None,
    )


def _names(model: torch.nn.Module) -> dict[int, str]:
    """Names of parameters by their memory."""
    model = getattr(model, "_orig_mod", model)
    return {parameter.data_ptr(): name for name, parameter in model.named_parameters()}


def _name(where: Key, names: Mapping[int, str]) -> str | None:
    """The name of a site that a model's parameters feed; None for others."""
    if not where.owners or not all(owner in names for owner in where.owners):
        return None
    return "+".join(names[owner] for owner in where.owners) + f"#{where.place}"


def _form(where: Key) -> dict[str, Any]:
    """What a fit depends on beside the tensors."""
    chosen = Options.from_key(where.options)
    return {
        **{name: getattr(chosen, name) for name in FIT_FIELDS},
        "exact_keys": list(chosen.exact_keys),
        "seen": where.seen,
        "scale": where.scale,
        "d": where.d,
    }
