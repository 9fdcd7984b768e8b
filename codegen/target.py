"""Which target runs a specification: the one place that knows devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.spec import KernelSpec


def run(
    spec: KernelSpec, inputs: Mapping[str, torch.Tensor], scalars: Mapping[str, float], head_dim: int, block: int
) -> dict[str, torch.Tensor]:
    """Outputs of a specification by name.

    Args:
        inputs: name → tensor. Query-side ones are [heads, groups, n_q, ·] (or without the last axis), key-side ones
            [heads, n_k, ·].
        scalars: values of the symbols in coefficients.
        head_dim: size of the queries' last axis.
        block: tokens per block; under a causal mask the chunk length.
    """
    return Evaluation(spec, inputs, scalars, head_dim, block).run()


def sources(spec: KernelSpec) -> dict[str, str]:
    """The text of a specification, and what each target emits for it, by name."""
    return {"specification": str(spec)}
