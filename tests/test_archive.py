"""An archive's verdicts are those of `predict`, by whichever engine, after whatever stop; a bad picture is a row, wrong input a line."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from zipper_ad import archive
from zipper_ad.archive import fetch, find_regions, open_archive, read_scores, score_archive
from zipper_ad.config import make_config
from zipper_ad.core import InputError
from zipper_ad.detector import Detector
from zipper_ad.export import export_detector
from zipper_ad.models.head import Restorer
from zipper_ad.predictor import Predictor
from zipper_ad.synth import render_zipper


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A detector that was never trained, as a folder and as a file."
    root = tmp_path_factory.mktemp("detector")
    config = make_config(["data.size=32", "model.widths=[8,16]", "model.latent=8", "train.device=cpu", "score.map=l2"])
    torch.manual_seed(0)
    model = Restorer(config.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    normals = torch.from_numpy(np.stack([render_zipper(s, 32) for s in range(40)]))[:, None] / 255
    Detector.fit(model, normals, config).save(root / "run")
    return root / "run", export_detector(Detector.load(root / "run"), root, "onnx")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "14 pictures of several kinds, among them ones with a stain; four that cannot be read."
    root = tmp_path_factory.mktemp("archive")
    (root / "b").mkdir()
    for i in range(14):
        picture = Image.fromarray(render_zipper(i, 40 + i))
        if i % 3 == 0:
            picture.paste(0, (8, 12, 22, 20 + i))
        picture = picture.convert("RGB") if i % 4 == 1 else picture
        picture.save(root / f"{'b/' if i % 2 else ''}{i}{('.png', '.jpg', '.tif')[i % 3]}")
    whole = (root / "0.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_bytes(b"not a picture")
    Image.fromarray(np.zeros((5, 40), np.uint8)).save(root / "small.png")
    (root / ".hidden.png").write_bytes(whole)
    (root / "notes.txt").write_text("no picture")
    return root


def same_as_predict(table, judge, root):
    rows = {r["file"]: r for r in table.to_pylist()}
    assert list(rows) == sorted(rows) and len(rows) == 18
    for v in judge.predict_each([root / name for name in rows], bs=1):
        row = rows[v.path.relative_to(root).as_posix()]
        assert row["threshold"] == judge.threshold.value
        if v.error:
            assert row["error"] == v.error.replace(str(v.path), row["file"])
            assert {row[k] for k in ("score", "p_value", "is_anomalous", "width", "height")} == {None} and row["regions"] == []
            continue
        assert (row["score"], row["p_value"], row["is_anomalous"]) == (v.score, v.p_value, v.is_anomalous)
        with Image.open(v.path) as image:
            assert (row["width"], row["height"]) == image.size
        assert row["regions"] == find_regions(v.anomaly_map, v.mask, row["width"], row["height"]) and row["error"] is None
    return rows


@pytest.fixture(scope="module")
def scored(made, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "out"
    counts = score_archive(made[1], pictures, out, workers=1, shard=4)
    assert (counts["pictures"], counts["errors"], counts["judged"], counts["shards"]) == (18, 4, 5, 5)
    return out


# ---------------------------------------------------------------- the same as predict
def test_exported_file_says_what_predict_says(made, pictures, scored):
    rows = same_as_predict(read_scores(scored), Predictor(made[1]), pictures)
    assert any(r["is_anomalous"] for r in rows.values()) and any(r["is_anomalous"] is False for r in rows.values())
    assert any(r["regions"] for r in rows.values())


def test_run_folder_says_what_predict_says(made, pictures, tmp_path):
    threads = torch.get_num_threads()
    score_archive(made[0], pictures, tmp_path, workers=1, shard=7, device="cpu")
    assert torch.get_num_threads() == threads
    same_as_predict(read_scores(tmp_path), Detector.load(made[0]), pictures)


def test_two_processes_write_the_same_bytes(made, pictures, scored, tmp_path):
    score_archive(made[1], pictures, tmp_path, workers=2, shard=4)
    assert shards(tmp_path) == shards(scored)


@pytest.mark.slow
def test_ray_writes_the_same_bytes(made, pictures, scored, tmp_path):
    score_archive(made[1], pictures, tmp_path, engine="ray", workers=2, shard=4)
    import ray

    assert shards(tmp_path) == shards(scored) and not ray.is_initialized()


@pytest.mark.slow
def test_ray_from_the_command_line_is_quiet(made, pictures, scored, tmp_path):
    words = ["score", f"run={made[1]}", f"data={pictures}", f"out={tmp_path}", "engine=ray", "workers=1", "shard=4"]
    done = subprocess.run([sys.executable, "-m", "zipper_ad", *words], capture_output=True, text=True)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "judging" not in line]
    assert (done.returncode, said) == (0, []) and len(done.stdout.splitlines()) == 1
    assert shards(tmp_path) == shards(scored)


def shards(folder):
    return {p.name: p.read_bytes() for p in folder.glob("shard-*.parquet")}


def test_a_batch_is_made_of_the_same_neighbours(made, pictures, tmp_path):
    for name, workers in (("a", 1), ("b", 1)):
        score_archive(made[1], pictures, tmp_path / name, workers=workers, shard=9, batch=4)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


# ---------------------------------------------------------------- where pictures stand
@pytest.mark.parametrize("group", [3, 100])
@pytest.mark.parametrize("struct", [False, True])
def test_parquet(made, pictures, scored, tmp_path, group, struct):
    names = open_archive(pictures).names
    data = [(pictures / n).read_bytes() for n in names]
    column = pa.array([{"bytes": d, "path": "x"} for d in data]) if struct else data
    half = 10
    for i, (a, b) in enumerate(((0, half), (half, len(names)))):
        table = pa.table({"name": names[a:b], "n": list(range(a, b)), "image": column[a:b]})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=group)
    score_archive(made[1], tmp_path, tmp_path / "out", workers=1, shard=4)
    assert read_scores(tmp_path / "out").equals(read_scores(scored))
    assert len(shards(tmp_path / "out")) == 5  # three of the first file, two of the second


def test_parquet_without_names_and_with_an_empty_row(made, pictures, tmp_path):
    pq.write_table(pa.table({"x": [(pictures / "0.png").read_bytes(), None]}), tmp_path / "a.parquet")
    score_archive(made[1], tmp_path / "a.parquet", tmp_path / "out", workers=1)
    rows = read_scores(tmp_path / "out").to_pylist()
    assert [r["file"] for r in rows] == ["a.parquet#0", "a.parquet#1"] and rows[0]["error"] is None
    assert rows[1]["error"] == "a.parquet#1: no picture in this row"


def test_object_store(made, pictures, scored, tmp_path):
    store = fsspec.filesystem("memory")
    for name in open_archive(pictures).names:
        store.pipe_file(f"/test-archive/{name}", (pictures / name).read_bytes())
    score_archive(made[1], "memory://test-archive", tmp_path, workers=1, shard=4, readers=3)
    assert shards(tmp_path) == shards(scored)
    with pytest.raises(InputError, match="workers=1"):
        score_archive(made[1], "memory://test-archive", tmp_path / "other", workers=2)


def test_a_store_that_stumbles_is_asked_again(monkeypatch):
    class Store:
        calls = 0

        def cat_file(self, path):
            self.calls += 1
            if self.calls < 3:
                raise TimeoutError("slow down")
            return b"x"

    monkeypatch.setattr(archive.time, "sleep", lambda seconds: None)
    store = Store()
    assert fetch(store, "a") == b"x" and store.calls == 3
    store.calls = -10
    assert "slow down" in str(fetch(store, "a")) and store.calls == -7


# ---------------------------------------------------------------- stops
def test_goes_on_after_a_kill(made, pictures, scored, tmp_path):
    words = ["score", f"run={made[1]}", f"data={pictures}", f"out={tmp_path}", "workers=1", "shard=1"]
    process = subprocess.Popen([sys.executable, "-m", "zipper_ad", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not shards(tmp_path) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = shards(tmp_path)
    (tmp_path / ".part-x.parquet").write_bytes(b"half a shard")  # as a kill at that moment leaves it
    counts = score_archive(made[1], pictures, tmp_path, workers=1, shard=1)
    assert counts["skipped"] >= len(there) >= 1 and counts["judged"] + counts["skipped"] == 18
    assert there.items() <= shards(tmp_path).items() and read_scores(tmp_path).equals(read_scores(scored))


def test_a_full_disk_ends_the_job_with_a_line_and_loses_nothing(made, pictures, scored, tmp_path, refused, monkeypatch):
    real, calls = archive.atomic_path, []

    @contextlib.contextmanager
    def full(path):
        calls.append(path)
        with real(path) as temporary:
            if len(calls) == 5:  # archive.json, stamps.json and two shards were written
                temporary.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a real one, without a name
            yield temporary

    monkeypatch.setattr(archive, "atomic_path", full)
    line = refused("score", f"run={made[1]}", f"data={pictures}", f"out={tmp_path}", "workers=1", "shard=4")
    assert "No space left" in line and "free space" in line and "shard-00000002" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive.json", "shard-00000000.parquet", "shard-00000001.parquet", "stamps.json"]
    monkeypatch.undo()
    counts = score_archive(made[1], pictures, tmp_path, workers=1, shard=4)
    assert (counts["judged"], counts["skipped"]) == (3, 2) and shards(tmp_path) == shards(scored)


@pytest.mark.parametrize("when", ["at once", "after a shard"])
def test_a_worker_that_is_killed_costs_its_shards_alone(made, pictures, scored, tmp_path, when):
    "A real SIGKILL to a real process: in its first moment, before it has read the detector, and while it judges."
    def kill():
        while not multiprocessing.active_children() or when == "after a shard" and not shards(tmp_path):
            time.sleep(0.001)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(InputError, match="a worker died.*run it again"):
        score_archive(made[1], pictures, tmp_path, workers=2, shard=1)
    killer.join()
    assert not list(tmp_path.glob(".part-*")) and not multiprocessing.active_children()
    assert score_archive(made[1], pictures, tmp_path, workers=1, shard=1)["pictures"] == 18
    assert read_scores(tmp_path).equals(read_scores(scored))


def test_a_command_that_is_killed_leaves_nothing_behind(made, pictures, tmp_path):
    "Neither workers that wait for ever, nor copies of the detector."
    (tmp_path / "tmp").mkdir()
    words = ["score", f"run={made[1]}", f"data={pictures}", f"out={tmp_path / 'out'}", "workers=2", "shard=1"]
    process = subprocess.Popen([sys.executable, "-m", "zipper_ad", *words], env=os.environ | {"TMPDIR": str(tmp_path / "tmp")})
    while not shards(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.005)
    family = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert len(family) >= 2 and not psutil.wait_procs(family, timeout=60)[1]
    assert not list((tmp_path / "tmp").glob("zipper_ad-*"))


def test_what_a_worker_raises_is_raised_here(made, pictures, tmp_path, monkeypatch):
    real = archive.plan_job

    def broken(*words, **settings):
        job = real(*words, **settings)
        return archive.replace(job, files={"detector.onnx": b"no detector"})

    monkeypatch.setattr(archive, "plan_job", broken)
    with pytest.raises(InputError, match="detector.onnx: damaged"):
        score_archive(made[1], pictures, tmp_path, workers=2, shard=4)
    assert not multiprocessing.active_children()


def test_pictures_that_vanish_or_are_forbidden_become_rows(made, pictures, tmp_path, monkeypatch):
    source = shutil.copytree(pictures, tmp_path / "in")
    listed = archive.open_archive

    def vanishing(*words):
        found = listed(*words)
        (source / "0.png").unlink()
        return found

    monkeypatch.setattr(archive, "open_archive", vanishing)
    real = open

    def forbidding(file, *words, **settings):
        if str(file).endswith("6.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *words, **settings)

    monkeypatch.setattr("builtins.open", forbidding)
    assert score_archive(made[1], source, tmp_path / "out", workers=1, shard=4)["errors"] == 6
    rows = {r["file"]: r["error"] for r in read_scores(tmp_path / "out").to_pylist()}
    assert rows["0.png"] == "0.png: no such file. Check the path." and rows["6.png"].startswith("6.png: permission denied")
    monkeypatch.undo()
    shutil.copy(pictures / "0.png", source)
    assert score_archive(made[1], source, tmp_path / "out", workers=1, shard=4, again=True)["errors"] == 4


def test_errors_are_judged_again_when_asked(made, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(render_zipper(i, 40)).save(tmp_path / f"in/{i}.png")
    whole = (tmp_path / "in/3.png").read_bytes()
    (tmp_path / "in/3.png").write_bytes(whole[:100])
    assert score_archive(made[1], tmp_path / "in", tmp_path / "out", workers=1, shard=2)["errors"] == 1
    (tmp_path / "in/3.png").write_bytes(whole)
    (tmp_path / "out/stamps.json").unlink()  # as if it had been a failure of the disk, and no other picture
    assert score_archive(made[1], tmp_path / "in", tmp_path / "out", workers=1, shard=2)["errors"] == 1
    counts = score_archive(made[1], tmp_path / "in", tmp_path / "out", workers=1, shard=2, again=True)
    assert (counts["errors"], counts["judged"], counts["skipped"]) == (0, 1, 1)


def test_a_judge_that_fails_on_one_picture_gives_a_row(made, pictures):
    judge = Predictor(made[1], threads=1)
    plain, run = judge.run, judge.run
    bad = judge.prepare(pictures / "0.png")

    def stumble(x):
        if (x == bad).reshape(len(x), -1).all(1).any():
            raise RuntimeError("out of memory")
        return run(x)

    judge.run = stumble
    things = [(n, pictures / n) for n in ("0.png", "6.png", "12.png")]
    for batch in (1, 3):
        rows = archive.judge_rows(judge, things, batch)
        assert [r["error"] for r in rows] == ["0.png: could not be judged (RuntimeError: out of memory)", None, None]
    judge.run = plain


def test_a_score_that_is_no_number_gives_a_row(made, pictures):
    judge = Predictor(made[1], threads=1)
    run = judge.run
    judge.run = lambda x: [np.full_like(run(x)[0], np.nan), *run(x)[1:]]
    (row,) = archive.judge_rows(judge, [("0.png", pictures / "0.png")])
    assert row["error"].startswith("0.png: its score or map is not finite") and row["score"] is None and row["is_anomalous"] is None


# ---------------------------------------------------------------- wrong input
def test_another_job_is_refused(made, pictures, scored, tmp_path):
    before = shards(scored)
    for run, source, settings, said in (
        (made[0], pictures, {}, "another detector"), (made[1], pictures, {"shard": 5}, "shard=4, not 5"),
        (made[1], pictures, {"batch": 2}, "batch=1, not 2"), (made[1], pictures / "b", {}, "other pictures: pictures=18, not 7"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            score_archive(run, source, scored, workers=1, **({"shard": 4} | settings))
    assert shards(scored) == before
    (tmp_path / "shard-00000000.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match="without archive.json"):
        score_archive(made[1], pictures, tmp_path, workers=1)


@pytest.mark.parametrize("settings, said", [
    ({"engine": "spark"}, "must be local or ray"), ({"shard": 0}, "shard=0"), ({"batch": 0}, "batch=0"), ({"workers": -1}, "workers=-1"),
    ({"engine": "local", "address": "auto"}, "engine=ray"),
])  # fmt: skip
def test_wrong_settings(made, pictures, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        score_archive(made[1], pictures, tmp_path / "out", **({"workers": 1} | settings))
    assert not (tmp_path / "out").exists()


def test_wrong_archives(made, pictures, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.png").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "mixed/text.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.binary())}), tmp_path / "rows.parquet")
    for source, said in (("gone", "nothing there"), ("none", "no images there"), ("mixed", "one kind"), ("torn.parquet", "no whole"),
                         ("two.parquet", "2 columns of bytes.*a, b"), ("mixed/text.parquet", "0 columns of bytes.*columns are a"),
                         ("rows.parquet", "no rows")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            score_archive(made[1], tmp_path / source, tmp_path / "out", workers=1)
    with pytest.raises(InputError, match="name=z: no such column"):
        score_archive(made[1], tmp_path / "two.parquet", tmp_path / "out", workers=1, image="a", name="z")
    with pytest.raises(InputError, match="no such file"):
        score_archive(tmp_path / "gone.onnx", pictures, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["pyarrow", "ray", "fsspec"])
def test_a_missing_package_is_named(made, pictures, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"{missing}.parquet", raising=False)
    with pytest.raises(InputError, match=rf'{missing}.*pip install "zipper_ad\[scale\]"'):
        score_archive(made[1], pictures, tmp_path, engine="ray" if missing == "ray" else "local", workers=1)


def test_command(made, pictures, scored, tmp_path, cli, refused):
    done = cli("score", f"run={made[1]}", f"data={pictures}", f"out={tmp_path / 'out'}", "workers=1", "shard=4")
    assert done.code == 0 and "18 pictures" in done.out and "4 could not be judged" in done.out
    assert shards(tmp_path / "out") == shards(scored)
    assert json.loads((tmp_path / "out/archive.json").read_text())["settings"]["shard"] == 4
    assert "nothing there" in refused("score", f"run={made[1]}", f"data={tmp_path / 'gone'}", f"out={tmp_path}")
    assert "no such setting" in refused("score", f"run={made[1]}", f"data={pictures}", f"out={tmp_path}", "shards=4")


def test_an_archive_of_broken_pictures_only_is_exit_code_1(made, tmp_path, cli):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"x")
    assert cli("score", f"run={made[1]}", f"data={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "workers=1").code == 1


# ---------------------------------------------------------------- regions
def test_regions_cover_the_mask():
    rng = np.random.default_rng(0)
    for side, width, height in ((16, 16, 16), (16, 37, 90), (32, 31, 12)):
        anomaly_map = rng.random((side, side), dtype=np.float32)
        mask = anomaly_map > 0.9
        found = find_regions(anomaly_map, mask, width, height, most=1000)
        assert [r["peak"] for r in found] == sorted((r["peak"] for r in found), reverse=True)
        assert abs(sum(r["area"] for r in found) - mask.mean() * width * height) <= len(found) / 2 + 1e-6
        assert all(0 <= r["left"] < r["right"] <= width and 0 <= r["top"] < r["bottom"] <= height for r in found)
        covered = np.zeros((height, width), bool)
        for r in found:
            covered[r["top"] : r["bottom"], r["left"] : r["right"]] = True
        y, x = np.nonzero(mask)
        assert covered[((y + 0.5) * height / side).astype(int), ((x + 0.5) * width / side).astype(int)].all()
        assert len(find_regions(anomaly_map, mask, width, height, most=2)) == 2


def test_the_same_rows_are_the_same_bytes(made, pictures):
    rows = archive.judge_rows(Predictor(made[1]), [("0.png", pictures / "0.png"), ("ü\udcff.png", b"")])
    data = archive.to_parquet(rows)
    assert data == archive.to_parquet(rows)
    assert pq.read_table(io.BytesIO(data)).to_pylist()[1]["file"] == "ü\\udcff.png"


def test_results_within_the_archive_and_pictures_that_were_replaced(made, pictures, tmp_path):
    copied = Path(shutil.copytree(pictures, tmp_path / "archive"))
    n = score_archive(made[0], copied, copied / "scores", engine="local", workers=1)
    again = score_archive(made[0], copied, copied / "scores", engine="local", workers=1)
    assert again["judged"] == 0 and again["pictures"] == n["pictures"]
    first = copied / "0.png"
    Image.new("L", (64, 64), 9).save(first)
    replaced = score_archive(made[0], copied, copied / "scores", engine="local", workers=1)
    assert replaced["judged"] == 1 and replaced["shards"] == 1
    row = next(r for r in read_scores(copied / "scores").to_pylist() if r["file"] == first.relative_to(copied).as_posix())
    assert row["score"] == pytest.approx(Detector.load(made[0]).predict(first).score, abs=1e-5)
