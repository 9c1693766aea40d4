"""Measure how much of zipper_ad the notebooks and the tests run, together, and print a table.

A notebook runs its own exported cells, not the module that they become. So each exported cell is replaced, in a copy under
build/, by an import of the same names from the module: then the rest of the notebook exercises the package itself.
"""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "coverage"


def names_in(source):
    "The top-level names that a cell defines or imports; none for `@patch`, which the module has done already."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            names += [] if patched else [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            return None  # imports run as they are
    return names


def from_module(nb):
    "Replace the exported cells of a notebook by imports from its module."
    module = None
    for cell in nb.cells:
        first = cell.source.lstrip().split("\n")[0]
        if first.startswith("#| default_exp"):
            module = "zipper_ad." + first.split()[-1]
        exported = cell.cell_type == "code" and first.split()[:2] in (["#|", "export"], ["#|", "exporti"], ["#|", "exports"])
        if module and exported and (names := names_in(cell.source)) is not None:
            cell.source = f"from {module} import {', '.join(names)}" if names else f"import {module}"


def main():
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / "nbs", COPY / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"), symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", COPY)
    for path in (COPY / "nbs").rglob("*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        from_module(nb)
        nbformat.write(nb, path)
    env = dict(os.environ, COVERAGE_FILE=str(ROOT / ".coverage"), COVERAGE_RCFILE=str(ROOT / "pyproject.toml"))
    coverage = [sys.executable, "-m", "coverage"]

    def run(*command):
        return subprocess.run([*coverage, *map(str, command)], cwd=ROOT, env=env).returncode

    run("erase")
    failed = run("run", Path(sys.executable).parent / "nbdev-test", COPY / "nbs", "--n-workers", "2", "--timing")
    failed |= run("run", "-m", "pytest", "-q")
    run("combine", "-q")
    failed |= run("report")
    shutil.rmtree(COPY)
    sys.exit(failed)


if __name__ == "__main__":
    main()
