"""Ten thousand rendered pictures in bursts through the real `zipper_ad watch`, killed three times: what is lost, what told twice, how fast.

    python tools/watch_study.py [OUT.json] [pictures=10000] [kills=3] [burst=500] [size=64] [seed=0] [detector=FILE]

The detector is a small CNN of 64 pixels that was never trained, exported to ONNX; detector=FILE takes another one. A thread sends
pictures in bursts as cameras do: most under a hidden name and then renamed, every tenth in two halves under its own name, every
seventh into a folder below. The command runs as a process of its own and gets `kill -9` at moments drawn at random; it is started
again each time. In the end SIGTERM asks it to stop, and database, CSV and heatmaps are compared with what was sent. Every picture
has noise of its own, so no two files are equal.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zipper_ad import __version__
from zipper_ad.config import make_config
from zipper_ad.core import atomic_path, set_seed
from zipper_ad.detector import Detector
from zipper_ad.export import export_detector
from zipper_ad.models.head import Restorer
from zipper_ad.synth import render_defect, render_zipper
from zipper_ad.watch import audit, read_verdicts

options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
target = next((a for a in sys.argv[1:] if "=" not in a), None)
pictures, kills, burst, size, seed = (int(options.get(k, v)) for k, v in
                                      (("pictures", 10_000), ("kills", 3), ("burst", 500), ("size", 64), ("seed", 0)))  # fmt: skip


def make_detector(root: Path) -> Path:
    "An exported detector, around a network that was never trained: what is studied here is files, not verdicts."
    config = make_config([f"data.size={size}", "model.widths=[8,16,32]", "model.latent=32", "model.head=none", "train.device=cpu"])
    set_seed(seed)
    normals = torch.from_numpy(np.stack([render_zipper(s, size) for s in range(160)]))[:, None] / 255
    return export_detector(Detector.fit(Restorer(config.model), normals, config), root / "detector.onnx")


def bases(n: int = 300) -> list[np.ndarray]:
    "Rendered zippers, one in ten with a defect; the pictures of the study are these with noise of their own."
    return [render_defect("rough", 9000 + i, size, 1.0)[0] if i % 10 == 9 else render_zipper(9000 + i, size) for i in range(n)]


def send(folder: Path, sent: list[str]):
    "Write all pictures, burst after burst; names are noted once they are whole."
    rng, originals = np.random.default_rng(seed), bases()
    for i in range(pictures):
        noisy = originals[i % len(originals)].astype(np.int16) + rng.integers(-2, 3, (size, size))
        image, name = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), f"{'night/' if i % 7 == 6 else ''}{i:06}.png"
        if i % 10 == 9:  # a careless sender
            with atomic_path(folder.parent / "camera.png") as hidden:
                image.save(hidden)
                data = hidden.read_bytes()
            with open(folder / name, "wb") as f:
                f.write(data[: len(data) // 2])
                f.flush()
                time.sleep(0.002)
                f.write(data[len(data) // 2 :])
        else:
            with atomic_path(folder / name) as hidden:
                image.save(hidden)
        sent.append(name)
        if i % burst == burst - 1:
            time.sleep(0.3)


def memory(pid: int) -> float | None:
    "Resident memory of a process in MB."
    try:
        return next(int(line.split()[1]) / 1024 for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def judged(out: Path) -> int:
    "Verdicts in the database so far."
    try:
        with contextlib.closing(sqlite3.connect(f"{(out / 'verdicts.db').as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM verdicts").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


def watched(command: list[str], out: Path, until: int, samples: list, begin: float) -> tuple[subprocess.Popen, float, int, float]:
    "Start the command and wait for so many verdicts: the process, when it wrote its first, how many there were then, when it had enough."
    before, process, first = judged(out), subprocess.Popen(command, stdout=subprocess.DEVNULL), None
    while (n := judged(out)) < until:
        assert process.poll() is None, f"the watcher ended by itself with exit code {process.returncode}"
        now = time.monotonic()
        first = first or ((now, n) if n > before else None)
        if first and (not samples or now - begin - samples[-1][0] >= 1):
            samples.append([round(now - begin, 1), n, round(memory(process.pid) or 0, 1)])
        time.sleep(0.1)
    now = time.monotonic()
    return process, *(first or (now, n)), now


def study() -> dict:
    root = Path(tempfile.mkdtemp())
    folder, out, sent, samples, spans = root / "camera", root / "verdicts", [], [], []
    (folder / "night").mkdir(parents=True)
    detector = options.get("detector") or make_detector(root)
    command = ["-m", "zipper_ad", "watch", f"run={detector}", f"input={folder}", f"out={out}", "settle=0.3", "poll=0.5", "bs=16"]
    chance, killed_at = random.Random(seed), []
    sender = threading.Thread(target=send, args=(folder, sent))
    sender.start()
    begin = time.monotonic()
    for k in range(kills + 1):
        goal = pictures if k == kills else int(pictures * (k + 0.5 + 0.5 * chance.random()) / (kills + 1))
        process, first, before, last = watched([sys.executable, *command], out, goal, samples, begin)
        spans.append([round(last - first, 2), goal - before])
        if k < kills:
            time.sleep(chance.random() * 0.2)
            process.kill()
            process.wait()
            killed_at.append(judged(out))
    sender.join()
    seconds = time.monotonic() - begin
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    frame, found = read_verdicts(out), audit(folder, out)
    names = frame.file.value_counts()
    return {
        "data": f"{pictures} rendered zippers of {size} x {size} pixels, not photographs, in bursts of {burst}",
        "command": f"zipper_ad watch run=detector.onnx input=camera out=verdicts {' '.join(command[-3:])}",
        "made_by": " ".join(["python tools/watch_study.py", *(f"{k}={v}" for k, v in options.items() if k != "detector")]),
        "pictures": pictures, "sent": len(sent), "kills": killed_at, "exit_code_after_sigterm": code,
        "verdicts": len(frame), "lost": len(set(sent) - set(names.index)), "repeated": int((names - 1).sum()), "audit": found,
        "seconds": round(seconds, 1), "per_second_while_judging": round(sum(n for _, n in spans) / sum(s for s, _ in spans), 1),
        "spans": {"columns": ["seconds", "verdicts"], "rows": spans},
        "memory_mb": {"first": samples[0][2], "most": max(s[2] for s in samples), "last": samples[-1][2]},
        "samples": {"columns": ["seconds", "verdicts", "memory_mb"], "rows": samples},
        "machine": {"processors": os.cpu_count(), "load_average": [round(x, 1) for x in os.getloadavg()], "system": platform.platform()},
        "versions": {"zipper_ad": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
        | {p: importlib.metadata.version(p) for p in ("onnxruntime", "numpy", "pillow")},
    }  # fmt: skip


if __name__ == "__main__":
    facts = study()
    print(json.dumps({k: v for k, v in facts.items() if k != "samples"}, indent=1))
    if target:
        text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), json.dumps(facts, indent=1))
        with atomic_path(target) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    assert facts["lost"] == facts["repeated"] == 0 and facts["verdicts"] == pictures
