"""An exported detector beside the detector it came from: do they say the same, and which is how fast?

    python tools/bench_export.py run=RUN data=DIR [out=results/bench.json] [rounds=60] [threads=2] [images=0] [calibration=24]
                                 [formats=onnx,openvino,torchscript] [precisions=fp32,bf16,int8]

Every program judges all test pictures (or the first `images` of them, taken evenly): largest relative difference of a score, verdicts that
change, and image AUROC. Then all take turns on single decoded pictures. The file is written after each step; the ratios are what
can be compared, and the load of the machine stands beside them.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from zipper_ad.bench import benchmark, export_all, where_time_goes, write_bench
from zipper_ad.core import atomic_path
from zipper_ad.data import AnomalyDataset, read_image, split_normals
from zipper_ad.detector import Detector
from zipper_ad.predictor import Predictor

options = dict(a.split("=", 1) for a in sys.argv[1:])
out = Path(options.get("out", "results/bench.json"))


def keep(facts):
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")


def scores_of(judge, pictures):
    verdicts = list(judge.predict_each(pictures, bs=4))
    return np.array([v.score for v in verdicts]), np.array([v.is_anomalous for v in verdicts]), [v.anomaly_map for v in verdicts]


def parity(name, judge, pictures, labels, expected):
    scores, verdicts, maps = scores_of(judge, pictures)
    apart = [float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in zip(maps, expected[2], strict=True)]
    return {
        "program": name, "images": len(pictures), "auroc": round(float(roc_auc_score(labels, scores)), 5),
        "largest_relative_difference": float((np.abs(scores - expected[0]) / np.maximum(1, np.abs(expected[0]))).max()),
        "largest_relative_difference_of_a_map": max(apart), "verdicts_changed": int((verdicts != expected[1]).sum()),
    }  # fmt: skip


def main():
    detector = Detector.load(options["run"])
    d = detector.config.data
    test = AnomalyDataset(options["data"], "test", size=d.size, channels=d.channels, cache="off")
    n = int(options.get("images", 0)) or len(test.paths)
    chosen = np.unique(np.linspace(0, len(test.paths) - 1, n).astype(int))
    labels = [test.labels[i] for i in chosen]
    pictures = [read_image(test.paths[i], d.channels) for i in chosen]
    train = AnomalyDataset(options["data"], "train", size=d.size, channels=d.channels, cache="off")
    trained_on = split_normals(train, d.held_out, detector.config.seed)[0]  # not those that set the threshold
    calibration = train.batch(trained_on[: int(options.get("calibration", 24))])
    facts = {"model": detector.config.model.name, "data": options.get("note", "rendered"), "defective": int(sum(labels))}
    facts |= {"parity": [], "load": []}
    expected = scores_of(detector, pictures)
    facts["auroc_eager_fp32"] = round(float(roc_auc_score(labels, expected[0])), 5)
    with tempfile.TemporaryDirectory() as folder:
        formats, precisions = (options.get(k, v).split(",") for k, v in
                               (("formats", "onnx,openvino,torchscript"), ("precisions", "fp32,bf16,int8")))
        files = {}
        for f in formats:
            for p in precisions:
                if f == "torchscript" and p != "fp32" or (f, p) == ("onnx", "bf16"):
                    continue
                files |= (made := export_all(detector, folder, [f], [p], calibration))
                (name, file), = made.items()
                judge = Predictor(file, int(options.get("threads", 2)))
                more = {k: judge.facts[k] for k in ("fp32_layers", "search") if k in judge.facts}
                facts["parity"].append(parity(name, judge, pictures, labels, expected) | more)
                keep(facts)
                print(json.dumps({k: v for k, v in facts["parity"][-1].items() if k not in ("fp32_layers", "search")}), flush=True)
        facts["load"].append(os.getloadavg()[0])
        facts["bench"] = benchmark(detector, files, pictures[:8], (1,), int(options.get("threads", 2)), int(options.get("rounds", 60)))
        facts["bench"]["auroc"] = {"eager fp32": facts["auroc_eager_fp32"]} | {p["program"]: p["auroc"] for p in facts["parity"]}
        facts["load"].append(os.getloadavg()[0])
        facts["where_time_goes_ms"] = where_time_goes(detector, test.paths[0])
        keep(facts)
        if "page" in options:
            write_bench(facts["bench"], options["page"])
    for row in facts["bench"]["rows"]:
        print(json.dumps(row))


main()
