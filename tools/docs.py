"""Build the website in _docs with nbdev and Quarto.

nbdev stages the notebooks in _proc and leaves execution times on the cells that document a function. Quarto then wraps their
headings out of sight, and the page has no table of contents. So the times are removed between the two steps.
"""
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def without_times(folder):
    "Remove `metadata.execution` from every cell of the notebooks in `folder`; return how many had it."
    count = 0
    for path in sorted(Path(folder).rglob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        timed = [c for c in nb["cells"] if c["metadata"].pop("execution", None) is not None]
        if timed:
            path.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        count += len(timed)
    return count


if __name__ == "__main__":
    subprocess.run(["nbdev-proc-nbs"], cwd=ROOT, check=True)
    print("removed the execution times of", without_times(ROOT / "_proc"), "cells")
    subprocess.run(["nbdev-docs"], cwd=ROOT, check=True)  # leaves the staged notebooks alone: they are newer than their sources
