"""A detector that everyone shares, a way to call the command line, and global state put back after each test."""

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# what hypothesis notes of this machine is of no use elsewhere
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir(), "zipper_ad-hypothesis")))
TINY = ["data.size=64", "model.widths=[8,16,32]", "model.latent=32", "train.epochs=3", "train.device=cpu"]


class Trap:
    "Unpickling this makes a file."

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@contextlib.contextmanager
def keep_global_state():
    "Whatever a command does to logging, threads, chance or autocast ends with the block."
    logger = logging.getLogger("zipper_ad")
    logs = logger.handlers[:], logger.level, logger.propagate
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        logger.handlers, logger.propagate = logs[0], logs[2]
        logger.setLevel(logs[1])
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        while torch.is_autocast_enabled("cpu"):
            torch.set_autocast_enabled("cpu", False)


@pytest.fixture(autouse=True)
def global_state():
    with keep_global_state():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "Rendered zippers of 64 pixels in `data`, a detector trained on them in `run`, and the settings that make it small."
    from zipper_ad.cli import main

    root = tmp_path_factory.mktemp("trained")
    with keep_global_state():
        assert main(["data", "render", f"out={root / 'zippers'}", "n_train=40", "n_test=2", "size=64"]) == 0
        assert main(["train", f"data={root / 'zippers'}", f"out={root / 'run'}", *TINY]) == 0
    return SimpleNamespace(data=root / "zippers", run=root / "run", settings=TINY)


@pytest.fixture
def cli(capfd):
    "Run a command in this process: code, stdout, stderr (progress bars left out) and the lines of stderr."
    from zipper_ad.cli import main

    def run(*words):
        capfd.readouterr()
        code = main([str(w) for w in words])
        out, err = capfd.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        return SimpleNamespace(code=code, out=out, err=err, lines=lines)

    return run


@pytest.fixture
def refused(cli):
    "Run a command that must end with exit code 2 and exactly one line; returns the line."

    def run(*words):
        done = cli(*words)
        assert done.code == 2, done
        assert len(done.lines) == 1 and done.lines[0].startswith("zipper_ad: "), done.err
        assert "Traceback" not in done.err and done.out == ""
        return done.lines[0]

    return run


@pytest.fixture
def contents():
    "The files below a folder and their bytes."
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)
CHROMIUM = os.environ.get("ZIPPER_AD_CHROMIUM", CHROMIUM)
ARGUMENTS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync".split()


@pytest.fixture
def browser():
    "A Chromium: the one named in ZIPPER_AD_CHROMIUM, the system's, or Playwright's. Without any the test is skipped."
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'zipper_ad[dev]'")
    with playwright.sync_playwright() as p:
        program = CHROMIUM or p.chromium.executable_path
        if not Path(program).exists():
            pytest.skip("no Chromium: run `make browser`, or name one in ZIPPER_AD_CHROMIUM")
        browser = p.chromium.launch(executable_path=program, args=[f"--{a}" for a in ARGUMENTS])
        yield browser
        browser.close()


LONG = ("test_resume.py", "test_export.py", "test_distributed.py", "test_app.py", "test_tune.py", "test_sweep.py", "test_training.py")


def pytest_collection_modifyitems(items):
    "Files that take longest first, so that of two workers none waits for the other at the end."
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
