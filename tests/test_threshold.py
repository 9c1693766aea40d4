"Thresholds and p-values: against counting and independent formulas, properties, and broken input."

import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from zipper_ad import threshold as t
from zipper_ad.core import InputError
from zipper_ad.metrics import evaluate_scores
from zipper_ad.threshold import Threshold, conformal_threshold, p_values, smallest_fpr


def test_a_station_needs_no_training_library():
    code = ("import sys, zipper_ad.threshold, zipper_ad.drift, zipper_ad.watch; "
            "print({'torch', 'sklearn', 'fastai', 'matplotlib'} & {*sys.modules})")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    "n, fpr, rank",
    [(99, 0.01, 99), (19, 0.05, 19), (39, 0.05, 38), (199, 0.01, 198), (9, 0.1, 9), (999, 0.003, 997), (9, 0.3, 7)],
)
def test_exact_ranks(n, fpr, rank):
    "(n + 1)(1 − α) is whole in all of these, and must not be rounded up by a floating-point error."
    threshold = conformal_threshold(np.random.default_rng(0).permutation(np.arange(1.0, n + 1)), fpr)
    assert threshold.value == rank and threshold.message == ""
    assert threshold.promised_fpr == pytest.approx(fpr)


@pytest.mark.parametrize("n", [1, 2, 7, 20, 63, 150])
@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.05, 0.2, 0.5, 0.99])
def test_promise_is_the_smallest_rank_that_keeps_it(n, fpr):
    threshold = conformal_threshold(np.arange(1, n + 1), fpr)
    assert threshold.promised_fpr == pytest.approx((n + 1 - threshold.value) / (n + 1))
    if fpr < smallest_fpr(n):
        assert threshold.value == n and threshold.message
    else:
        assert threshold.promised_fpr <= fpr + 1e-9
        assert threshold.value == 1 or (n + 2 - threshold.value) / (n + 1) > fpr


def test_too_few_normals_warn(caplog):
    with caplog.at_level(logging.WARNING):
        threshold = conformal_threshold(np.arange(5.0), 0.05)
    assert threshold.message in caplog.text and "Hold out 19" in threshold.message


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 1.5, float("nan")])
def test_bad_rates(fpr):
    with pytest.raises(InputError, match="between 0 and 1"):
        conformal_threshold(np.arange(50.0), fpr)


def test_threshold_and_p_values_agree_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(50):
        calibration, new = rng.integers(0, 12, 30).astype(float), rng.integers(0, 15, 60).astype(float)
        threshold = conformal_threshold(calibration, 0.1)
        p = p_values(new, calibration)
        assert ((new > threshold.value) <= (p <= threshold.promised_fpr + 1e-12)).all()
        assert 1 / 31 <= p.min() and p.max() <= 1


def test_p_values_reject_nan():
    with pytest.raises(InputError, match="not finite"):
        p_values([np.nan], [1.0, 2.0])


def test_user_threshold_is_the_conformal_one_at_its_value():
    rng = np.random.default_rng(0)
    for n in range(1, 60):
        scores = rng.normal(size=n)
        conformal = conformal_threshold(scores, 0.1)
        assert t.user_threshold(conformal.value, scores).promised_fpr == pytest.approx(conformal.promised_fpr, abs=1e-12)


def test_cost_threshold_is_the_cheapest_of_all():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        normal, damaged = np.round(rng.normal(size=rng.integers(1, 30)), 1), np.round(rng.normal(1.5, 1, rng.integers(1, 30)), 1)
        miss, alarm, share = rng.uniform(0.1, 50), rng.uniform(0.1, 5), rng.uniform(0.001, 0.9)
        cost = lambda t: (1 - share) * alarm * np.mean(normal > t) + share * miss * np.mean(damaged <= t)  # noqa: E731, B023
        chosen = t.cost_threshold(normal, damaged, miss, alarm, share)
        tried = np.unique([*normal, *damaged, *(normal + 0.05), -99, 99])
        assert t.expected_cost(tried, normal, damaged, miss, alarm, share) == pytest.approx([cost(t) for t in tried], abs=1e-12)
        assert cost(chosen.value) == pytest.approx(min(cost(t) for t in tried), abs=1e-12)
        assert isinstance(chosen, Threshold) and np.isfinite(chosen.value) and 0 < chosen.promised_fpr <= 1


@pytest.mark.parametrize("setting", [(0, 1, 0.1), (1, 0, 0.1), (1, 1, 0), (1, 1, 1), (np.inf, 1, 0.1), (np.nan, 1, 0.1)])
def test_impossible_costs_are_errors(setting):
    with pytest.raises(InputError, match="must be above 0"):
        t.cost_threshold([1.0], [2.0], *setting)


@pytest.mark.parametrize("p_values", [[], [0.5, 1.5], [-1.0], [np.nan]])
def test_plot_of_what_are_no_p_values(p_values):
    with pytest.raises(InputError):
        t.plot_p_values(p_values)


@pytest.mark.parametrize("n, rate, confidence", [(24, 0.2, 0.9), (59, 0.05, 0.95), (60, 0.1, 0.95), (200, 0.05, 0.99), (300, 0.01, 0.9)])
def test_guaranteed_threshold_is_the_lowest_score_that_keeps_the_rate(n, rate, confidence):
    scores = np.random.default_rng(n).permutation(n) * 1.0
    found = t.guaranteed_threshold(scores, rate, confidence)
    above = int(n - 1 - found.value)
    kept = [stats.binom.cdf(k, n, rate) for k in (above, above + 1)]  # P(no more than k of n lie above the true quantile)
    assert 1 - kept[0] >= confidence - 1e-12 > 1 - kept[1]
    assert found.promised_fpr == (above + 1) / (n + 1) and found.n_calibration == n and not found.message


def test_too_few_normals_guarantee_what_they_can(caplog):
    found = t.guaranteed_threshold(np.arange(24.0), 0.05)
    assert found.value == 23 and found.promised_fpr == 1 / 25 and "guarantee a false-alarm rate of 11.7%" in found.message
    assert "Hold out 59 or more" in found.message and found.message in caplog.text
    caplog.clear()
    assert t.guaranteed_threshold(np.arange(24.0), 0.05, quiet=True) == found and not caplog.text
    assert t.smallest_guaranteed_fpr(24) == pytest.approx(1 - 0.05 ** (1 / 24))


@pytest.mark.parametrize("setting", [{"target_fpr": 0}, {"target_fpr": 1}, {"confidence": 0}, {"confidence": 1}, {"scores": []},
                                     {"scores": [np.nan]}])
def test_impossible_guarantees_are_errors(setting):
    with pytest.raises(InputError):
        t.guaranteed_threshold(**({"scores": [1.0, 2.0]} | setting))


@pytest.mark.parametrize("n, target", [(24, 0.05), (60, 0.1), (99, 0.01), (3, 0.9)])
def test_promise_of_a_threshold(n, target):
    "The rate of the threshold's rank among uniform scores, by its distribution; and p-values of what was observed, by counting ranks."
    threshold = conformal_threshold(np.arange(n) * 1.0, target, quiet=True)
    above = int(n - 1 - threshold.value)  # held-out scores above it
    bound = t.fpr_upper_bound(threshold.promised_fpr, n)
    assert stats.binom.cdf(above, n, bound) == pytest.approx(0.05, abs=1e-9)  # so few above, were the rate larger: one in twenty
    assert t.fpr_upper_bound(threshold.promised_fpr, n, 0.5) < bound
    report = evaluate_scores([*np.full(7, n + 1.0), *np.full(13, -1.0)], np.zeros(20), ["good"] * 20, threshold)["threshold"]
    assert report["fpr_upper_bound"] == bound and report["confidence"] == 0.95
    assert f"at most {bound:.1%} with 95% confidence" in report["notes"][0]
    orders = math.comb(n + 20, 20)  # of held-out and new scores, all alike
    at_least = sum(math.comb(above + k, k) * math.comb(n - 1 - above + 20 - k, 20 - k) for k in range(7, 21))
    assert report["p_value"] == pytest.approx(at_least / orders)
