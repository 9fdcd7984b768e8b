"""Fixtures of every test. Importing this file changes nothing: it sets no seed, thread count, flag or environment."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)


def torch_state() -> dict[str, Any]:
    """The settings of torch that belong to the process and not to us; empty while torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device"):
        return {}
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "number of interop threads": torch.get_num_interop_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill uninitialized memory": torch.utils.deterministic.fill_uninitialized_memory,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "flush denormal": (torch.tensor(1e-41) * 1).item() == 0.0,
        "flash SDPA": torch.backends.cuda.flash_sdp_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """A test, or the code under test, that leaves torch's global state changed fails. The state is not repaired."""
    before = torch_state()
    yield
    after = torch_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"torch's global state was left changed (before, after): {changed}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled and nothing decided, before the test and after it."""
    import torch

    import polyattn

    torch._dynamo.reset()
    polyattn.reset()
    yield
    torch._dynamo.reset()
    polyattn.reset()


@pytest.fixture(scope="session")
def golden() -> Callable[..., None]:
    """``golden(name, text)``: see ``tests/golden.py``."""
    return load("golden", ROOT / "tests" / "golden.py").check


@pytest.fixture(scope="session")
def load_file() -> Callable[[str, Path], Any]:
    """``load_file(name, path)``: a file as a module (examples start with a digit), without touching ``sys.path``."""
    return load


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, f"{path} cannot be imported"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
