"""Build sdist and wheel, import every module of the wheel, resolve the entry point: ``make wheel-check``.

The tree is copied first, so that nothing is left in it, and links are kept, as in a clone. The wheel is built from the
sdist, as an installer would, and unpacked alone with ``pip install --target``; its modules are then imported by a
process that sees this environment's packages and the wheel, but neither the tree nor the editable installation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("rewriter", "passes", "codegen")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "polyattn", *LAYERS)

PROBE = """
import importlib, importlib.metadata, sys
target, names = sys.argv[1], sys.argv[2:]
sys.meta_path[:] = [
    finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", finder))
]
failed = []
for name in names:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
        continue
    if not (module.__file__ or "").startswith(target):
        failed.append(f"{name} was imported from {module.__file__}, not from the wheel")
found = [
    point
    for distribution in importlib.metadata.distributions(path=[target])
    for point in distribution.entry_points
    if point.group == "torch_dynamo_backends"
]
assert [point.name for point in found] == ["polyattn"], found
if not callable(found[0].load()):
    failed.append(f"the entry point {found[0].value} is not callable")
print("\\n".join(failed))
sys.exit(bool(failed))
"""


def copy_tree(folder: Path) -> Path:
    """The sources that a distribution is made of, links kept."""
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, tree / name)
    return tree


def build_wheel(folder: Path) -> Path:
    """The path of a wheel, built in ``folder`` from an sdist that is built from a copy of the tree."""
    dist = folder / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy_tree(folder))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"the build failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    (wheel,) = dist.glob("*.whl")
    return wheel


def expected_files() -> set[str]:
    """Every file that the wheel must hold below ``polyattn/``."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "polyattn").rglob("*.py")} | {"polyattn/py.typed"}
    layers = (path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
    return files | {f"polyattn/{path.relative_to(ROOT).as_posix()}" for path in layers}


def wheel_files(wheel: Path) -> set[str]:
    """Every file in the wheel outside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def module_names() -> list[str]:
    """Every module of the package, by its import name."""
    files = sorted(name.removesuffix(".py").replace("/", ".") for name in expected_files() if name.endswith(".py"))
    return [name.removesuffix(".__init__") for name in files]


def import_all(wheel: Path, folder: Path) -> None:
    """Install the wheel alone into a folder, and import every module from there.

    Raises:
        AssertionError: a module cannot be imported, or comes from elsewhere, or the entry point does not resolve.
    """
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    packages = sysconfig.get_paths()["purelib"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), packages])}
    command = [sys.executable, "-c", PROBE, str(target), *module_names()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, f"the installed wheel is broken:\n{done.stdout}{done.stderr}"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="polyattn-wheel-") as name:
        folder = Path(name).resolve()
        wheel = build_wheel(folder)
        difference = wheel_files(wheel) ^ expected_files()
        if difference:
            print(f"{wheel.name} and the tree differ in {sorted(difference)}", file=sys.stderr)
            return 1
        import_all(wheel, folder)
        print(f"{wheel.name}: {len(module_names())} modules import, the entry point resolves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
