"""The service says what its judge says, refuses what it must, keeps to its limits, counts, and ends gently."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="pip install 'zipper_ad[serve]'")
pytest.importorskip("onnxruntime", reason="pip install 'zipper_ad[export]'")

import uvicorn
from fastapi import Request
from fastapi.testclient import TestClient
from PIL import Image

from zipper_ad.config import make_config
from zipper_ad.core import InputError
from zipper_ad.detector import Detector
from zipper_ad.export import export_detector
from zipper_ad.models.head import Restorer
from zipper_ad.picture import MAX_PIXELS, Judge, Verdict, overlay, read_image
from zipper_ad.predictor import Predictor
from zipper_ad.serve import Batcher, Refused, Service, check_token, describe_judge, listen, make_app, read_bytes, serve
from zipper_ad.synth import render_defect, render_zipper

SIZE = 64


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(1)
    settings = ["model.widths=[8,16]", "model.latent=16", "model.head=none", "score.map=msgms", "train.device=cpu"]
    config = make_config([f"data.size={SIZE}", *settings])
    normals = torch.from_numpy(np.stack([render_zipper(s, SIZE) for s in range(60)]))[:, None] / 255
    return Detector.fit(Restorer(config.model), normals, config)


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    return export_detector(detector, tmp_path_factory.mktemp("exported"), "onnx")


@pytest.fixture(scope="module")
def judge(exported):
    return Predictor(exported, threads=1)


class Gated(Judge):
    "A judge that waits for its gate, and remembers how many pictures it was given."

    def __init__(self, judge, error=None):
        self.inner, self.gate, self.sizes, self.error = judge, threading.Event(), [], error

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def prepare(self, thing):
        return self.inner.prepare(thing)

    def judge(self, pictures, paths):
        if self.sizes:  # the first is the warm-up
            assert self.gate.wait(60)
        self.sizes.append(len(pictures))
        if self.error and len(self.sizes) == 2:
            raise self.error
        return self.inner.judge(pictures, paths)


def as_file(pixels, form="PNG", **settings):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, format=form, **settings)
    return buffer.getvalue()


def wait_until(condition):
    "At most a minute, on a machine that may be busy."
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


# ---- the same verdicts


def photographs():
    grey, colour = render_zipper(5, 90)[:70], np.stack([render_defect("rough", s, 80, 1.0)[0] for s in (1, 2, 3)], 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    alpha = Image.fromarray(np.dstack([colour, render_zipper(6, 80)]))
    return {
        "grey.png": as_file(grey), "colour.jpg": as_file(colour, "JPEG"), "turned.jpg": as_file(grey, "JPEG", exif=exif),
        "deep.png": as_file(deep), "alpha.png": as_file(alpha), "a.tif": as_file(colour, "TIFF"), "a.bmp": as_file(grey, "BMP"),
        "a.webp": as_file(colour, "WEBP"), "turned.tif": as_file(grey, "TIFF", exif=exif), "rough.png": as_file(colour[..., 0]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["exported", "run"])
def test_verdicts_are_the_judges_own(kind, judge, detector, tmp_path):
    asked = {"exported": judge, "run": detector}[kind]
    answers = []
    with TestClient(make_app(asked)) as client:
        for name, content in photographs().items():
            (tmp_path / name).write_bytes(content)
            expected = asked.predict(tmp_path / name)
            raw = client.post("/v1/judge?map=true", content=content)
            form = client.post("/v1/judge", files={"file": (name, content)})
            assert raw.status_code == form.status_code == 200, (name, raw.text, form.text)
            answers.append(a := raw.json())
            assert form.json() == a | {"heatmap": None}
            said = {"score": expected.score, "p_value": expected.p_value, "is_anomalous": expected.is_anomalous}
            assert {k: a[k] for k in said} == said, name
            assert (a["height"], a["width"]) == read_image(tmp_path / name).shape
            heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(a["heatmap"])))) / 255
            assert np.abs(heat - overlay(expected.image, expected.anomaly_map, asked.map_scale)).max() < 0.02
            assert bool(a["regions"]) == bool(expected.mask.any())
            for r in a["regions"]:
                assert 0 <= r["left"] < r["left"] + r["width"] <= a["width"] and 0 <= r["top"] < r["top"] + r["height"] <= a["height"]
        model = client.get("/v1/model").json()
    assert {a["is_anomalous"] for a in answers} == {True, False}, "pictures on both sides of the threshold"
    assert max(r["peak"] for a in answers for r in a["regions"]) == pytest.approx(max(a["score"] for a in answers)), "the score is the peak"
    assert all(model.items() <= a.items() for a in answers) and model["fingerprint"] == describe_judge(asked).fingerprint


def test_requests_that_wait_are_judged_together(judge):
    gated, pictures = Gated(judge), [render_zipper(s, SIZE) if s % 2 else render_defect("rough", s, SIZE, 1.0)[0] for s in range(21)]
    app = make_app(gated, batch=8)
    with TestClient(app) as client, ThreadPoolExecutor(21) as pool:
        first = pool.submit(client.post, "/v1/judge", content=as_file(pictures[0]))
        batcher = app.state.service.batcher
        wait_until(lambda: batcher.inside == 1 and batcher.queue.empty() and not batcher.coming)
        others = [pool.submit(client.post, "/v1/judge", content=as_file(p)) for p in pictures[1:]]
        wait_until(lambda: batcher.queue.qsize() == 20)
        assert "zipper_ad_queue_depth 20.0" in client.get("/metrics").text
        gated.gate.set()
        answers = [f.result().json() for f in (first, *others)]
    assert gated.sizes == [1, 1, 8, 8, 4]
    alone = [judge.predict(p) for p in pictures]
    assert [a["is_anomalous"] for a in answers] == [v.is_anomalous for v in alone]
    assert np.allclose([a["score"] for a in answers], [v.score for v in alone], rtol=1e-4), "only the last digits may differ"


# ---- refusals


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
WHOLE = as_file(render_zipper(1, SIZE))
BAD = {
    "empty": (b"", 422, "empty"), "text": (b"hello " * 30, 422, "not an image"), "cut short": (WHOLE[: len(WHOLE) // 2], 422, "damaged"),
    "tiny": (as_file(render_zipper(1, SIZE)[:8]), 422, "too small"), "postscript": (EPS, 422, "not an image"),
    "bomb": (png_header(60_000, 60_000), 413, "million pixels"), "small bomb": (png_header(10_001, 10_000), 413, "million pixels"),
    "too large": (bytes(300_000), 413, "over 0.2 MB"), "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "not an image"),
}  # fmt: skip
assert 10_001 * 10_000 > MAX_PIXELS


@pytest.fixture(scope="module")
def client(judge):
    with TestClient(make_app(judge, max_mb=0.2), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("how", ["raw", "form"])
def test_what_is_no_photograph(client, exported, name, how):
    content, status, said = BAD[name]
    hostile = "../../etc/<b>passwd"
    sent = {"content": content} if how == "raw" else {"files": {"file": (hostile, content)}}
    reply = client.post("/v1/judge", **sent)
    assert (reply.status_code, list(reply.json())) == (status, ["detail"]) and said in reply.json()["detail"], reply.text
    for private in (str(exported.parent), "Traceback", "site-packages", "passwd", "/"):
        assert private not in reply.json()["detail"]


@pytest.mark.parametrize("sent", [
    {"data": {"file": "text"}, "headers": {"content-type": "multipart/form-data; boundary=x"}},
    {"files": [("a", ("a.png", WHOLE)), ("b", ("b.png", WHOLE))]},
    {"files": {"file": ("", b"")}},
    {"content": WHOLE, "headers": {"content-type": "multipart/form-data"}},
    {"content": b"--x\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}},
    {"content": WHOLE, "headers": {"content-type": "multipart/form-data; boundary=x"}},
], ids=str)  # fmt: skip
def test_forms_that_hold_no_photograph(client, sent):
    reply = client.post("/v1/judge", **sent)
    assert reply.status_code == 422 and isinstance(reply.json()["detail"], str), reply.text


def test_other_wrong_requests(client):
    assert client.get("/v1/judge").status_code == 405 and client.get("/v1/../../etc/passwd").status_code == 404
    assert client.post("/v1/judge?map=perhaps", content=WHOLE).status_code == 422
    assert client.post("/v1/judge", content=WHOLE, headers={"content-length": "many"}).status_code == 200  # counted, not believed
    assert client.get("/docs").status_code == 404, "it would load scripts from elsewhere"
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/v1/judge", "/v1/model", "/metrics", "/healthz", "/readyz"}
    assert set(schema["paths"]["/v1/judge"]["post"]["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert {"score", "p_value", "is_anomalous", "regions", "promised_fpr"} <= set(schema["components"]["schemas"]["Answer"]["required"])


def test_body_is_counted_while_it_comes():
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    from zipper_ad.serve import read_upload

    for headers in ([], [(b"content-type", b"multipart/form-data; boundary=x")], [(b"content-length", b"10")]):
        read.clear()
        with pytest.raises(InputError):
            asyncio.run(read_upload(Request({"type": "http", "headers": headers}, receive), 5000))
        assert len(read) <= 6, "it read on"


def test_token(judge):
    with TestClient(make_app(judge, token="secret word")) as client:
        wrong = (None, "Bearer wrong", "Bearer secret wor", "Bearer secret words", "Basic secret word", "secret word", "Bearer ü")
        for path, method in (("/v1/judge", "POST"), ("/v1/model", "GET"), ("/metrics", "GET")):
            for header in wrong:
                headers = {"authorization": header.encode()} if header else {}
                reply = client.request(method, path, content=WHOLE, headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", (path, header)
            assert client.request(method, path, content=WHOLE, headers={"authorization": "Bearer secret word"}).status_code == 200
        for path in ("/", "/healthz", "/readyz"):
            reply = client.get(path)
            assert reply.status_code == 200 and "secret word" not in reply.text


def test_full_queue(judge):
    gated = Gated(judge)
    app = make_app(gated, batch=1, queue=2)
    with TestClient(app) as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.post, "/v1/judge", content=WHOLE) for _ in range(3)]
        wait_until(lambda: app.state.service.batcher.inside == 3)
        for _ in range(5):
            reply = client.post("/v1/judge", content=WHOLE)
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
        gated.gate.set()
        assert [f.result().status_code for f in waiting] == [200] * 3
        assert client.post("/v1/judge", content=WHOLE).status_code == 200
        assert app.state.service.batcher.inside == 0
        assert 'zipper_ad_requests_total{status="429"} 5.0' in client.get("/metrics").text


def test_places_are_given_back_by_whoever_is_refused(client):
    for content, *_ in BAD.values():
        client.post("/v1/judge", content=content)
    batcher = client.app.state.service.batcher
    assert (batcher.inside, batcher.coming, batcher.queue.qsize()) == (0, 0, 0)


def test_answers_that_take_too_long(judge):
    gated = Gated(judge)
    app = make_app(gated, batch=4, timeout=1.0)
    with TestClient(app) as client, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: client.post("/v1/judge", content=WHOLE), range(4)))
        assert {r.status_code for r in replies} == {504} and "took too long" in replies[0].json()["detail"]
        gated.gate.set()
        wait_until(lambda: app.state.service.batcher.queue.empty())
        app.state.service.timeout = 60
        assert client.post("/v1/judge", content=WHOLE).status_code == 200
    begun = gated.sizes[1]  # the batch that the gate held
    assert gated.sizes == [1, begun, 1], "a verdict that nobody waits for was given"


def test_bodies_that_come_too_slowly(judge):
    async def never():
        await asyncio.sleep(60)

    async def ask():
        await Service(judge, timeout=0.05).answer(Request({"type": "http", "headers": []}, never))

    with pytest.raises(Refused) as e:
        asyncio.run(ask())
    assert e.value.status == 408
    with pytest.raises(Refused) as e:
        Service(judge).prepare(WHOLE, time.monotonic() - 1)
    assert e.value.status == 504


def test_a_judge_that_fails_tells_the_log_alone(judge):
    gated = Gated(judge, RuntimeError("cannot open /srv/secret/weights"))
    gated.gate.set()
    with TestClient(make_app(gated), raise_server_exceptions=False) as client:
        reply = client.post("/v1/judge", content=WHOLE)
        assert reply.status_code == 500 and "secret" not in reply.text and "log" in reply.json()["detail"]
        assert client.post("/v1/judge", content=WHOLE).status_code == 200
        assert 'zipper_ad_requests_total{status="500"} 1.0' in client.get("/metrics").text


def test_a_score_that_is_no_number_is_no_verdict(judge):
    broken, sound = Gated(judge), judge.judge
    flat = np.zeros((8, 8), np.float32)
    broken.judge = lambda pictures, paths: [Verdict(float("nan"), anomaly_map=flat, mask=flat > 0, image=flat)]
    with TestClient(make_app(broken), raise_server_exceptions=False) as client:
        assert client.post("/v1/judge", content=WHOLE).status_code == 500
        broken.judge = sound
        assert client.post("/v1/judge", content=WHOLE).status_code == 200
        assert 'verdict="normal"} 1.0' in client.get("/metrics").text


def test_meters(judge):
    anomalous = as_file(render_defect("rough", 3, SIZE, 1.0)[0])
    with TestClient(make_app(judge, max_mb=0.2)) as client, TestClient(make_app(judge)) as other:
        codes = [client.post("/v1/judge", content=c).status_code for c in (WHOLE, WHOLE, anomalous, b"x", bytes(300_000))]
        lines, others = client.get("/metrics").text.splitlines(), other.get("/metrics").text
    assert codes == [200, 200, 200, 422, 413]
    for line in (
        'requests_total{status="200"} 3.0', 'requests_total{status="422"} 1.0', 'requests_total{status="413"} 1.0',
        'verdicts_total{verdict="anomalous"} 1.0', 'verdicts_total{verdict="normal"} 2.0', "queue_depth 0.0", "batch_size_sum 3.0",
        "request_seconds_count 5.0",
    ):  # fmt: skip
        assert f"zipper_ad_{line}" in lines, line
    assert "zipper_ad_request_seconds_count 0.0" in others, "two services share their meters"


# ---- settings


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"queue": -1}, {"max_mb": 0.0}, {"timeout": float("nan")}, {"timeout": float("inf")}])
def test_limits_that_make_no_sense(judge, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_app(judge, **wrong)


def test_wrong_settings_of_the_command(refused, exported, monkeypatch):
    monkeypatch.delenv("ZIPPER_AD_TOKEN", raising=False)
    assert "port=70000" in refused("serve", f"run={exported}", "port=70000")
    assert "cannot be taken" in refused("serve", f"run={exported}", "host=203.0.113.7", "port=0")
    assert "token" in refused("serve", f"run={exported}", "port=0", "token=tökén")
    assert "no such file" in refused("serve", f"run={exported.with_name('none.onnx')}", "port=0")
    assert "Did you mean batch" in refused("serve", f"run={exported}", "bach=3")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be taken" in refused("serve", f"run={exported}", f"port={taken.getsockname()[1]}")


def test_a_judge_that_cannot_judge_is_not_served(judge, caplog):
    broken = Gated(judge)
    broken.judge = lambda pictures, paths: 1 / 0
    with pytest.raises(InputError, match="failed on a first picture"):
        serve(lambda: broken, port=0)
    assert "ZeroDivisionError" in caplog.text


def test_open_to_a_network_without_token(monkeypatch, caplog):
    monkeypatch.setattr("zipper_ad.serve.logger.parent.propagate", True)
    monkeypatch.delenv("ZIPPER_AD_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert check_token("", host) == "" and not caplog.records
    assert check_token("", "0.0.0.0") == "" and "ZIPPER_AD_TOKEN" in caplog.text
    caplog.clear()
    monkeypatch.setenv("ZIPPER_AD_TOKEN", "from outside")
    assert (check_token("", "0.0.0.0"), check_token("given", "0.0.0.0")) == ("from outside", "given") and not caplog.records


def test_read_bytes_reads_as_read_image_does(tmp_path):
    for name, content in photographs().items():
        (tmp_path / name).write_bytes(content)
        for channels in (1, 3):
            assert (read_bytes(content, channels) == read_image(tmp_path / name, channels)).all(), name


# ---- the end


def test_stopping_answers_what_waits(judge):
    gated = Gated(judge)

    async def scene():
        batcher = Batcher(gated, batch=2)
        await batcher.start()
        picture = gated.prepare(render_zipper(1, SIZE))
        waiting = [asyncio.create_task(batcher.submit(picture)) for _ in range(5)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="stopping"):
            await batcher.submit(picture)
        gated.gate.set()
        await stopping
        return [t.result().score for t in waiting]

    assert len(asyncio.run(scene())) == 5


@pytest.fixture
def command(exported, tmp_path):
    "Starts the real command where neither torch nor fastai can be imported; returns its process and port."
    for name in ("torch", "fastai"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    running = []

    def start(*words):
        words = words if any(w.startswith("port=") for w in words) else (*words, "port=0")
        command = [sys.executable, "-m", "zipper_ad", "serve", f"run={exported}", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes))
        line = running[-1].stdout.readline()
        assert line, running[-1].stderr.read()
        return running[-1], int(re.search(r"127\.0\.0\.1:(\d+)/", line)[1])

    yield start
    for process in running:
        process.kill()
        process.wait()


def ask(port, *parts, between=lambda: None):
    "Send the parts of a request, with something done between them: the answer's status, and its text."
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for part in parts[:-1]:
            connection.sendall(part)
            between()
        connection.sendall(parts[-1])
        with connection.makefile("rb") as answer:
            head = list(iter(answer.readline, b"\r\n"))
            length = next(int(h.split(b":")[1]) for h in head if h.lower().startswith(b"content-length"))
            return int(head[0].split()[1]), answer.read(length).decode()


HEAD = b"POST /v1/judge HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_real_command_ends_gently(command, judge, ending):
    process, port = command("max_mb=0.2")
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(WHOLE)
    status, text = ask(port, head + WHOLE)
    assert status == 200 and json.loads(text)["score"] == judge.predict(read_bytes(WHOLE)).score
    chunks = [b"%x\r\n%s\r\n" % (20_000, bytes(20_000))] * 11
    assert ask(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks))[0] == 413, "the last chunk never came"

    def stop():
        wait_until(lambda: b"inside 1.0" in metrics())
        process.send_signal(ending)
        wait_until(lambda: not open_to_others())

    def metrics():
        return ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")[1].encode()

    def open_to_others():
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            return False
        return True

    status, text = ask(port, head + WHOLE[:100], WHOLE[100:], between=stop)
    assert status == 200 and json.loads(text)["score"] == judge.predict(read_bytes(WHOLE)).score
    assert process.wait(60) == 0
    assert process.stdout.read() == "the service has ended\n" and process.stderr.read() == ""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_senders_that_hang_up_and_a_service_that_is_killed(command, judge):
    process, port = command()
    head, expected = HEAD + b"Content-Length: %d\r\n\r\n" % len(WHOLE), judge.predict(read_bytes(WHOLE)).score
    for sent in (HEAD, head, head + WHOLE[:50], HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(sent)
    metrics = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    wait_until(lambda: "inside 0.0" in ask(port, metrics)[1])
    assert json.loads(ask(port, head + WHOLE)[1])["score"] == expected
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head + WHOLE[:50])
        wait_until(lambda: "inside 1.0" in ask(port, metrics)[1])
        process.kill()
        process.wait()
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100) == b"", "no answer is an answer too: it is sent again"
    assert "Traceback" not in process.stderr.read()
    process, _ = command(f"port={port}")
    assert json.loads(ask(port, head + WHOLE)[1])["score"] == expected


# ---- the page


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)
CHROMIUM = os.environ.get("ZIPPER_AD_CHROMIUM", CHROMIUM)
ARGUMENTS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync".split()


@pytest.fixture
def page(judge):
    "The page of a service that asks for a token; `outside` lists requests to other places, `errors` what the browser complains of."
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'zipper_ad[dev]'")
    if not CHROMIUM:
        pytest.skip("no Chromium: install it (on Debian: apt-get install chromium), or name it in ZIPPER_AD_CHROMIUM")
    place = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{place.getsockname()[1]}/"
    server = uvicorn.Server(uvicorn.Config(make_app(judge, token="secret"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[f"--{a}" for a in ARGUMENTS])
        page = browser.new_page(viewport={"width": 900, "height": 1000})
        page.set_default_timeout(60_000)
        page.outside, page.errors = [], []
        page.on("request", lambda r: page.outside.append(r.url) if r.url.startswith("http") and not r.url.startswith(address) else None)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and "status of 4" not in m.text else None)
        page.goto(address)
        yield page
        browser.close()
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def test_page_in_a_browser(page, judge, tmp_path):
    bad, name = render_defect("rough", 3, 2 * SIZE, 1.0)[0], "<img src=x onerror=alert(1)>.png"
    sent = {"name": name, "mimeType": "image/png", "buffer": as_file(bad)}
    articles, choose = page.locator("article"), page.locator("#drop input")
    choose.set_input_files(sent)
    articles.filter(has_text="wrong or missing token").wait_for()
    page.locator("#token input").fill("secret")
    choose.set_input_files([sent, sent | {"name": "good.png", "buffer": WHOLE}, sent | {"name": "bad.png", "buffer": b"no picture"}])
    articles.filter(has_text="not an image").wait_for()
    said, verdict = articles.nth(2), judge.predict(bad)
    assert articles.count() == 4 and said.get_attribute("class") == "anomalous" and verdict.is_anomalous
    assert name in said.inner_text() and f"{verdict.score:.3g}" in said.inner_text() and "128 × 128 pixels" in said.inner_text()
    assert articles.nth(1).get_attribute("class") == "normal"
    for picture in (0, 1):
        assert said.locator("img").nth(picture).evaluate("i => i.complete && i.naturalWidth > 0")
    page.screenshot(path=Path(tmp_path) / "page.png", full_page=True)
    assert not page.outside and not page.errors
