"""Which target runs a specification: the one place that knows devices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from polyattn.codegen.cpu import target as cpu_target
from polyattn.codegen.evaluate import TILE_ELEMENTS, Evaluation
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.triton import target as triton_target
from polyattn.errors import ScheduleError
from polyattn.rewriter.algebra.monomials import Basis

MAX_GRID = 65535
"""Programs along the second axis of a CUDA grid."""
_refused: set[KernelSpec] = set()
"""Specifications whose Triton kernels failed in this process."""


def heads_at_once(device: torch.device, groups: int, elements: int) -> int:
    """How many key heads one call of :func:`run` should take.

    A CPU works through them a few at a time, so that their feature tiles, ``elements`` for each of the ``groups`` of
    queries, stay in its cache; a GPU's grid takes all of them, as far as its second axis goes.
    """
    limit = MAX_GRID // groups if device.type == "cuda" else TILE_ELEMENTS // max(1, groups * elements)
    return max(1, limit)


def run(
    spec: KernelSpec, inputs: Mapping[str, torch.Tensor], scalars: Scalars, basis: Basis, block: int
) -> dict[str, torch.Tensor]:
    """Outputs of a specification by name.

    Args:
        inputs: name → tensor. Query-side ones are [heads, groups, n_q, ·] (or without the last axis), key-side ones
            [heads, n_k, ·]. Q, K and V are always among them: they give the sizes.
        scalars: values of the symbols in coefficients; those of polynomials may differ from head to head, [heads].
        basis: the monomials that the features are; of skeleton features, none but the constant one.
        block: tokens per block; under a causal mask the chunk length.
    """
    device = inputs["Q"].device
    if device.type == "cuda" and spec not in _refused and triton_target.available(device):
        try:
            return triton_target.run(spec, inputs, scalars, basis, block)
        except Exception as error:
            # Plain torch computes the same; what a device cannot take (shared memory, an old Triton) is said once.
            _refused.add(spec)
            logging.getLogger("polyattn").warning(
                "Triton kernels of the %s do not run on %s; plain torch runs instead: %s", spec.name, device, error
            )
    if device.type == "cpu":
        return cpu_target.run(spec, inputs, scalars, basis, block)
    return Evaluation(spec, inputs, scalars, basis, block).run()


def sources(spec: KernelSpec) -> dict[str, str]:
    """The text of a specification, and what each target emits for it, by name."""
    made = {"specification": str(spec)}
    for name, text in (("cpu", cpu_target.emit), ("triton", lambda spec: triton_target.emit(spec).text)):
        try:
            made[name] = text(spec)
        except ScheduleError as error:
            made[name] = f"# no code for this target: {error}"
    return made


class _DeviceRules(NamedTuple):
    chunk_length: Callable[[int], int]


def for_device(device: str) -> _DeviceRules:
    """What a device's target chooses; ``device`` is a type such as ``cpu``."""
    if device == "cpu":
        return _DeviceRules(lambda below: min(256, max(128, below // 4)))
    return _DeviceRules(lambda below: min(512, max(64, below)))
