"Metrics: properties and broken input."

import json

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from zipper_ad import metrics as m
from zipper_ad.core import InputError
from zipper_ad.data import PackedMasks
from zipper_ad.pixels import PixelMetrics, at_size
from zipper_ad.statistics import across_seeds, delong_test
from zipper_ad.threshold import conformal_threshold


def problem(seed, n=12, size=24):
    "Maps and masks, half of the images with faults; some values tied."
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for mask in masks[: n // 2]:
        for row, column, height, width in rng.integers(1, size // 3, (3, 4)):
            mask[2 * row : 2 * row + height, 2 * column : 2 * column + width] = True
    maps = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + masks * rng.uniform(0, 1, (n, 1, 1))
    return np.round(maps, 2).astype(np.float32), masks


@pytest.fixture
def scored():
    maps, masks = problem(0)
    labels = masks.any((1, 2)).astype(int)
    return maps.max((1, 2)), labels, np.where(labels, "rough", "good"), conformal_threshold(np.arange(0, 1, 0.02)), maps, masks


@pytest.mark.parametrize("seed", range(5))
def test_curves_agree_with_scikit_learn(seed):
    maps, masks = problem(seed)
    block = m.pixel_metrics(maps, masks, n_bootstrap=0)
    assert block["auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert block["auprc"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_rank_metrics_ignore_scale_and_order(seed):
    maps, masks = problem(seed)
    figures = lambda maps, masks: [m.pixel_metrics(maps, masks, n_bootstrap=0)[k] for k in ("auroc", "auprc", "aupro")]  # noqa: E731
    expected = figures(maps, masks)
    shuffled = np.random.default_rng(0).permutation(len(maps))
    for other in (np.exp(maps), maps * 7 - 100):
        assert figures(other, masks) == pytest.approx(expected, abs=1e-4)
    assert figures(maps[shuffled], masks[shuffled]) == pytest.approx(expected, abs=1e-9)
    assert figures(maps[:, ::-1], masks[:, ::-1]) == pytest.approx(expected, abs=1e-9)


def test_perfect_inverted_and_constant_maps():
    _, masks = problem(1)
    assert m.aupro(masks.astype(float), masks) == pytest.approx(1)
    assert m.aupro(-masks.astype(float), masks) == pytest.approx(0)
    assert m.aupro(np.zeros(masks.shape), masks) == pytest.approx(0.15)  # the diagonal, up to 0.3, over 0.3


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
def test_pro_curve_integrates_to_aupro(limit):
    maps, masks = problem(2)
    fpr, pro = m.pro_curve(maps, masks, limit)
    assert fpr[0] == 0 and fpr[-1] == limit and (np.diff(fpr) >= 0).all() and (np.diff(pro) >= 0).all()
    assert np.trapezoid(pro, fpr) / limit == pytest.approx(m.aupro(maps, masks, limit), abs=1e-12)


def test_regions_count_alike_whatever_their_area():
    masks = np.zeros((1, 30, 30), bool)
    masks[0, :10, :10] = masks[0, 20, 20] = True
    found_large, found_small = np.zeros((2, 1, 30, 30))
    found_large[0, :10, :10], found_small[0, 20, 20] = 1, 1
    assert m.aupro(found_large, masks) == pytest.approx(m.aupro(found_small, masks))


def test_tensors_lists_and_channels_are_accepted():
    maps, masks = problem(3)
    expected = m.aupro(maps, masks)
    assert m.aupro(torch.from_numpy(maps)[:, None], list(torch.from_numpy(masks)[:, None])) == expected
    assert m.aupro(list(maps), [mask.astype(np.uint8) * 255 for mask in masks]) == expected
    assert m.auroc(torch.tensor([0, 1]), torch.tensor([0.1, 0.2])) == 1


@pytest.mark.parametrize("masks", [np.zeros((2, 5, 5), bool), np.ones((2, 5, 5), bool), [None, None]])
def test_pixels_of_one_class(masks):
    maps = np.random.default_rng(0).random((2, 5, 5))
    block = m.pixel_metrics(maps, masks, 0.5)
    assert block["auroc"] is block["auprc"] is block["aupro"] is m.aupro(maps, masks) is None
    assert block["notes"] and block["ci"] == {}
    with pytest.raises(InputError, match="PRO curve"):
        m.pro_curve(maps, masks)


def test_curves_of_one_class():
    for curve in (m.roc_points, m.roc_band):
        with pytest.raises(InputError, match="ROC"):
            curve([1, 1], [0.0, 1.0])


def test_intervals_are_repeatable_and_hold_the_figure(scored):
    scores, labels, *_, maps, masks = scored
    first, again = (m.pixel_metrics(maps, masks, 0.5, seed=3) for _ in range(2))
    assert first == again
    assert all(low <= first[k] <= high for k, (low, high) in first["ci"].items())
    narrow, wide = (m.bootstrap_interval(m.auroc, labels, scores, level=level) for level in (0.5, 0.99))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


def test_logit_interval_at_the_ends():
    labels = [0] * 10 + [1] * 20
    perfect = m.auroc_interval(labels, labels)
    assert perfect[1] == 1 and 0.6 < perfect[0] < 0.8
    assert m.auroc_interval(labels, [-y for y in labels]) == pytest.approx([0, 1 - perfect[0]])


def test_whole_report_is_json(scored):
    report = m.evaluate_scores(*scored[:4], maps=scored[4], masks=list(scored[5]), pixel_threshold=0.5, n_bootstrap=50)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == {"n", "image", "pixel", "per_defect", "threshold"}
    assert {"auroc", "auprc", "f1", "precision", "recall", "f1_max", "ci"} <= set(report["image"])
    assert {"auroc", "auprc", "aupro", "iou", "dice", "ci"} <= set(report["pixel"])
    assert {"value", "target_fpr", "promised_fpr", "n_calibration", "observed_fpr", "ci"} <= set(report["threshold"])


def test_missing_masks_count_at_image_level_only(scored):
    scores, labels, kinds, threshold, maps, masks = scored
    missing = [None if i in (0, 2) else mask for i, mask in enumerate(masks)]
    some = m.evaluate_scores(scores, labels, kinds, threshold, maps, missing, 0.5, n_bootstrap=20)
    every = m.evaluate_scores(scores, labels, kinds, threshold, maps, masks, 0.5, n_bootstrap=20)
    assert some["image"] == every["image"] and some["n"] == {**every["n"], "with_mask": every["n"]["with_mask"] - 2}
    kept = [i for i in range(len(masks)) if i not in (0, 2)]
    assert some["pixel"]["aupro"] == m.aupro(maps[kept], masks[kept])


def test_good_images_need_no_mask(scored):
    scores, labels, kinds, threshold, maps, masks = scored
    none = [mask if label else None for mask, label in zip(masks, labels, strict=True)]
    first, second = (m.evaluate_scores(scores, labels, kinds, threshold, maps, v, 0.5, n_bootstrap=20) for v in (none, masks))
    assert first == second


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_report_of_one_class(labels):
    n = len(labels)
    report = m.evaluate_scores(np.arange(n) * 1.0, labels, ["a"] * n, conformal_threshold(np.arange(20.0)))
    assert report["image"]["auroc"] is None and report["image"]["notes"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_values_are_errors(scored, bad):
    scores, labels, kinds, threshold, maps, masks = scored
    with pytest.raises(InputError, match="not finite"):
        m.evaluate_scores(np.where(labels, bad, scores), labels, kinds, threshold)
    maps = maps.copy()
    maps[3, 0, 0] = bad
    with pytest.raises(InputError, match="image 3"):
        m.evaluate_scores(scores, labels, kinds, threshold, maps, masks)


@pytest.mark.parametrize("n_kinds, n_maps, n_masks", [(11, 12, 12), (12, 11, 12), (12, 12, 11)])
def test_lengths_must_agree(scored, n_kinds, n_maps, n_masks):
    scores, labels, kinds, threshold, maps, masks = scored
    with pytest.raises(InputError, match="there must be one"):
        m.evaluate_scores(scores, labels, kinds[:n_kinds], threshold, maps[:n_maps], masks[:n_masks], n_bootstrap=5)


# ---------------------------------------------------------------- masks of any size
def test_maps_are_enlarged_to_masks_of_one_size_exactly(scored):
    scores, labels, kinds, threshold, maps, masks = scored
    large = np.kron(masks, np.ones((1, 3, 2), bool))
    found = m.evaluate_scores(scores, labels, kinds, threshold, list(maps), large, 0.5, n_bootstrap=20)["pixel"]
    upsampled = [at_size(a, (72, 48)) for a in maps]
    assert found.pop("bound") == {} and found == m.pixel_metrics(upsampled, large, 0.5, n_bootstrap=20)


def test_many_pixels_are_counted_with_a_bound(scored, monkeypatch):
    scores, labels, kinds, threshold, maps, masks = scored
    packed = PackedMasks(np.kron(masks, np.ones((1, 2, 2), bool)))
    measure = lambda masks: m.evaluate_scores(scores, labels, kinds, threshold, maps, masks, 0.5, n_bootstrap=50)  # noqa: E731
    exact = measure(packed)
    monkeypatch.setattr(m, "EXACT_PIXELS", masks.size * 4 - 1)
    counted = measure(packed)
    assert exact["pixel"]["bound"] == {} and set(counted["pixel"]["bound"]) == {"auroc", "auprc", "aupro", "aupro_05", "aupimo"}
    assert set(counted["pixel"]) == set(exact["pixel"]) and set(counted["pixel"]["ci"]) == set(exact["pixel"]["ci"])
    for name, bound in counted["pixel"]["bound"].items():
        assert abs(counted["pixel"][name] - exact["pixel"][name]) <= bound + 1e-12
    for name in ("iou", "dice", "iou_per_region"):
        assert counted["pixel"][name] == pytest.approx(exact["pixel"][name])
    assert {k: v for k, v in counted.items() if k != "pixel"} == {k: v for k, v in exact.items() if k != "pixel"}
    broken = maps.copy()
    broken[7, 0, 0] = np.nan
    with pytest.raises(InputError, match="image 7"):
        m.evaluate_scores(scores, labels, kinds, threshold, broken, packed, 0.5)


def test_masks_of_several_sizes_and_aspects(scored):
    scores, labels, kinds, threshold, maps, masks = scored
    sizes = [(1, 1), (2, 2), (3, 1)]
    mixed = [np.kron(mask, np.ones(sizes[i % 3], bool)) for i, mask in enumerate(masks)]
    report = m.evaluate_scores(scores, labels, kinds, threshold, maps, mixed, 0.5, n_bootstrap=20)
    assert json.loads(json.dumps(report, allow_nan=False)) == report and report["n"]["with_mask"] == 6
    enlarged = [at_size(a, mask.shape) for a, mask in zip(maps, mixed, strict=True)]
    truth, values = (np.concatenate([v.ravel() for v in images]) for images in (mixed, enlarged))
    pixel = report["pixel"]
    assert abs(pixel["auroc"] - roc_auc_score(truth, values)) <= pixel["bound"]["auroc"] + 1e-12


def test_empty_masks_of_defective_images_are_left_out(scored):
    scores, labels, kinds, threshold, maps, masks = scored
    empty, missing = list(masks), list(masks)
    empty[1], missing[1] = np.zeros((24, 24), np.uint8), None
    found, expected = (m.evaluate_scores(scores, labels, kinds, threshold, maps, v, 0.5, n_bootstrap=20) for v in (empty, missing))
    note = "1 defective images have an empty mask and are left out of pixel metrics"
    assert found["pixel"].pop("notes") == [*expected["pixel"].pop("notes"), note]
    assert found == expected and found["n"]["with_mask"] == 5


@pytest.mark.parametrize("sizes", [[(2, 2)], [(1, 1), (2, 2), (3, 1)]])
def test_resampled_pixels_make_the_intervals_of_the_report(scored, sizes):
    scores, labels, kinds, threshold, maps, masks = scored
    native = [None if i == 2 else np.kron(mask, np.ones(sizes[i % len(sizes)], bool)) for i, mask in enumerate(masks)]
    drawn = m.resampled_pixels(labels, maps, native, n=40, seed=7)
    pixel = m.evaluate_scores(scores, labels, kinds, threshold, maps, native, n_bootstrap=40, seed=7)["pixel"]
    assert set(drawn) == {"auroc", "auprc", "aupro", "aupro_05"}
    for name, values in drawn.items():
        assert np.quantile(values, [0.025, 0.975]) == pytest.approx(pixel["ci"][name], rel=1e-12)
    assert m.resampled_pixels(labels, maps, [None] * len(labels)) == {}
    assert m.resampled_pixels(np.zeros(3), maps[labels == 0][:3], [None] * 3) == {}


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_of_images_with_maps(scored, label):
    scores, labels, kinds, threshold, maps, masks = (v[scored[1] == label] if isinstance(v, np.ndarray) else v for v in scored)
    report = m.evaluate_scores(scores, labels, kinds, threshold, maps, masks, 0.5, n_bootstrap=20)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["image"]["auroc"] is report["pixel"]["aupimo"] is None and report["image"]["notes"] and report["pixel"]["notes"]
    assert (report["pixel"]["auroc"] is None) == (label == 0)
    assert (report["threshold"]["observed_fpr"] is None) == (label == 1) == (report["image"]["recall"] is not None)


def test_a_good_image_without_a_mask_counts_like_one_with_an_empty_mask():
    rng = np.random.default_rng(3)
    labels, maps = np.arange(12) % 2, rng.normal(size=(12, 16, 16))
    truth = [np.kron(rng.random((4, 4)) > 0.8, np.ones((16, 16))) > 0 if label else np.zeros((64, 64), bool) for label in labels]
    limit = conformal_threshold(rng.normal(size=30), 0.05)
    scores = maps.max((1, 2))
    none = [t if label else None for t, label in zip(truth, labels, strict=True)]
    with_masks, without = (m.evaluate_scores(scores, labels, ["x"] * 12, limit, maps, masks, 1.0, 20)["pixel"] for masks in (truth, none))
    assert with_masks == without and with_masks["auprc"] is not None
    resampled = [m.resampled_pixels(labels, maps, masks, 5) for masks in (truth, none)]
    assert all(np.array_equal(resampled[0][k], resampled[1][k]) for k in resampled[0]) and len(resampled[0]) == 4


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_a_level_that_is_no_confidence(level):
    labels, scores = [0, 0, 1, 1], [1.0, 3, 2, 4]
    for call in (lambda: m.wilson_interval(1, 5, level), lambda: m.auroc_interval(labels, scores, level),
                 lambda: m.bootstrap_interval(m.auroc, labels, scores, level=level), lambda: m.perfect_auroc_bound(3, 3, level),
                 lambda: delong_test(labels, scores, scores, level), lambda: across_seeds([1.0, 2.0], level)):
        with pytest.raises(InputError, match="level="):
            call()


@pytest.mark.parametrize("max_fpr", [0, -1, 1.5])
def test_a_rate_at_which_no_curve_can_end(max_fpr):
    maps, masks = np.zeros((1, 4, 4)), [np.eye(4) > 0]
    for call in (m.aupro, m.pro_curve):
        with pytest.raises(InputError, match="max_fpr="):
            call(maps, masks, max_fpr)
    with pytest.raises(InputError, match="max_fpr="):
        PixelMetrics(max_fpr=max_fpr)


def test_no_interval_where_a_resample_has_no_good_pixels():
    masks = np.zeros((2, 8, 8), bool)
    masks[0], masks[1, :2] = True, True
    for block in (m.pixel_metrics(np.random.default_rng(0).normal(size=(2, 8, 8)), masks, 0.0, n_bootstrap=200),
                  PixelMetrics(0.0).update(np.random.default_rng(0).normal(size=(2, 8, 8)), masks).compute(200)):
        assert block["auroc"] is not None and "auroc" not in block["ci"] and np.isfinite(list(block["ci"].values())).all()
