"""How long the dashboard takes to answer a moved slider, in a real browser: python tools/app_study.py [images=1000] [moves=40]

Rendered zippers of 32 pixels and two untrained detectors: what is shown is of no interest here, only how fast. The slider for the
threshold is moved by its keys. Measured is the time from the key to the last frame in which the chart changed, and to the last in
which anything on the page changed. Needs a Chromium (`make browser`). Prints milliseconds: median and 95th percentile.
"""
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import sync_playwright

from zipper_ad.app import served
from zipper_ad.config import make_config
from zipper_ad.data import AnomalyDataset
from zipper_ad.detector import Detector
from zipper_ad.models.head import Restorer
from zipper_ad.synth import render_dataset

WATCH = """() => {
  window.changed = {chart: 0, page: 0, begun: 0};
  const later = (name) => requestAnimationFrame(() => { window.changed[name] = performance.now(); });
  const all = {childList: true, subtree: true, attributes: true, characterData: true};
  new MutationObserver(() => later("chart")).observe(document.querySelector(".js-plotly-plot"), all);
  new MutationObserver(() => later("page")).observe(document.body, all);
  addEventListener("keydown", () => { window.changed.begun = performance.now(); }, true);
}"""


def make_runs(root: Path, images: int) -> tuple[dict, Path]:
    "Folders of two untrained detectors by name, and a test set of so many rendered zippers."
    kinds, good = 7, images // 4
    data = render_dataset(root / "zippers", n_train=50, n_test=-(-(images - good) // kinds), n_good=good, size=32, progress=False)
    normals, runs = AnomalyDataset(data, "train", size=32, cache="memory").batch(range(50)), {}
    for seed, (name, map_) in enumerate({"first": "auto", "second": "l2"}.items()):
        torch.manual_seed(seed)
        config = make_config(["data.size=32", "model.widths=[4,8]", "model.latent=8", "train.device=cpu", f"score.map={map_}"])
        runs[name] = root / name
        Detector.fit(Restorer(config.model), normals, config).save(runs[name])
    return runs, data


def measure(page, moves: int) -> dict[str, list[float]]:
    "Milliseconds of so many moves of the slider, one after the other has been answered."
    page.evaluate(WATCH)
    handle = page.locator(".jupyter-widgets", has_text="threshold").locator(".noUi-handle").first
    handle.focus()
    times = {"chart": [], "page": []}
    for i in range(moves):
        handle.press("PageDown" if i % 2 else "PageUp")
        page.wait_for_function("changed.page > changed.begun && performance.now() - changed.page > 500", polling=100, timeout=60_000)
        changed = page.evaluate("changed")
        for name, values in times.items():
            values.append(changed[name] - changed["begun"])
    return times


def main(images: int = 1000, moves: int = 40):
    root = Path(tempfile.mkdtemp())
    runs, data = make_runs(root, images)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = os.environ.get("ZIPPER_AD_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    with served(runs, data, port, root / "stores") as (_, address), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(300_000)  # only how long a busy machine may take
        page.goto(address)
        page.wait_for_selector(".js-plotly-plot .scatterlayer .point", timeout=120_000)
        page.wait_for_timeout(3000)
        page.get_by_label("beside").select_option("second")
        page.wait_for_timeout(3000)
        times = measure(page, moves)
        browser.close()
    facts = {name: {"median": round(float(np.median(t))), "p95": round(float(np.quantile(t, 0.95)))} for name, t in times.items()}
    print(json.dumps({"images": images, "moves": moves, "cores": os.cpu_count(), "milliseconds": facts}, indent=1))
    shutil.rmtree(root)


if __name__ == "__main__":
    main(**{k: int(v) for k, v in (a.split("=") for a in sys.argv[1:])})
