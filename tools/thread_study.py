"""How long a training takes on a machine that does other work too, by how long OpenMP's threads spin while they wait for each other.

    python tools/thread_study.py [out=results/threads.json] [rounds=2] [epochs=2] [n=80]

Trains the CNN (`train=fast`, 256 × 256, n rendered zippers, so many epochs, two threads) as `zipper_ad train` does, in turns with the
number of spins that the command asks for (GOMP_SPINCOUNT=10000) and with libgomp's own (300,000): on a machine that has nothing else to do,
and beside as many other processes as there are cores, each of which computes without end. Start it on a quiet machine. Seconds of the
whole command.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from zipper_ad.cli import main as zipper_ad
from zipper_ad.cli import write_json

options = dict(a.split("=", 1) for a in sys.argv[1:])
rounds, epochs, n = (int(options.get(k, d)) for k, d in (("rounds", 2), ("epochs", 2), ("n", 80)))
cores = len(os.sched_getaffinity(0))


@contextmanager
def busy(processes: int):
    "So many processes that compute without end."
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()


def seconds(data: Path, out: Path, spin: int) -> float:
    "Of one training."
    words = ["train", "-q", f"data={data}", f"out={out}", "overwrite=true", "train=fast", f"train.epochs={epochs}", "train.minutes=0",
             "train.threads=2"]
    code, start = "import sys; from zipper_ad.cli import main; sys.exit(main())", time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"GOMP_SPINCOUNT": str(spin)})
    return time.perf_counter() - start


with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "zippers")
    if zipper_ad(["data", "render", "-q", f"out={data}", f"n_train={n}", "n_test=1"]):
        raise SystemExit("nothing was rendered")
    found = {}
    for name, others in (("alone", 0), ("beside other work", cores)):
        with busy(others):
            taken = [[seconds(data, Path(folder, "run"), spin) for spin in (10_000, 300_000)] for _ in range(rounds)]
        found[name] = {"seconds": [[round(s, 1) for s in pair] for pair in taken],
                       "ratio": round(statistics.median(long / short for short, long in taken), 2)}
        print(name, found[name], flush=True)
write_json({"made_by": f"python tools/thread_study.py rounds={rounds} epochs={epochs} n={n}", "cores": cores, "threads": 2,
            "pairs": "[GOMP_SPINCOUNT=10000, 300000], in turns; ratio: median of the second over the first", **found},
           options.get("out", "results/threads.json"))
