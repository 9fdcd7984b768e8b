"""The targets there are, in order of preference: the one place that chooses between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.phases import Choose
from polyattn.codegen.reference import REFERENCE
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import Fused, Target
from polyattn.codegen.triton.target import TRITON
from polyattn.rewriter.algebra.monomials import Basis

TARGETS: tuple[Target, ...] = (TRITON, CPU, REFERENCE)


def of_device(device: torch.device) -> Target:
    """The preferred target of a device, whatever the specification."""
    return next(target for target in TARGETS if target.available(device))


def of(spec: KernelSpec, device: torch.device) -> Target:
    """The preferred target that runs a specification on a device."""
    return next(target for target in TARGETS if target.available(device) and target.runs(spec))


def fused_kernel(q: torch.Tensor) -> Fused | None:
    """The fused exact kernel for tensors like this one; None where there is none that can be trusted."""
    return of_device(q.device).fused(q)


def run(
    spec: KernelSpec,
    inputs: Mapping[str, torch.Tensor],
    scalars: Scalars,
    basis: Basis,
    block: int,
    choose: Choose | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of a specification by name.

    Args:
        inputs: name → tensor. Query-side ones are [heads, groups, n_q, ·] (or without the last axis), key-side ones
            [heads, n_k, ·]. Q, K and V are always among them: they give the sizes.
        scalars: values of the symbols in coefficients; those of polynomials may differ from head to head, [heads].
        basis: the monomials that the features are; the constant one where there are none.
        block: tokens per block; under a causal mask the chunk length; of a specification in tiles, tiles of queries.
        choose: for a specification in tiles, which pairs of tiles are near.
    """
    device = inputs["Q"].device
    chosen = of(spec, device)
    try:
        return chosen.run(spec, inputs, scalars, basis, block, choose)
    except Exception as error:
        if not chosen.may_fail:
            raise
        chosen.fail(spec, device, error)
        return of(spec, device).run(spec, inputs, scalars, basis, block, choose)


def reset() -> None:
    """Forget which kernels have failed on a device of this process."""
    for target in TARGETS:
        target.reset()


def sources(spec: KernelSpec) -> dict[str, str]:
    """The text of a specification, and what each target emits for it, by name."""
    made = {}
    for target in reversed(TARGETS):
        reason = target.unsupported(spec)
        made[target.name] = target.emit(spec) if reason is None else f"# no code for this target: {reason}"
    return made
