"""The measured figures of this project, one JSON a row under results/; rows that exist are skipped.

    python tools/results.py PHOTOGRAPHS [RUNS=runs/results] [row …]

PHOTOGRAPHS is a folder in MVTec's layout. Each row trains on PHOTOGRAPHS/train/good with the settings it names, measures on
PHOTOGRAPHS/test, and writes what `zipper_ad evaluate` writes, with the settings, the training's minutes and the machine's
threads. Rows `*-damage` and `*-ssim` score the same trained network by its damage map alone and by its reconstruction error alone,
refitted on the same held-out normals; they train nothing.
"""

import os
import sys
import time
from pathlib import Path

from zipper_ad.cli import main as zipper_ad
from zipper_ad.cli import write_json
from zipper_ad.config import load_config
from zipper_ad.detector import Detector

JOINT = {f"real-joint-seed{s}": [f"seed={s}"] for s in (0, 1, 2)}
OTHERS = {  # at equal length, to compare ways of finding damage
    "real-joint30-seed0": ["train.epochs=30"],
    "real-plain30-seed0": ["train.epochs=30", "damage.restore=false", "model.head=none"],
    "real-none30-seed0": ["train.epochs=30", "model.head=none"],
    "real-image30-seed0": ["train.epochs=30", "model.head=image"],
    "real-discrepancy30-seed0": ["train.epochs=30", "model.head=discrepancy"],
}
MINUTES = {f"real-joint-{m}min": ["train.epochs=1000", "train.patience=1000", f"train.minutes={m}"] for m in (5, 10, 20)}
ROWS = JOINT | OTHERS | MINUTES


def refit(run: Path, overrides: dict) -> Detector:
    "The run's network with other scoring, calibrated anew on the same held-out normals."
    from zipper_ad.data import AnomalyDataset
    from zipper_ad.learner import reference_indices, split_three

    config = load_config(run / "config.yaml")
    for key, value in overrides.items():
        setattr(config.score, key, value)
    dataset = AnomalyDataset(config.data.root, "train", size=config.data.size, channels=config.data.channels)
    split, old = split_three(dataset, config.data.held_out, config.seed), Detector.load(run)
    return Detector.fit(old.model, dataset.batch(split.calibration), config, dataset.batch(reference_indices(split)), old.data_fingerprint)


def record(name, metrics, settings, minutes):
    how = {"row": name, "settings": settings, "train_minutes": minutes, "processors": os.cpu_count(), "preset": "cnn quick"}
    write_json({"made_by": "python tools/results.py PHOTOGRAPHS " + name} | how | metrics, Path("results") / f"{name}.json")
    pixel = metrics["pixel"]["auroc"]
    print(f"{name:32s} image AUROC {metrics['image']['auroc']:.3f}  pixel AUROC {pixel:.3f}  {minutes} min", flush=True)


def do(name, settings, photographs, runs):
    run = Path(runs) / name
    if not (run / "detector.json").exists():
        start = time.monotonic()
        if zipper_ad(["train", f"data={photographs}", f"out={run}", *settings]):
            raise SystemExit(f"{name}: training failed")
        (run / "minutes.txt").write_text(f"{(time.monotonic() - start) / 60:.1f}")
    minutes = float((run / "minutes.txt").read_text())
    metrics, *_ = refit(run, {}).evaluate(photographs)  # as training leaves it, with today's scoring
    record(name, metrics, settings, minutes)
    for kind in ("damage", "ssim") if "+" in metrics["map"] else ():
        metrics, *_ = refit(run, {"map": kind}).evaluate(photographs)
        record(f"{name}-{kind}", metrics, settings, minutes)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    photographs, rest = arguments[0], arguments[1:]
    runs = rest.pop(0) if rest and rest[0] not in ROWS else "runs/results"
    for name in rest or ROWS:
        if not (Path("results") / f"{name}.json").exists():
            do(name, ROWS[name], photographs, runs)
