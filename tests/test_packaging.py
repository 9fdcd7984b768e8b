"""The package as a whole: links, wheel, options, imports, dependencies, what the documents name."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("rewriter", "passes", "codegen")
SOURCES = sorted(
    path
    for folder in ("polyattn", *LAYERS, "examples", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel_check(load_file: Callable[[str, Path], Any]) -> Any:
    return load_file("wheel_check", ROOT / "tests" / "wheel_check.py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of what a file imports (``from a import b`` is a.b), wherever the import stands, with lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_is_linked_into_the_package(layer: str) -> None:
    link = ROOT / "polyattn" / layer
    assert link.is_symlink(), f"polyattn/{layer} must be a link, not a copy"
    assert str(link.readlink()) == f"../{layer}", "the link must be relative: it is committed"
    assert link.resolve() == ROOT / layer
    assert (link / "__init__.py").is_file()


def test_packages_and_folders_are_the_same(project: dict[str, Any]) -> None:
    tool = project["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for top in ("polyattn", *LAYERS) for path in (ROOT / top).rglob("*.py")}
    packages = {folder.as_posix().replace("/", "."): folder.as_posix() for folder in folders}
    packages = {name if name.split(".")[0] == "polyattn" else f"polyattn.{name}": at for name, at in packages.items()}
    assert set(tool["packages"]) == set(packages)
    assert tool["package-dir"] == packages


def test_wheel_holds_every_module_and_imports(wheel_check: Any, tmp_path: Path) -> None:
    wheel = wheel_check.build_wheel(tmp_path)
    assert wheel_check.wheel_files(wheel) == wheel_check.expected_files()
    wheel_check.import_all(wheel, tmp_path)


def test_wheel_check_notices_a_missing_module(
    wheel_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = wheel_check.build_wheel(tmp_path)
    monkeypatch.setattr(wheel_check, "module_names", lambda: ["polyattn.errors", "polyattn.missing"])
    with pytest.raises(AssertionError, match=r"No module named 'polyattn\.missing'"):
        wheel_check.import_all(wheel, tmp_path)


def test_entry_point_is_installed() -> None:
    (point,) = metadata.entry_points(group="torch_dynamo_backends", name="polyattn")
    from polyattn.backend import polyattn as backend

    assert point.load() is backend


def test_versions_are_the_same(project: dict[str, Any]) -> None:
    import polyattn

    version = project["project"]["version"]
    assert polyattn.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_functorch_is_not_declared(project: dict[str, Any]) -> None:
    declared = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        declared += extra
    names = {re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower() for requirement in declared}
    assert "torch" in names
    assert "functorch" not in names, "it ships inside the torch wheel; the distribution of that name pins torch < 2.1"


def test_constraints_pin_everything_declared(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", pin) for pin in pins), pins
    pinned = {pin.split("==")[0].lower() for pin in pins}
    extras = project["project"]["optional-dependencies"].values()
    for requirement in [*project["project"]["dependencies"], *(name for extra in extras for name in extra)]:
        assert re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower() in pinned, requirement
    assert "torch==2.13.0" in pins, "without a local version, so that a CPU build satisfies it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_are_never_imported_as_top_level_modules(path: Path) -> None:
    bad = [f"{path}:{line}: {name}" for name, line in imported(path) if name.split(".")[0] in LAYERS]
    assert not bad, "import polyattn.<layer>: " + ", ".join(bad)


def test_rewriter_needs_no_graphs_and_no_triton() -> None:
    """The import linter sees external packages as a whole; this sees ``torch.fx`` inside torch."""
    forbidden = ("torch.fx", "functorch", "torch._functorch", "triton")
    for path in (ROOT / "rewriter").rglob("*.py"):
        for name, line in imported(path):
            assert not any(name == bad or name.startswith(f"{bad}.") for bad in forbidden), f"{path}:{line}: {name}"


def test_import_of_polyattn_loads_no_layer_and_no_torch() -> None:
    code = "import sys, polyattn; print(sorted(m for m in sys.modules if m == 'torch' or m.startswith('polyattn.')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_option_is_documented() -> None:
    from polyattn.options import Options

    tree = ast.parse((ROOT / "polyattn" / "options.py").read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options"]
    documented = set()
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            documented.add(field.target.id)
    assert {field.name for field in dataclasses.fields(Options)} == documented


def test_public_names_exist() -> None:
    import polyattn

    missing = [name for name in polyattn.__all__ if not hasattr(polyattn, name)]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/layout.md"])
def test_links_of_documents_resolve(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{name} links to {target}"


def test_layout_describes_every_module() -> None:
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    for folder in ("polyattn", *LAYERS):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if path.name != "__init__.py":
                assert f"`{name}`" in text, f"docs/layout.md does not mention {name}"


def test_make_targets_of_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        for target in re.findall(r"(?:`|^\s*)make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name} names make {target}"
