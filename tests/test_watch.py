"""Every picture that arrives gets one verdict, through half-written files, replaced ones, full disks, kills and restarts."""

import contextlib
import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from zipper_ad import watch
from zipper_ad.core import InputError, atomic_path
from zipper_ad.drift import DriftMonitor, OnlinePValues
from zipper_ad.picture import Judge, Verdict, as_pixels
from zipper_ad.watch import Bands, Drift, Ledger, Queue, Stamp, Watcher, WatchSettings, audit, make_bands, read_verdicts, walk_images


class Stub(Judge):
    "A detector whose score is the mean grey of a picture, in [0, 1]; scores of good parts are 0.00 to 0.99."

    calibration_scores = np.arange(100) / 100
    threshold = SimpleNamespace(value=0.95, promised_fpr=0.04)
    map_scale = (0.0, 1.0)

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def prepare(self, thing):
        return as_pixels(thing, 16)

    def judge(self, pictures, paths):
        time.sleep(self.seconds)
        grey = [p[0].astype(np.float32) / 255 for p in pictures]
        return [Verdict(float(g.mean()), 0.5, bool(g.mean() > 0.95), g, g > 1, g, None, p) for g, p in zip(grey, paths, strict=True)]


def put(path, grey=100, seed=None):
    "A picture as a careful sender writes it: under a hidden name, then renamed."
    pixels = np.full((16, 16), grey, np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8)
    with atomic_path(path) as hidden:
        Image.fromarray(pixels).save(hidden, format="BMP" if Path(path).suffix == ".bmp" else "PNG")
    return Path(path)


@pytest.fixture
def clock(monkeypatch):
    "A monotonic clock that only sleeping moves."
    fake = SimpleNamespace(now=1000.0, slept=lambda: None)

    def sleep(seconds):
        fake.now += seconds
        fake.slept()

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: fake.now, sleep=sleep))
    fake.sleep = sleep
    return fake


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


@pytest.fixture
def start(folders):
    "Watchers on the two folders, closed in the end."
    with contextlib.ExitStack() as stack:

        def make(judge=None, **settings):
            watcher = Watcher(judge or Stub(), *folders, WatchSettings(**settings), say=lambda s: None)
            stack.callback(watcher.close)
            return watcher

        yield make


def drain(watcher):
    "One look, then all that is ready; the verdicts so far, as file: verdict."
    watcher.look()
    while watcher.step():
        pass
    frame = read_verdicts(watcher.out)
    return list(zip(frame.file, frame.verdict, strict=True))


def clean(folders, n):
    "Assert that n verdicts are there and nothing else is amiss."
    assert audit(*folders) == {"verdicts": n, "lost": 0, "repeated": 0, "csv_differs": 0, "heatmaps_missing": 0}


# ---- what counts as a picture


def test_only_whole_names_of_images_are_found(folders):
    folder, out = folders
    for name in ("a.png", "B.PNG", "below/deep/c.jpg"):
        put(folder / name)
    for name in ("notes.txt", ".hidden.png", ".git/d.png", "__MACOSX/e.png", "a.png.part", "verdicts/heatmaps/f.png"):
        put(folder / name)
    os.symlink(folder, folder / "circle")
    os.mkfifo(folder / "pipe.png")
    assert sorted(name for name, _ in walk_images(folder, folder / "verdicts")) == ["B.PNG", "a.png", "below/deep/c.jpg"]


def test_folder_below_that_cannot_be_listed_is_told_and_passed_over(folders, monkeypatch):
    folder, _ = folders
    put(folder / "good/a.png")
    put(folder / "lost/b.png")
    listed, heard = os.scandir, []

    def scandir(path):
        if "lost" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [name for name, _ in walk_images(folder, on_error=heard.append)] == ["good/a.png"] and len(heard) == 1


def test_a_growing_file_waits_and_a_broken_one_becomes_a_row_after_its_grace(start, folders, clock):
    folder, _ = folders
    whole = put(folder / "x.bmp", seed=1).read_bytes()
    watcher = start(settle=0.5, grace=5)
    (folder / "x.bmp").write_bytes(whole[:100])
    for size in (200, 300, 400):
        assert drain(watcher) == []
        clock.sleep(0.4)
        (folder / "x.bmp").write_bytes(whole[:size])  # still growing: never still for half a second
        os.utime(folder / "x.bmp", ns=(size, size))
    assert drain(watcher) == []
    clock.sleep(0.6)
    assert drain(watcher) == []  # still, but not whole: the grace time begins
    clock.sleep(4.5)
    assert drain(watcher) == []
    clock.sleep(0.6)
    assert drain(watcher) == [("x.bmp", "ERROR")]
    assert "cut short" in read_verdicts(watcher.out).error[0]
    clock.sleep(60)
    assert drain(watcher) == [("x.bmp", "ERROR")]  # said once
    (folder / "x.bmp").write_bytes(whole)
    assert len(drain(watcher)) == 1
    clock.sleep(0.6)
    assert drain(watcher) == [("x.bmp", "ERROR"), ("x.bmp", "PASS")]
    clean(folders, 2)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_becomes_a_row(start, folders, content):
    (folders[0] / "x.png").write_bytes(content)
    watcher = start(settle=0, grace=0)
    assert drain(watcher) == [("x.png", "ERROR")] and drain(watcher) == [("x.png", "ERROR")]
    clean(folders, 1)


def test_new_bytes_under_an_old_name_are_a_new_picture(start, folders):
    folder, _ = folders
    watcher, path = start(settle=0), put(folders[0] / "latest.bmp", 10)
    times = os.stat(path).st_mtime_ns
    assert len(drain(watcher)) == 1
    put(path, 20)
    os.utime(path, ns=(times, times))  # same name, size and mtime
    assert len(drain(watcher)) == 2
    put(path, 250)
    assert drain(watcher)[-1] == ("latest.bmp", "FAIL")
    put(path, 10)  # the first again: another part
    assert len(drain(watcher)) == 4 == len(set(read_verdicts(watcher.out).heatmap)) + 1
    clean(folders, 4)


def test_same_bytes_in_another_guise_are_no_new_picture(start, folders):
    folder, _ = folders
    watcher, path = start(settle=0), put(folders[0] / "a.png")
    assert len(drain(watcher)) == 1
    for change in (lambda: os.utime(path, (1, 1)), lambda: os.utime(path, (4e9, 4e9)), lambda: path.chmod(0o600), lambda: put(path)):
        change()
        assert len(drain(watcher)) == 1
    path.rename(folder / "b.png")
    assert len(drain(watcher)) == 1  # moved
    (folder / "done").mkdir()
    (folder / "b.png").rename(folder / "done/b.png")
    assert len(drain(watcher)) == 1
    clean(folders, 1)
    put(folder / "c.png")
    assert len(drain(watcher)) == 2  # an equal picture of another name is another part
    times = os.stat(folder / "c.png").st_mtime_ns
    put(folder / "d.png")
    os.utime(folder / "d.png", ns=(times, times))
    assert len(drain(watcher)) == 3  # even with the same time, as c.png is still in its place
    clean(folders, 3)


def test_times_far_from_now_do_not_matter(start, folders):
    for i, seconds in enumerate((0, 1, 4_000_000_000)):
        os.utime(put(folders[0] / f"{i}.png", i), (seconds, seconds))
    assert len(drain(start(settle=0))) == 3


def test_deleted_before_and_while_it_is_read(start, folders):
    folder, _ = folders
    judge = Stub()
    watcher = start(judge, settle=0)
    gone, going = put(folder / "a.png"), put(folder / "b.png", seed=1)
    watcher.look()
    gone.unlink()
    prepare = judge.prepare

    def deletes(thing):
        going.unlink(missing_ok=True)
        return prepare(thing)

    judge.prepare = deletes
    assert watcher.step() == 0 and not watcher.queue.waiting and len(watcher.queue) == 0
    assert drain(watcher) == []


def test_replaced_while_it_is_read_waits_anew(start, folders):
    folder, _ = folders
    judge = Stub()
    watcher, path = start(judge, settle=0), put(folders[0] / "a.png", 10)
    prepare, judge.prepare = judge.prepare, lambda thing: (put(path, 250), prepare(thing))[1]
    watcher.look()
    assert watcher.step() == 0 and list(watcher.queue.waiting) == ["a.png"]
    judge.prepare = prepare
    assert watcher.step() == 1 and drain(watcher) == [("a.png", "FAIL")]
    clean(folders, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_bytes(start, folders):
    folder, _ = folders
    for name in (b"caf\xe9.png", b"caf\\xe9.png", "büro,\"1\"\n.png".encode(), b"x" * 250 + b".png"):
        (folder / os.fsdecode(name)).write_bytes(put(folder / "model.png", seed=len(name)).read_bytes())
    watcher = start(settle=0)
    assert len(drain(watcher)) == len(drain(watcher)) == 5
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken")
    assert len(drain(start_again(watcher, settle=0, grace=0))) == 6
    assert audit(*folders)["lost"] == audit(*folders)["csv_differs"] == 0


def start_again(watcher, **settings):
    watcher.close()
    return Watcher(watcher.judge, watcher.folder, watcher.out, WatchSettings(**settings), say=lambda s: None)


# ---- bounded, and once


def test_queue_holds_the_oldest_and_no_more():
    queue = Queue(5)
    queue.refresh(((f"{i}.png", Stamp(1, 100 - i, 0)) for i in range(100)), 0.0)
    assert list(queue.waiting) == ["99.png", "98.png", "97.png", "96.png", "95.png"] and len(queue) == 100
    since = queue.waiting["98.png"].since
    queue.refresh(((f"{i}.png", Stamp(1, 100 - i, 0)) for i in range(99)), 9.0)  # 99.png is gone
    assert list(queue.waiting)[-1] == "94.png" and queue.waiting["98.png"].since == since and queue.waiting["94.png"].since == 9.0


def test_a_burst_beyond_the_backlog_is_judged_in_order(folders, start):
    folder, out = folders
    for i in range(50):
        os.utime(put(folder / f"{99 - i}.png", i), ns=(i, i))
    watcher, most = start(settle=0, backlog=7, bs=3, once=True, poll=0), []
    looks, watcher.look = watcher.look, lambda: (looks(), most.append(len(watcher.queue.waiting)))
    assert watcher.run() == 0
    assert max(most) == 7 and list(read_verdicts(out).file) == [f"{99 - i}.png" for i in range(50)]
    clean(folders, 50)


def test_once_ends_while_pictures_keep_coming(folders, start, clock):
    folder, out = folders
    put(folder / "0.png", seed=0)
    clock.slept = lambda: put(folder / f"{clock.now}.png", seed=int(clock.now * 1000))
    assert start(settle=0.5, once=True).run() == 0
    assert list(read_verdicts(out).file) == ["0.png"]


# ---- PASS, REVIEW, FAIL


def test_bands_are_the_detectors_threshold_and_a_conformal_one(start, folders):
    bands = make_bands(Stub(), 0.2)
    assert bands.review == 0.80 and bands.threshold == 0.95 and bands.fail_rate == 0.04 and 0.19 < bands.review_rate <= 0.2
    for grey in (0, 204, 205, 242, 243, 255):  # 204 / 255 is 0.8
        put(folders[0] / f"{grey}.png", grey)
    told = dict(drain(start(settle=0, review=0.2)))
    assert [told[f"{g}.png"] for g in (0, 205, 242, 243, 255)] == ["PASS", "REVIEW", "REVIEW", "FAIL", "FAIL"]
    assert make_bands(Stub(), 0).review_share() == (0, 0, 0)


def test_a_score_that_is_not_finite_never_passes(start, folders):
    judge = Stub()
    judge.judge = lambda pictures, paths: [Verdict(math.nan, path=p) for p in paths]
    put(folders[0] / "a.png")
    watcher = start(judge, settle=0)
    assert drain(watcher) == [("a.png", "ERROR")] and "not finite" in read_verdicts(watcher.out).error[0]
    assert Bands(0.8, 0.9, 0.2, 0.1, 9)(Verdict(math.inf, is_anomalous=True)) == "ERROR"


@pytest.mark.parametrize("settings, said", [
    ({"review": 0.01}, "review=0.01"), ({"review": 1.5}, "review=1.5"), ({"settle": -1.0}, "settle"), ({"bs": 0}, "bs=0"),
    ({"poll": math.nan}, "poll"),
])  # fmt: skip
def test_wrong_settings_are_refused(start, settings, said):
    with pytest.raises(InputError, match=said):
        start(**settings)


def test_wrong_folders_are_refused(folders, start):
    folder, out = folders
    for bad in (folder / "nowhere", put(folder / "a.png")):
        with pytest.raises(InputError, match="folder"):
            Watcher(Stub(), bad, out)
    with pytest.raises(InputError, match="Choose another out"):
        Watcher(Stub(), folder, folder)
    drain(start(settle=0))
    other = Stub()
    other.calibration_scores = np.arange(100) / 101
    with pytest.raises(InputError, match="another"):
        Watcher(other, folder, out)


def test_verdicts_of_another_detector_are_not_mixed(folders, start):
    start().close()
    other = Stub()
    other.calibration_scores = np.arange(100) / 101
    with pytest.raises(InputError, match="another detector"):
        start(other)
    start()  # and the lock was not kept


def test_a_file_that_is_no_ledger(folders, start):
    folders[1].mkdir()
    (folders[1] / "verdicts.db").write_text("Dear diary, " * 200)
    with pytest.raises(InputError, match="verdicts.db"):
        start()


# ---- the drift monitor


def test_drift_goes_on_after_restarts_as_if_there_were_none(folders, start):
    rng, folder = np.random.default_rng(0), folders[0]
    watcher, scores = start(settle=0, bs=4), []
    for i, grey in enumerate(rng.integers(0, 256, 60)):
        os.utime(put(folder / f"{i}.png", int(grey)), ns=(i, i))
        if i % 17 == 16:
            drain(watcher)
            watcher = start_again(watcher, settle=0, bs=4)
    drain(watcher)
    online, monitor = OnlinePValues(Stub.calibration_scores[:95]), DriftMonitor()
    scores = [s for s in read_verdicts(watcher.out).score if s < 0.95]
    told = [online(s) for s in scores]
    capital = [monitor.update(p) for p in told]
    assert len(scores) < 60 and list(read_verdicts(watcher.out).drift_p.dropna()) == told
    again = Drift(watcher.ledger, Stub.calibration_scores, 0.95)
    for d in (watcher.drift, again):
        assert d.monitor.capital == capital[-1] and d.online.seen == online.seen and d.online.random.random() == pytest.approx(
            again.online.random.random() if d is watcher.drift else d.online.random.random(), abs=1)
    assert Drift(watcher.ledger, Stub.calibration_scores, 0.95)(0.3) == online(0.3)
    watcher.close()


# ---- trouble


def test_a_full_disk_is_waited_for(folders, start, clock, caplog):
    folder, out = folders
    for i in range(30):
        put(folder / f"{i}.png", i)
    watcher = start(settle=0, bs=30)
    (pages,) = watcher.ledger.db.execute("PRAGMA page_count").fetchone()
    watcher.ledger.db.execute(f"PRAGMA max_page_count={pages}")

    def freed():
        if clock.now > 1005:
            watcher.ledger.db.execute("PRAGMA max_page_count=100000")

    clock.slept = freed
    assert len(drain(watcher)) == 30 and clock.now > 1005
    assert len(caplog.messages) == 2 and "full" in caplog.messages[0] and "works again" in caplog.messages[1]
    clean(folders, 30)


def test_heatmaps_that_cannot_be_written_are_waited_for(folders, start, clock, caplog):
    folder, out = folders
    put(folder / "a.png")
    watcher = start(settle=0)
    (out / "heatmaps").write_text("in the way")
    clock.slept = lambda: (out / "heatmaps").unlink() if clock.now > 1003 and (out / "heatmaps").is_file() else None
    assert drain(watcher) == [("a.png", "PASS")] and len(caplog.messages) == 2
    clean(folders, 1)


def test_a_csv_that_is_held_open_elsewhere_lags_and_catches_up(folders, start, caplog):
    folder, out = folders
    watcher = start(settle=0)
    put(folder / "a.png")
    (out / "verdicts.csv").mkdir(parents=True)
    assert len(drain(watcher)) == 1 and len(caplog.messages) == 1
    (out / "verdicts.csv").rmdir()
    put(folder / "b.png", seed=1)
    assert len(drain(watcher)) == 2
    clean(folders, 2)


def test_stopped_during_trouble_loses_nothing(folders, start, clock):
    folder, out = folders
    put(folder / "a.png")
    watcher = start(settle=0)
    (out / "heatmaps").write_text("in the way")
    clock.slept = watcher.stop
    assert watcher.run() == 1 and len(read_verdicts(out)) == 0
    (out / "heatmaps").unlink()
    assert drain(start(settle=0)) == [("a.png", "PASS")]


def test_a_ledger_that_was_removed_is_noticed(folders, start):
    folder, out = folders
    put(folder / "a.png")
    watcher = start(settle=0)
    (out / "verdicts.db").unlink()
    watcher.look()
    with pytest.raises(InputError, match="was removed"):
        watcher.step()


def test_a_database_that_cannot_be_read_for_a_while(folders, start, monkeypatch, caplog):
    folder, out = folders
    put(folder / "a.png")
    watcher = start(settle=0)
    watcher.look()

    def fails(name):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(watcher.ledger, "last", fails)
    assert watcher.step() == 0
    watcher.look()
    monkeypatch.undo()
    assert drain(watcher) == [("a.png", "PASS")] and "disk I/O error" in caplog.text
    clean(folders, 1)


def test_a_folder_that_goes_away_is_waited_for(folders, start, caplog):
    folder, _ = folders
    watcher = start(settle=0)
    folder.rename(folder.with_name("unmounted"))
    assert drain(watcher) == drain(watcher) == [] and len(caplog.messages) == 1
    folder.with_name("unmounted").rename(folder)
    put(folder / "a.png")
    assert len(drain(watcher)) == 1 and "works again" in caplog.messages[-1]


def test_a_drive_that_fails_makes_no_row_and_a_forbidden_file_does(folders, start, clock, monkeypatch):
    folder, out = folders
    put(folder / "a.png")
    digest, errors = watch.digest_of, [OSError(5, "Input/output error")] * 3 + [PermissionError(13, "Permission denied")]

    def fails(path):
        if errors:
            raise errors.pop(0)
        return digest(path)

    monkeypatch.setattr(watch, "digest_of", fails)
    watcher = start(settle=0, grace=0)
    for _ in range(3):
        assert drain(watcher) == []
        clock.sleep(2)
    assert drain(watcher) == [("a.png", "ERROR")] and "chmod" in read_verdicts(out).error[0]
    os.utime(folder / "a.png")  # as chmod would, this changes the stamp
    assert drain(watcher) == [("a.png", "ERROR"), ("a.png", "PASS")]
    errors[:] = [OSError(5, "Input/output error")] * 99
    put(folder / "b.png", seed=1)
    watcher.close()
    assert start(settle=0, grace=3, once=True).run() == 1  # once comes to an end, and says so
    errors.clear()
    assert start(settle=0, once=True).run() == 0
    clean(folders, 3)


def test_a_database_that_another_program_holds_is_waited_for(folders, start, clock, caplog):
    folder, out = folders
    put(folder / "a.png")
    watcher = start(settle=0)
    watcher.ledger.db.execute("PRAGMA busy_timeout=0")  # half a minute otherwise
    other = sqlite3.connect(out / "verdicts.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    clock.slept = lambda: other.in_transaction and clock.now > 1004 and other.execute("ROLLBACK")
    assert drain(watcher) == [("a.png", "PASS")] and clock.now > 1004
    assert len(caplog.messages) == 2 and "locked" in caplog.messages[0] and "works again" in caplog.messages[1]
    other.close()
    clean(folders, 1)


def test_a_clock_that_jumps_backwards_changes_no_order(folders, start, monkeypatch):
    "The wall clock is only written down: files are timed by the monotonic one, and verdicts are in order of their number."
    folder, out = folders
    hours = iter([12, 11, 10, 23, 1])

    original, watcher = watch.datetime, start(settle=0)
    monkeypatch.setattr(watch, "datetime", SimpleNamespace(now=lambda zone: original(2030, 1, 1, next(hours), tzinfo=zone)))
    for i in range(5):
        path = put(folder / f"{i}.png", seed=i)
        os.utime(path, (1e9 - 1000 * i, 1e9 - 1000 * i))  # the sender's clock, too
        drain(watcher)
        if i == 2:
            watcher = start_again(watcher, settle=0)
    frame = read_verdicts(out)
    assert list(frame.file) == [f"{i}.png" for i in range(5)] and list(frame.id) == [1, 2, 3, 4, 5]
    assert [j[11:13] for j in frame.judged] == ["12", "11", "10", "23", "01"]
    watcher.close()
    clean(folders, 5)


def test_folders_that_are_deleted_while_it_watches(folders, start, caplog):
    folder, out = folders
    put(folder / "a.png")
    watcher = start(settle=0)
    watcher.look()
    shutil.rmtree(folder)  # what was found is gone
    assert watcher.step() == 0 and drain(watcher) == [] and "trying again" in caplog.text
    put(folder / "b.png")  # and the folder is back
    assert drain(watcher) == [("b.png", "PASS")] and "works again" in caplog.messages[-1]
    shutil.rmtree(out / "heatmaps")
    put(folder / "c.png", seed=1)
    assert len(drain(watcher)) == 2
    shutil.rmtree(out)
    put(folder / "d.png", seed=2)
    watcher.look()
    with pytest.raises(InputError, match="was removed"):
        watcher.step()


# ---- the CSV


def test_csv_is_what_the_database_says_whatever_was_done_to_it(folders, start):
    folder, out = folders
    path, rng = out / "verdicts.csv", np.random.default_rng(0)
    harm = [lambda: path.unlink(), lambda: path.write_bytes(path.read_bytes()[:-5]), lambda: path.write_text(""),
            lambda: path.write_bytes(path.read_bytes() + b"7,half a li"), lambda: None]  # fmt: skip
    watcher = start(settle=0)
    for i in range(12):
        put(folder / f"{i}.png", seed=i)
        drain(watcher)
        clean(folders, i + 1)
        harm[rng.integers(len(harm))]()
        if i % 4 == 3:
            watcher = start_again(watcher, settle=0)
            watcher._catch_up()
            clean(folders, i + 1)
    watcher.close()
    with open(path, newline="") as f, contextlib.closing(sqlite3.connect(out / "verdicts.db")) as db:
        scores = [float(row["score"]) for row in csv.DictReader(f)]
        assert len(scores) >= 11 and scores == [s for (s,) in db.execute("SELECT score FROM verdicts ORDER BY id")][: len(scores)]


# ---- processes


fork = pytest.mark.skipif(sys.platform != "linux", reason="starts watchers by fork")


def launch(folders, **settings):
    "A watcher in a process of its own, at work when this returns."
    def work(ready):
        watcher = Watcher(Stub(seconds=0.01), *folders, WatchSettings(**settings), say=lambda s: None)
        ready.set()
        sys.exit(watcher.run())

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,))
    process.start()
    assert ready.wait(30)
    return process


def wait_for(folders, n):
    while not (folders[1] / "verdicts.db").exists() or len(read_verdicts(folders[1])) < n:
        time.sleep(0.005)


@fork
def test_kill_and_restart_lose_and_repeat_nothing(folders):
    folder, out = folders
    for i in range(120):
        put(folder / f"{i}.png", seed=i)
    for goal in (20, 45, 77):
        process = launch(folders, settle=0, poll=0.05, bs=4)
        wait_for(folders, goal)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and goal <= len(read_verdicts(out)) < 120
    process = launch(folders, settle=0, poll=0.05, once=True)
    process.join(60)
    assert process.exitcode == 0
    clean(folders, 120)


@fork
def test_a_process_that_may_write_no_larger_files_waits_for_room(folders):
    "As on a disk that is full: the system itself refuses, until it is told otherwise."
    import resource

    folder, out = folders
    for i in range(200):
        put(folder / f"{i}.png", seed=i)
    process = launch(folders, settle=0, poll=0.05, bs=4)
    wait_for(folders, 8)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    before = -1
    while len(read_verdicts(out)) != before:  # until it stands still
        before = len(read_verdicts(out))
        time.sleep(0.5)
    assert before < 200 and process.is_alive()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for(folders, 200)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
    clean(folders, 200)


@fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_batch(folders, number):
    folder, out = folders
    for i in range(200):
        put(folder / f"{i}.png", seed=i)
    process = launch(folders, settle=0, bs=5)
    wait_for(folders, 10)
    os.kill(process.pid, number)
    process.join(30)
    n = len(read_verdicts(out))
    assert process.exitcode == 0 and 10 <= n < 200 and n % 5 == 0
    assert audit(folder, out) == {"verdicts": n, "lost": 200 - n, "repeated": 0, "csv_differs": 0, "heatmaps_missing": 0}


@fork
def test_two_watchers(folders, start):
    process = launch(folders, settle=0)
    with pytest.raises(InputError, match="another watcher"):
        start()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    start()  # the lock died with the process


# ---- the command


def test_command(trained, tmp_path, cli, refused):
    out = tmp_path / "out"
    words = f"run={trained.run}", f"input={trained.data / 'test'}", f"out={out}", "once=true", "settle=0.1", "review=0.3"
    done = cli("watch", *words)
    n = len(list(walk_images(trained.data / "test")))
    assert done.code == 0 and "Of good parts" in done.out and f"{n} judged" in done.out.splitlines()[-1]
    clean((trained.data / "test", out), n)
    again = cli("watch", *words)
    assert again.code == 0 and len(read_verdicts(out)) == n
    assert "no such setting" in refused("watch", *words, "wait=3")
    assert "input" in refused("watch", words[0], words[2])
    assert "between" in refused("watch", *words[:-1], "review=0.0001")


@pytest.mark.slow
def test_command_with_an_exported_file_through_kills(trained, tmp_path, cli):
    from zipper_ad.synth import render_zipper

    assert cli("export", f"run={trained.run}", f"out={tmp_path}").code == 0
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(150):
        with atomic_path(folder / f"{i % 3}/{i}.png") as hidden:
            Image.fromarray(render_zipper(i, 64)).save(hidden)
    exported = tmp_path / "detector-fp32.onnx"
    command = [sys.executable, "-m", "zipper_ad", "watch", f"run={exported}", f"input={folder}", f"out={out}", "settle=0.1"]
    for goal in (30, 80):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for((folder, out), goal)
        process.kill()
        process.wait()
    done = subprocess.run([*command, "once=true"], capture_output=True, text=True)
    assert done.returncode == 0 and "150 judged" in done.stdout, json.dumps([done.stdout, done.stderr])
    clean((folder, out), 150)
    by_run = cli("watch", f"run={trained.run}", f"input={folder}", f"out={out}", "once=true")
    assert by_run.code == 0, "the run and its exported file are one detector"


def test_ledger_reads_what_it_wrote(tmp_path):
    ledger = Ledger(tmp_path, "d")
    ledger.write([], [("a", Stamp(1, -5, 2**62), "x")])
    assert ledger.last("a") == (Stamp(1, -5, 2**62), "x") and ledger.last("b") is None
    ledger.db.close()
