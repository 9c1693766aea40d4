"""How much does `zipper_ad serve` take beside the judging itself, and what happens when more ask than it can answer?

    python tools/serve_study.py run=FILE|RUN [out=results/serve-load.json] [rounds=6] [seconds=12] [batch=8] [queue=64]
                                [concurrency=1,8,64,128] [size=256] [device=auto]

The real command is started with the exported file (a run's folder is exported to ONNX first). Then, in each round, all take turns in
an order that moves on by one: the bare judge on prepared pictures in batches of the same size, the bare judge from the bytes of the files,
and a client, in a process of its own, with so many requests under way at any time. The server idles while the bare judge has its turn.
On a machine that does other things as well only the ratios within a round are worth much, so their medians and ranges are written;
beside them the ratio of the processor's time, which depends less on what else was running. The file is written after each round.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from zipper_ad import __version__
from zipper_ad.core import atomic_path
from zipper_ad.predictor import Predictor
from zipper_ad.serve import read_bytes
from zipper_ad.synth import KINDS, render_defect, render_zipper

N_PICTURES = 32
WARM_UP = 3.0  # seconds after which answers are counted, until the clients begin no more


# ---- the client: no library, so that it takes little of the processor that it shares with the server


async def ask(port: int, bodies: list[bytes], first: int, until: float, seen: list):
    "Send one request after another over one connection, and note status, seconds and when it was sent."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    i = first
    while time.perf_counter() < until:
        body, start = bodies[i % len(bodies)], time.perf_counter()
        writer.write(b"POST /v1/judge HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        seen.append((int(head[9:12]), time.perf_counter() - start, time.perf_counter()))
        if seen[-1][0] == 429:
            await asyncio.sleep(0.05)  # a patient client would wait for what Retry-After says
        i += 1
    writer.close()


def client(port: int, concurrency: int, seconds: float, folder: str) -> dict:
    bodies, seen = [p.read_bytes() for p in sorted(Path(folder).glob("*.png"))], []
    start = time.perf_counter()

    async def everyone():
        await asyncio.gather(*(ask(port, bodies, k, start + WARM_UP + seconds, seen) for k in range(concurrency)))

    asyncio.run(everyone())
    other = sorted({status for status, *_ in seen} - {200, 429})
    counted = sum(status == 200 and WARM_UP < at - start <= WARM_UP + seconds for status, _, at in seen)
    return {"requests": len(seen), "rejected": sum(s == 429 for s, *_ in seen), "other": other, "rate": counted / seconds,
            "seconds": [s for status, s, _ in seen if status == 200]}  # fmt: skip


# ---- the bare judge


def per_second(work, n: int, seconds: float) -> dict[str, float]:
    "Pictures a second, and the processor's milliseconds a picture, when `work` judges n of them."
    work()
    start, used, turns = time.perf_counter(), time.process_time(), 0
    while (wall := time.perf_counter() - start) < seconds:
        work()
        turns += 1
    return {"rate": turns * n / wall, "processor_ms": 1000 * (time.process_time() - used) / (turns * n)}


def processor(pid: int) -> float:
    "Seconds that a process has computed."
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, float]:
    "What a process holds now, and held at most, in MB."
    status = Path(f"/proc/{pid}/status").read_text()
    return {k: int(next(line for line in status.splitlines() if line.startswith(f"{k}:")).split()[1]) / 1000 for k in ("VmRSS", "VmHWM")}


# ---- rounds


def measure(file: Path, folder: Path, port: int, pid: int, options: dict, keep):
    batch, seconds, rounds = int(options.get("batch", 8)), float(options.get("seconds", 12)), int(options.get("rounds", 6))
    levels = [int(c) for c in options.get("concurrency", "1,8,64,128").split(",")]
    judge = Predictor(file)
    bodies = [p.read_bytes() for p in sorted(folder.glob("*.png"))][:batch]
    prepared = [judge.prepare(read_bytes(b)) for b in bodies]

    def from_bytes():
        judge.judge([judge.prepare(read_bytes(b)) for b in bodies], [None] * batch)

    def asked(c):
        command = [sys.executable, __file__, f"client={port}", f"level={c}", f"seconds={seconds}", f"folder={folder}"]
        before = processor(pid)
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert not found["other"], found["other"]
        return found | {"memory": memory(pid), "served": processor(pid) - before}

    turns = {
        "bare": lambda: per_second(lambda: judge.judge(prepared, [None] * batch), batch, seconds),
        "bare_from_bytes": lambda: per_second(from_bytes, batch, seconds / 2),
        **{c: (lambda c=c: asked(c)) for c in levels},
    }
    found, names, loads = {name: [] for name in turns}, list(turns), []
    for r in range(rounds):
        loads.append(os.getloadavg()[0])
        for name in names[r % len(names) :] + names[: r % len(names)]:
            found[name].append(turns[name]())
        keep(summary(found, levels, r + 1) | {"load_of_the_machine": [round(x, 1) for x in loads]})
        print(f"round {r + 1} of {rounds}", flush=True)


def spread(values) -> dict[str, float]:
    return {"median": round(float(np.median(values)), 3), "least": round(float(min(values)), 3), "most": round(float(max(values)), 3)}


def summary(found: dict, levels: list[int], rounds: int) -> dict:
    bare = {k: np.array([f["rate"] for f in found[k]]) for k in ("bare", "bare_from_bytes")}
    used = {k: np.array([f["processor_ms"] for f in found[k]]) for k in bare}
    rows = []
    for c in levels:
        seconds = 1000 * np.concatenate([f["seconds"] for f in found[c]])
        rate = np.array([f["rate"] for f in found[c]])
        row = {"concurrency": c, "requests": sum(f["requests"] for f in found[c]), "requests_per_s": spread(rate)}
        row |= {f"p{q}_ms": round(float(np.percentile(seconds, q)), 1) for q in (50, 95, 99)}
        row["rejected_share"] = round(sum(f["rejected"] for f in found[c]) / row["requests"], 4)
        row |= {f"ratio_to_{k}": spread(rate / v) for k, v in bare.items()}
        answered = np.array([1000 * f["served"] / len(f["seconds"]) for f in found[c]])
        row |= {"processor_ms_per_answer": spread(answered), "ratio_by_processor_time": spread(used["bare"] / answered)}
        row["rss_mb"] = round(max(f["memory"]["VmRSS"] for f in found[c]))
        rows.append(row)
    facts = {f"{k}_{what}": spread(v[k]) for k in bare for what, v in (("per_s", bare), ("processor_ms", used))}
    peak = max(f["memory"]["VmHWM"] for c in levels for f in found[c])
    return {"rounds": rounds, **facts, "served": rows, "peak_rss_mb": round(peak)}


def exported(run: str, folder: Path) -> Path:
    if Path(run).is_file():
        return Path(run)
    command = [sys.executable, "-m", "zipper_ad", "export", f"run={run}", f"out={folder}"]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.onnx"))


def main(options: dict):
    out, size = Path(options.get("out", "results/serve-load.json")), int(options.get("size", 256))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        kinds = list(KINDS)
        for i in range(N_PICTURES):
            pixels = render_zipper(9000 + i, size) if i % 2 else render_defect(kinds[i // 2 % len(kinds)], 9000 + i, size, 0.8)[0]
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        file, limits = exported(options["run"], folder), {k: int(options.get(k, d)) for k, d in (("batch", 8), ("queue", 64))}
        command = [sys.executable, "-m", "zipper_ad", "serve", f"run={file}", "port=0", "timeout=300"]
        server = subprocess.Popen([*command, *(f"{k}={v}" for k, v in limits.items())], stdout=subprocess.PIPE, text=True)
        facts = Predictor(file).facts
        about = {"what": "zipper_ad serve under load, beside the bare Predictor, in turns", "model": facts["model"], "size": facts["size"],
                 "format": file.suffix[1:], "precision": facts["precision"], "cores": os.cpu_count(), "version": __version__, **limits,
                 "pictures": f"{N_PICTURES} rendered zippers, PNG of {size} pixels a side"}  # fmt: skip

        def keep(found):
            with atomic_path(out) as temporary:
                temporary.write_text(json.dumps(about | found, indent=1) + "\n")

        try:
            port = int(server.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
            measure(file, folder, port, server.pid, options, keep)
        finally:
            server.terminate()
            assert server.wait(60) == 0
    print(out.read_text())


if __name__ == "__main__":
    options = dict(a.split("=", 1) for a in sys.argv[1:])
    if "client" in options:
        print(json.dumps(client(int(options["client"]), int(options["level"]), float(options["seconds"]), options["folder"])))
    else:
        main(options)
