"Pixel metrics: against torchmetrics and brute force, streamed against exact, and what can't be measured."

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from zipper_ad import pixels as p
from zipper_ad.core import InputError, import_torchvision
from zipper_ad.metrics import aupro, dice, iou, pixel_metrics

EIGHT = np.ones((3, 3))
BOUNDS = (0.01, 0.15)  # of AUPIMO: a few dozen pixels can't show the usual ones
KINDS = ["any", "one region", "touching corners", "no fault", "all faulty", "many small"]


def problem(seed):
    "Maps float32 and masks (N,H,W); six kinds of masks, and maps without ties, with many, with some, constant."
    rng, kind = np.random.default_rng(100 + seed), KINDS[seed % len(KINDS)]
    n, h, w = int(rng.integers(2, 7)), *rng.integers(5, 13, 2)
    masks = rng.random((n, h, w)) < {"any": 0.3, "many small": 0.06}.get(kind, 0)
    masks[0] = False
    if kind in ("one region", "touching corners"):
        masks[1, 1:3, 1:3] = True
        masks[1, 3:5, 3:5] = kind == "touching corners"
    if kind == "all faulty":
        masks[:] = True
    if kind == "many small":
        masks[1, 0, 0] = True
    maps = rng.normal(size=masks.shape) * rng.choice([1e-3, 1, 1e4]) + masks * rng.choice([-1, 0, 1, 2])
    return [maps, np.round(maps), np.round(maps * 3) / 3, maps * 0 + 0.5][seed % 4].astype(np.float32), masks


def brute_pro(maps, masks, limit):
    "AU-PRO from the points of the curve at every threshold, joined by straight lines, on a fine grid that holds all corners."
    overlaps = []
    cuts = np.unique(maps)[::-1]
    for m, mask in zip(maps, masks, strict=True):
        regions, n = ndimage.label(mask, EIGHT)
        overlaps += [[(m[regions == k] >= t).mean() for t in cuts] for k in range(1, n + 1)]
    fpr = np.append(0, [(maps[~masks] >= t).mean() for t in cuts])
    pro = np.append(0, np.mean(overlaps, axis=0))
    keep = fpr < limit
    # where several thresholds share a rate, the curve jumps up there: the last of them is where it goes on
    last = np.flatnonzero(keep)[-1]
    x, y = fpr[keep], pro[keep]
    if last + 1 < len(fpr):
        x, y = np.append(x, limit), np.append(y, y[-1] + (pro[last + 1] - y[-1]) * (limit - x[-1]) / (fpr[last + 1] - x[-1]))
    return np.trapezoid(y, x) / limit


def brute_pimo(maps, masks, low, high):
    "AUPIMO of each faulty image: at each of the rates between which nothing changes, the best recall any threshold has."
    good = [m for m, mask in zip(maps, masks, strict=True) if not mask.any()]
    cuts = np.append(np.unique(np.concatenate([m.ravel() for m in maps])), np.inf)
    rate = np.array([np.mean([(m >= t).mean() for m in good]) for t in cuts])
    corners = np.unique(np.append(rate[(rate > low) & (rate < high)], [low, high]))
    values = []
    for m, mask in zip(maps, masks, strict=True):
        if mask.any():
            recall = np.array([(m[mask] >= t).mean() for t in cuts])
            best = np.array([recall[rate <= z + 1e-12].max() for z in corners[:-1]])
            values.append((np.diff(np.log(corners)) * best).sum() / np.log(high / low))
    return np.array(values)


def brute_region_iou(marked, mask):
    "The IoU of each region as sets of pixels."
    true, n = ndimage.label(mask, EIGHT)
    found, m = ndimage.label(marked, EIGHT)
    sets = lambda labels, n: [set(zip(*np.nonzero(labels == k), strict=True)) for k in range(1, n + 1)]  # noqa: E731
    true, found, result = sets(true, n), sets(found, m), []
    for region in true:
        touching = set().union(*(f for f in found if f & region))
        others = set().union(*(t for t in true if t is not region))
        result.append(len(region & touching) / len((region | touching) - (others - region)))
    return result


def rounded(maps, bits):
    "Scores rounded down to their bins."
    return p._lowest_in(p._bin_of(maps, bits), bits)


@pytest.fixture(scope="module")
def torchmetrics():
    import_torchvision()  # torchmetrics imports it
    from torchmetrics.functional import classification

    return classification


@pytest.mark.parametrize("seed", range(20))
def test_against_torchmetrics(torchmetrics, seed):
    maps, masks = problem(seed)
    exact, cut = pixel_metrics(maps, masks, float(np.median(maps)), n_bootstrap=0), float(np.median(maps))
    streamed = p.PixelMetrics(cut).update(maps, masks).compute(0)
    if not 0 < masks.sum() < masks.size:
        assert {block[k] for block in (exact, streamed) for k in ("auroc", "auprc", "iou", "dice")} == {None}
        return
    unit = lambda v: torch.from_numpy((v.astype(float) - v.min()) / max(float(np.ptp(v)), 1e-9)).ravel()  # noqa: E731
    labels, marked = torch.from_numpy(masks.ravel()).long(), torch.from_numpy((maps > cut).ravel()).long()
    for name, fn in (("auroc", torchmetrics.binary_auroc), ("auprc", torchmetrics.binary_average_precision)):
        assert exact[name] == pytest.approx(fn(unit(maps), labels).item(), abs=1e-6)
        assert streamed[name] == pytest.approx(fn(unit(rounded(maps, 20)), labels).item(), abs=1e-6)
    for name, fn, own in (("iou", torchmetrics.binary_jaccard_index, iou), ("dice", torchmetrics.binary_f1_score, dice)):
        expected = pytest.approx(fn(marked, labels).item(), abs=1e-6)
        assert exact[name] == expected and streamed[name] == expected and own(maps, masks, cut) == expected


@pytest.mark.parametrize("seed", range(20))
def test_against_brute_force(seed):
    maps, masks = problem(seed)
    streamed = p.PixelMetrics(0.3, bits=16, bounds=BOUNDS).update(maps, masks).compute(0)
    pimo, regions = p.aupimo(maps, masks, BOUNDS, n_bootstrap=0), p.iou_per_region(maps, masks, 0.3, n_bootstrap=0)
    assert np.allclose(regions.values, sum((brute_region_iou(m > 0.3, k) for m, k in zip(maps, masks, strict=True)), []), atol=1e-9)
    if not 0 < masks.sum() < masks.size:
        assert aupro(maps, masks) is pimo is streamed["aupro"] is streamed["aupimo"] is None
        return
    for limit, name in ((0.3, "aupro"), (0.05, "aupro_05")):
        assert aupro(maps, masks, limit) == pytest.approx(brute_pro(maps, masks, limit), abs=1e-6)
        assert streamed[name] == pytest.approx(brute_pro(rounded(maps, 16), masks, limit), abs=1e-6)
    assert pimo.values == pytest.approx(brute_pimo(maps, masks, *BOUNDS), abs=1e-6)
    assert streamed["aupimo"] == pytest.approx(brute_pimo(rounded(maps, 16), masks, *BOUNDS).mean(), abs=1e-6)
    assert streamed["iou_per_region"] == pytest.approx(regions.mean)


@pytest.mark.parametrize("seed", range(60))
def test_truth_lies_within_the_bound(seed):
    rng = np.random.default_rng(seed)
    maps, masks = problem(seed)
    # few bins for many values: scores close together, so that whole bins are mixed
    maps = (maps * 10.0 ** rng.integers(-3, 2) + rng.choice([0, 1, 100])).astype(np.float32)
    if not 0 < masks.sum() < masks.size:
        return
    exact = {**pixel_metrics(maps, masks, n_bootstrap=0), "aupimo": p.aupimo(maps, masks, BOUNDS, 0).mean}
    for bits, centre in ((16, 0), (18, 0), (16, 100)):
        block = p.PixelMetrics(bits=bits, bounds=BOUNDS, centre=centre).update(maps, masks).compute(0)
        assert set(block["bound"]) == {"auroc", "auprc", "aupro", "aupro_05", "aupimo"}
        for name, bound in block["bound"].items():
            assert 0 <= bound <= 1 and abs(block[name] - exact[name]) <= bound + 1e-12, name


def test_bound_is_reached_in_the_worst_case():
    masks = np.array([[[False, True]], [[False, False]]])
    low, high = np.float32(1), np.nextafter(np.float32(1), np.float32(2))  # one bin
    for maps, value in (([[[low, high]], [[low, low]]], 1), ([[[high, low]], [[high, high]]], 0)):
        block = p.PixelMetrics().update(np.array(maps), masks).compute(0)
        assert (block["auroc"], block["bound"]["auroc"]) == (0.5, 0.5) and abs(value - block["auroc"]) == block["bound"]["auroc"]


def test_bins_of_equal_scores_cost_nothing():
    masks = np.random.default_rng(0).random((6, 30, 30)) < 0.1
    masks[:2] = False
    maps = np.where(masks, np.random.default_rng(1).integers(0, 9, masks.shape), np.random.default_rng(2).integers(0, 5, masks.shape))
    block, exact = p.PixelMetrics().update(maps, masks).compute(0), pixel_metrics(maps, masks, n_bootstrap=0)
    assert set(block["bound"].values()) == {0.0}
    assert [block[k] for k in block["bound"]] == pytest.approx([exact[k] for k in block["bound"]], abs=1e-12)


def big_problem(seed=0, n=24, size=64):
    "Smooth maps, half of the images with two square faults."
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for mask in masks[: n // 2]:
        for row, column, height, width in rng.integers(3, size // 3, (2, 4)):
            mask[2 * row : 2 * row + height, 2 * column : 2 * column + width] = True
    maps = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + masks * rng.uniform(0, 1.5, (n, 1, 1))
    return maps.astype(np.float32), masks


def test_block_has_the_keys_of_pixel_metrics_and_close_intervals():
    maps, masks = big_problem()
    exact, block = pixel_metrics(maps, masks, 0.7), p.PixelMetrics(0.7).update(maps, masks).compute()
    assert set(block) == set(exact) | {"bound", "n"} and set(block["ci"]) == set(exact["ci"])
    assert json.loads(json.dumps(block, allow_nan=False)) == block
    for name, interval in exact["ci"].items():
        assert block["ci"][name] == pytest.approx(interval, abs=0.02), name
        assert block["ci"][name][0] <= block[name] <= block["ci"][name][1], name


def test_order_and_batches_do_not_matter():
    maps, masks = big_problem(1)
    whole = p.PixelMetrics(0.7).update(maps, masks).compute(0)
    pieces, order = p.PixelMetrics(0.7), np.random.default_rng(0).permutation(len(maps))
    pieces.update(torch.from_numpy(maps[order[:5]])[:, None], list(masks[order[:5]]))
    for i in order[5:]:
        pieces.update(maps[i], masks[i])
    for name, value in pieces.compute(0)["bound"].items():
        assert [value, pieces.compute(0)[name]] == pytest.approx([whole["bound"][name], whole[name]], abs=1e-12)


def test_memory_does_not_grow_with_pixels():
    rng = np.random.default_rng(0)
    kept = []
    for size in (64, 256):
        metrics = p.PixelMetrics()
        mask = np.zeros((size, size), bool)
        mask[: size // 8, : size // 8] = True
        for _ in range(4):
            metrics.update(rng.integers(0, 500, (size, size)) / np.float32(500), mask)
        kept.append(sum(v.nbytes for s in metrics.seen for v in s if isinstance(v, np.ndarray)))
    assert kept[1] < 2 * kept[0]  # sixteen times the pixels


def test_images_of_different_sizes_count_by_their_pixels():
    small, large = big_problem(2, n=6, size=32), big_problem(3, n=6, size=48)
    maps, masks = [np.round(m, 1) for m in (*small[0], *large[0])], [*small[1], *large[1]]
    block = p.PixelMetrics(0.7).update(maps, masks).compute(0)
    labels, scores = (np.concatenate([v.ravel() for v in part]) for part in (masks, maps))
    single = pixel_metrics(scores[None, None], labels[None, None], n_bootstrap=0)  # all pixels in one row
    assert abs(block["auroc"] - single["auroc"]) <= block["bound"]["auroc"] + 1e-12
    assert abs(block["auprc"] - single["auprc"]) <= block["bound"]["auprc"] + 1e-12
    exact = p.aupimo(maps, masks, (0.001, 0.1), n_bootstrap=0)
    expected = brute_pimo(maps, masks, 0.001, 0.1)
    assert exact.values == pytest.approx(expected, abs=1e-9) and len(exact.values) == 6


def test_aupimo_is_one_for_perfect_and_zero_for_blind_maps():
    _, masks = big_problem()
    assert p.aupimo(masks * 1.0, masks, n_bootstrap=10).interval == [1, 1]
    for maps in (masks * -1.0, np.zeros(masks.shape)):
        assert p.aupimo(maps, masks, n_bootstrap=10).mean == 0


def test_aupimo_interval_repeats_and_resamples_like_the_real_thing():
    maps, masks = big_problem(4)
    first, again = (p.aupimo(maps, masks, (0.001, 0.1), n_bootstrap=50, seed=3) for _ in range(2))
    assert first.interval == again.interval and first.interval[0] <= first.mean <= first.interval[1]
    kinds = masks.any((1, 2))
    counts = p._resample_counts(kinds, 4, 5)
    good = [p._highest(m, 0.1 * len(maps)) for m in maps[~kinds]]
    faulty = [np.sort(m[k]) for m, k in zip(maps[kinds], masks[kinds], strict=True)]
    means = p._resampled_means(p._tail(good, [64 * 64] * len(good)), faulty, (0.001, 0.1), kinds, 4, 5)
    for mean, drawn in zip(means, counts.astype(int), strict=True):
        taken = np.repeat(np.arange(len(maps)), drawn)
        assert mean == pytest.approx(p.aupimo(maps[taken], masks[taken], (0.001, 0.1), 0).mean, abs=1e-9)


def test_few_pixels_are_noted():
    maps, masks = big_problem()
    assert "49,152 pixels" in p.aupimo(maps, masks, n_bootstrap=0).note
    assert p.aupimo(maps, masks, (1e-3, 1e-2), n_bootstrap=0).note == ""


def test_region_table_adds_up():
    maps, masks = big_problem(5)
    rows = p.region_table(maps, masks, 0.7)
    true, found = ([r for r in rows if r.kind == kind] for kind in ("true", "found"))
    assert len(true) == sum(ndimage.label(m, EIGHT)[1] for m in masks) and sum(r.size for r in true) == masks.sum()
    assert sum(r.size for r in found) == (maps > 0.7).sum() and {r.hit for r in found} == {True, False}
    assert sum(r.overlap for r in true) == sum(r.overlap for r in found) == ((maps > 0.7) & masks).sum()
    assert all(r.hit == (r.overlap > 0) == (r.iou > 0) == (r.matched > 0) for r in rows)
    assert np.mean([r.iou for r in true]) == pytest.approx(p.iou_per_region(maps, masks, 0.7, 0).mean)
    large = p.region_table(maps, masks, 0.7, min_size=20)
    assert [r.size for r in large if r.kind == "found"] == [r.size for r in found if r.size >= 20]
    middle = ndimage.center_of_mass(ndimage.label(masks[0], EIGHT)[0] == 1)
    assert (rows[0].row, rows[0].column) == pytest.approx(middle)


def test_maps_are_brought_to_the_size_of_their_masks():
    maps, masks = big_problem(6, size=64)
    large = [np.kron(m, np.ones((3, 2), bool)) for m in masks]
    upsampled = np.stack([p.at_size(m, (192, 128)) for m in maps])
    expected = pixel_metrics(upsampled, large, 0.7, n_bootstrap=0)
    block = p.PixelMetrics(0.7).update(maps, large).compute(0)
    assert block["n"]["faulty_pixels"] == sum(m.sum() for m in large)  # no mask was changed
    for name in ("auroc", "auprc", "aupro", "aupimo", "iou", "dice", "iou_per_region"):
        assert abs(block[name] - expected[name]) <= block["bound"].get(name, 0) + 1e-12
    assert p.aupimo(maps, large, n_bootstrap=0).mean == expected["aupimo"]
    with pytest.raises(InputError, match="at_size"):  # the exact functions say how
        pixel_metrics(maps, large)


def test_masks_of_any_values():
    maps, masks = big_problem(7)
    expected = p.PixelMetrics(0.7).update(maps, masks).compute(10)
    for other in (masks * 255, (masks * 255).astype(np.uint8), masks * 0.5, (masks * 3).astype(np.int64), torch.from_numpy(masks)[:, None]):
        assert p.PixelMetrics(0.7).update(maps, other).compute(10) == expected
    for bad in (-1.0, np.nan):
        broken = masks * 1.0
        broken[2, 0, 0] = bad
        with pytest.raises(InputError, match="image 2: the mask"):
            p.PixelMetrics().update(maps, broken)


def test_missing_and_empty_masks():
    maps, masks = big_problem(8)
    unknown = [None if i in (0, 20) else m for i, m in enumerate(masks)]
    kept = [i for i in range(len(maps)) if i not in (0, 20)]
    block = p.PixelMetrics(0.7).update(maps, unknown).compute(10)
    expected = p.PixelMetrics(0.7).update(maps[kept], masks[kept]).compute(10)
    assert block["n"].pop("left_out") == 2 and expected["n"].pop("left_out") == 0 and block == expected
    assert p.aupimo(maps, unknown, n_bootstrap=0).images.tolist() == [i for i in range(1, 12)]


@pytest.mark.parametrize("masks", [np.zeros((3, 6, 6), bool), np.ones((3, 6, 6), bool), [None] * 3])
def test_one_class_only(masks):
    maps = np.random.default_rng(0).random((3, 6, 6))
    block = p.PixelMetrics(0.5).update(maps, masks).compute()
    assert block["notes"] and block["ci"] == block["bound"] == {} and p.aupimo(maps, masks) is None
    assert all(block[k] is None for k in ("auroc", "auprc", "aupro", "aupro_05", "aupimo", "iou", "dice", "iou_per_region"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_maps_name_the_image_and_lose_nothing(bad):
    maps, masks = big_problem(9)
    metrics = p.PixelMetrics(0.7).update(maps, masks)
    before = metrics.compute(10)
    broken = maps.copy()
    broken[3, 5, 5] = bad
    for measure in (p.aupimo, lambda a, b: p.iou_per_region(a, b, 0.7), lambda a, b: p.region_table(a, b, 0.7)):
        with pytest.raises(InputError, match="image 3: the anomaly map"):
            measure(broken, masks)
    with pytest.raises(InputError, match=f"image {len(maps) + 3}: the anomaly map"):  # counted from the first that was given
        metrics.update(broken, masks)
    assert metrics.compute(10) == before


def test_settings_are_checked():
    maps, masks = big_problem(10)
    with pytest.raises(InputError, match="bits=12"):
        p.PixelMetrics(bits=12)
    for bounds in ((0, 0.1), (0.1, 0.1), (1e-4, 2)):
        with pytest.raises(InputError, match="bounds="):
            p.aupimo(maps, masks, bounds, n_bootstrap=0)
    with pytest.raises(InputError, match="one mask"):
        p.aupimo(maps, masks[:3])
    with pytest.raises(InputError, match="must be"):
        p.PixelMetrics().update([np.zeros((3, 4, 4))], [np.zeros((4, 4))])


def test_aupimo_between_wide_bounds():
    rng = np.random.default_rng(0)
    maps, masks = rng.normal(size=(20, 128, 128)).astype(np.float32), np.zeros((20, 128, 128), bool)
    masks[:4, 20:60, 20:60] = True
    maps[:4][masks[:4]] += 1
    found = p.aupimo(maps, masks, bounds=(0.01, 1.0), n_bootstrap=5)  # more pixels at once than there are resamples to split
    assert found.interval[0] <= found.mean <= found.interval[1]


def test_fewer_levels_for_many_images_change_intervals_little(monkeypatch):
    rng = np.random.default_rng(1)
    maps, masks = rng.normal(size=(30, 64, 64)).astype(np.float32), np.zeros((30, 64, 64), bool)
    masks[:10, 10:30, 10:30] = True
    maps[:10][masks[:10]] += rng.uniform(0, 3, 10).repeat(400).astype(np.float32)
    counted = p.PixelMetrics(1.0).update(maps, masks)
    fine = counted.resampled(50)
    assert counted._level_counts().shape[2] > 2048
    monkeypatch.setattr("zipper_ad.pixels.LEVELS", 1)
    assert counted._level_counts().shape[2] <= 2048
    for name, values in counted.resampled(50).items():
        assert np.abs(values - fine[name]).max() < 0.002, name
