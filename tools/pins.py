"""Write constraints.txt: the exact version of every package, direct or not, for each Python that we support.

    python tools/pins.py python3.10 python3.11 python3.12 python3.13            # keeps today's pins, adds what is missing
    python tools/pins.py --renew python3.10 python3.11 python3.12 python3.13    # newest versions (torch and torchvision stay)

Nothing is installed: pip only says what it would install. Versions that differ between Pythons get a marker.
CUDA's own packages are left out, because torch names their versions itself.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = re.compile(r"nvidia-|cuda-|triton$|zipper[-_]ad$")
HEADER = """\
# Exact versions of every package that `make` installs, written by tools/pins.py (see CONTRIBUTING.md).
# The package itself asks for ranges only (settings.ini), so that it can be installed beside other software.
"""


def canonical(name):
    "The name as package indexes compare it."
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python, torch, constraints):
    "What pip would install for this interpreter: its version `(3, 11)` and `{package: version}`."
    ask = [python, "-c", "import sys; print(*sys.version_info[:2])"]
    version = subprocess.run(ask, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        # one transaction, torch first: the same request as in the Makefile
        command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), *torch, "-e", f"{ROOT}[dev]", "-c", str(constraints)]
        subprocess.run(command, check=True)
        items = json.loads(report.read_text())["install"]
    found = {canonical(i["metadata"]["name"]): i["metadata"]["version"].split("+")[0] for i in items}
    return tuple(map(int, version.stdout.split())), {k: v for k, v in found.items() if not LEFT_OUT.match(k)}


def marked(name, versions):
    "The lines for one package from `{(3, 10): version, ...}`: one without a marker where every Python agrees."
    if len(set(versions.values())) == 1:
        return [f"{name}=={next(iter(versions.values()))}"]
    runs = []  # [version, first Python, last Python]
    for python, version in sorted(versions.items()):
        if runs and runs[-1][0] == version:
            runs[-1][2] = python
        else:
            runs.append([version, python, python])
    lines = []
    for i, (version, first, _) in enumerate(runs):
        low = f'python_version >= "{first[0]}.{first[1]}"' if i else ""
        high = 'python_version < "{}.{}"'.format(*runs[i + 1][1]) if i + 1 < len(runs) else ""
        lines.append(f"{name}=={version} ; " + " and ".join(filter(None, [low, high])))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="take the newest versions instead of today's")
    parser.add_argument("pythons", nargs="+", help="one interpreter for each Python version")
    args = parser.parse_args()
    target = ROOT / "constraints.txt"
    old = [line for line in target.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    torch = [line for line in old if re.match(r"torch(vision)?==", line)]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(torch if args.renew else old) + "\n")
        resolved = dict(resolve(python, torch, constraints) for python in args.pythons)
    names = sorted(set().union(*resolved.values()))
    lines = [line for n in names for line in marked(n, {p: found[n] for p, found in resolved.items() if n in found})]
    target.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lowest, promised = "{}.{}".format(*min(resolved)), config["DEFAULT"]["min_python"]
    if lowest != promised:
        print(f"Note: the lowest Python given is {lowest}; settings.ini promises {promised}.", file=sys.stderr)
    print(f"{target.name}: {len(names)} packages for Python {', '.join('{}.{}'.format(*p) for p in sorted(resolved))}")


if __name__ == "__main__":
    main()
