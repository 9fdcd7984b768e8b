"""Golden texts: derivations and emitted kernels as files of ``tests/golden``, read in review, accepted on purpose.

Tests take the fixture ``golden`` of ``tests/conftest.py``, which is :func:`check`::

    def test_degree_2(golden):
        golden("derivation-degree-2.txt", str(derivation))

``make golden`` (or POLYATTN_ACCEPT_GOLDEN=1) writes what the tests produce now; the diff is then reviewed like code.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
ACCEPT = "POLYATTN_ACCEPT_GOLDEN"


def check(name: str, text: str, env: Mapping[str, str] | None = None, folder: Path = FOLDER) -> None:
    """Compare ``text`` with the golden file ``name``; with POLYATTN_ACCEPT_GOLDEN=1 write it instead.

    Args:
        name: a relative path inside ``tests/golden``, with the extension that the text would have as a file.
        text: compared exactly, except that both end in one newline.
        env: in place of ``os.environ``.

    Raises:
        AssertionError: the texts differ, or there is no such file; the message is a diff and how to accept it.
    """
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        raise ValueError(f"{name!r} lies outside {folder}")
    produced = text.rstrip("\n") + "\n"
    if (os.environ if env is None else env).get(ACCEPT) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(produced.encode())
        return
    hint = "if this is what it should be, run `make golden` and review the diff"
    if not path.exists():
        raise AssertionError(f"there is no golden file {name}; {hint}")
    expected = path.read_bytes().decode()
    if produced != expected:
        diff = difflib.unified_diff(expected.splitlines(), produced.splitlines(), f"golden/{name}", "now", lineterm="")
        raise AssertionError("\n".join([f"{name} changed; {hint}", *diff]))
