"Drift: against the definitions, and broken input."

import json

import numpy as np
import pytest

from zipper_ad import drift as d
from zipper_ad.core import InputError


def test_drift_test_of_broken_input():
    for scores, before in (([], [1.0]), ([1.0], []), ([np.nan], [1.0])):
        with pytest.raises(InputError):
            d.drift_test(scores, before)
    result = d.drift_test([5.0] * 20, [5.0] * 30)  # all alike
    assert result["p_value"] == 1 and result["higher"] == 0.5 and json.loads(json.dumps(result)) == result


def test_online_p_values_rank_among_all_before():
    rng = np.random.default_rng(0)
    before, scores = np.round(rng.normal(size=15), 1).tolist(), np.round(rng.normal(size=40), 1)
    p_of, random = d.OnlinePValues(before, seed=4), np.random.default_rng(4)
    for score in scores:
        higher, equal = sum(v > score for v in before), sum(v == score for v in before)
        assert p_of(score) == pytest.approx((higher + (1 - random.random()) * (equal + 1)) / (len(before) + 1), abs=1e-12)
        before.append(score)
    assert p_of.seen == sorted(before)


def test_monitor_is_a_mixture_over_bets_and_starts():
    "The recursion against its definition: for each start k a stake of 1 / (k (k + 1)), spread over 16 bets."
    p = np.random.default_rng(0).random(60) ** 1.5
    monitor, bets = d.DriftMonitor(), d._bets(p)
    for n in range(1, len(p) + 1):
        begun = sum(bets[k - 1 : n].prod(0).mean() / (k * (k + 1)) for k in range(1, n + 1))
        assert monitor.update(p[n - 1]) == pytest.approx(begun + 1 / (n + 1), rel=1e-10)
