"""Time and peak memory of every pixel metric, each in a process of its own: 150 images of 256 x 256 and of 1024 x 1024.

    python tools/bench_metrics.py [OUT.json] [sizes=256,1024] [images=150]

Half of the images have faults. Values are noise with a bump at the faults, every one of them another number: the hardest case for sorting.
`cpu_s` is processor time, which other programs lengthen little; `peak_gb` the largest resident memory, `inputs_gb` that before measuring.
What needs more memory than is free is left out, and says so. Rows that OUT.json has already are kept, so it can be stopped and resumed;
those that a later run added say on which machine, and how busy that was.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("PixelMetrics, all", "PixelMetrics, all, 1000 resamples", "aupimo", "aupimo, 1000 resamples", "iou", "dice", "iou_per_region",
         "region_table", "auroc, auprc, aupro (exact)", "aupro (exact)", "pro_curve (exact)", "all exact, 1000 resamples")
BYTES_A_PIXEL = 30  # of what sorts all pixels, inputs included


def images(n, size):
    "Maps and masks, one at a time."
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(n):
        mask = np.zeros((size, size), bool)
        if i % 2:
            for row, column, height, width in (rng.uniform(0.02, 0.2, (2, 4)) * size).astype(int):
                mask[4 * row : 4 * row + height, 4 * column : 4 * column + width] = True
        yield rng.standard_normal((size, size), dtype=np.float32) + 2 * mask.astype(np.float32), mask


def measure(name, n, size):
    "Run one metric in this process; its facts."
    import numpy as np

    from zipper_ad import metrics as m
    from zipper_ad import pixels as p

    resamples = 1000 if "resamples" in name else 0
    metric = name.split(",")[0].split(" (")[0]
    peak = lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # noqa: E731
    threshold = 3.0
    spent = [0.0, 0.0]

    def timed(fn, *args):
        start = time.perf_counter(), time.process_time()
        result = fn(*args)
        spent[0] += time.perf_counter() - start[0]
        spent[1] += time.process_time() - start[1]
        return result

    if metric == "PixelMetrics":
        inputs, streamed = peak(), p.PixelMetrics(threshold)
        for anomaly_map, mask in images(n, size):
            timed(streamed.update, anomaly_map, mask)
        block = timed(streamed.compute, resamples)
        figures = {k: block[k] for k in ("auroc", "auprc", "aupro", "aupro_05", "aupimo", "iou", "dice", "iou_per_region")}
        more = {"bound": block["bound"], "figures": figures}
    else:
        maps, masks = np.zeros((n, size, size), np.float32), np.zeros((n, size, size), bool)
        for i, (anomaly_map, mask) in enumerate(images(n, size)):
            maps[i], masks[i] = anomaly_map, mask
        calls = {
            "auroc": lambda: m.pixel_metrics(maps, masks, None, n_bootstrap=0),
            "all exact": lambda: m.pixel_metrics(maps, masks, threshold, n_bootstrap=resamples),
            "aupro": lambda: m.aupro(maps, masks), "pro_curve": lambda: m.pro_curve(maps, masks),
            "iou": lambda: m.iou(maps, masks, threshold), "dice": lambda: m.dice(maps, masks, threshold),
            "iou_per_region": lambda: p.iou_per_region(maps, masks, threshold).mean,
            "aupimo": lambda: p.aupimo(maps, masks, n_bootstrap=resamples).mean,
            "region_table": lambda: len(p.region_table(maps, masks, threshold, min_size=2)),
        }
        inputs = peak()
        result = timed(calls[metric])
        figures = {k: result[k] for k in ("auroc", "auprc", "aupro", "aupro_05", "aupimo")} if isinstance(result, dict) else result
        more = {} if metric == "pro_curve" else {"figures": figures}
    return {"metric": name, "images": n, "size": size, "wall_s": round(spent[0], 2), "cpu_s": round(spent[1], 2),
            "inputs_gb": inputs, "peak_gb": peak(), **more}


def free_bytes():
    "Memory that is free or can be freed at once; endless where the system does not say."
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def main():
    options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    out = next((a for a in sys.argv[1:] if "=" not in a), None)
    n, rows = int(options.get("images", 150)), []
    if "one" in options:
        print(json.dumps(measure(options["one"], n, int(options["size"]))))
        return
    import numpy
    import torch

    machine = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "threads": 1,
               "python": platform.python_version(), "numpy": numpy.__version__, "torch": torch.__version__}
    facts = {"command": "python tools/bench_metrics.py results/pixel-metrics.json",
             "data": f"{n} images, half with faults; random numbers, not photographs", "machine": machine, "rows": rows}
    later = bool(out) and Path(out).exists()
    if later:
        facts = json.loads(Path(out).read_text())
        rows = facts["rows"] = [row for row in facts["rows"] if "left_out" not in row]
    done_before = {(row["metric"], row["images"], row["size"]) for row in rows}
    for size in map(int, options.get("sizes", "256,1024").split(",")):
        for name in NAMES:
            if (name, n, size) in done_before:
                continue
            needed = n * size**2 * (BYTES_A_PIXEL if "exact" in name else 8)
            if needed > free_bytes():
                rows.append({"metric": name, "images": n, "size": size, "left_out": f"needs about {needed / 2**30:.0f} GB of memory"})
            else:
                command = [sys.executable, __file__, f"one={name}", f"size={size}", f"images={n}"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
                rows.append(json.loads(done.stdout))
                if later:
                    rows[-1]["added_later"] = {"machine": machine, "load_average": round(os.getloadavg()[0], 1)}
            row = rows[-1]
            print(f"{size:5} {name:34} " + (row.get("left_out") or f"{row['cpu_s']:7.2f} s   {row['peak_gb']:6.2f} GB"), flush=True)
            if out:
                Path(out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
