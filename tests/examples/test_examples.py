"""The numbered examples run, and what they show is true; the demo, in small."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(load_file: Callable[[str, Path], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """``example("02_gpt")``: that file as a module, imported as the interpreter does it when it runs the file."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: load_file(f"example_{name}", EXAMPLES / f"{name}.py")


def test_02_gpt(example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown = example("02_gpt").main(["--tokens", "128", "--steps", "3", "--inner", "eager"])
    sites = shown["report"].sites
    assert [site.verdict for site in sites] == ["low_rank", "low_rank"]
    assert [site.causal for site in sites] == [True, True]
    errors = shown["gradient_errors"]
    assert len(errors) == 29
    assert max(errors.values()) < 1e-3, "degree 2 follows the small logits of an untrained model"
    assert max(errors.values()) > 1e-7, "it is an approximation: bitwise equal gradients mean that exact attention ran"
    ours, eager = shown["losses"]["polyattn"], shown["losses"]["eager"]
    assert ours[0] == pytest.approx(math.log(256), abs=0.2)
    assert ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(eager, abs=1e-3)
    printed = capsys.readouterr().out
    assert "LOW RANK" in printed
    assert "blocks.1.attention.qkv.weight" in printed


def test_the_model_knows_nothing_of_polyattn() -> None:
    assert "polyattn" not in (EXAMPLES / "gpt_model.py").read_text(encoding="utf-8")


def test_text_and_batches_are_the_same_every_time(example: Callable[[str], Any]) -> None:
    stdlib_text = example("stdlib_text")
    text = stdlib_text.read(200_000)
    assert len(text) == 200_000
    assert b"def " in bytes(text.tolist())
    first, again = (list(stdlib_text.batches(text, 64, 3, seed=5)) for _ in range(2))
    other = list(stdlib_text.batches(text, 64, 3, seed=6))
    for (inputs, targets), (same_inputs, _), (other_inputs, _) in zip(first, again, other, strict=True):
        assert inputs.equal(same_inputs)
        assert not inputs.equal(other_inputs)
        assert inputs[0, 1:].equal(targets[0, :-1])


def test_demo_in_small(example: Callable[[str], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "deep" / "demo.png"
    arguments = ["--context", "256", "--steps", "4", "--policy", "low_rank", "--out", str(plot)]
    results = example("demo").main(arguments)
    assert results["inductor"]["losses"] == pytest.approx(results["polyattn"]["losses"], abs=1e-2)
    assert results["inductor"]["losses"][0] == pytest.approx(results["polyattn"]["losses"][0], abs=1e-4)
    assert len(results["polyattn"]["seconds"]) == 4
    assert all(memory > 0 for run in results.values() for memory in run["memory"].values())
    assert [site["verdict"] for site in results["polyattn"]["sites"]] == ["low_rank", "low_rank"]
    assert all(len(errors) == 2 for errors in results["polyattn"]["errors"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in ("what became of the attention", "median step", "peak memory", "error: start", "At 256 tokens"):
        assert words in printed


def test_demo_refuses_too_few_steps(example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("demo").main(["--steps", "2"])
    assert "--steps must be more than 2" in capsys.readouterr().err
