"""How much compile time polyattn adds to a 12-layer GPT-style model (examples/gpt_model.py), forward and backward.

python benchmarks/compile_time.py [--layers 12] [--tokens 256] [--repeats 3]

Every measurement is a process of its own with torch's caches off and one thread: the first training step (which
compiles) and the fastest of three later ones; their difference is the compile time. It is given on the clock and as
processor time, of the process and the C++ compilers it starts, which other work on the machine changes less.
Configurations take turns, the table shows medians. Two parts of polyattn's share are timed inside: its passes over the
graph, and the first derivation of the kernels, which happens once per process and form, at the first call. Losses are
compared with eager before anything is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "eager": ("eager", None),
    "polyattn, inner eager, exact": ("polyattn", {"inner": "eager", "policy": "exact"}),
    "polyattn, inner eager, low rank": ("polyattn", {"inner": "eager", "policy": "low_rank"}),
    "inductor": ("inductor", None),
    "polyattn, inner inductor, exact": ("polyattn", {"inner": "inductor", "policy": "exact"}),
    "polyattn, inner inductor, low rank": ("polyattn", {"inner": "inductor", "policy": "low_rank"}),
}
EXAMPLES = Path(__file__).parent.parent / "examples"
BASELINES = {"eager": "eager", "inductor": "inductor"}
"""Inner compiler → the configuration that polyattn's compile time is compared with."""
GATE = {"exact": 1e-5, "low rank": 1e-2}
"""Relative difference of the loss from eager's that is allowed."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=list(CONFIGURATIONS), help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.child is not None:
        print(json.dumps(measure(chosen.child, chosen.layers, chosen.tokens)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGURATIONS}
    for _ in range(chosen.repeats):
        for name, measured in found.items():
            measured.append(in_a_process(name, chosen.layers, chosen.tokens))
    print(heading(chosen.layers, chosen.tokens, chosen.repeats))
    print(table({name: medians(measured) for name, measured in found.items()}))


def in_a_process(name: str, layers: int, tokens: int) -> dict[str, float]:
    """The measurements of one configuration in a fresh process.

    Raises:
        SystemExit: it failed, or its loss is not eager's.
    """
    command = [sys.executable, __file__, "--child", name, "--layers", str(layers), "--tokens", str(tokens)]
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", **one}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr}")
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    allowed = GATE["low rank" if "low rank" in name else "exact"]
    if not measured["loss_difference"] <= allowed:
        raise SystemExit(f"{name}: the loss differs from eager's by {measured['loss_difference']:.1e}")
    return measured


def measure(name: str, layers: int, tokens: int) -> dict[str, float]:
    """Seconds of one configuration, in this process."""
    sys.path.insert(0, str(EXAMPLES))
    import gpt_model
    import torch

    import polyattn.backend
    from polyattn.runtime import policy

    backend, options = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = gpt_model.GPT(gpt_model.Config(context=tokens, layers=layers))
    inputs, targets = torch.randint(256, (2, 1, tokens))
    seconds = {"passes": 0.0, "derivation": 0.0}
    timed(polyattn.backend, "_passes", seconds, "passes")
    timed(policy, "decide", seconds, "derivation")
    compiled = torch.compile(model, backend=backend, options=options)

    def step(function: Callable[..., Any]) -> tuple[float, float, float]:
        model.zero_grad()
        clock, processor = time.perf_counter(), processor_time()
        loss = gpt_model.loss_of(function(inputs), targets)
        loss.backward()
        return time.perf_counter() - clock, processor_time() - processor, float(loss.detach())

    wanted = step(model)[2]
    first, first_processor, loss = step(compiled)
    later = [step(compiled)[:2] for _ in range(3)]
    warm, warm_processor = (min(column) for column in zip(*later, strict=True))
    if options is not None:
        report = polyattn.backend.reports()[0]
        assert report.failure is None, report.failure
        assert len(report.sites) == layers, f"{len(report.sites)} attention sites of {layers}"
    return {
        "first": first,
        "warm": warm,
        "compile": first - warm,
        "processor": first_processor - warm_processor,
        "loss_difference": abs(loss - wanted) / abs(wanted),
        **seconds,
    }


def processor_time() -> float:
    """Seconds of this process and of the compilers that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(module: Any, name: str, seconds: dict[str, float], key: str) -> None:
    """Add to ``seconds[key]`` the time that a function of a module takes."""
    original = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[key] += time.perf_counter() - start

    setattr(module, name, wrapper)


def medians(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in measured) for key in measured[0]}


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown; seconds. ``added`` is processor time, ``passes`` and ``derivation`` are clock time."""
    lines = [
        "| backend | first step | later step | compile, clock | compile, processor | added | passes | derivation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = [f"{one[key]:.2f}" for key in ("first", "warm", "compile", "processor")]
        if name in BASELINES.values():
            cells += ["", "", ""]
        else:
            base = next(base for inner, base in BASELINES.items() if f"inner {inner}" in name)
            cells += [f"{one['processor'] - found[base]['processor']:+.2f}"]
            cells += [f"{one['passes']:.2f}", f"{one['derivation']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(layers: int, tokens: int, repeats: int) -> str:
    """What was measured, on what, when."""
    sys.path.insert(0, str(EXAMPLES))
    import torch
    from machine import processor

    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{layers}-layer GPT, {tokens} tokens, forward and backward; median of {repeats} processes, in seconds.\n"
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} CPUs{load}; Python {platform.python_version()}, "
        f"torch {torch.__version__}.\n"
    )


if __name__ == "__main__":
    main()
