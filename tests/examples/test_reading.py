"""Example 03: what it reads of a site is there, and the forward graph that it runs is attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(load_file: Callable[[str, Path], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load_file("example_03_reading", EXAMPLES / "03_reading.py")


def test_03_reading(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    read = example.main(["--tokens", "64", "--site", "1"])
    assert read["site"] is read["report"].sites[1]
    assert read["site"].verdict == "low_rank"
    rules = [rule for rule, _ in read["steps"]]
    assert rules[0] == "lift"
    assert rules[-1] == "stack"
    assert {"split", "approximate", "differentiate", "kronecker", "compress"} <= set(rules)
    assert set(rules) <= set(example.RULES), "every rule is explained"
    assert all(lines > 0 for rule, lines in read["steps"] if rule != "stack")
    costs = {name: value for name, (_, value) in read["costs"].items()}
    assert set(costs) == {
        "exact forward",
        "exact backward",
        "low-rank forward",
        "consistent backward",
        "substituted backward",
    }
    assert costs["substituted backward"] > costs["consistent backward"] > 0
    assert any("forward" in name for name in read["kernels"])
    assert 1e-9 < read["error"] < 1e-3
    printed = capsys.readouterr().out
    for words in ("the derivation", "kronecker", example.RULES["kronecker"], "LOW RANK", "|graph - dense|", "names: "):
        assert words in printed


def test_steps_end_where_the_costs_begin(example: Any) -> None:
    text = "title\n1. lift: one\n     A = B\n\n2. stack: two\n     A = C\n  same  B\n\ncosts (FLOPs)\n     exact: n"
    assert example.split(text) == [
        (("1", "lift", "one"), ["     A = B"]),
        (("2", "stack", "two"), ["     A = C", "  same  B"]),
    ]
