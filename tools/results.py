"""The measured figures of this project, one JSON a row under results/. Rows that exist are skipped, so it can be stopped and resumed.

    python tools/results.py [photographs=DIR] [runs=runs/results] [jobs=1] [list=true] [PATTERN …]
    python tools/results.py measure=RUN data=DIR out=FILE
    python tools/results.py seeds=true [PATTERN …]

PATTERN is a row's name or a pattern such as "main-cnn-*"; without one, all rows are made, in order. Rows on rendered pictures need
nothing; rows on real ones need photographs=DIR, a folder in MVTec's layout. Each row trains with the settings it names, on one
processor thread (so that `jobs` rows can run side by side) and by epochs, not by the preset's minutes (which are meant for two
cores), measures on the test folder, and writes what `zipper_ad evaluate` writes, with the settings, the minutes and the same figures
for each map alone and for all reconstruction maps without the damage map. These score the same network, calibrated on the same
held-out normals; they train nothing. `measure` does the same for any run. `seeds` measures nothing: it prints, of rows that differ by
nothing but the seed, the mean of each figure with Student's interval for it, and for image AUROC the interval that also counts the
pictures, where the rows hold the score of each.

The groups: `main` is the table of families; `ensemble` judges by the mean of its members' anomaly maps, which are on one scale;
`head` asks what the reconstruction adds; `minutes` and `images` are learning curves over time and over the number of training
pictures; `damage` leaves one kind of damage out at a time; `realtime` is the table of families with that preset;
`equal` compares, at equal minutes of training, what the damage head is shown: both pictures, only what differs (`discrepancy`),
or the picture without any reconstruction (`control`, for more epochs); `large-equal-FAMILY-error_maps` uses no damage map at all;
`whole` sees all of the picture of a turned part, not only the box around it;
`precision` trains the same in fp32 and in bf16; `exported` compares the files exported from the `realtime` rows with the detectors;
`large-ROW` judges what another row trained on a larger set of rendered zippers or screws, 600 good and 200 of each kind, drawn from
a seed that nothing else uses: its intervals are a third as wide, and nothing was ever chosen in view of it. `promise-ROW` sets the
threshold of what ROW trained anew, by 300 other good pictures instead of 24, and counts on the larger set, whose scores must be there:
what is found at 5 % and at 1 % of false alarms?

`ablation-NAME-zippers-seedS` changes what `experiment=NAME` says and nothing else. Its baseline is `precision-cnn-fp32-zippers-seedS`, a
CNN at 128 x 128 pixels trained for 60 epochs; the groups `damage` and `head` have those without a kind of damage or without the damage
map. Experiments that change only how maps become a score train nothing: they score the baseline's run again, after calibrating it anew,
which takes seconds (and the baseline's training first, where that run is missing). `ablation-default-…` scores it again as it is. A row
that changes the training takes as long as the baseline. `size_128` has no row: it is the baseline. Rows hold the score of each picture,
for paired intervals, and those of the held-out normals, for p-values.
"""

import fnmatch
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zipper_ad.corrupt import ALIGNED

FAMILIES = ("cnn", "resnet", "vit", "diffusion")
SMALL = ["data.size=128", "train.epochs=60"]  # a quarter of the pixels: to compare settings, not to report what can be reached
RESCORED = ("default", "uncalibrated", "pool_topk", "pool_mean", "no_smoothing", "smoothing_8")
RETRAINED = ("only_mse", "only_l1", "only_ssim", "only_msgms", "no_skip", "latent_32", "latent_512", "size_64",
             "control", "discrepancy", "error_maps_only")
CONTROL_EPOCHS = (170, 320)  # of preset=realtime: as many minutes as CNN, ResNet and diffusion take for theirs, and as ViT takes
DRAWN = {  # what is rendered: the scene, and what differs from the set that the demo uses
    "zippers": {"scene": "zipper"}, "screws": {"scene": "screw"},
    "zippers-large": {"scene": "zipper", "seed": 2000, "n_train": 0, "n_good": 600, "n_test": 200},
    "screws-large": {"scene": "screw", "seed": 2002, "n_train": 0, "n_good": 600, "n_test": 200},
    "zippers-good": {"scene": "zipper", "seed": 2001, "n_train": 300, "n_good": 0, "n_test": 0},
}
ALONE = {"reconstruction": "l2+ssim+msgms"} | {k: k for k in ("damage", "l2", "ssim", "msgms")}


def seed(s: int) -> list[str]:
    "The setting, where it is not the default."
    return [f"seed={s}"] if s else []


def rows() -> dict[str, dict]:
    "Name of each row: its data and its settings."
    table = {f"main-{f}-{d}-seed0": (d, [f"model={f}"]) for d in ("photographs", "zippers") for f in FAMILIES}
    table["main-cnn-screws-seed0"] = ("screws", ["model=cnn"])
    table["realtime-cnn-screws-seed0"] = ("screws", ["model=cnn", "preset=realtime"])
    table["whole-cnn-screws-seed0"] = ("screws", ["model=cnn", "preset=realtime", "data.crop=false"])
    table |= {f"main-{f}-{d}-seed{s}": (d, [f"model={f}", f"seed={s}"])
              for s in (1, 2) for d in ("photographs", "zippers") for f in FAMILIES}
    for d in ("zippers", "photographs"):
        for f in FAMILIES:
            table |= {f"head-{f}-{h}-{d}": (d, [f"model={f}", f"model.head={h}", *SMALL]) for h in ("none", "discrepancy", "joint")}
            table[f"head-{f}-plain-{d}"] = (d, [f"model={f}", "model.head=none", "damage.restore=false", *SMALL])
        table[f"head-image-{d}"] = (d, ["model=cnn", "model.head=image", *SMALL])
    table |= {f"minutes-cnn-{m}-photographs": ("photographs", ["train.epochs=1000", "train.patience=1000", f"train.minutes={m}"])
              for m in (2, 5, 10, 20, 30)}
    for d in ("zippers", "photographs"):
        table |= {f"images-cnn-{n}-{d}": (f"{d}:{n}", ["model=cnn", *SMALL, *(["data.held_out=0.4"] if n < 25 else [])])
                  for n in (10, 25, 50, 100, 200)}  # of ten pictures a fifth are too few to choose and to calibrate
    for kind in ALIGNED:
        others = "{" + ", ".join(f"{k}: {w}" for k, w in ALIGNED.items() if k != kind) + "}"
        table[f"damage-without-{kind}-zippers"] = ("zippers", ["model=cnn", f"damage.kinds={others}", *SMALL])
    table |= {f"realtime-{f}-{d}-seed{s}": (d, [f"model={f}", "preset=realtime", *seed(s)])
              for s in (0, 1, 2) for d in ("zippers", "photographs") for f in FAMILIES}
    table |= {f"precision-cnn-{p}-zippers-seed{s}": ("zippers", ["model=cnn", f"seed={s}", f"train.precision={p}", *SMALL])
              for s in (0, 1, 2) for p in ("fp32", "bf16")}
    for s in (0, 1, 2):
        table |= {f"ablation-{e}-zippers-seed{s}": ("zippers", ["model=cnn", f"seed={s}", "train.precision=fp32", f"experiment={e}",
                                                                *(SMALL[1:] if e.startswith("size_") else SMALL)]) for e in RETRAINED}
    table |= {f"equal-{f}-discrepancy-zippers-seed0": ("zippers", [f"model={f}", "preset=realtime", "model.head=discrepancy"])
              for f in FAMILIES}
    table |= {f"equal-control-{n}-zippers-seed{s}": ("zippers", ["model=cnn", "preset=realtime", "model.head=image", "score.map=damage",
                                                                 f"train.epochs={n}", f"train.patience={n // 2}", *seed(s)])
              for s in (0, 1, 2) for n in CONTROL_EPOCHS}
    ready = {name: {"data": data, "settings": settings} for name, (data, settings) in table.items()}
    ready |= {f"ablation-{e}-zippers-seed{s}": {"data": "zippers", "experiment": e, "rescores": f"precision-cnn-fp32-zippers-seed{s}"}
              for s in (0, 1, 2) for e in RESCORED}
    ready |= {f"exported-{f}-{d}-seed{s}": {"data": d, "exports": f"realtime-{f}-{d}-seed{s}"}
              for s in (0, 1, 2) for d in ("zippers", "photographs") for f in FAMILIES}
    judged = {f"realtime-{f}-zippers-seed{s}": "default" for s in (0, 1, 2) for f in FAMILIES}
    judged |= {f"main-{f}-zippers-seed{s}": "default" for s in (0, 1, 2) for f in FAMILIES}
    judged |= {f"ablation-{e}-zippers-seed{s}": e if e in RESCORED else "default" for s in (0, 1, 2) for e in (*RESCORED, *RETRAINED)}
    judged |= {name: "default" for name in table if name.startswith("equal-") or "-screws-" in name}
    for name, e in judged.items():
        larger = "screws-large" if "-screws-" in name else "zippers-large"
        ready[f"large-{name}"] = {"data": larger, "experiment": e, "rescores": ready[name].get("rescores", name)}
    ready |= {f"large-equal-{f}-error_maps-zippers-seed0": {"data": "zippers-large", "experiment": "error_maps",
                                                            "rescores": f"realtime-{f}-zippers-seed0"} for f in FAMILIES}
    ready |= {f"promise-realtime-{f}-zippers-seed{s}": {"data": "zippers-good", "promises": f"realtime-{f}-zippers-seed{s}"}
              for s in (0, 1, 2) for f in FAMILIES}
    for d in ("photographs", "zippers"):
        ready[f"ensemble-{d}-seed0"] = {"data": d, "settings": [], "members": [f"main-{f}-{d}-seed0" for f in FAMILIES[:3]]}
    return ready


def folder_of(data: str, photographs: str | None, runs: Path) -> Path:
    "The pictures of a row; rendered ones are made when absent. `zippers:25` has only 25 training pictures."
    from zipper_ad.synth import render_dataset

    data, _, n = data.partition(":")
    if data == "photographs":
        if not photographs:
            raise SystemExit("rows on photographs need photographs=DIR, a folder in MVTec's layout")
        root = Path(photographs).resolve()
    else:
        root = (runs / f"data-{data}").resolve()
        if not root.exists():
            render_dataset(root, **DRAWN[data])
    return fewer(root, int(n), runs) if n else root


def fewer(root: Path, n: int, runs: Path) -> Path:
    "A folder of links to `root` with its first n training pictures only."
    part = (runs / f"data-{root.name}-{n}").resolve()
    if not part.exists():
        (part / "train/good").mkdir(parents=True)
        for file in sorted((root / "train/good").iterdir())[:n]:
            (part / "train/good" / file.name).symlink_to(file)
        for name in ("test", "ground_truth"):
            (part / name).symlink_to(root / name)
    return part


def refitted(run: Path, experiment: str = "default"):
    "The detector of a run, calibrated anew, scoring as an experiment says; its normal pictures, and which of them set the threshold."
    from zipper_ad.config import change_config, compare_configs, make_config
    from zipper_ad.data import AnomalyDataset
    from zipper_ad.detector import Detector
    from zipper_ad.learner import reference_indices, split_three

    detector = Detector.load(run)
    changes = compare_configs(make_config([]), make_config([f"experiment={experiment}"]))
    if wrong := [name for name in changes if not name.startswith("score.")]:
        raise SystemExit(f"experiment={experiment} changes {', '.join(wrong)}: that needs a training of its own")
    c = change_config(detector.config, [f"{name}={value}" for name, (_, value) in changes.items()])
    normal = AnomalyDataset(c.data.root, "train", size=c.data.size, channels=c.data.channels)
    split = split_three(normal, c.data.held_out, c.seed)
    reference = normal.batch(reference_indices(split))
    detector = Detector.fit(detector.model, normal.batch(split.calibration), c, reference, upright=detector.upright)
    return detector, normal, split.calibration


def batches(indices):
    "The indices, about sixteen at a time."
    import numpy as np

    return np.array_split(indices, -(-len(indices) // 16))


def scores_of(verdicts: list, data: Path) -> dict[str, float]:
    "The score of each test picture, for paired comparisons."
    return {v.path.relative_to(data / "test").as_posix(): float(f"{v.score:.7g}") for v in verdicts}


def rescore(run: Path, data: Path, experiment: str) -> dict:
    "Figures of a trained run that scores as an experiment says; nothing is trained."
    metrics, verdicts, _ = refitted(run, experiment)[0].evaluate(data)
    return metrics | {"scores": scores_of(verdicts, data)}


def measure(run: Path, data: Path) -> dict:
    "Figures of a trained run: as `evaluate` gives them, for each map alone, and the score of each picture."
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score

    from zipper_ad.detector import witnesses
    from zipper_ad.metrics import evaluate_scores
    from zipper_ad.score import fuse, pool

    detector, normal, calibration = refitted(run)
    kinds = detector.map_kinds
    metrics, verdicts, test = detector.evaluate(data)
    masks = test.native_masks()

    def surprises(dataset, indices):
        parts = [[loc(m) for loc, m in zip(detector.locations.values(), detector.raw_maps(dataset.batch(i))[1:], strict=True)]
                 for i in batches(indices)]
        return dict(zip(kinds, (torch.cat(m) for m in zip(*parts, strict=True)), strict=True))

    def counted(fused):
        return detector.upright.on_part(fused, detector.config.data.size) if detector.upright else fused

    held_out, tested = surprises(normal, calibration), surprises(test, range(len(test)))
    alone = {}
    for name, wanted in ALONE.items():
        if not all(k in kinds for k in wanted.split("+")):
            continue
        good, maps = (counted(fuse(*witnesses({k: m[k] for k in wanted.split("+")}))) for m in (held_out, tested))
        facts = {}
        for rate in (0.05, 0.01):
            threshold = threshold_of(pool(good), rate)
            with_pixels = rate == 0.05 and not detector.upright  # turned parts: these maps are upright, the masks are not
            figures = evaluate_scores(pool(maps), test.labels, test.kinds, threshold, maps[:, 0].numpy() if with_pixels else None,
                                      masks if with_pixels else None, threshold.value, 1000 if rate == 0.05 else 0)
            facts |= {f"recall_at_{rate:g}": figures["image"]["recall"], f"promised_at_{rate:g}": figures["threshold"]["promised_fpr"]}
            if rate == 0.05:
                pixel = figures["pixel"] or {}
                facts |= {"image_auroc": figures["image"]["auroc"], "ci": figures["image"]["ci"]["auroc"],
                          "pixel_auroc": pixel.get("auroc"), "aupro": pixel.get("aupro"),
                          "per_defect": {k: v["auroc"] for k, v in figures["per_defect"].items()}}
        alone[name] = facts
    strict = threshold_of(pool(counted(fuse(*witnesses(held_out)))), 0.01)
    scores = pool(counted(fuse(*witnesses(tested)))).numpy()
    labels = np.asarray(test.labels, bool)
    metrics["at_1_percent"] = {"promised_fpr": strict.promised_fpr, "recall": float((scores[labels] > strict.value).mean()),
                               "observed_fpr": float((scores[~labels] > strict.value).mean())}
    for name, fused in (("mean of all", torch.stack(list(tested.values())).mean(0)), ("largest of all", fuse(list(tested.values())))):
        alone[name] = {"image_auroc": float(roc_auc_score(labels, pool(counted(fused)).numpy()))}
    return metrics | {"maps_alone": alone, "calibration_scores": [float(f"{s:.7g}") for s in np.sort(detector.calibration_scores)],
                      "scores": scores_of(verdicts, data)}


def ensemble(runs: list[Path], data: Path) -> dict:
    "Figures of the mean of several detectors' anomaly maps, with a threshold from the mean on the held-out normals."
    import torch

    from zipper_ad.data import AnomalyDataset
    from zipper_ad.metrics import evaluate_scores
    from zipper_ad.score import pool

    members = [refitted(run) for run in runs]
    detectors, (first, normal, calibration) = [m[0] for m in members], members[0]
    c = first.config
    test = AnomalyDataset(data, "test", size=c.data.size, channels=c.data.channels)

    def judged(dataset, indices):
        return torch.cat([torch.stack([d.maps_and_scores(dataset.batch(i))[0] for d in detectors]).mean(0) for i in batches(indices)])

    maps, threshold = judged(test, range(len(test))), threshold_of(pool(judged(normal, calibration)), c.score.target_fpr)
    return evaluate_scores(pool(maps), test.labels, test.kinds, threshold, maps[:, 0].numpy(), test.native_masks(), threshold.value, 1000)


def exported(run: Path, data: Path) -> dict:
    "What files exported from a run say of the test pictures, beside the detector: AUROC, its difference (DeLong), verdicts changed."
    import tempfile

    import numpy as np

    from zipper_ad.bench import export_all
    from zipper_ad.data import AnomalyDataset, read_image, split_normals
    from zipper_ad.detector import Detector
    from zipper_ad.predictor import Predictor
    from zipper_ad.statistics import delong_test

    detector = Detector.load(run)
    d, seed = detector.config.data, detector.config.seed
    train, test = (AnomalyDataset(data, part, size=d.size, channels=d.channels, cache="off") for part in ("train", "test"))
    quantised_on = train.batch(split_normals(train, d.held_out, seed)[0][:24])  # not those that set the threshold
    pictures, labels = [read_image(p, d.channels) for p in test.paths], np.asarray(test.labels)

    def judged(judge):
        verdicts = list(judge.predict_each(pictures, bs=4))
        return np.array([v.score for v in verdicts]), np.array([v.is_anomalous for v in verdicts])

    scores, verdicts = judged(detector)
    programs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in export_all(detector, folder, ["onnx", "openvino"], ["fp32", "bf16", "int8"], quantised_on).items():
            theirs, said = judged(Predictor(file, threads=1))
            compared = delong_test(labels, theirs, scores)
            programs[name] = {
                "auroc": round(compared["auroc_a"], 5), "difference": round(compared["difference"], 5), "ci": compared["ci"],
                "verdicts_changed": int((said != verdicts).sum()), "recall": float(said[labels > 0].mean()),
                "observed_fpr": float(said[labels == 0].mean()),
                "largest_relative_difference": float((np.abs(theirs - scores) / np.maximum(1, np.abs(scores))).max()),
            }
            auroc = compared["auroc_b"]
    return {"n": {"good": int((labels == 0).sum()), "defective": int(labels.sum())}, "auroc": round(auroc, 5), "programs": programs}


def promised(run: Path, good: Path, large: Path) -> dict:
    "Thresholds of a trained run from many other good pictures, and what they do on those that the row `large` holds the scores of."
    import numpy as np

    from zipper_ad.data import AnomalyDataset
    from zipper_ad.metrics import wilson_interval
    from zipper_ad.threshold import fpr_upper_bound

    if not large.exists():
        raise SystemExit(f"{large.name} is missing: make that row first")
    detector = refitted(run)[0]
    normal = AnomalyDataset(good, "train", size=detector.config.data.size, channels=detector.config.data.channels)
    calibration = np.concatenate([detector.maps_and_scores(normal.batch(i))[1].numpy() for i in batches(range(len(normal)))])
    good_ones, defective, at = [], [], {}
    for name, score in json.loads(large.read_text())["scores"].items():
        (good_ones if name.startswith("good/") else defective).append(score)
    for rate in (0.05, 0.01):
        threshold = threshold_of(calibration, rate)
        found, alarms = (sum(score > threshold.value for score in scores) for scores in (defective, good_ones))
        at[f"{rate:g}"] = {
            "threshold": threshold.value, "promised_fpr": threshold.promised_fpr,
            "fpr_upper_bound": fpr_upper_bound(threshold.promised_fpr, threshold.n_calibration),
            "observed_fpr": alarms / len(good_ones), "recall": found / len(defective),
            "ci": {"observed_fpr": wilson_interval(alarms, len(good_ones)), "recall": wilson_interval(found, len(defective))},
        }
    return {"n_calibration": len(calibration), "n": {"good": len(good_ones), "defective": len(defective)}, "at": at,
            "calibration_scores": [float(f"{s:.7g}") for s in np.sort(calibration)]}


def threshold_of(scores, rate):
    "The conformal threshold, without the warning that few pictures promise little: the row says what is promised."
    from zipper_ad.threshold import conformal_threshold

    return conformal_threshold(scores, rate, quiet=True)


def trained(name: str, photographs: str | None, runs: Path) -> tuple[Path, list[str]]:
    "The run of a row that trains, trained if that was not done before, and its settings."
    from zipper_ad.cli import main as zipper_ad

    row = rows()[name]
    run, settings = runs / name, ["train.minutes=0", *row["settings"], "train.threads=1"]
    if not (run / "detector.json").exists():
        start = time.monotonic()
        if zipper_ad(["train", f"data={folder_of(row['data'], photographs, runs)}", f"out={run}", *settings]):
            raise SystemExit(f"{name}: training failed")
        (run / "minutes.txt").write_text(f"{(time.monotonic() - start) / 60:.1f}")
    return run, settings


def make(name: str, row: dict, photographs: str | None, runs: Path):
    "Train, measure, and write the row."
    from zipper_ad.cli import write_json

    how, data = {"made_by": f"python tools/results.py photographs=DIR {name}", "row": name}, folder_of(row["data"], photographs, runs)
    how["data"] = row["data"]

    def run_of(base):
        return trained(base, photographs, runs)[0]

    if "members" in row:
        facts = ensemble([run_of(m) for m in row["members"]], data)
        how |= {"members": row["members"]}
    elif base := row.get("rescores"):
        facts = rescore(run_of(base), data, row["experiment"])
        how |= {"settings": [f"experiment={row['experiment']}"], "rescores": base}
    elif base := row.get("promises"):
        facts = promised(run_of(base), data, Path("results") / f"large-{base}.json")
        how |= {"promises": base}
    elif base := row.get("exports"):
        facts = exported(run_of(base), data)
        how |= {"exports": base}
    else:
        run, settings = trained(name, photographs, runs)
        facts, epochs = measure(run, data), sum(1 for _ in (run / "history.csv").open()) - 1
        minutes = float((run / "minutes.txt").read_text())
        how |= {"settings": settings, "train_minutes_one_thread": minutes, "epochs": epochs}
    write_json(how | facts, Path("results") / f"{name}.json")


def main(arguments: list[str]):
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    patterns = [a for a in arguments if "=" not in a] or ["*"]
    runs, table = Path(options.get("runs", "runs/results")), rows()
    names = [n for n in table if any(fnmatch.fnmatch(n, p) for p in patterns) and not (Path("results") / f"{n}.json").exists()]
    if options.get("measure"):
        from zipper_ad.cli import write_json

        made_by = {"made_by": "python tools/results.py " + " ".join(arguments)}
        write_json(made_by | measure(Path(options["measure"]), Path(options["data"])), options["out"])
    elif options.get("seeds"):
        print("\n".join(over_seeds(patterns)) or "no settings are measured from two seeds or more")
    elif options.get("list"):
        print("\n".join(names))
    elif options.get("one"):
        make(options["one"], table[options["one"]], options.get("photographs"), runs)
    else:
        def start(name):
            passed = [a for a in arguments if a.startswith(("photographs=", "runs="))]
            command = [sys.executable, __file__, f"one={name}", *passed]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            print(summary(name) if not done.returncode else f"{name}: failed\n{done.stderr[-2000:]}", flush=True)

        for data in {table[n]["data"].partition(":")[0] for n in names} - {"photographs"}:
            folder_of(data, None, runs)  # before several jobs want it
        with ThreadPoolExecutor(int(options.get("jobs", 1))) as pool:
            list(pool.map(start, names))


def over_seeds(patterns: list[str]) -> list[str]:
    "One line for each settings measured from two seeds or more: the mean of each figure and its interval."
    from zipper_ad.statistics import across_seeds, mrmc_interval

    groups, lines = {}, []
    for file in sorted(Path("results").glob("*-seed[0-9]*.json")):
        if any(fnmatch.fnmatch(file.stem, p) for p in patterns) and "image" in (row := json.loads(file.read_text())):
            groups.setdefault(file.stem.rpartition("-seed")[0], []).append(row)
    for name, found in groups.items():
        figures = {"image": [r["image"]["auroc"] for r in found], "recall": [r["image"]["recall"] for r in found]}
        if len({r["pixel"].get("resolution") for r in found}) == 1:  # else some masks were shrunk and some were not
            figures["PRO"] = [r["pixel"]["aupro"] for r in found]
        spread = {k: across_seeds(v) for k, v in figures.items() if len(v) > 1 and None not in v}
        told = "  ".join(f"{k} {s['mean']:.3f} [{max(s['ci'][0], 0):.3f}, {min(s['ci'][1], 1):.3f}]" for k, s in spread.items())
        if len(found) > 1 and all("scores" in r for r in found):
            pictures = sorted(found[0]["scores"])
            both = mrmc_interval([not p.startswith("good/") for p in pictures], [[r["scores"][p] for p in pictures] for r in found])
            told += "  image, other pictures too [{:.3f}, {:.3f}]".format(*both["ci"])
        lines += [f"{name:34s} {told}  {len(found)} seeds"] if spread else []
    return lines


def summary(name: str) -> str:
    "One line for a finished row."
    row = json.loads((Path("results") / f"{name}.json").read_text())
    if "programs" in row:
        told = (f"{k} {v['difference']:+.4f}, {v['verdicts_changed']} changed" for k, v in row["programs"].items())
        return f"{name:34s} " + "  ".join(told)
    if "at" in row:
        told = (f"asked {k}: recall {v['recall']:.3f}, false alarms {v['observed_fpr']:.3f}" for k, v in row["at"].items())
        return f"{name:34s} " + "  ".join(told)
    alone = row.get("maps_alone", {}).get("reconstruction", {}).get("image_auroc")
    pixel = row["pixel"] or {}
    figures = {"image": row["image"]["auroc"], "pixel": pixel.get("auroc"), "PRO": pixel.get("aupro"), "reconstruction alone": alone}
    told = "  ".join(f"{k} {v:.3f}" for k, v in figures.items() if v is not None)
    cost = f"  {row['train_minutes_one_thread']:.1f} min, {row['epochs']} epochs" if "epochs" in row else ""
    return f"{name:34s} {told}{cost}"


if __name__ == "__main__":
    main(sys.argv[1:])
