"""How fast an archive is judged, by a bare loop, by processes of this machine, and by Ray; and whether they say the same.

    python tools/archive_study.py FILE PICTURES [OUT.json] [n=400 rounds=3 shard=20]

FILE is an exported detector, PICTURES a folder of images. All programs take turns in each round, on the same pictures, so that a busy
machine is busy for all; what is reported are medians, and medians of the ratios within a round.
"""

import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from zipper_ad.archive import Shard, cut, plan_job, read_shard, run_local, run_ray, start_ray, to_parquet
from zipper_ad.core import InputError, atomic_path
from zipper_ad.picture import list_images
from zipper_ad.predictor import Predictor

options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
words = [a for a in sys.argv[1:] if "=" not in a]
N, ROUNDS, SHARD = (int(options.get(k, d)) for k, d in (("n", 400), ("rounds", 3), ("shard", 20)))


def timed(function, *arguments):
    start = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - start, found


def one_round(file, folder, job, shards):
    "Seconds of each program, of what it takes to begin, and what each said."
    import ray

    judge = Predictor(file, threads=1)
    names = [n for s in shards for n in s.names]
    few = [Shard(i, s.names[:1]) for i, s in enumerate(shards[:2])]
    seconds, said = {}, {}
    seconds["bare loop"], verdicts = timed(lambda: [judge.predict(folder / n) for n in names])
    for workers in (1, 2):
        seconds[f"local {workers}, begin"], _ = timed(lambda w=workers: dict(run_local(job, few[:w], w)))
        seconds[f"local {workers}"], said[f"local {workers}"] = timed(lambda w=workers: dict(run_local(job, shards, w)))
    try:
        seconds["ray, start"], _ = timed(start_ray, 2)
    except InputError as e:  # on a busy machine
        print(e, file=sys.stderr)
    for workers in (1, 2) if ray.is_initialized() else ():
        seconds[f"ray {workers}, begin"], _ = timed(lambda w=workers: dict(run_ray(job, few[:w], w)))
        seconds[f"ray {workers}"], said[f"ray {workers}"] = timed(lambda w=workers: dict(run_ray(job, shards, w)))
    ray.shutdown()
    rows = [r for i in sorted(said["local 1"]) for r in pq.read_table(io.BytesIO(said["local 1"][i])).to_pylist()]
    same = all(v == said["local 1"] for v in said.values())
    equal = [(r["score"], r["p_value"], r["is_anomalous"]) for r in rows] == [(v.score, v.p_value, v.is_anomalous) for v in verdicts]
    return seconds, same, equal, said["local 1"], rows


def bits(file, folder, names):
    "Whether batches and threads change the last digits of a score, and the time of a batch of 16 beside 16 single ones."
    scores = {}
    for key, threads, bs in (("one", 1, 1), ("batch", 1, 16), ("threads", 2, 1)):
        judge = Predictor(file, threads=threads)
        prepared = [judge.prepare(folder / n) for n in names]
        judge.judge(prepared[:bs], [None] * bs)
        batches = [prepared[i : i + bs] for i in range(0, len(prepared), bs)]
        seconds, verdicts = timed(lambda j=judge, b=batches: [v for x in b for v in j.judge(x, [None] * len(x))])
        scores[key] = np.array([v.score for v in verdicts]), seconds
    one = scores["one"][0]
    return {
        "pictures": len(names), "scores_changed_by_a_batch_of_16": int((scores["batch"][0] != one).sum()),
        "largest_change": float(np.abs(scores["batch"][0] - one).max()),
        "scores_changed_by_2_threads": int((scores["threads"][0] != one).sum()),
        "seconds_single_over_batch": round(scores["one"][1] / scores["batch"][1], 3),
    }


def per_picture(folder, job, shards, rows, found):
    "Milliseconds and bytes of the parts that are not judging."
    whole = cut(job.archive, 1000)[0]
    reading, things = timed(lambda: list(read_shard(job.archive, whole)))
    encoding, _ = timed(lambda: [to_parquet(rows) for _ in range(10)])
    scratch = Path(tempfile.mkdtemp())

    def write():
        for i, data in found.items():
            with atomic_path(scratch / f"{i}.parquet") as temporary:
                temporary.write_bytes(data)

    writing, _ = timed(lambda: [write() for _ in range(10)])
    shutil.rmtree(scratch)
    listing, _ = timed(lambda: list_images(folder, recursive=True))
    return {
        "image_bytes": round(statistics.mean((folder / n).stat().st_size for s in shards for n in s.names)),
        "result_bytes_per_image": round(len(to_parquet(rows)) / len(rows), 1), "shard_of": len(rows),
        "encode_ms_per_image": round(100 * encoding / len(rows), 4), "write_ms_per_shard": round(100 * writing / len(found), 3),
        "listing_ms_per_name_on_a_local_disk": round(1000 * listing / len(things), 4),
        "name_bytes": round(statistics.mean(map(len, whole.names))),
    }


def main():
    file, folder = Path(words[0]), Path(words[1])
    job = plan_job(file, folder)
    job.archive.names = job.archive.names[:: max(1, len(job.archive) // N)][:N]
    shards = cut(job.archive, SHARD)
    rounds = [one_round(file, folder, job, shards) for _ in range(ROUNDS)]
    n = len(job.archive)
    programs, judge = {}, Predictor(file)
    for name in ("bare loop", "local 1", "local 2", "ray 1", "ray 2"):
        if not (there := [r[0] for r in rounds if name in r[0]]):  # Ray did not start
            continue
        begin = [r.get(f"{name}, begin", 0.0) for r in there]
        net = [r[name] - b for r, b in zip(there, begin, strict=True)]
        workers, pairs = int(name[-1]) if name[-1].isdigit() else 1, [(r["bare loop"], s) for r, s in zip(there, net, strict=True)]
        programs[name] = {
            "images_per_s": round(statistics.median(n / s for s in net), 2),
            "of_the_bare_loop": round(statistics.median(b / s for b, s in pairs), 3),
            "of_the_bare_loop_each_round": [round(b / s, 3) for b, s in pairs],
            "overhead_ms_per_image": round(statistics.median(1000 * (s * workers - b) / n for b, s in pairs), 2),
            "begin_s": round(statistics.median(begin), 2),
        }  # fmt: skip
    facts = {
        "command": f"python tools/archive_study.py FILE PICTURES results/archive-scoring.json n={N} rounds={ROUNDS} shard={SHARD}",
        "data": f"{n} rendered zippers of 256 x 256 pixels, PNG; shards of {SHARD}",
        "detector": f"{file.name}: {judge.facts['model']}, {judge.size} x {judge.size}",
        "note": "On a machine that did other work at the same time: only the ratios within a round say something.",
        "machine": {"cores": os.cpu_count(), "load_at_the_end": round(os.getloadavg()[0], 1), "python": platform.python_version(),
                    **{m: __import__(m).__version__ for m in ("ray", "onnxruntime", "pyarrow")}},
        "rounds": ROUNDS, "programs": programs,
        "ray_start_s": [round(r[0]["ray, start"], 1) for r in rounds if "ray, start" in r[0]],
        "identical_files_from_all_engines": all(r[1] for r in rounds), "identical_to_predict": all(r[2] for r in rounds),
        "bits": bits(file, folder, job.archive.names[:64]), "per_image": per_picture(folder, job, shards, rounds[0][4], rounds[0][3]),
    }  # fmt: skip
    print(json.dumps(facts, indent=1))
    if len(words) > 2:
        Path(words[2]).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
