"""When the lamp grows dim: what is left of a detector, and is a new training quicker if it begins with the old weights?

    python tools/retrain_study.py run=RUN data=DIR [out=results/retrain-dimmer.json] [work=runs/retrain-study] [factor=0.7] [epochs=10]

All pictures of DIR, in MVTec's layout, are made darker by the factor, those to train on and those of the test. Measured on the dark test
pictures: the detector of RUN as it is; one that `zipper_ad retrain` makes of it in so many epochs; one that the same settings make in so
many epochs from random weights. One processor thread. What stands in `work` already is not made again.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from zipper_ad.care import check_drift
from zipper_ad.cli import main as zipper_ad
from zipper_ad.cli import write_json


def darken(source: Path, out: Path, factor: float):
    "A copy of a data set whose pictures are darker; masks stay."
    if out.exists():
        return
    shutil.copytree(source, aside := out.with_name(out.name + ".part"))
    for part in ("train", "test"):
        for file in (aside / part).rglob("*.png"):
            Image.fromarray((np.asarray(Image.open(file)).astype(float) * factor).round().astype(np.uint8)).save(file)
    aside.rename(out)


def measured(run: Path, data: Path, file: Path) -> dict:
    "What `zipper_ad evaluate` finds, in short."
    if not file.exists() and zipper_ad(["evaluate", f"run={run}", f"data={data}", f"out={file}"]):
        raise SystemExit(f"{run}: could not be measured")
    m = json.loads(file.read_text())
    image, pixel = m["image"], m["pixel"]
    return {"image_auroc": image["auroc"], "ci": image["ci"].get("auroc_logit") or image["ci"]["auroc"], "aupro": pixel["aupro"],
            "ci_aupro": pixel["ci"]["aupro"], "recall": image["recall"], "observed_fpr": m["threshold"]["observed_fpr"], "n": m["n"]}


def main(options: dict):
    run, work, epochs = Path(options["run"]), Path(options.get("work", "runs/retrain-study")), options.get("epochs", "10")
    factor, dark = float(options.get("factor", 0.7)), work / "dark"
    work.mkdir(parents=True, exist_ok=True)
    darken(Path(options["data"]), dark, factor)
    short = [f"train.epochs={epochs}", "train.minutes=0", "train.threads=1", f"data={dark}"]
    ways = {"from the run's weights": ["retrain", f"run={run}"], "from random weights": ["train", "--config", f"{run}/config.yaml"]}
    change = check_drift(run, dark)
    facts = {"the detector as it was": measured(run, dark, work / "as-it-was.json")}
    for name, words in ways.items():
        new = work / name.replace(" ", "-").replace("'", "")
        if not (new / "detector.json").exists() and zipper_ad([*words, *short, f"out={new}"]):
            raise SystemExit(f"{new}: was not trained")
        facts[name] = measured(new, dark, new / "metrics.json")
    config = json.loads((run / "detector.json").read_text())["config"]
    about = {"made_by": f"python tools/retrain_study.py run=RUN data=DIR factor={factor:g} epochs={epochs}", "run": run.name,
             "model": config["model"]["name"], "preset": config["preset"], "seed": config["seed"], "factor": factor, "epochs": int(epochs),
             "p_value_of_no_drift": change.drift["p_value"], "alarms_before": change.alarms}  # fmt: skip
    write_json(about | {"detectors": facts}, options.get("out", "results/retrain-dimmer.json"))
    for name, f in facts.items():
        print(f"{name:24s} image AUROC {f['image_auroc']:.3f} [{f['ci'][0]:.3f}, {f['ci'][1]:.3f}], AU-PRO {f['aupro']:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(dict(a.split("=", 1) for a in sys.argv[1:]))
