"""What is measured of one model: a row of docs/zoo.md, and when it counts as equal to eager."""

from __future__ import annotations

import dataclasses

MODES = ("inference", "training")
OUTPUT_TOLERANCE = 2e-5
"""Largest difference of an output, in units of its largest value: float32 rounding through a few layers."""
GRADIENT_TOLERANCE = 1e-4
"""Likewise for the gradient of a parameter; one much smaller than the others is measured in a hundredth of theirs."""
COLUMNS = (
    *(
        "model",
        "attn_implementation",
        "mode",
        "attentions executed",
        "sites",
        "op / masked op / SDPA / as written",
        "refusals",
    ),
    *("outputs equal", "gradients equal", "graph breaks ours/stock"),
)
MARK = "ZOO-ROW "
"""Stands before each row in the output of a process that measures."""


@dataclasses.dataclass
class Row:
    """One model, one implementation, one mode."""

    model: str
    implementation: str
    mode: str
    executed: int | None = None
    """Attentions that the eager forward pass executes."""
    captured: int | None = None
    """How many of them stock Dynamo puts into graphs (counted like ``executed``); the rest no backend sees."""
    sites: int | None = None
    """How many of them ran as sites of a compiled graph."""
    op: int = 0
    """Sites that became ``polyattn::attention``."""
    masked: int = 0
    """Sites that became ``polyattn::masked_attention``."""
    sdpa: int = 0
    """Sites that run as ``scaled_dot_product_attention``, put there or found there; the rest stays as written."""
    refused: int | None = None
    refusals: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """Reason, source line, node; code and graph around it."""
    spellings: list[str] = dataclasses.field(default_factory=list)
    output_error: float | None = None
    stock_error: float | None = None
    """By how much stock torch.compile itself differs from eager; it is what polyattn is compared with."""
    gradient_error: float | None = None
    worst_gradient: str = ""
    breaks: int | None = None
    stock_breaks: int | None = None
    graphs: int | None = None
    failure: str = ""
    seconds: float = 0.0

    @property
    def outputs_equal(self) -> bool | None:
        return None if self.output_error is None else self.output_error <= OUTPUT_TOLERANCE

    @property
    def gradients_equal(self) -> bool | None:
        return None if self.gradient_error is None else self.gradient_error <= GRADIENT_TOLERANCE

    @property
    def sound(self) -> bool:
        """Values and gradients are equal, no graph break is ours, every attention in a graph is found or refused."""
        return (
            not self.failure
            and bool(self.outputs_equal)
            and (self.mode == "inference" or bool(self.gradients_equal))
            and self.breaks == self.stock_breaks
            and self.captured == (self.sites or 0) + (self.refused or 0)
        )

    @property
    def complete(self) -> bool:
        """Sound, and every attention became a site."""
        return self.sound and self.sites == self.executed and not self.refusals
