"""The reference target: plain torch on any device, block by block, by what a specification means."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.codegen.evaluate import Evaluation
from polyattn.codegen.evaluate_tiles import TileEvaluation
from polyattn.codegen.phases import Choose
from polyattn.codegen.spec import KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import Target
from polyattn.rewriter.algebra.monomials import Basis


class ReferenceTarget(Target):
    """Runs every specification everywhere."""

    name = "specification"

    def available(self, device: torch.device) -> bool:
        """Any device."""
        return True

    def unsupported(self, spec: KernelSpec) -> str | None:
        """Nothing is unsupported: this is what a specification means."""
        return None

    def emit(self, spec: KernelSpec) -> str:
        """The specification itself, as text."""
        return str(spec)

    def run(
        self,
        spec: KernelSpec,
        inputs: Mapping[str, torch.Tensor],
        scalars: Scalars,
        basis: Basis,
        block: int,
        choose: Choose | None = None,
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Target.run`."""
        if spec.tiled:
            assert choose is not None, "a specification in tiles needs a choice of near pairs"
            return TileEvaluation(spec, inputs, scalars, choose, block).run()
        return Evaluation(spec, inputs, scalars, basis, block).run()


REFERENCE = ReferenceTarget()
