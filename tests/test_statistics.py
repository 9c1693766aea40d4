"Statistics: against independent implementations, properties, and broken input."

import itertools
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from zipper_ad import statistics as s
from zipper_ad.core import InputError
from zipper_ad.metrics import auprc, auroc, auroc_interval, bootstrap_interval
from zipper_ad.pixels import at_size


def problem(seed, n=None):
    "Labels and the scores of two detectors; every other one with many ties."
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1], n or rng.integers(5, 40, 2)))
    shared = rng.normal(size=len(labels)) + labels
    a, b = (shared + rng.normal(0, 0.7, len(labels)) + k * labels for k in rng.uniform(0, 1, 2))
    return labels, *((np.round(v, seed % 2) if seed % 4 > 1 else v) for v in (a, b))


def share_ordered(high, low):
    "The share of pairs in the right order, ties half, by counting."
    return float(np.mean([[(x > y) + (x == y) / 2 for y in low] for x in high]))


def delong_by_pairs(labels, a, b):
    "Difference and p-value with DeLong's covariance matrices from all m × n comparisons."
    kernels = [np.array([[(x > y) + (x == y) / 2 for y in v[labels == 0]] for x in v[labels == 1]]) for v in (a, b)]
    faulty, good = np.cov([k.mean(1) for k in kernels]), np.cov([k.mean(0) for k in kernels])
    covariance = faulty / len(kernels[0]) + good / kernels[0].shape[1]
    difference = kernels[0].mean() - kernels[1].mean()
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return difference, 2 * stats.norm.sf(abs(difference) / variance**0.5), variance


def test_delong_agrees_with_counting_pairs():
    largest = 0
    for seed in range(20):
        labels, a, b = problem(seed)
        ours, (difference, p_value, variance) = s.delong_test(labels, a, b), delong_by_pairs(labels, a, b)
        half = stats.norm.ppf(0.975) * variance**0.5
        expected = [difference, max(difference - half, -1), min(difference + half, 1), p_value,
                    roc_auc_score(labels, a), roc_auc_score(labels, b)]
        found = [ours["difference"], *ours["ci"], ours["p_value"], ours["auroc_a"], ours["auroc_b"]]
        largest = max(largest, np.abs(np.subtract(found, expected)).max())
    print(f"largest difference {largest:.1e}")
    assert largest < 1e-10


def test_delong_is_antisymmetric_and_ignores_scale():
    labels, a, b = problem(0)
    forth, back = s.delong_test(labels, a, b), s.delong_test(labels, b, a)
    assert forth["difference"] == pytest.approx(-back["difference"], abs=1e-12) and forth["p_value"] == back["p_value"]
    assert forth["ci"] == pytest.approx([-v for v in back["ci"][::-1]], abs=1e-12)
    assert s.delong_test(labels, np.exp(a), 5 * b - 3) == forth
    narrow, wide = (s.delong_test(labels, a, b, level)["ci"] for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def weak_orders(n):
    "All ways to rank n items with ties, as tuples of ranks."
    return {tuple(np.unique(ranks, return_inverse=True)[1]) for ranks in itertools.product(range(n), repeat=n)}


@pytest.mark.parametrize("n_good, n_faulty", [(2, 2), (2, 3), (3, 2)])
def test_no_variance_and_no_difference_means_all_pairs_alike(n_good, n_faulty):
    "What the interval without variance rests on: placements of all images determine the order of every pair."
    orders = {}
    for ranks in weak_orders(n_good + n_faulty):
        good, faulty = np.array(ranks[:n_good]), np.array(ranks[n_good:])
        pairs = np.sign(faulty[:, None] - good)
        orders.setdefault((*pairs.sum(0), *pairs.sum(1)), set()).add(pairs.tobytes())
    assert len(orders) > 10 and all(len(same) == 1 for same in orders.values())


def test_delong_without_variance():
    labels = np.repeat([0, 1], [12, 24])
    separated = s.delong_test(labels, labels + np.linspace(0, 0.5, 36), labels)
    assert separated["difference"] == 0 and separated["p_value"] == 1
    assert separated["ci"] == pytest.approx([0.05 ** (1 / 12) - 1, 1 - 0.05 ** (1 / 12)])
    chance = s.delong_test(labels, labels, np.zeros(36))
    assert chance["difference"] == 0.5 and 0 < chance["p_value"] < 1 and chance["ci"][0] < 0.5 < chance["ci"][1] <= 1


def test_comparisons_of_one_class_are_none():
    for labels in ([0, 0, 0], [1, 1, 1], [0, 0, 1], []):
        scores = np.arange(len(labels)) * 1.0
        assert set(s.delong_test(labels, scores, scores).values()) == {None}
        assert s.bca_interval(auroc, labels, scores) is None
    assert set(s.paired_bootstrap(auroc, [1, 1], [0.0, 1.0], [1.0, 0.0]).values()) == {None}
    row, = s.compare_detectors([1, 1], {"a": [0.0, 1.0], "b": [1.0, 0.0]})
    assert row["p_value"] is row["p_holm"] is None and s.alike_groups([row]) == [["a", "b"]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, "short"])
@pytest.mark.parametrize("which", [0, 1])
def test_broken_scores_are_errors(bad, which):
    labels, *both = problem(1)
    both[which] = both[which][1:] if bad == "short" else np.where(labels == 1, bad, both[which])
    match = "same length" if bad == "short" else "not finite"
    for compare in (s.delong_test, lambda *args: s.paired_bootstrap(auroc, *args, n=9)):
        with pytest.raises(InputError, match=match):
            compare(labels, *both)
    with pytest.raises(InputError, match=f"detector '{'ab'[which]}'.*{match}"):
        s.compare_detectors(labels, dict(zip("ab", both, strict=True)))
    with pytest.raises(InputError, match=match):
        s.bca_interval(auroc, labels, both[which], n=9)


@pytest.mark.parametrize("seed", range(3))
def test_bca_agrees_with_scipy(seed):
    "One sample and two; SciPy's resampled figures, leave-one-out figures by hand."
    rng = np.random.default_rng(seed)
    two = rng.normal(1, 1, 18), rng.normal(size=11)
    for statistic, samples in ((np.mean, (rng.exponential(size=25),)), (np.median, (rng.exponential(size=24) ** 2,)), (share_ordered, two)):
        theirs = stats.bootstrap(samples, statistic, method="BCa", n_resamples=199, vectorized=False, rng=np.random.default_rng(seed))
        left_out = [np.array([statistic(*samples[:j], np.delete(x, i), *samples[j + 1 :]) for i in range(len(x))])
                    for j, x in enumerate(samples)]
        ours = s._bca(theirs.bootstrap_distribution, statistic(*samples), left_out, 0.95)
        assert ours == pytest.approx(list(theirs.confidence_interval), abs=1e-10)


def test_bca_leaves_out_one_image_at_a_time():
    labels, a, _ = problem(3, n=(9, 14))
    drawn = s._resample_counts(labels == 1, 99, 7).astype(int)
    values = np.array([roc_auc_score(np.repeat(labels, c), np.repeat(a, c)) for c in drawn])
    left_out = np.array([roc_auc_score(np.delete(labels, i), np.delete(a, i)) for i in range(len(labels))])
    expected = s._bca(values, roc_auc_score(labels, a), [left_out[labels == 1], left_out[labels == 0]], 0.9)
    assert s.bca_interval(auroc, labels, a, 99, 7, 0.9) == pytest.approx(expected, abs=1e-10)


def test_bca_in_blocks():
    rng = np.random.default_rng(0)
    labels = np.arange(1100) % 2
    scores = rng.normal(size=1100) + labels
    low, high = s.bca_interval(auroc, labels, scores, n=200)
    assert [low, high] == pytest.approx(bootstrap_interval(auroc, labels, scores, n=200), abs=0.01) and low < auroc(labels, scores) < high


def test_paired_bootstrap_agrees_with_a_loop():
    for seed in range(4):
        labels, a, b = problem(seed)
        counts = s._resample_counts(labels == 1, 20, seed).astype(int)
        for ours, theirs in ((auroc, roc_auc_score), (auprc, average_precision_score)):
            d = np.array([theirs(np.repeat(labels, c), np.repeat(a, c)) - theirs(np.repeat(labels, c), np.repeat(b, c)) for c in counts])
            found = s.paired_bootstrap(ours, labels, a, b, n=20, seed=seed)
            assert found["ci"] == pytest.approx(list(np.quantile(d, [0.025, 0.975])), abs=1e-10)
            tail = min((d <= 1e-12).sum(), (d >= -1e-12).sum())
            assert found["p_value"] == pytest.approx(min(1, 2 * (tail + 1) / 21))
            assert json.loads(json.dumps(found)) == found


def test_paired_difference_needs_matching_values():
    for a, b in (([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])):
        with pytest.raises(InputError, match="same length"):
            s.paired_difference(1, 1, a, b)


def test_paired_pixels_agree_with_pixel_metrics():
    rng = np.random.default_rng(0)
    masks = np.zeros((8, 16, 16), bool)
    masks[:5, 3:9, 4:8] = True
    maps = [rng.normal(size=masks.shape) * noise + masks for noise in (0.3, 0.6)]
    found = s.paired_pixel_bootstrap(*maps, masks, n=50, seed=3)
    one = s.pixel_metrics(maps[0], masks, n_bootstrap=50, seed=3)
    constant = s.paired_pixel_bootstrap(maps[0], np.zeros_like(maps[0]), masks, n=50, seed=3)
    assert set(found) == {"auroc", "auprc", "aupro", "aupro_05"}
    assert [v - 0.5 for v in one["ci"]["auroc"]] == pytest.approx(constant["auroc"]["ci"], abs=1e-9)
    with_unknown = s.paired_pixel_bootstrap(*(np.concatenate([m, m[:1]]) for m in maps), [*masks, None], n=50, seed=3)
    assert with_unknown == found
    with pytest.raises(InputError, match="one mask"):
        s.paired_pixel_bootstrap(*maps, masks[1:])


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [np.nan], [[0.1]]])
def test_holm_refuses_what_is_no_p_value(bad):
    with pytest.raises(InputError):
        s.holm(bad)


def test_holm_against_the_closed_test():
    "Holm is the closure of Bonferroni: a hypothesis falls when every set that holds it falls, at (smallest p) · (size of the set)."
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(5) ** 2
        sets = [c for k in range(1, 6) for c in itertools.combinations(range(5), k)]
        closed = [max(min(1, len(c) * p[list(c)].min()) for c in sets if i in c) for i in range(5)]
        assert s.holm(p) == pytest.approx(closed, abs=1e-12)


def test_groups_are_the_maximal_cliques():
    rng = np.random.default_rng(0)
    for _ in range(50):
        names = list("abcdef")
        rows = [{"a": x, "b": y, "p_holm": float(rng.random() > 0.4)} for x, y in itertools.combinations(names, 2)]
        differ = {frozenset((r["a"], r["b"])) for r in rows if r["p_holm"] <= 0.05}
        cliques = [set(c) for k in range(1, 7) for c in itertools.combinations(names, k)
                   if not any(frozenset(pair) in differ for pair in itertools.combinations(c, 2))]
        largest = [c for c in cliques if not any(c < other for other in cliques)]
        assert sorted(map(sorted, s.alike_groups(rows))) == sorted(map(sorted, largest))


def test_across_seeds_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for n in range(2, 8):
        values = rng.normal(size=n)
        expected = stats.t.interval(0.9, n - 1, values.mean(), stats.sem(values))
        assert s.across_seeds(values, 0.9)["ci"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match="no values"):
        s.across_seeds([])


# ---------------------------------------------------------------- a rate that is kept with confidence


# ---------------------------------------------------------------- ranks over data sets
def test_ranks_ignore_scale_and_order():
    rng = np.random.default_rng(0)
    figures = {name: rng.random(8) + shift for name, shift in (("a", 0.3), ("b", 0.1), ("c", 0))}
    found = s.rank_detectors(figures)
    assert sum(found["ranks"].values()) == pytest.approx(6) and found["n"] == 8
    assert found["statistic"] == pytest.approx(stats.friedmanchisquare(*figures.values()).statistic)
    squeezed = s.rank_detectors({name: np.exp(figures[name]) for name in ("c", "a", "b")})
    assert squeezed["ranks"] == pytest.approx(found["ranks"]) and squeezed["p_value"] == pytest.approx(found["p_value"])
    close = [pair for pair, p in found["p_values"].items() if p > 0.05]
    assert close == [(a, b) for a, b in found["p_values"] if abs(found["ranks"][a] - found["ranks"][b]) < found["critical_difference"]]


@pytest.mark.parametrize("figures", [{}, {"a": [1.0, 2], "b": [1.0, 2]}, {"a": [1.0], "b": [1.0], "c": [2.0]},
                                     {"a": [1.0, 2], "b": [1.0, 2], "c": [1.0]}, {"a": [1.0, 2], "b": [1.0, 2], "c": [1.0, np.nan]}])
def test_too_little_to_rank(figures):
    with pytest.raises(InputError):
        s.rank_detectors(figures)


def test_paired_pixels_are_measured_at_the_size_of_the_masks():
    rng = np.random.default_rng(1)
    masks = np.zeros((6, 24, 36), bool)
    masks[:3, 5:14, 8:20] = True
    small, large = (rng.random((6, *size)) for size in ((8, 12), (24, 36)))
    enlarged = np.stack([at_size(m, (24, 36)) for m in small])
    assert s.paired_pixel_bootstrap(small, large, masks, n=30) == s.paired_pixel_bootstrap(enlarged, large, masks, n=30)


def trainings(seed, r=3, n=None):
    "Labels and, for two detectors, the scores of r trainings; every other one with many ties."
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1], n or rng.integers(8, 40, 2)))
    image = rng.normal(size=len(labels)) + labels
    noise = lambda *shape: rng.normal(0, 0.5, (*shape, len(labels)))  # noqa: E731
    both = [image + noise() + noise(r) + rng.uniform(0, 1, (r, 1)) * labels for _ in "ab"]
    return labels, *((np.round(v, 1) if seed % 2 else v) for v in both)


def covariances_by_counting(labels, scores):
    "AUROCs and DeLong's covariance matrix from all m × n comparisons."
    kernels = np.array([[[(x > y) + (x == y) / 2 for y in v[labels == 0]] for x in v[labels == 1]] for v in scores])
    return kernels.mean((1, 2)), np.cov(kernels.mean(2)) / kernels.shape[1] + np.cov(kernels.mean(1)) / kernels.shape[2]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("paired", [False, True])
def test_mrmc_is_the_anova_of_obuchowski_and_rockette(seed, paired):
    "By their mean squares, F and Hillis' degrees of freedom: readers crossed with tests, or nested in them."
    labels, a, b = trainings(seed)
    r = len(a)
    areas, c = covariances_by_counting(labels, [*a, *b])
    table, off = areas.reshape(2, r), 1 - np.eye(r)
    cov2 = ((c[:r, :r] + c[r:, r:]) * off).sum() / (2 * r * (r - 1))
    cov3 = (c[:r, r:] * off).sum() / (r * (r - 1)) if paired else c[:r, r:].mean()
    ms_t = r * table.mean(1).var(ddof=1)
    if paired:
        ms = ((table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()) ** 2).sum() / (r - 1)
        df = (ms + r * max(cov2 - cov3, 0)) ** 2 / (ms**2 / (r - 1))
    else:
        within = table.var(1, ddof=1)
        ms, df = within.mean(), (within.mean() + r * max(cov2 - cov3, 0)) ** 2 / ((within**2).sum() / 4 / (r - 1))
    f = ms_t / (ms + r * max(cov2 - cov3, 0))
    weights = np.repeat([1, -1], r) / r
    these = table[0].mean() - table[1].mean(), (weights @ c @ weights) ** 0.5  # fixed readers
    p_values = stats.f.sf(f, 1, df), 2 * stats.norm.sf(abs(these[0]) / these[1])
    found = s.mrmc_test(labels, a, b, paired)
    assert found["p_value"] == pytest.approx(max(p_values), abs=1e-9)
    assert found["df"] == (pytest.approx(df, rel=1e-9) if found["df"] else None)
    assert found["difference"] == pytest.approx(these[0], abs=1e-12)
    half = max(stats.t.ppf(0.975, df) * abs(these[0]) / f**0.5, stats.norm.ppf(0.975) * these[1])
    assert np.allclose(found["ci"], [these[0] - half, these[0] + half], atol=1e-9)
    assert (found["p_value"] < 0.05) == (found["ci"][0] * found["ci"][1] > 0)


@pytest.mark.parametrize("seed", range(6))
def test_mrmc_does_not_ask_for_the_order_of_trainings_or_the_scale_of_scores(seed):
    labels, a, b = trainings(seed, r=4)
    found = s.mrmc_test(labels, a, b)
    other = s.mrmc_test(labels, 3 * a[::-1] - 7, np.exp(b[[2, 0, 3, 1]]))
    assert all(np.allclose(found[k], other[k], atol=1e-12) for k in ("difference", "ci", "p_value", "df"))
    swapped = s.mrmc_test(labels, b, a)
    assert np.allclose(swapped["ci"], [-v for v in found["ci"][::-1]], atol=1e-12)
    assert s.mrmc_interval(labels, a)["auroc"] == pytest.approx(np.mean([auroc(labels, v) for v in a]), abs=1e-12)


def test_mrmc_is_never_surer_than_the_images_and_the_trainings_alone():
    labels, a, _ = trainings(0, r=5, n=(60, 90))
    width = lambda ci: ci[1] - ci[0]  # noqa: E731
    both = s.mrmc_interval(labels, a)["ci"]
    assert width(both) > width(s.across_seeds([auroc(labels, v) for v in a])["ci"])
    assert 0 < both[0] < both[1] < 1
    alike = np.stack([a[0], a[0] + 1e-9 * a[1]])  # trainings that do not scatter
    assert np.allclose(s.mrmc_interval(labels, alike)["ci"], auroc_interval(labels, a[0]), atol=1e-9)


def test_mrmc_with_a_class_missing_or_too_few_trainings():
    labels, a, b = trainings(0)
    assert s.mrmc_interval([0] * 4, [[1.0, 2, 3, 4]] * 2) == {"auroc": None, "ci": None, "df": None, "n": 2}
    assert set(s.mrmc_test([0] * 4, [[1.0, 2, 3, 4]] * 2, [[1.0, 2, 3, 4]] * 2).values()) == {None}
    with pytest.raises(InputError, match="1 training: what a training brings"):
        s.mrmc_test(labels, a[:1], b)
    with pytest.raises(InputError, match="not finite"):
        s.mrmc_interval(labels, [a[0], a[1] * np.nan])
    with pytest.raises(InputError, match="detector 'b': .*same length"):
        s.compare_trainings(labels, {"a": a, "b": b[:, 1:]})
    rows = s.compare_trainings(labels, {"a": a, "b": b, "c": a + b})
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [r["p_holm"] for r in rows] == list(s.holm([r["p_value"] for r in rows]))
