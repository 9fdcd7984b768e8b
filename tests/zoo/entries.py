"""The registry of the zoo: models of public packages, built with small random weights, and inputs for them.

Every entry of ``ZOO`` builds ``(module, args, kwargs)`` for one implementation of attention. Nothing is downloaded.
Dropout is 0, so that an eager and a compiled run can be compared; weights are large enough that attention is far
from uniform and a lost mask or a wrong scale shows in the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    name: str
    package: str
    implementations: tuple[str, ...]
    build: Callable[[str], Built]
    note: str = ""


ZOO: dict[str, Entry] = {}
BOTH = ("eager", "sdpa")
B, N, V = 2, 12, 67  # batch, tokens, vocabulary


def entry(name: str, package: str, *implementations: str, note: str = "") -> Callable[[Callable[[str], Built]], Any]:
    def add(build: Callable[[str], Built]) -> Callable[[str], Built]:
        assert name not in ZOO, name
        ZOO[name] = Entry(name, package, implementations or ("as written",), build, note)
        return build

    return add


def build(name: str, implementation: str, seed: int = 0) -> Built:
    """The model with its weights, in float32 on the CPU."""
    torch.manual_seed(seed)
    prepare(ZOO[name].package)
    module, args, kwargs = ZOO[name].build(implementation)
    enlarge(module)
    return module, args, kwargs


def enlarge(module: nn.Module) -> None:
    """Weights of unit gain, biases of 0.1: what packages start from (0.02) makes every attention nearly uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.dtype.is_floating_point:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.5 / fan_in**0.5))
            else:
                parameter.add_(0.1 * noise)


_libraries: list[Any] = []


def prepare(package: str) -> None:
    """Import a package; where torchvision lacks its compiled operators (another build), declare the two that its import
    asks for: no model of the zoo runs them."""
    if package in ("transformers", "timm", "vit_pytorch", "diffusers") and not _libraries:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
    importlib.import_module(package)
    if package == "transformers":
        import transformers

        transformers.logging.set_verbosity_error()


def ids(*shape: int, vocabulary: int = V) -> torch.Tensor:
    """Token ids from 3 on: the small ones are padding, begin and end."""
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(2))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def padding(side: str, tokens: int = N) -> torch.Tensor:
    """An attention mask whose second row has four padded tokens."""
    mask = torch.ones(B, tokens, dtype=torch.long)
    if side == "right":
        mask[1, -4:] = 0
    else:
        mask[1, :4] = 0
    return mask
