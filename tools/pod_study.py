"""How large must a defect be to be found? Probability of detection (MIL-HDBK-1823A) of trained detectors on rendered defects.

    python tools/pod_study.py runs=[RUN,RUN,…] [out=results/pod-{model}.json] [n=60] [seed=3000] [scene=zipper] [kinds=[rough,…]]
                              [force=true | refit=true]

Each RUN is a folder with a detector.json. For each kind of defect, n parts are rendered with severities spread evenly over (0, 1), and as
many good parts for false calls; the detector judges them at its own threshold. {model} in `out` stands for the family. The figures go into
the JSON, the pictures' rows into a CSV beside it, from which nbs/35_pod.ipynb draws. A study that exists is skipped unless force=true; with
refit=true the rows in the CSV are fitted anew and nothing is judged.

The parts' seeds come from a stream that `zipper_ad data render` never draws from, whatever its seed; the study compares them with the
synth.json of the detector's training data, where that is at hand. Takes about 0.1 s a picture on one thread, 480 pictures a detector.
"""

import json
import sys
import time
from pathlib import Path


def training_seeds(root: str) -> set[int]:
    "Seeds of all parts in the detector's data set; empty where its synth.json is not at hand."
    file = Path(root) / "synth.json"
    return {item["seed"] for item in json.loads(file.read_text())["images"]} if root and file.exists() else set()


def study(run: Path, out: str, n: int, seed: int, scene: str, kinds: list[str] | None, force: bool, refit: bool) -> str:
    "Judge, fit and write one detector's study; what to say of it."
    import scipy

    from zipper_ad.cli import write_json
    from zipper_ad.detector import Detector, versions
    from zipper_ad.pod import describe_study, pod_study, read_rows, study_curves, study_facts, write_rows

    detector = Detector.load(run)
    config, file = detector.config, Path(out.replace("{model}", detector.config.model.name))
    if file.exists() and not (force or refit):
        return f"{file}: exists already. Say force=true to make it anew."
    start = time.monotonic()
    rows = read_rows(file.with_suffix(".csv")) if refit else pod_study(detector, kinds, n, seed, config.data.size, scene)
    seconds, known = None if refit else round(time.monotonic() - start, 1), training_seeds(config.data.root)
    if again := known & {r["seed"] for r in rows}:
        raise SystemExit(f"{len(again)} parts of the study are in the training data: choose another seed=")
    facts = {
        "made_by": f"python tools/pod_study.py runs=[RUN] n={n} seed={seed} scene={scene}", "run": run.name, "model": config.model.name,
        "head": config.model.head, "training_seed": config.seed, "training_fingerprint": detector.data_fingerprint,
        "parts_compared_with_training_data": len(known), "threshold": detector.threshold.value,
        "promised_fpr": detector.threshold.promised_fpr, "scene": scene, "size_of_pictures": config.data.size, "n_of_each_kind": n,
        "study_seed": seed, "severities": "(i + 0.5) / n, each on another part", "seconds": seconds,
        "versions": versions() | {"scipy": scipy.__version__},
    }
    write_rows(rows, file.with_suffix(".csv"))
    write_json(facts | study_facts(rows, threshold=detector.threshold.value), file)
    return f"{config.model.name}, {run.name}\n{describe_study(rows, study_curves(rows))}\n{file}"


def main(arguments: list[str]):
    options = dict(a.split("=", 1) for a in arguments)
    listed = lambda name: [w for w in options.get(name, "").strip("[]").split(",") if w]  # noqa: E731
    unknown = set(options) - {"runs", "out", "n", "seed", "scene", "kinds", "force", "refit"}
    if unknown or not listed("runs"):
        raise SystemExit(__doc__)
    out, n, seed = options.get("out", "results/pod-{model}.json"), int(options.get("n", 60)), int(options.get("seed", 3000))
    again = {name: options.get(name) == "true" for name in ("force", "refit")}
    for run in map(Path, listed("runs")):
        print(study(run, out, n, seed, options.get("scene", "zipper"), listed("kinds") or None, **again), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
