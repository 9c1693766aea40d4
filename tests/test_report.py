"Figures and reports: odd inputs, hostile names, and what must never happen to a page that a browser opens."

import io
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from zipper_ad.core import InputError
from zipper_ad.detector import Verdict
from zipper_ad.interpret import pick_examples, plot_pr, plot_pro, plot_roc, plot_scores, show_verdict, show_verdicts, verdict_panels
from zipper_ad.metrics import evaluate_scores
from zipper_ad.picture import overlay
from zipper_ad.report import write_pdf, write_report
from zipper_ad.threshold import Threshold, conformal_threshold

THRESHOLD = conformal_threshold(np.linspace(0, 1, 39))
SCALE = (0.0, 1.5)
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $a$ &amp; {x} ${body}"


def verdict(score, size=48, channels=1, seed=0, **more):
    "A verdict with random pictures whose map peaks at the score."
    rng = np.random.default_rng(seed)
    shape = (size, size) if channels == 1 else (size, size, channels)
    image, map_ = rng.random(shape, np.float32), rng.random((size, size), np.float32) * 0.3
    map_[size // 2 : size // 2 + 4, 8:14] = score
    return Verdict(score, 0.5, score > THRESHOLD.value, map_, map_ > THRESHOLD.value, image, image * 0.9, **more)


def results(n_good=6, n_bad=6, masks=True, **kw):
    "Metrics, verdicts, labels, kinds and masks of a small made-up test set."
    labels = [0] * n_good + [1] * n_bad
    verdicts = [verdict(0.2 + 0.15 * i if not y else 0.6 + 0.2 * (i - n_good), seed=i, **kw) for i, y in enumerate(labels)]
    kinds = ["rough" if y else "good" for y in labels]
    known = [v.anomaly_map > 0.4 if y else np.zeros(v.anomaly_map.shape, bool) for v, y in zip(verdicts, labels, strict=True)]
    maps = np.stack([v.anomaly_map for v in verdicts]) if masks else None
    known = known if masks else [None] * len(labels)
    metrics = evaluate_scores([v.score for v in verdicts], labels, kinds, THRESHOLD, maps, known, 0.9, n_bootstrap=50)
    return metrics, verdicts, labels, kinds, known


class Page(HTMLParser):
    "Tags, addresses, alternative texts and handlers of a page; fails where tags are not closed."

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.addresses, self.alts, self.handlers, self.open = path.read_text("utf-8"), set(), [], [], [], []
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.addresses += [attrs[a] for a in ("src", "href", "srcset", "action", "data") if a in attrs]
        self.handlers += [a for a in attrs if a.startswith("on")]
        self.alts += [attrs.get("alt")] if tag == "img" else []
        self.open += [tag] if tag not in ("img", "meta", "br") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(path):
    "The page, after checking that nothing in it can run or ask for anything."
    page = Page(path)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "form", "base"} and not page.handlers
    assert all(a.startswith("data:image/") for a in page.addresses) and all(page.alts)
    assert "url(" not in page.text and "@import" not in page.text
    assert "default-src 'none'" in page.text
    return page


def test_hostile_text_stays_text(tmp_path):
    metrics, verdicts, labels, kinds, masks = results()
    for i, v in enumerate(verdicts):
        v.path = Path(f"{i} <script>alert(1)<" + "$x$\u202e.png")
    verdicts[2] = Verdict(path=Path("<b>.png"), error=HOSTILE)
    kinds = [HOSTILE if y else "good" for y in labels]
    metrics["per_defect"] = {HOSTILE: metrics["per_defect"]["rough"]}
    metrics |= {"model": HOSTILE, "versions": {HOSTILE: HOSTILE}, "speed": {"ms_per_image_p50": 1.0, "device": HOSTILE}}
    metrics["image"]["notes"] = [HOSTILE]
    figure = {HOSTILE: plt.figure()}
    config = {HOSTILE: {"k": HOSTILE}}
    path = tmp_path / "r.html"
    page = checked(write_report(path, HOSTILE, metrics, verdicts, labels, kinds, masks, SCALE, config, HOSTILE, figure))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text and "Files without a verdict: 1" in page.text


def test_name_that_is_not_text_can_be_written(tmp_path):
    metrics, verdicts, labels, kinds, masks = results()
    for v in verdicts:
        v.path = Path("part-\udcff.png")  # how Python reads a name that is not UTF-8
    assert "part-?.png" in checked(write_report(tmp_path / "r.html", "t", metrics, verdicts, labels, kinds, masks)).text


@pytest.mark.parametrize("n_good,n_bad", [(6, 0), (0, 6), (1, 1), (6, 6)])
@pytest.mark.parametrize("masks", [True, False])
def test_every_mixture_gives_a_page(tmp_path, n_good, n_bad, masks):
    metrics, *rest = results(n_good, n_bad, masks)
    page = checked(write_report(tmp_path / "r.html", "t", metrics, *rest, SCALE))
    assert "nan" not in page.text.lower().split("base64")[0]
    if not masks:
        assert "pixel metrics are null" in page.text and "–" in page.text


def test_colour_images_and_a_dataclass_as_settings(tmp_path):
    @dataclass
    class Settings:
        seed: int = 7

    metrics, *rest = results(channels=3)
    assert "seed=7" in checked(write_report(tmp_path / "r.html", "t", metrics, *rest, SCALE, Settings())).text


@pytest.mark.parametrize("size", [48, 256, 700])
def test_size_is_bounded(tmp_path, size):
    "Random pixels are the worst case for any compression."
    metrics, verdicts, labels, kinds, _ = results(n_good=4, n_bad=4, masks=False)
    verdicts = [verdict(v.score, size, 3, seed=i) for i, v in enumerate(verdicts)]
    path = write_report(tmp_path / "r.html", "t", metrics, verdicts, labels, kinds, None, SCALE, n_examples=1)
    assert path.stat().st_size < 6e6


def test_a_failure_leaves_the_old_report(tmp_path):
    metrics, verdicts, labels, kinds, masks = results()
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(KeyError):
        write_report(tmp_path / "r.html", "t", {"n": metrics["n"]}, verdicts, labels, kinds, masks)
    with pytest.raises(InputError, match="5 kinds"):
        write_report(tmp_path / "r.html", "t", metrics, verdicts, labels, kinds[:5], masks)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.html", "old")]


def test_rendered_is_said_beside_every_figure_of_the_summary(tmp_path):
    metrics, *rest = results()
    text = write_report(tmp_path / "r.html", "t", metrics, *rest, data_note="Rendered zippers").read_text("utf-8")
    short = text.split('<p class="short">')[1].split("</p>")[0]
    assert all("rendered images" in sentence for sentence in short.split(". "))


def test_interval_of_a_perfect_result_has_a_width(tmp_path):
    metrics, verdicts, labels, kinds, _ = results(masks=False)
    verdicts = [verdict(3.0 if y else 0.1) for y in labels]
    metrics = evaluate_scores([v.score for v in verdicts], labels, kinds, THRESHOLD, n_bootstrap=50)
    assert metrics["image"]["ci"]["auroc"] == [1, 1]
    text = write_report(tmp_path / "r.html", "t", metrics, verdicts, labels, kinds).read_text("utf-8")
    assert "AUROC 1.000, 95% interval 0.541\u00a0to\u00a01.000" in text


# ---- on paper


def pages_of(path):
    "How many pages a PDF has, after checking that it is one to its end."
    content = path.read_bytes()
    assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF")
    return len(re.findall(rb"/Type /Page\b", content))


@pytest.mark.parametrize("n_good,n_bad", [(6, 0), (0, 6), (6, 6)])
def test_every_mixture_gives_a_pdf(tmp_path, n_good, n_bad):
    metrics, *rest = results(n_good, n_bad, masks=n_bad > 0)
    assert 2 <= pages_of(write_pdf(tmp_path / "r.pdf", "t", metrics, *rest, SCALE)) <= 8


def test_hostile_text_on_paper(tmp_path):
    metrics, verdicts, labels, kinds, masks = results()
    for v in verdicts:
        v.path = Path("$x$ \udcff \u202e.png")
    verdicts[2] = Verdict(path=Path("$\\frac{.png"), error=HOSTILE * 20)
    kinds = [HOSTILE if y else "good" for y in labels]
    metrics["per_defect"] = {HOSTILE: metrics["per_defect"]["rough"]}
    metrics["image"]["notes"] = [HOSTILE, "a\nb\x00c"]
    assert pages_of(write_pdf(tmp_path / "r.pdf", HOSTILE, metrics, verdicts, labels, kinds, masks, SCALE, {HOSTILE: HOSTILE}, HOSTILE)) > 2


def test_many_settings_run_over_pages(tmp_path):
    metrics, *rest = results()
    few = pages_of(write_pdf(tmp_path / "few.pdf", "t", metrics, *rest))
    assert pages_of(write_pdf(tmp_path / "many.pdf", "t", metrics, *rest, config={f"k{i}": i for i in range(200)})) >= few + 2


def test_a_failure_leaves_the_old_pdf(tmp_path):
    metrics, verdicts, labels, kinds, masks = results()
    (tmp_path / "r.pdf").write_text("old")
    with pytest.raises(KeyError):
        write_pdf(tmp_path / "r.pdf", "t", {"n": metrics["n"]}, verdicts, labels, kinds, masks)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.pdf", "old")]


# ---- in a browser

CONTRAST = """() => {
  const light = (c) => c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const rgb = (s) => s.match(/[\\d.]+/g).map(Number);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data.trim()).join(" ");
    if (!text || !e.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${((a + 0.05) / (b + 0.05)).toFixed(2)} ${e.tagName} ${text.slice(0, 60)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_can_be_read_by_everybody(tmp_path, browser, scheme):
    "WCAG 2.1 AA, as far as a program can tell: contrast, headings, names, language; and not one request leaves the page."
    metrics, verdicts, labels, kinds, masks = results(12, 12)
    path = write_report(tmp_path / "r.html", "A detector", metrics, verdicts, labels, kinds, masks, SCALE, {"seed": 0}, "Rendered zippers.")
    page, asked = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme=scheme), []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate(CONTRAST) == [], "text that is hard to read"
    assert [a for a in asked if not a.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.lang") == "en" and page.title() == "A detector"
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), levels
    assert page.evaluate("[...document.images].filter(i => !i.alt.trim() || !i.complete || !i.naturalWidth).length") == 0
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope=col]'))")
    assert page.evaluate("[...document.querySelectorAll('[role=region]')].every(r => r.getAttribute('aria-label'))")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    for width in (1000, 360):  # nothing sticks out sideways, on a telephone neither
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"at {width} pixels the page scrolls sideways"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body"), "what scrolls cannot be reached by keyboard"
    page.close()


# ---- figures


@pytest.mark.parametrize("scale", [(0, 1), (1, 1), (-5.0, 5.0)])
def test_overlay_is_a_picture_whatever_the_map(scale):
    for map_ in (np.zeros((8, 8)), np.full((8, 8), np.nan), np.full((8, 8), np.inf), np.full((8, 8), -1e30)):
        rgb = overlay(np.full((8, 8), 0.5), map_, scale)
        assert rgb.shape == (8, 8, 3) and np.isfinite(rgb).all() and 0 <= rgb.min() and rgb.max() <= 1


@pytest.mark.parametrize("mask", [np.zeros((48, 48), bool), np.ones((48, 48), bool), np.eye(48, dtype=np.uint8) * 255])
def test_panels_take_any_mask(mask):
    v = verdict(1.2)
    v.mask = mask > 0
    assert all(np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 for p in verdict_panels(v, mask, SCALE).values())
    v.reconstruction = None
    assert list(verdict_panels(v, mask)) == ["image", "anomaly map", "overlay"]
    show_verdict(v, mask).savefig(io.BytesIO())


def test_figures_are_forgotten_also_after_an_error():
    plt.close("all")
    show_verdicts([verdict(1.0), Verdict(error="broken $")], ["$a$", "$"]).savefig(io.BytesIO())
    with pytest.raises(InputError):
        plot_scores([], [])
    with pytest.raises(InputError):
        show_verdict(verdict(1.0), np.ones((5, 5)))
    assert plt.get_fignums() == []


@pytest.mark.parametrize("scores", [[1.0], [0, 0, 0], [1e-30, 1, 1e30], [-1e9, 0, 1], [-3, 2, 5000], [1, 2, np.inf]])
@pytest.mark.parametrize("value", [None, -1.0, 1e6])
def test_scores_of_any_size_can_be_plotted(scores, value):
    threshold = None if value is None else Threshold(value, 0.05, 0.05, 19)
    for kinds in (["rough"] * len(scores), (["good", "good", "$x"])[: len(scores)]):
        plot_scores(scores, kinds, threshold).savefig(io.BytesIO())


def test_histogram_counts_every_image():
    scores = np.random.default_rng(0).normal(size=200)
    figure = plot_scores(scores, ["good"] * 100 + ["rough"] * 100, THRESHOLD)
    counts = [p.get_data().values.sum() for p in figure.axes[0].patches]
    assert counts == [100, 100]


def test_roc_marks_the_threshold():
    axes = plot_roc([0, 0, 1, 1], [0.1, 2, 0.5, 3], Threshold(1.0, 0.05, 0.05, 19), n_bootstrap=0).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines][-1] == [[0.5, 0.5]]


def test_precision_curve_marks_the_threshold():
    axes = plot_pr([0, 0, 1, 1], [0.1, 2, 0.5, 3], Threshold(1.0, 0.05, 0.05, 19), n_bootstrap=0).axes[0]
    assert axes.lines[-1].get_xydata().tolist() == [[0.5, 0.5]]
    silent = plot_pr([0, 0, 1, 1], [0.1, 2, 0.5, 3], Threshold(9.0, 0.05, 0.05, 19), n_bootstrap=20)
    assert "at the threshold" not in [t.get_text() for t in silent.axes[0].get_legend().texts]  # no alarm has no precision


def test_pro_band_holds_the_curve():
    _, verdicts, labels, _, masks = results(12, 12)
    axes = plot_pro([v.anomaly_map for v in verdicts], masks, n_bootstrap=100).axes[0]
    band = axes.collections[0].get_paths()[0].get_extents()
    assert 0 <= band.y0 and band.y1 <= 1.0001 and band.x1 == pytest.approx(0.3)


def test_examples_are_disjoint_and_right():
    metrics, verdicts, labels, kinds, _ = results(12, 12)
    verdicts[3] = Verdict(error="broken")
    groups = pick_examples(verdicts, labels, kinds, 50, THRESHOLD.value)
    everything = [i for found in groups.values() for i in found]
    assert sorted(everything) == [i for i in range(24) if i != 3]
    assert all(labels[i] and not verdicts[i].is_anomalous for i in groups["missed"])
    assert all(not labels[i] and verdicts[i].is_anomalous for i in groups["false alarm"])
    assert [verdicts[i].score for i in groups["missed"]] == sorted(verdicts[i].score for i in groups["missed"])
