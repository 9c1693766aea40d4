"The dashboard: its logic without a browser, and once through everything in a real one."

import csv
import io
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from zipper_ad.app import (
    MAX_UPLOAD,
    MODES,
    Dashboard,
    Reviews,
    ReviewState,
    ScoreAxis,
    badge_html,
    blend,
    chart_marks,
    check_port,
    counts_html,
    data_key,
    fill_chart,
    gallery_html,
    judge_upload,
    layers,
    make_chart,
    open_store,
    prepare,
    serve,
    served,
    view_html,
)
from zipper_ad.config import make_config
from zipper_ad.core import InputError
from zipper_ad.data import AnomalyDataset, find_items
from zipper_ad.detector import Detector
from zipper_ad.metrics import wilson_interval
from zipper_ad.models.head import Restorer
from zipper_ad.synth import render_dataset
from zipper_ad.threshold import conformal_threshold

SMALL = ["data.size=32", "model.widths=[4,8]", "model.latent=8", "train.device=cpu"]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "Rendered zippers of 32 pixels in `data`, two untrained detectors, saved in `runs` too, and prepared in `stores`."
    root = tmp_path_factory.mktemp("app")
    data = render_dataset(root / "zippers", n_train=50, n_test=2, n_good=8, size=32, progress=False, workers=1)
    normals = AnomalyDataset(data, "train", size=32, cache="memory").batch(range(50))
    detectors, runs = {}, {}
    for seed, (name, map_) in enumerate({"first": "auto", "second": "l2"}.items()):
        torch.manual_seed(seed)
        config = make_config([*SMALL, f"score.map={map_}"])
        detectors[name] = Detector.fit(Restorer(config.model), normals, config)
        runs[name] = root / name
        detectors[name].save(runs[name])
    return SimpleNamespace(data=data, detectors=detectors, runs=runs, stores=root / "stores", normals=normals)


@pytest.fixture
def state(small, tmp_path):
    return ReviewState(prepare(small.detectors, small.data, small.stores, progress=False), Reviews(tmp_path / "review.csv"))


# ---- prepared maps


def test_store_says_what_the_detector_says(small, state):
    for name, detector in small.detectors.items():
        store = state.stores[name]
        verdicts = detector.predict([small.data / f for f in store.files])
        assert np.allclose(store.scores, [v.score for v in verdicts], rtol=1e-4, atol=1e-4)
        for i, v in enumerate(verdicts):
            kept = store.verdict(i)
            assert kept.is_anomalous == v.is_anomalous and (kept.mask != v.mask).mean() < 0.01
            assert np.abs(kept.image - v.image).max() < 0.003 and np.abs(kept.reconstruction - v.reconstruction).max() < 0.003
            assert np.allclose(kept.anomaly_map, v.anomaly_map, rtol=2e-3, atol=1e-3)


def test_store_is_kept_and_renewed(small, tmp_path):
    data = shutil.copytree(small.data, tmp_path / "data")
    one = {"first": small.detectors["first"]}
    first = prepare(one, data, tmp_path / "stores", progress=False)["first"].folder
    stamp = (first / "facts.json").stat().st_mtime_ns
    loaded = Detector.load(small.runs["first"])  # the same detector, come from disk
    assert prepare({"other name": loaded}, data, tmp_path / "stores", progress=False)["other name"].folder == first
    assert (first / "facts.json").stat().st_mtime_ns == stamp, "computed again although nothing had changed"

    item = find_items(data, "test")[0]
    key = data_key(find_items(data, "test"))
    Image.fromarray(np.asarray(Image.open(item.path)) // 2).save(item.path)
    os.utime(item.path, ns=(0, 1))
    assert data_key(find_items(data, "test")) != key
    second = prepare(one, data, tmp_path / "stores", progress=False)["first"].folder
    assert second != first and not first.exists(), "the store of the old pictures should be gone"
    assert [p.name for p in (tmp_path / "stores").iterdir()] == [second.name], "something half-written was left"


@pytest.mark.parametrize("file", ["facts.json", "maps.npy", "thumbs.npy"])
def test_damaged_store_is_computed_again(small, tmp_path, file):
    one = {"first": small.detectors["first"]}
    folder = prepare(one, small.data, tmp_path, progress=False)["first"].folder
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    assert open_store(folder) is None
    again = prepare(one, small.data, tmp_path, progress=False)["first"]
    assert (again.folder / file).stat().st_size == len(whole)


def test_wrong_folders_are_one_line(small, tmp_path):
    (tmp_path / "file").write_text("x")
    for data, folder in ((tmp_path / "nowhere", tmp_path), (small.data, tmp_path / "file")):
        with pytest.raises(InputError) as e:
            prepare({"first": small.detectors["first"]}, data, folder, progress=False)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="no threshold yet"):
        prepare({"new": Detector(Restorer(make_config(SMALL).model), make_config(SMALL))}, small.data, tmp_path, progress=False)


# ---- counts and lists


def test_counts_against_a_loop(state):
    store = state.store
    for kind in ["all", *sorted(set(store.kinds))]:
        state.kind = kind
        for t in np.quantile(store.scores, [0, 0.3, 0.8, 1]):
            state.thresholds[state.model] = float(t)
            counts = dict.fromkeys(("found", "missed", "alarms", "passed"), 0)
            for score, label, k in zip(store.scores, store.labels, store.kinds, strict=True):
                if kind in ("all", k) or not label:
                    counts[("found" if score > t else "missed") if label else ("alarms" if score > t else "passed")] += 1
            assert state.counts() == counts
            n = counts["found"] + counts["missed"]
            assert state.rates()["recall"] == (counts["found"], n, wilson_interval(counts["found"], n))


def test_only_the_detectors_own_threshold_is_honest(state):
    own = state.store.threshold["value"]
    assert state.is_honest() and "honest" in badge_html(state) and "oracle" not in badge_html(state) + counts_html(state)
    for moved in (own * 1.0001, own - 1):
        state.thresholds[state.model] = moved
        assert not state.is_honest() and "oracle" in badge_html(state) and "oracle" in counts_html(state)
        assert ",oracle," in state.table() and ",honest," not in state.table()
    state.thresholds[state.model] = own
    assert ",honest," in state.table()


def test_false_alarm_slider_is_the_conformal_rule(state):
    scores = state.store.calibration_scores
    n = len(scores)
    for k in range(1, n + 1):
        state.set_alarms(k)
        t = state.thresholds[state.model]
        assert t == conformal_threshold(scores, k / (n + 1)).value and t == np.sort(scores)[n - k]
        assert state.alarms() == 1 + (scores > t).sum()
    state.thresholds[state.model] = -1e9
    assert state.alarms() == n, "the slider has no place beyond its end"


def test_groups_and_orders(state, small):
    store = state.store
    state.thresholds[state.model] = float(np.median(store.scores))
    called = store.scores > state.thresholds[state.model]
    expected = {"missed": store.labels & ~called, "alarm": ~store.labels & called, "anomalous": called, "normal": ~called}
    for group, chosen in expected.items():
        state.group = group
        assert sorted(state.listed()) == np.flatnonzero(chosen).tolist()
    state.group = "all"
    for order, values in (("high", -store.scores), ("low", store.scores), ("file", np.arange(len(store)))):
        state.order = order
        assert state.listed() == np.argsort(values, kind="stable").tolist()
    state.order = "near"
    distances = np.abs(store.scores - state.thresholds[state.model])[state.listed()]
    assert (np.diff(distances) >= 0).all()
    state.group, state.second = "differ", "second"
    other = state.stores["second"].scores > state.thresholds["second"]
    assert sorted(state.listed()) == np.flatnonzero(called != other).tolist()
    state.group, state.kind = "all", "good"
    assert set(store.kinds[state.listed()]) == {"good"}
    state.kind, state.span = "all", (float(store.scores.min()), float(np.median(store.scores)))
    assert all(state.span[0] < store.scores[i] <= state.span[1] for i in state.listed())
    state.kind = "nothing"
    before = state.index
    state.step(1)
    assert state.index == before and "No image matches" in gallery_html(state)


def test_table_reads_back(state):
    state.second = "second"
    state.reviews.save(state.store.files[0], "good", 'a "note", with\nlines')
    rows = list(csv.DictReader(io.StringIO(state.table())))
    assert len(rows) == len(state.store)
    row = next(r for r in rows if r["file"] == state.store.files[0])
    assert row["note"] == 'a "note", with\nlines' and row["review"] == "good"
    assert float(row["score second"]) == state.stores["second"].scores[0]


def test_axis_goes_there_and_back():
    for scores in (np.linspace(-3, 5, 9), np.array([0.1, 0.3, 2e5]), np.array([-40.0, 0.1, 0.2]), np.full(3, 2.0), np.zeros(2)):
        axis = ScoreAxis(scores, np.arange(len(scores)) < 2)
        assert np.allclose(axis.back(axis.to(scores)), scores)
        assert axis.low < axis.to(scores).min() and axis.to(scores).max() < axis.high
        places, texts = axis.ticks()
        assert len(places) == len(texts) == len(set(texts)) < 20


def test_marks_against_a_loop(state):
    store, chart = state.store, make_chart()
    for kind in ["all", sorted(set(store.kinds) - {"good"})[0]]:
        state.kind = kind
        fill_chart(chart, state)
        dots = next(chart.select_traces({"name": "images"}))
        axis, counted = state.axis(), np.flatnonzero(state.counted())
        for t in [store.threshold["value"], *np.quantile(store.scores, [0, 0.5, 1]), -1e9, 1e9]:
            state.thresholds[state.model], state.index = float(t), int(counted[-1])
            marks, wrong = chart_marks(chart, state, axis), [i for i in counted if (store.scores[i] > t) != store.labels[i]]
            places = {i: [x, y] for i, x, y in zip(counted, dots.x, dots.y, strict=True)}
            assert np.allclose(np.reshape(marks["crosses"], (-1, 2)), np.reshape([places[i] for i in wrong], (-1, 2)), atol=1e-4)
            assert axis.low <= marks["set"] <= axis.high and np.allclose(marks["ring"], [places[state.index]], atol=1e-4)
            assert (marks["set"] == marks["honest"]) == (t == store.threshold["value"])


def test_moving_the_threshold_sends_no_pictures(small, tmp_path):
    board = Dashboard(small.runs, small.data, small.stores, tmp_path / "review.csv")
    html, said, marks = board.view.html, board.view.texts, board.marks.marks
    board.threshold.value = 0
    assert board.view.html == html and board.view.texts != said and board.marks.marks != marks
    assert "oracle" in board.view.texts["0"]
    board.next.click()
    assert board.view.html != html and board.view.texts["0"] in board.view.html


# ---- what people say


def test_reviews_of_two_windows_meet(tmp_path):
    one, two = Reviews(tmp_path / "review.csv"), Reviews(tmp_path / "review.csv")
    one.save("a.png", "good", "fine")
    two.save("b.png", "defective")
    one.save("c.png", "", "only a note")
    two.save("a.png", "unsure", "")
    rows = Reviews(tmp_path / "review.csv").rows
    assert {f: r["review"] for f, r in rows.items()} == {"a.png": "unsure", "b.png": "defective", "c.png": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["review.csv"]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00binary", b"file,review\nx,good\n"])
def test_foreign_review_file_is_left_alone(tmp_path, content):
    (tmp_path / "review.csv").write_bytes(content)
    with pytest.raises(InputError, match="Move it away"):
        Reviews(tmp_path / "review.csv")
    assert (tmp_path / "review.csv").read_bytes() == content


# ---- pictures


def test_every_mode_draws(state):
    state.second = "second"
    for mode in MODES:
        html = view_html(state, mode)
        assert html.count("<section") == 2 and html.count("<img") == {"side by side": 8, "contours": 2}.get(mode, 4)
        for pair in layers(state.store.verdict(0), state.store.true_mask(0), state.store.scale, mode).values():
            for at in (0.0, 0.4, 1.0):
                flat = blend(*pair, mode, at)
                assert flat.ndim == 3 and 0 <= flat.min() and flat.max() <= 1


def test_names_from_outside_stay_text(state, small):
    hostile = "<img src=x onerror=alert(1)>'\"&{}"
    state.store.files[:] = [hostile] * len(state.store)
    state.store.kinds = np.array([hostile] * len(state.store))
    state.upload = None
    for html in (view_html(state), gallery_html(state), counts_html(state)):
        assert "<img src=x" not in html
    for attribute in re.findall(r'title="([^"]*)"', gallery_html(state)):
        assert "&quot;" in attribute


def test_uploads_that_are_no_pictures(small, state):
    whole = (small.data / state.store.files[0]).read_bytes()
    for content, message in ((b"", "empty"), (b"hello", "not an image"), (whole[:200], "cut short"), (bytes(MAX_UPLOAD + 1), "at most")):
        with pytest.raises(InputError, match=message) as e:
            judge_upload(small.detectors, "../../etc/evil name.png", content)
        assert str(e.value).startswith("evil name.png") and "\n" not in str(e.value) and "upload:" not in str(e.value)


# ---- the widgets, without a browser


def test_dashboard_in_a_notebook(small, tmp_path):
    board = Dashboard(small.runs, small.data, small.stores, tmp_path / "review.csv")
    assert board.state.is_honest() and board.honest.disabled
    board.alarms.value = 5
    assert board.state.alarms() == 5 and "oracle" in board.badge.value
    board.second.value = "second"
    assert "<th scope=\"col\">second</th>" in board.counts.value and board.view.html.count("<section") == 2
    board.model.value = "second"
    assert board.state.is_honest(), "each detector keeps its own threshold"
    board.model.value = "first"
    assert not board.state.is_honest() and board.alarms.value == 5
    board.exact.value = float("nan")
    assert "must be a number" in board.status.value
    for name in ("good", "ROC"):
        board.on_point(next(board.chart.select_traces({"name": name})), [1])
    board.next.click()
    sent = []
    board.view.send = lambda message, buffers: sent.append((message["save"], buffers[0]))
    board.to_png.click()
    board.to_csv.click()
    assert Image.open(io.BytesIO(sent[0][1])).format == "PNG" and sent[1][1].decode().startswith("file,kind,")
    assert board._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]


def test_one_class_alone(small, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small.data / "test/good", data / "test/good")
    board = Dashboard({"first": small.runs["first"]}, data, tmp_path / "stores", tmp_path / "review.csv")
    assert board.state.rates()["recall"][2] is None and "–" in board.counts.value
    assert "needs good and defective" in board.chart.layout.xaxis2.title.text


# ---- the server


def test_port_that_is_taken(small):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError) as e:
            serve([small.runs["first"]], small.data, port, small.stores)
    assert re.fullmatch(rf"port={port}: taken.*Choose another, for example port=\d+\.", str(e.value))
    check_port(int(str(e.value).rpartition("=")[2].rstrip(".")))


MINUTE = 60_000  # milliseconds: only how long a busy machine may take


@pytest.fixture
def page(small, browser):
    "The dashboard on a free port, opened in a window, with its maps prepared; `outside` lists requests to other machines."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (small.runs["first"] / "review.csv").unlink(missing_ok=True)
    with served(small.runs, small.data, port, small.stores) as (process, address):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(MINUTE)
        page.outside, page.errors = [], []
        page.on("request", lambda r: page.outside.append(r.url) if r.url.startswith("http") and not r.url.startswith(address) else None)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.goto(address)
        page.wait_for_selector(".zad .card")
        page.wait_for_selector(".js-plotly-plot .scatterlayer .point")
        yield page
        page.close()
    assert process.poll() is not None, "the server outlived the dashboard"


def test_in_a_browser(page, small, state, tmp_path):
    badge, counts = page.locator(".zad-badge"), page.locator(".zad-counts")
    said, name, cards = page.locator(".zad .said"), page.locator(".zad h3"), page.locator(".zad .card")
    pictures = Path(tmp_path)

    def shows(place, text):
        place.filter(has_text=text).first.wait_for()

    shows(badge, "honest")
    assert cards.count() == min(24, len(state.store))
    page.screenshot(path=pictures / "1-honest.png", full_page=True)

    handle = page.locator(".jupyter-widgets", has_text="threshold").locator(".noUi-handle").first  # the slider is moved: oracle
    handle.focus()
    before, line = counts.inner_text(), page.locator(".zad-marks .set")
    stood, chart = line.get_attribute("d"), page.locator(".js-plotly-plot").first.bounding_box()
    assert page.locator(".zad-marks .crosses").get_attribute("d").count("M") == sum(state.counts()[k] for k in ("missed", "alarms"))
    box = line.bounding_box()
    assert chart["x"] < box["x"] < chart["x"] + chart["width"] and box["height"] > chart["height"] / 2
    for _ in range(3):
        handle.press("PageDown")
    shows(badge, "oracle")
    shows(counts, "oracle")
    assert counts.inner_text() != before and line.get_attribute("d") != stood
    shows(said, "oracle")
    assert page.get_by_role("slider", name="threshold", exact=True).count() == 1, "a screen reader cannot tell the sliders apart"
    page.get_by_role("button", name="back to the honest threshold").click()
    shows(badge, "honest")
    page.wait_for_function("d => document.querySelector('.zad-marks .set').getAttribute('d') === d", arg=stood)

    kind = sorted(set(state.store.kinds) - {"good"})[0]
    page.get_by_label("kind", exact=True).select_option(label=kind)
    shows(counts, f"{kind} and good")
    assert cards.count() == (state.store.kinds == kind).sum()
    assert set(page.locator(".zad .card span:first-of-type").all_inner_texts()) == {kind}
    page.get_by_label("kind", exact=True).select_option(label="all kinds")
    shows(counts, "all kinds")

    points = page.locator(".js-plotly-plot .subplot.x3y3 .scatterlayer .point")  # a dot is clicked
    ends = [int(i) for i in np.argsort(state.store.scores)[[-1, 0]]]
    chosen = next(i for i in ends if state.store.files[i] not in name.inner_text())
    box = points.nth(chosen).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y, steps=4)
    page.locator(".hoverlayer", has_text=state.store.files[chosen]).wait_for(state="attached")  # the chart says what would be clicked
    page.mouse.down()
    page.mouse.up()
    shows(name, state.store.files[chosen])

    page.get_by_label("you say").select_option("defective")  # a review is kept
    page.get_by_placeholder("a note on this image").fill("seen in a browser")
    page.get_by_role("button", name="save what you say").click()
    page.get_by_text("saved to").wait_for()
    assert Reviews(small.runs["first"] / "review.csv").said(state.store.files[chosen]) == ("defective", "seen in a browser")

    for mode in ("overlay", "contours", "swipe"):
        page.get_by_role("button", name=mode, exact=True).click()
        page.locator(".zad .panels figure").first.wait_for()
        shows(page.locator(".zad figcaption"), {"overlay": "heat", "contours": "contours", "swipe": "|"}[mode])
    page.screenshot(path=pictures / "2-swipe.png", full_page=True)
    with page.expect_download() as download:
        page.get_by_role("button", name="this view as PNG").click()
    assert Image.open(download.value.path()).format == "PNG"

    page.get_by_label("beside").select_option("second")  # two detectors, then the other one
    page.locator(".zad section").nth(1).wait_for()
    page.get_by_role("button", name="side by side").click()
    shows(page.locator(".zad figcaption"), "anomaly map")
    page.screenshot(path=pictures / "3-two.png", full_page=True)
    page.get_by_label("detector", exact=True).select_option("second")
    shows(badge, f"{state.stores['second'].threshold['value']:.4g}")
    shows(said, "second")

    page.wait_for_timeout(500)
    assert "honest" in badge.inner_text() and "oracle" not in counts.inner_text(), "another detector was chosen, and the threshold moved"

    file = small.data / state.store.files[1]  # a picture of one's own, and one that is none
    page.set_input_files("[data-upload]", {"name": "mine.png", "mimeType": "image/png", "buffer": file.read_bytes()})
    shows(name, "mine.png")
    shows(said, f"score {state.stores['second'].scores[1]:.3g}")
    page.screenshot(path=pictures / "4-upload.png", full_page=True)
    page.set_input_files("[data-upload]", {"name": "bad.png", "mimeType": "image/png", "buffer": b"no picture"})
    shows(page.locator(".zad-error"), "bad.png: not an image")
    page.set_input_files("[data-upload]", {"name": "big.png", "mimeType": "image/png", "buffer": bytes(MAX_UPLOAD + 1)})
    shows(page.locator(".zad-error"), "big.png: 8.0 MB")
    assert "mine.png" in name.inner_text() and not page.outside and not page.errors

    page.set_viewport_size({"width": 820, "height": 1000})  # a narrow window: the chart and what lies on it follow
    page.wait_for_function("document.querySelector('.js-plotly-plot .main-svg').clientWidth < 820")
    page.wait_for_function("""() => {
      const [line, plot] = ['.zad-marks .set', '.subplot.x3y3'].map(s => document.querySelector(s)?.getBoundingClientRect());
      return line && plot && plot.left - 2 <= line.left && line.right <= plot.right + 2;
    }""")
