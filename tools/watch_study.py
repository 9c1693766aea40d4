"""Ten thousand rendered pictures in bursts through the real `zipper_ad watch`, which is killed three times: what is lost, what is told twice, how fast.

    python tools/watch_study.py [OUT.json] [pictures=10000] [kills=3] [burst=500] [size=64] [seed=0]

A small CNN detector is trained on rendered zippers and exported to ONNX. A thread sends pictures in bursts as cameras do: most under
a hidden name and then renamed, every tenth in two halves under its own name, every seventh into a folder below. The command runs as a process of its own
and gets `kill -9` at moments drawn at random; it is started again each time. In the end SIGTERM asks it to stop, and ledger, CSV and
heatmaps are compared with what was sent. Every picture is rendered noise and all on a zipper of its own, so no two files are equal.
"""

import importlib.metadata
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from zipper_ad import __version__
from zipper_ad.cli import main as zipper_ad
from zipper_ad.core import atomic_path
from zipper_ad.synth import render_defect, render_zipper
from zipper_ad.watch import audit, read_verdicts

options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
target = next((a for a in sys.argv[1:] if "=" not in a), None)
pictures, kills, burst, size, seed = (int(options.get(k, v)) for k, v in
                                      (("pictures", 10_000), ("kills", 3), ("burst", 500), ("size", 64), ("seed", 0)))  # fmt: skip
TRAINING = ["train.epochs=3", "model.widths=[8,16,32]", "model.latent=32", "train.device=cpu", "model.head=joint"]


def make_detector(root: Path) -> Path:
    "An exported detector."
    assert zipper_ad(["data", "render", f"out={root / 'zippers'}", "n_train=100", "n_test=1", f"size={size}"]) == 0
    assert zipper_ad(["train", f"data={root / 'zippers'}", f"out={root / 'run'}", f"data.size={size}", *TRAINING]) == 0
    assert zipper_ad(["export", f"run={root / 'run'}", f"out={root / 'detector.onnx'}"]) == 0
    return root / "detector.onnx"


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
    return len(read_verdicts(out)) if (out / "verdicts.db").exists() else 0


def watched(command: list[str], out: Path, until: int, samples: list, begin: float) -> tuple[subprocess.Popen, float, int, float]:
    "Start the command and wait for so many verdicts: the process, and when it wrote its first ones, and how many stood there then, and when it had enough."
    before, process, first = judged(out), subprocess.Popen(command, stdout=subprocess.DEVNULL), None
    while (n := judged(out)) < until:
        assert process.poll() is None, f"the watcher ended by itself with exit code {process.returncode}"
        now = time.monotonic()
        first = first or ((now, n) if n > before else None)
        if not samples or now - begin - samples[-1][0] >= 1:
            samples.append([round(now - begin, 1), n, round(memory(process.pid) or 0, 1)])
        time.sleep(0.1)
    now = time.monotonic()
    return process, *(first or (now, n)), now


def study() -> dict:
    root = Path(tempfile.mkdtemp())
    folder, out, sent, samples, spans = root / "camera", root / "verdicts", [], [], []
    (folder / "night").mkdir(parents=True)
    command = ["-m", "zipper_ad", "watch", f"run={make_detector(root)}", f"input={folder}", f"out={out}", "settle=0.3", "poll=0.5"]
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
        "command": f"zipper_ad watch run=detector.onnx input=camera out=verdicts {' '.join(command[-2:])}",
        "made_by": "python tools/watch_study.py " + " ".join(sys.argv[1:]).replace(str(target or ""), "").strip(),
        "pictures": pictures, "sent": len(sent), "kills": killed_at, "exit_code_after_sigterm": code,
        "verdicts": len(frame), "lost": len(set(sent) - set(names.index)), "repeated": int((names - 1).sum()), "audit": found,
        "shares": frame.verdict.value_counts().to_dict(),
        "seconds": round(seconds, 1), "per_second_while_judging": round(sum(n for _, n in spans) / sum(s for s, _ in spans), 1), "spans": spans,
        "memory_mb": {"first": samples[0][2], "most": max(s[2] for s in samples), "last": samples[-1][2]},
        "samples": {"columns": ["seconds", "verdicts", "memory_mb"], "rows": samples},
        "machine": {"processors": os.cpu_count(), "load_average": [round(x, 1) for x in os.getloadavg()], "system": platform.platform()},
        "versions": {"zipper_ad": __version__, "python": platform.python_version(), "sqlite": __import__("sqlite3").sqlite_version}
        | {p: importlib.metadata.version(p) for p in ("onnxruntime", "numpy", "pillow")},
    }  # fmt: skip


if __name__ == "__main__":
    facts = study()
    print(json.dumps({k: v for k, v in facts.items() if k != "samples"}, indent=1))
    if target:
        with atomic_path(target) as temporary:
            temporary.write_text(json.dumps(facts, indent=1).replace("[\n   ", "[").replace("\n   ]", "]") + "\n", encoding="utf-8")
    assert facts["lost"] == facts["repeated"] == 0 and facts["verdicts"] == pictures
