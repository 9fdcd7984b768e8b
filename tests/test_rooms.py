"""Each idea has one room: a walk through the source holds that families and masks are asked for by object."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyattn.rewriter.families.registry import FAMILIES

ROOT = Path(__file__).parent.parent
LAYERS = ("rewriter", "passes", "codegen", "polyattn")
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FAMILIES_ROOM = "rewriter/families/"

ABOVE_THE_PLAN = (
    "polyattn/options.py",
    "polyattn/site_plan.py",
    "polyattn/runtime/ops.py",  # the operators' schemas, and polyattn.attention
    "polyattn/runtime/key_mask.py",
    "polyattn/report/measure.py",  # polyattn.measure
    "passes/match/",  # what a graph says of a site
)
"""Where a parameter may be called causal: options, the plan, and what stands above them."""
NAMES_A_FAMILY = ("polyattn/options.py",)
"""Beside its room: the options' literals and their documentation."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def docstrings(tree: ast.Module) -> set[int]:
    """Identities of the constants that are documentation: strings that stand alone."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_family_is_told_by_a_missing_degree(path: Path) -> None:
    if name(path).startswith(FAMILIES_ROOM):
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            text = ast.unparse(node)
            assert "degree" not in text, f"{name(path)}:{node.lineno}: {text}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_parameter_is_called_causal_below_the_plan(path: Path) -> None:
    if name(path).startswith(ABOVE_THE_PLAN):
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            assert not {"causal", "band"} & set(names), f"{name(path)}:{node.lineno}: pass the mask"


def said(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names of modules that a file imports, identifiers, and strings that are not documentation, with lines."""
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, f"{node.module}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_family_is_named_outside_of_its_room(path: Path) -> None:
    """Neither its option's value, nor its class or rule, nor a module of its folder."""
    if name(path).startswith((FAMILIES_ROOM, *NAMES_A_FAMILY)):
        return
    names = {word for family in FAMILIES.values() for word in (family.name, family.__name__, f"{family.__name__}Rule")}
    folders = tuple(f"polyattn.rewriter.families.{family}" for family in FAMILIES)
    for line, text in said(parsed(path)):
        assert text not in names, f"{name(path)}:{line}: names a family: {text!r}"
        assert not text.startswith(folders), f"{name(path)}:{line}: enters the room of a family: {text!r}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name(path)} has {lines} lines; split it by subject"


OPENINGS = ("Of", "By", "Up", "Likewise", "As", "Beside")


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_public_definitions_are_documented_in_sentences(path: Path) -> None:
    for node in public_definitions(parsed(path)):
        text = ast.get_docstring(node)
        assert text, f"{name(path)}:{node.lineno}: {node.name} has no docstring"
        assert text.split()[0] not in OPENINGS, f"{name(path)}:{node.lineno}: {node.name}: {text.splitlines()[0]!r}"
