"Interpretation on made-up verdicts: odd mixtures, ties at the threshold, names from outside."

import io

import numpy as np
import pytest

from zipper_ad.core import InputError
from zipper_ad.detector import Verdict
from zipper_ad.interpretation import ORDERS, Interpretation
from zipper_ad.threshold import Threshold

LIMIT = Threshold(1.0, 0.05, 0.05, 19)


def made_up(scores, kinds):
    "An interpretation of verdicts with these scores."
    rng = np.random.default_rng(0)
    verdicts = []
    for s in scores:
        map_ = rng.random((24, 24), np.float32) * s
        verdicts.append(Verdict(s, 0.5, s > LIMIT.value, map_, map_ > 0.5, rng.random((24, 24), np.float32), map_ * 0))
    return Interpretation(verdicts, kinds, LIMIT, [None if k == "good" else v.mask for k, v in zip(kinds, verdicts, strict=True)], (0, 1))


def test_against_a_loop():
    rng = np.random.default_rng(1)
    kinds = rng.choice(["good", "bent", "torn"], 60).tolist()
    scores = rng.normal(1, 0.6, 60).round(1).tolist()  # some lie on the threshold
    interp, counts = made_up(scores, kinds), {}
    for kind, score in zip(kinds, scores, strict=True):
        row = counts.setdefault(kind, [0, 0])
        row[int(score > 1)] += 1
    assert dict(zip(interp.vocab(), interp.confusion_matrix().tolist(), strict=True)) == counts and interp.vocab()[0] == "good"
    wrong = [k for k, s in zip(kinds, scores, strict=True) if (s > 1) == (k == "good")]
    assert sorted((k, n) for k, _, n in interp.most_confused()) == sorted((k, wrong.count(k)) for k in set(wrong))
    losses, order = interp.top_losses()
    expected = [s - 1 if k == "good" else 1 - s for k, s in zip(kinds, scores, strict=True)]
    assert sorted(order.tolist()) == list(range(60)) and np.allclose(losses, sorted(expected, reverse=True))
    assert np.allclose([expected[i] for i in order], losses)
    for by in ORDERS:
        for kind in interp.vocab():
            assert set(interp.kinds[interp.top_losses(5, by, kind)[1]]) == {kind}


@pytest.mark.parametrize("kinds", [["good"] * 4, ["bent"] * 4, ["good", "$x_{", "<b>", "good"]])
def test_every_mixture_draws(kinds):
    interp = made_up([0.2, 0.9, 1.4, 3.0], kinds)
    for figure in (interp.plot_top_losses(2), interp.plot_confusion_matrix(), interp.plot_confusion_matrix(True), interp.plot_scores()):
        figure.savefig(io.BytesIO())
    if len(set(kinds)) == 1:
        with pytest.raises(InputError):
            interp.plot_curve("roc")
    else:
        for kind in ("roc", "pr", "pro"):
            interp.plot_curve(kind).savefig(io.BytesIO())
