"""The golden helper itself: it accepts only when told to, and a difference fails with a diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

COMPARE = {"POLYATTN_ACCEPT_GOLDEN": "0"}
ACCEPT = {"POLYATTN_ACCEPT_GOLDEN": "1"}


def test_accepts_then_compares(golden: Callable[..., None], tmp_path: Path) -> None:
    golden("deep/a.txt", "Φ\nΨ", ACCEPT, tmp_path)
    golden("deep/a.txt", "Φ\nΨ\n", COMPARE, tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)a\.txt changed.*make golden.*-Ψ.*\+Ω"):
        golden("deep/a.txt", "Φ\nΩ", COMPARE, tmp_path)
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "Φ\nΨ\n"


def test_missing_file_fails(golden: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no golden file b\.txt"):
        golden("b.txt", "text", COMPARE, tmp_path)
    assert not (tmp_path / "b.txt").exists()


def test_a_name_outside_the_folder_is_refused(golden: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies outside"):
        golden("../c.txt", "text", ACCEPT, tmp_path)
