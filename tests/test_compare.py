"Comparisons: pixel figures at the size of the masks, the same as `evaluate` gives, and test sets in which something is missing."

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from zipper_ad import compare as c
from zipper_ad.core import InputError
from zipper_ad.detector import Detector
from zipper_ad.pixels import at_size
from zipper_ad.statistics import paired_pixel_bootstrap

FIGURES = ["auroc", "auprc", "aupro", "aupro_05"]


@pytest.fixture(scope="module")
def detectors(trained, tmp_path_factory):
    "Two detectors with maps of different sizes."
    from zipper_ad.cli import main

    run = tmp_path_factory.mktemp("small") / "run"
    settings = [s for s in trained.settings if not s.startswith(("data.size", "train.epochs"))]
    assert main(["train", f"data={trained.data}", f"out={run}", *settings, "data.size=32", "train.epochs=1"]) == 0
    return {"large": Detector.load(trained.run), "small": Detector.load(run)}


@pytest.fixture
def enlarged(trained, tmp_path):
    "The test set with pictures and masks twice as large."
    root = shutil.copytree(trained.data / "test", tmp_path / "root/test").parent
    shutil.copytree(trained.data / "ground_truth", root / "ground_truth")
    for file in (*root.glob("test/*/*"), *root.glob("ground_truth/*/*")):
        image = Image.open(file)
        image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(file)
    return root


def same(a, b):
    "Equal but for the times that were measured."
    return {k: v for k, v in a.items() if k != "speed"} == {k: v for k, v in b.items() if k != "speed"}


def test_pixel_figures_are_those_of_evaluate_at_the_size_of_the_masks(detectors, enlarged):
    found = c.compare(detectors, enlarged, n_bootstrap=30)
    assert {m.shape for m in found.masks} == {(128, 128)}
    verdicts = {}
    for judge in found.judges:
        metrics, verdicts[judge.name], test = judge.detector.evaluate(enlarged, n_bootstrap=30)
        assert same(metrics, judge.metrics) and metrics["pixel"]["resolution"] == "native masks"
    pairs = {row["figure"]: row for row in found.pixel_pairs()}
    assert list(pairs) == FIGURES
    large, small = (j.metrics["pixel"] for j in found.judges)
    maps = [[at_size(v.anomaly_map, (128, 128)) for v in verdicts[name]] for name in ("large", "small")]
    expected = paired_pixel_bootstrap(*maps, list(test.native_masks()), n=50)  # of so many resamples at least, for a pair
    for name, row in pairs.items():
        assert row["difference"] == large[name] - small[name] and row["p_holm"] == row["p_value"]
        assert {k: row[k] for k in ("difference", "ci", "p_value")} == expected[name]


def test_masks_of_several_sizes(detectors, enlarged):
    for file in (*enlarged.glob("test/rough/*"), *enlarged.glob("ground_truth/rough/*")):
        image = Image.open(file)
        image.resize((96, 160), Image.NEAREST).save(file)
    found = c.compare(detectors, enlarged, n_bootstrap=20)
    assert len(found.pixel_pairs()) == 4 and found.judges[0].metrics["pixel"]["bound"]["auroc"] > 0
    assert [r["difference"] for r in found.pixel_pairs()] == [
        found.judges[0].metrics["pixel"][f] - found.judges[1].metrics["pixel"][f] for f in FIGURES]


@pytest.mark.parametrize("gone, pairs, pixel_pairs", [("ground_truth", 1, 0), ("test/good", 0, 4)])
def test_a_page_where_something_is_missing(detectors, enlarged, tmp_path, gone, pairs, pixel_pairs):
    shutil.rmtree(enlarged / gone)
    found = c.compare(detectors, enlarged, n_bootstrap=10)
    assert (len(found.pairs()), len(found.pixel_pairs())) == (pairs, pixel_pairs)
    facts = json.loads((c.write_comparison(found, tmp_path / "out", n_examples=1).parent / "compare.json").read_text())
    assert len(facts["pixel_pairs"]) == pixel_pairs and sum(row["n"] for row in facts["failures"]) == len(found.labels)
    if gone == "test/good":
        with pytest.raises(InputError, match="needs good pictures"):
            c.plot_calibration(found)


def test_only_good_pictures_and_no_intervals(detectors, trained, tmp_path):
    shutil.copytree(trained.data / "test/good", tmp_path / "root/test/good")
    found = c.compare(detectors, tmp_path / "root", n_bootstrap=0)
    assert found.pairs() == found.pixel_pairs() == [] and found.judges[0].metrics["pixel"]["auroc"] is None
    assert np.isfinite(found.judges[0].scores).all() and c.plot_calibration(found)


def test_an_empty_mask_counts_like_none(detectors, enlarged):
    first = sorted((enlarged / "ground_truth/rough").iterdir())[0]
    Image.new("L", (128, 128), 0).save(first)
    empty = c.compare(detectors, enlarged, n_bootstrap=10)
    first.unlink()
    none = c.compare(detectors, enlarged, n_bootstrap=10)
    assert empty.pixel_pairs() == none.pixel_pairs() and empty.pairs() == none.pairs()


def test_broken_weights_are_one_line(detectors, trained):
    import torch

    broken = Detector.load(trained.run)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite. Is the model broken"):
        c.compare({"whole": detectors["large"], "broken": broken}, trained.data, n_bootstrap=0)


def test_runs_that_differ_only_in_their_seed_are_taken_together(detectors, trained, tmp_path):
    from zipper_ad.cli import main

    settings = [x for x in trained.settings if not x.startswith(("data.size", "train.epochs"))]
    for seed in (0, 1):
        assert main(["train", f"data={trained.data}", f"out={tmp_path / f'tiny-seed{seed}'}", *settings, f"seed={seed}", "data.size=32",
                     "train.epochs=1"]) == 0
    runs = ",".join(str(p) for p in (tmp_path / "tiny-seed0", tmp_path / "tiny-seed1", trained.run))
    assert main(["compare", f"runs=[{runs}]", f"data={trained.data}", f"out={tmp_path / 'out'}", "n=1"]) == 0
    facts = json.loads((tmp_path / "out/compare.json").read_text())
    (row,) = facts["trainings"]
    assert row["detector"] == "tiny" and row["n"] == 2
    assert row["aurocs"] == [facts["detectors"][f"tiny-seed{k}"]["image"]["auroc"] for k in (0, 1)]
    assert facts["training_pairs"] == [] and (tmp_path / "out/figures/trainings.png").exists()
    assert "Over several trainings" in (tmp_path / "out/compare.html").read_text()
    again = c.compare({"large": detectors["large"], "same": Detector.load(trained.run)}, trained.data, n_bootstrap=0)
    assert again.trainings() == {}  # one seed twice is one training


@pytest.mark.parametrize("few", ["test/good", "test/rough"])
def test_one_picture_of_a_class(detectors, enlarged, tmp_path, few):
    for folder in (enlarged / "test").iterdir():
        if few == "test/rough" and folder.name not in ("good", "rough"):
            shutil.rmtree(folder)
    for file in sorted((enlarged / few).iterdir())[1:]:
        file.unlink()
    found = c.compare(detectors, enlarged, n_bootstrap=5)
    assert min(found.labels.sum(), (~found.labels).sum()) == 1 and found.pairs() == []
    assert "Nothing can be ranked" in c.write_comparison(found, tmp_path / "out", n_examples=1).read_text()
    for draw in (c.plot_pairs, c.plot_speed):
        with pytest.raises(InputError, match="two good and two defective"):
            draw(found)


def test_runs_on_other_data_and_copies_are_no_further_trainings(detectors):
    from dataclasses import replace
    from types import SimpleNamespace

    config = detectors["large"].config
    judge = lambda name, root, seed: SimpleNamespace(  # noqa: E731
        name=name, detector=SimpleNamespace(config=replace(config, seed=seed, data=replace(config.data, root=root))))
    judges = [judge("few-seed0", "few", 0), judge("many-seed0", "many", 0), judge("few-seed1", "./few", 1), judge("copy", "few", 0)]
    found = c.Comparison(None, None, [], [], judges).trainings()
    assert {name: [j.name for j in group] for name, group in found.items()} == {"few": ["few-seed0", "few-seed1"]}


def test_many_detectors_look_different():
    assert len({c._look(i)[:2] for i in range(28)}) == 28
