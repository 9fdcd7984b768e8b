"""All models of the zoo, in the order of docs/zoo.md: each module named here adds its own to ``ZOO``."""

from __future__ import annotations

import importlib

from entries import ZOO, Entry, build

for module in ("of_transformers", "of_diffusers", "of_small_packages", "of_torch"):
    importlib.import_module(module)

__all__ = ["ZOO", "Entry", "build"]
