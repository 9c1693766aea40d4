"""Ten thousand rendered pictures through the real `zipper_ad score` or `zipper_ad serve`, with faults: what is lost, what comes twice.

    python tools/fault_study.py score|serve [OUT.json] [pictures=10000] [size=64] [seed=0] [shard=100]

The detector is a small CNN that was never trained, exported to ONNX; each picture has noise of its own. What is damaged, and when a
process is killed, is drawn by chance from the seed. All commands run under a clock that jumps: each reading of Python's `time.time` is off
by up to a day, anew. Afterwards all answers are compared with those of a bare `Predictor`, and all memory that was noted is written down.

score: 1 in 100 pictures is cut short, empty, no picture, or too small. Two workers judge. The results' folder is a small disk first (a
tmpfs, where this user may mount one), which fills up; then a worker is killed in its first moment, workers and the whole command are
killed at moments drawn by chance, and each time the command is started again. From 45 % of the shards on nothing disturbs it.

serve: 16 clients ask at once. Of 200 pictures 10 come damaged, too large, too slowly, or not to their end. In the end five services
get SIGTERM while 16 clients ask.
"""

import asyncio
import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from watch_study import bases, make_detector, memory, options, pictures, seed, size

from zipper_ad import __version__
from zipper_ad.archive import read_scores
from zipper_ad.core import atomic_path
from zipper_ad.picture import MAX_PIXELS
from zipper_ad.predictor import Predictor

words = [a for a in sys.argv[1:] if "=" not in a]
shard, CLIENTS, TIMEOUT = int(options.get("shard", 100)), 16, 10
CLOCK = """
import random, time
_real, _chance = time.time, random.Random(0)
time.time = lambda: _real() + _chance.uniform(-86400, 86400)
"""


# ---- what both share


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def rendered() -> list[bytes]:
    "The pictures, as files of PNG."
    rng, originals = np.random.default_rng(seed), bases()
    noisy = (originals[i % len(originals)].astype(np.int16) + rng.integers(-2, 3, (size, size)) for i in range(pictures))
    return [png(n.clip(0, 255).astype(np.uint8)) for n in noisy]


def jumping(root: Path) -> dict:
    "The environment in which Python's clock jumps."
    (root / "clock").mkdir()
    (root / "clock/sitecustomize.py").write_text(CLOCK)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])}


def over_time(samples: list) -> dict:
    "First, most and last of each column of megabytes, and how much more the last quarter holds than the third, on average."
    found = {}
    workers = {f"worker {k + 1}": [s[3][k] for s in samples if len(s[3]) > k] for k in (0, 1)}
    for name, values in {"command": [s[2] for s in samples], **workers}.items():
        if values:
            third, last = (np.mean(part) for part in np.array_split(values, 4)[2:])
            found[name] = {"first": values[0], "most": max(values), "last": values[-1],
                           "last_quarter_beside_the_third": round(float(last - third), 1)}  # fmt: skip
    return found


def about(load: float) -> dict:
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    return {
        "machine": {"processors": os.cpu_count(), "load_average_before_and_after": loads, "system": platform.platform()},
        "versions": {"zipper_ad": __version__, "python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in ("onnxruntime", "numpy", "pillow", "pyarrow", "uvicorn", "fastapi")},
    }  # fmt: skip


def thinned(samples: list, most: int = 200) -> list:
    return samples[:: max(1, math.ceil(len(samples) / most))]


# ---- score


def spoil(data: bytes, k: int) -> bytes:
    return (data[: len(data) // 2], b"", b"this is no picture", png(np.zeros((5, 40), np.uint8)))[k % 4]


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    "The processes that judge for the command."
    with contextlib.suppress(psutil.Error):
        return [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    return []


def lives(worker: psutil.Process) -> bool:
    try:
        return worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds: float) -> float | None:
    "Seconds until it held; None where it never did."
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if condition():
            return round(time.monotonic() - start, 1)
        time.sleep(0.05)
    return None


def until(process, out: Path, goal: int, samples: list, begin: float):
    "Wait for so many shards, or for the command's end, and note memory each second, from this start's first shard on."
    there = len(list(out.glob("shard-*.parquet")))
    while process.poll() is None and (n := len(list(out.glob("shard-*.parquet")))) < goal:
        if n > there and (held := memory(process.pid)) and (not samples or time.monotonic() - begin - samples[-1][0] >= 1):
            family = [round(memory(w.pid) or 0, 1) for w in sorted(workers(process), key=lambda w: w.pid)]
            samples.append([round(time.monotonic() - begin, 1), n, round(held, 1), family])
        time.sleep(0.05)


def strike(process, fault: str, chance: random.Random):
    "Do to the command what the fault's name says."
    if fault == "worker at once":
        wait_for(lambda: workers(process) or process.poll() is not None, 120)
        workers(process)[0].kill()
    elif fault == "worker":
        wait_for(lambda: len(workers(process)) == 2, 60)
        chance.choice(workers(process)).kill()
    elif fault == "command":
        process.kill()


def disturbed(command: list[str], env: dict, out: Path, fault: str, goal: int, chance: random.Random, begin: float) -> dict:
    "One start of the command with one fault: how it ended, what it said, what was left running."
    there, samples = len(list(out.glob("shard-*.parquet"))), []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said)
        if fault != "worker at once":
            until(process, out, goal, samples, begin)
            time.sleep(chance.random() * 0.3)
        family = workers(process)
        strike(process, fault, chance)
        ended = wait_for(lambda: process.poll() is not None, 180)
        process.kill()
        family += workers(process)
        gone = wait_for(lambda: not any(map(lives, family)), 60)
        for worker in filter(lives, family):
            worker.kill()
        said.seek(0)
        lines = re.findall(r"zipper_ad: .*|Traceback.*", said.read())  # without the progress bar
    now = len(list(out.glob("shard-*.parquet")))
    print(f"{fault}: ended after {ended} s, workers gone after {gone} s, {now} shards", file=sys.stderr, flush=True)
    return {"fault": fault, "shards_before": there, "shards_after": now, "hung": ended is None, "exit_code": process.wait(),
            "seconds_to_the_end": ended, "workers_left_running": gone is None, "seconds_until_workers_were_gone": gone,
            "lines": [line.replace(str(out), "scores") for line in lines]}  # fmt: skip


def score() -> dict:
    root, load = Path(tempfile.mkdtemp()), os.getloadavg()[0]
    folder, out, file, env = root / "pictures", root / "scores", make_detector(root), jumping(root)
    folder.mkdir(), out.mkdir(), (root / "tmp").mkdir()
    env["TMPDIR"] = str(root / "tmp")
    damaged = {int(i) for i in np.random.default_rng(seed).choice(pictures, pictures // 100, replace=False)}
    names = [f"{i:06}.png" for i in range(pictures)]
    for i, data in enumerate(rendered()):
        (folder / names[i]).write_bytes(spoil(data, i) if i in damaged else data)
    chance, n = random.Random(seed), math.ceil(pictures / shard)
    settings = ["engine=local", "workers=2", f"shard={shard}"]
    command = [sys.executable, "-m", "zipper_ad", "score", f"run={file}", f"data={folder}", f"out={out}", *settings]
    faults = ["worker at once", "worker", "command", "worker", "command", "worker", "command"]
    goals, starts, samples, begin = sorted(chance.uniform(0.1, 0.45) * n for _ in faults), [], [], time.monotonic()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", out], capture_output=True).returncode == 0
    try:
        if mounted:
            starts.append(disturbed(command, env, out, "full disk", n, chance, begin))
            subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        starts += [disturbed(command, env, out, f, math.ceil(g), chance, begin) for f, g in zip(faults, goals, strict=True)]
        last = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        begin, before = time.monotonic(), len(list(out.glob("shard-*.parquet")))
        until(last, out, n + 1, samples, begin)
        line, seconds = last.stdout.read().strip().splitlines()[-1], time.monotonic() - begin
        judge, rows = Predictor(file, threads=1), read_scores(out).to_pylist()
        parts = len(list(out.glob(".part-*")))
    finally:
        if mounted:
            subprocess.run(["umount", out], check=True)
    counts, differs = Counter(r["file"] for r in rows), 0
    for row in (r for r in rows if r["error"] is None):
        v = judge.predict(folder / row["file"])
        differs += (row["score"], row["p_value"], row["is_anomalous"]) != (v.score, v.p_value, v.is_anomalous)
    return {
        "data": f"{pictures} rendered zippers of {size} x {size} pixels, not photographs; {len(damaged)} of them damaged",
        "command": f"zipper_ad score run=detector.onnx data=pictures out=scores {' '.join(settings)}",
        "starts": starts, "full_disk": mounted, "exit_code_of_the_last_start": last.wait(), "last_line": line.replace(str(out), "scores"),
        "pictures": pictures, "rows": len(rows), "lost": len(set(names) - set(counts)), "repeated": sum(c - 1 for c in counts.values()),
        "foreign": len(set(counts) - set(names)),
        "verdicts": sum(r["error"] is None for r in rows), "verdicts_that_differ_from_the_bare_predictor": differs,
        "errors": sum(r["error"] is not None for r in rows), "damaged": len(damaged),
        "errors_are_the_damaged_ones": {r["file"] for r in rows if r["error"]} == {names[i] for i in damaged},
        "error_kinds": dict(Counter(re.sub(r"^\S+: |\(.*|\d+ x \d+", "", r["error"]).strip()[:60] for r in rows if r["error"])),
        "half_written_files_left_by_kills": parts, "copies_of_the_detector_left": len(list((root / "tmp").glob("zipper_ad-*"))),
        "last_start": {"shards": n - before, "seconds": round(seconds, 1)},
        "memory_mb_of_the_last_start": over_time(samples),
        "samples": {"columns": ["seconds", "shards", "command_mb", "workers_mb"], "rows": thinned(samples)}, **about(load),
    }  # fmt: skip


# ---- serve


KINDS = {  # of 200 requests, by their number: what is sent, and the status that must come back
    3: ("cut short", 422), 23: ("no picture", 422), 43: ("empty", 422), 63: ("too many bytes", 413), 83: ("too many bytes, in chunks", 413),
    103: ("too many pixels", 413), 123: ("hangs up", None), 143: ("hangs up", None), 163: ("slow", 200), 183: ("too slow", 408),
}  # fmt: skip
HUGE = io.BytesIO()
Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)).save(HUGE, format="PNG")
HEAD = "POST /v1/judge HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n%s\r\n\r\n"


async def answer(reader) -> tuple[int, dict]:
    "(status, what the JSON says)."
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    return int(head[9:12]), json.loads(await reader.readexactly(length))


async def send(writer, body: bytes, kind: str = ""):
    "One request, in the way that its kind asks for."
    if kind == "too many bytes, in chunks":
        parts = [body[i : i + 65536] for i in range(0, len(body), 65536)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in [*parts, b""])
        writer.write((HEAD % "Transfer-Encoding: chunked").encode() + chunks)
        return
    writer.write((HEAD % f"Content-Length: {len(body)}").encode())
    if kind == "hangs up":
        writer.write(body[: len(body) // 2])
    elif "slow" in kind:
        pause = (TIMEOUT + 3 if kind == "too slow" else 1.0) / 10
        for i in range(10):
            writer.write(body[i * len(body) // 10 : (i + 1) * len(body) // 10 if kind == "slow" else i * len(body) // 10 + 1])
            await asyncio.sleep(pause)
    else:
        writer.write(body)


def requested(i: int, data: bytes) -> tuple[str, int | None, bytes]:
    "(kind, status that must come, body)."
    kind, status = KINDS.get(i % 200, ("", 200))
    bodies = {"cut short": data[: len(data) // 2], "no picture": b"this is no picture", "empty": b"", "too many pixels": HUGE.getvalue()}
    return kind, status, bodies.get(kind, data * (1_500_000 // len(data)) if "bytes" in kind else data)


async def one_client(port: int, things, seen: list):
    "Requests over one connection; those that are to break it, and slow ones, over one of their own."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for i, data in things:
        kind, status, body = requested(i, data)
        if reader.at_eof():  # the service closes connections that were idle for five seconds
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        r, w = await asyncio.open_connection("127.0.0.1", port) if kind else (reader, writer)
        said, more = (None, {}), b""
        try:
            await send(w, body, kind)
            if status:
                said = await asyncio.wait_for(answer(r), 120)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as e:
            said = type(e).__name__, {}
        if kind:
            w.close()
            with contextlib.suppress(OSError):
                more = await asyncio.wait_for(r.read(), 120)  # a second answer would stand here
        seen.append((i, kind or "good", status, *said, len(more)))
        if len(seen) % 500 == 0:
            print(f"{len(seen)} requests", file=sys.stderr, flush=True)
    writer.close()
    more = await asyncio.wait_for(reader.read(), 120)
    assert not more, f"bytes that nobody asked for: {more[:80]!r}"


class Served:
    "The real command, serving; its memory is noted each second."

    def __init__(self, file: Path, env: dict):
        self.settings = ["batch=8", "queue=64", "max_mb=1", f"timeout={TIMEOUT}"]
        command = [sys.executable, "-m", "zipper_ad", "serve", f"run={file}", "port=0", *self.settings]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        self.port, self.samples, self.begin = int(self.process.stdout.readline().split("127.0.0.1:")[1].split("/")[0]), [], time.monotonic()

    def watch(self, seen: list):
        while held := memory(self.process.pid):
            self.samples.append([round(time.monotonic() - self.begin, 1), len(seen), round(held, 1), []])
            time.sleep(1)

    async def counted(self) -> dict[str, int]:
        "What the service itself counted."
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        found = re.findall(r'zipper_ad_(requests|verdicts)_total{\w+="(\w+)"} (\d+)', text)
        return {name: {key: int(n) for what, key, n in found if what == name} for name in ("requests", "verdicts")}


async def until_sigterm(served: Served, bodies: list[bytes], expected: list[float], wait: float) -> dict:
    "16 clients ask until the connection ends; SIGTERM comes after `wait` seconds."
    found = []  # [when it was sent, when it was answered, whether rightly], of all requests

    async def ask(k):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            for i in itertools.count(k, CLIENTS):
                found.append(entry := [time.monotonic(), None, None])
                try:
                    await send(writer, bodies[i % len(bodies)])
                    status, said = await answer(reader)
                except (OSError, asyncio.IncompleteReadError):
                    return
                entry[1:] = time.monotonic(), status == 200 and math.isclose(said["score"], expected[i % len(bodies)], rel_tol=1e-4)

    clients = [asyncio.create_task(ask(k)) for k in range(CLIENTS)]
    await asyncio.sleep(wait)
    at = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*clients)
    code = await asyncio.to_thread(served.process.wait, 60)
    under_way = [f for f in found if f[0] < at and (f[1] is None or f[1] > at)]
    lost = sorted(round(at - f[0], 3) for f in under_way if f[1] is None)
    return {"answered_before": sum(f[1] is not None and f[1] <= at for f in found), "under_way_at_the_signal": len(under_way),
            "of_these_answered": sum(f[1] is not None for f in under_way), "seconds_before_the_signal_of_those_not_answered": lost,
            "wrong_answers": sum(f[2] is False for f in found), "sent_afterwards": sum(f[0] >= at for f in found),
            "of_these_answered_rightly": sum(f[0] >= at and f[2] is True for f in found),
            "exit_code": code, "seconds_to_the_exit": round(time.monotonic() - at, 2)}  # fmt: skip


async def serve() -> dict:
    root, load = Path(tempfile.mkdtemp()), os.getloadavg()[0]
    file, env, bodies = make_detector(root), jumping(root), rendered()
    served, seen = Served(file, env), []
    noting = threading.Thread(target=served.watch, args=(seen,))
    noting.start()
    begin, things = time.monotonic(), iter(enumerate(bodies))
    await asyncio.gather(*(one_client(served.port, things, seen) for _ in range(CLIENTS)))
    seconds, counted, chance = time.monotonic() - begin, await served.counted(), random.Random(seed)
    judge = Predictor(file, threads=1)
    verdicts = [judge.judge([judge.prepare(np.asarray(Image.open(io.BytesIO(b))))], [None])[0] for b in bodies]
    stops = []
    for k in range(5):
        served_again = served if k == 0 else Served(file, env)
        stops.append(await until_sigterm(served_again, bodies, [v.score for v in verdicts], 2 + chance.random()))
        print(f"SIGTERM: {stops[-1]}", file=sys.stderr, flush=True)
    noting.join()
    rows, answers = {}, [(i, said) for i, _, _, status, said, _ in seen if status == 200]
    for _, kind, status, got, said, _ in seen:
        row = rows.setdefault(kind, {"status_that_must_come": status, "requests": 0, "came": Counter(), "one_line": 0})
        row["requests"] += 1
        row["came"][str(got)] += 1
        row["one_line"] += isinstance(detail := said.get("detail", ""), str) and bool(detail) and "\n" not in detail
    differs = [abs(said["score"] - verdicts[i].score) / verdicts[i].score for i, said in answers]
    sent = Counter(i for i, *_ in seen)
    return {
        "data": f"{pictures} rendered zippers of {size} x {size} pixels, not photographs",
        "command": f"zipper_ad serve run=detector.onnx port=0 {' '.join(served.settings)}", "clients": CLIENTS,
        "requests": len(seen), "sent_twice_or_never": pictures - len(sent) + sum(c - 1 for c in sent.values()), "kinds": rows,
        "other_status_than_must_come": sum(got != status for _, _, status, got, *_ in seen),
        "answered_twice": sum(more > 0 for *_, more in seen), "counted_by_the_service": counted,
        "verdicts": len(answers), "wrong_decisions": sum(said["is_anomalous"] != verdicts[i].is_anomalous for i, said in answers),
        "scores_that_differ_from_the_bare_predictor": sum(d > 0 for d in differs), "largest_relative_difference": max(differs),
        "seconds": round(seconds, 1), "stops": stops, "memory_mb": over_time(served.samples)["command"],
        "samples": {"columns": ["seconds", "requests", "memory_mb"], "rows": [s[:3] for s in thinned(served.samples)]}, **about(load),
    }  # fmt: skip


if __name__ == "__main__":
    mode, *target = words
    facts = score() if mode == "score" else asyncio.run(serve())
    facts = {"made_by": " ".join(["python tools/fault_study.py", mode, *(f"{k}={v}" for k, v in options.items())])} | facts
    print(json.dumps({k: v for k, v in facts.items() if k != "samples"}, indent=1))
    if target:
        text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), json.dumps(facts, indent=1))
        with atomic_path(target[0]) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
