"""``python -m polyattn explain package.module:factory [--html FILE]``: the report of a model, from the command line."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those after the program's name; None takes the process's own.
    Returns:
        exit status 0 when the model was explained, 2 when the factory cannot be found or does not fit.
    """
    parser = argparse.ArgumentParser(prog="python -m polyattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("explain", help="say what becomes of each attention of a model")
    command.add_argument(
        "factory",
        help="package.module:function; called without arguments it returns a model and its inputs: "
        "(model, *inputs), or (model, (inputs...), {named inputs})",
    )
    command.add_argument("--html", metavar="FILE", help="also write a self-contained page")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.add_argument("--policy", choices=["auto", "low_rank", "exact"], default="auto")
    chosen = parser.parse_args(arguments)
    try:
        model, inputs, named = _build(chosen.factory)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        print(f"polyattn: cannot build {chosen.factory!r}: {error}", file=sys.stderr)
        return 2
    from polyattn.report.explain import explain

    report = explain(model, *inputs, options={"policy": chosen.policy}, **named)
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report)
    if chosen.html:
        report.to_html(chosen.html)
        print(f"wrote {os.path.abspath(chosen.html)}", file=sys.stderr)
    return 0


def _build(factory: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    module, colon, name = factory.partition(":")
    if not colon:
        raise ValueError("write it as package.module:function")
    sys.path.insert(0, os.getcwd())
    built = getattr(importlib.import_module(module), name)()
    if not isinstance(built, tuple) or not built:
        raise TypeError("the factory must return a tuple (model, *inputs)")
    model, *rest = built
    if len(rest) == 2 and isinstance(rest[0], (tuple, list)) and isinstance(rest[1], Mapping):
        return model, tuple(rest[0]), dict(rest[1])
    return model, tuple(rest), {}


if __name__ == "__main__":
    sys.exit(main())
