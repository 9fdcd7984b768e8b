"""The paper's model, as people write models: layers softmax(X W Xᵀ) X W_V. It knows nothing of any compiler backend.

One matrix W = W_Q W_Kᵀ per head scores pairs of tokens. Between the attentions stands what acts per token: residual
connections, an activation (a GELU, alone or inside an MLP), and at the end a linear map to a vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of the model."""

    layers: int = 3
    width: int = 6
    heads: int = 1
    concat: bool = False
    """Several heads: concatenate their outputs (each is width / heads wide), or add them (each is width wide)."""
    causal: bool = False
    mlp: bool = True
    """The activation between attentions: an MLP with a GELU, or the GELU alone."""
    residual: bool = True
    vocabulary: int = 12
    score: float = 0.25
    """Size of W: the logits of the paper's bounded-entries regime are small."""
    branch: float = 0.25
    """Size of what a layer adds to its input, small enough for entries to stay bounded through eight layers."""


class Layer(nn.Module):
    """[batch, tokens, width] or [tokens, width] to the same."""

    def __init__(self, config: Config, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.heads
        value = width // heads if config.concat else width

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(shape, generator=generator))

        self.W = normal(heads, width, width, std=config.score / width)
        self.W_V = normal(heads, width, value, std=config.branch * width**-0.5)
        if config.mlp:
            self.up = normal(width, 4 * width, std=width**-0.5)
            self.down = normal(4 * width, width, std=config.branch * (4 * width) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x)
        y = x + y if self.config.residual else y
        if not self.config.mlp:
            return F.gelu(y)
        z = F.gelu(y @ self.up) @ self.down
        return y + z if self.config.residual else z

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """softmax(X W Xᵀ) X W_V, head by head."""
        each = x.unsqueeze(-3)  # [..., 1, tokens, width]: every head sees all of X
        scores = each @ self.W @ each.transpose(-2, -1)  # [..., heads, tokens, tokens]
        if self.config.causal:
            tokens = x.shape[-2]
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        outputs = torch.softmax(scores, dim=-1) @ (each @ self.W_V)  # [..., heads, tokens, value]
        return outputs.transpose(-3, -2).flatten(-2) if self.config.concat else outputs.sum(-3)


class Model(nn.Module):
    """Hidden states [batch, tokens, width] to logits [batch, tokens, vocabulary]."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(Layer(config, generator) for _ in range(config.layers))
        self.head = nn.Parameter(torch.randn(config.width, config.vocabulary, generator=generator))

    def forward(self, x: torch.Tensor, offsets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Args:
        x: input of the first layer.
        offsets: one per layer, added to its input. Zeros change nothing; their gradients are those of X, layer by
            layer.
        """
        for layer, offset in zip(self.layers, offsets, strict=True):
            x = layer(x + offset)
        return x @ self.head


def inputs(config: Config, tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Entries in [-1/2, 3/2]: bounded, and with a mean that is not 0, as the rows of trained embeddings have one.

    With entries symmetric about 0 the odd moments vanish, and with them the error of dW that degree 2 takes away
    (and degree 4): degrees 1 and 2 are then about equal for it, and so are 3 and 4.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    return 2.0 * torch.rand(batch, tokens, config.width, generator=generator) - 0.5


Loss = Callable[[torch.Tensor], torch.Tensor]


def losses(config: Config, tokens: int, seed: int = 0, batch: int = 1) -> Mapping[str, Loss]:
    """Three losses of the logits: two common ones and one that no library has."""
    generator = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(config.vocabulary, (batch, tokens), generator=generator)
    wanted = torch.randn(batch, tokens, config.vocabulary, generator=generator)
    weight = torch.linspace(0.0, 1.0, tokens)  # later tokens count more

    def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def squares(logits: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(logits, wanted.to(logits))

    def log_cosh(logits: torch.Tensor) -> torch.Tensor:
        distance = (logits - wanted.to(logits)).cosh().log().sum(-1)
        return (weight.to(distance) * distance).mean()

    return {"cross-entropy": cross_entropy, "L2": squares, "weighted log cosh": log_cosh}
