"""Probability of detection: what cannot be fitted is said so, what can be agrees with other ways to compute it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special, stats
from scipy.optimize import minimize

from zipper_ad.core import InputError
from zipper_ad.pod import (
    fit_pod,
    fit_signal,
    longest_extent,
    needed_in_a_row,
    plot_pod,
    plot_study,
    pod_seeds,
    pod_study,
    read_rows,
    render_pod_set,
    signal_curves,
    study_curves,
    study_facts,
    write_rows,
    write_study,
)

SIZES = np.geomspace(4, 60, 60)


def outcomes(slope=4.0, seed=0):
    "Found or not, the truth being a logistic curve with a50 = 15."
    return np.random.default_rng(seed).random(60) < special.expit(slope * np.log(SIZES / 15))


def log_likelihood(pod, intercept, slope, firth=False):
    "Written down anew, with the determinant of the information from the matrix."
    x = np.log(pod.sizes)
    eta = intercept + slope * x
    value = (pod.detected * eta - np.logaddexp(0, eta)).sum()
    if firth:
        w, design = special.expit(eta) * special.expit(-eta), np.stack([np.ones_like(x), x], 1)
        value += 0.5 * np.linalg.slogdet((design * w[:, None]).T @ design)[1]
    return value


# ---- what is wrong with the input


@pytest.mark.parametrize("fit", [fit_pod, lambda a, y, **k: fit_signal(a, y, 0.5, **k)], ids=["hits", "signals"])
@pytest.mark.parametrize(
    "sizes, found, said",
    [
        ([1, 2, 3], [0, 1], "same length"),
        ([[1, 2], [3, 4]], [[0, 1], [0, 1]], "same length"),
        ([], [], "same length"),
        ([1, np.nan, 3], [0, 1, 1], "1 of 3 sizes are not finite"),
        ([1, 2, np.inf], [0, 1, 1], "1 of 3 sizes are not finite"),
        ([1, 2, 3], [0, np.nan, 1], "1 of 3 outcomes are not finite"),
        ([1, -2, 3], [0, 1, 1], "1 of 3 sizes are not above 0"),
        ([0, 2, 3], [0, 1, 1], "1 of 3 sizes are not above 0"),
    ],
)
def test_bad_input_is_refused(fit, sizes, found, said):
    with pytest.raises(InputError, match=said):
        fit(sizes, found)


@pytest.mark.parametrize("fit", [fit_pod, lambda a, y, **k: fit_signal(a, y, 0.5, **k)], ids=["hits", "signals"])
@pytest.mark.parametrize("level", [0.5, 1.0, 95, -1])
def test_level_is_checked(fit, level):
    with pytest.raises(InputError, match="level="):
        fit(SIZES, outcomes(), level=level)


def test_other_settings_are_checked():
    with pytest.raises(InputError, match="0 .missed. or 1"):
        fit_pod([1, 2, 3], [0, 0.5, 1])
    with pytest.raises(InputError, match="bound=Wald"):
        fit_pod(SIZES, outcomes(), bound="Wald")
    with pytest.raises(InputError, match="rise in this order"):
        fit_signal(SIZES, SIZES, 10, floor=11)
    with pytest.raises(InputError, match="rise in this order"):
        fit_signal(SIZES, SIZES, np.nan)


# ---- no curve


@pytest.mark.parametrize("n, said", [(60, "At least 95.1%.*and so 90 % is shown"), (29, "90 % is shown"), (28, "would take 29 of 29")])
def test_all_found(n, said):
    pod = fit_pod(SIZES[:n], np.ones(n))
    assert [pod.a50, pod.a90, pod.a90_95, pod.slope] == [None] * 4 and len(pod.notes) == 1
    assert stats.binomtest(n, n).proportion_ci(0.9, "exact").low == pytest.approx(0.05 ** (1 / n))
    assert np.isnan(pod([10.0])).all() and np.isnan(pod.bound([10.0])).all()
    assert re.search(said, pod.notes[0])


def test_none_found():
    pod = fit_pod(SIZES, np.zeros(60))
    assert pod.a90 is None and pod.notes[0].startswith("none of 60 found") and "At most 4.9%" in pod.notes[0]
    assert fit_pod([5.0], [0]).a90 is None


def test_one_size_only():
    pod = fit_pod(np.full(20, 5.0), np.arange(20) % 2)
    assert pod.a90 is None and "same size" in pod.notes[0]
    assert fit_signal(np.full(20, 5.0), np.arange(20), 3).a90 is None
    assert fit_signal(SIZES, np.ones(60), 3).a90 is None  # scores that say nothing


def test_found_less_often_when_larger():
    pod = fit_pod(SIZES, ~outcomes())
    assert pod.slope < 0 and pod.a90 is None and pod.a90_95 is None and "not found more often" in pod.notes[0]


def test_no_bound_where_size_may_not_matter():
    pod = fit_pod(SIZES, np.arange(60) % 2)
    assert pod.a90_95 is None and pod.notes


# ---- curves


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e6])
def test_unit_of_size_does_not_matter(unit):
    one, other = fit_pod(SIZES, outcomes()), fit_pod(SIZES * unit, outcomes())
    np.testing.assert_allclose([other.a50, other.a90, other.a90_95], unit * np.array([one.a50, one.a90, one.a90_95]), rtol=1e-6)


@pytest.mark.parametrize("firth", [False, True])
def test_maximum_is_the_maximum(firth):
    pod = fit_pod(SIZES, outcomes(), firth=firth)
    other = minimize(lambda b: -log_likelihood(pod, *b, firth), [-8, 3], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    np.testing.assert_allclose([pod.intercept, pod.slope], other.x, rtol=1e-5)


@pytest.mark.parametrize("firth, found", [(False, outcomes()), (True, outcomes()), (True, SIZES > 15), (True, SIZES > 50)])
def test_bound_is_the_profile_likelihood(firth, found):
    pod, slopes = fit_pod(SIZES, found, firth=firth), np.geomspace(0.05, 300, 3000)
    lines = [log_likelihood(pod, np.log(9) - s * np.log(pod.a90_95), s, firth) for s in slopes]
    drop = 2 * (log_likelihood(pod, pod.intercept, pod.slope, firth) - max(lines))
    assert drop == pytest.approx(stats.chi2.ppf(0.9, 1), abs=0.01)


def test_wald_is_the_standard_error():
    pod = fit_pod(SIZES, outcomes(), bound="wald")
    v = np.array([1, np.log(20)])
    expected = special.expit(v @ [pod.intercept, pod.slope] - stats.norm.ppf(0.95) * (v @ pod.covariance @ v) ** 0.5)
    assert pod.bound(20.0) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("found", [SIZES > 15, SIZES >= SIZES[-1], SIZES > SIZES[0]], ids=["half", "one hit", "one miss"])
def test_parted_data_have_finite_answers(found):
    pod = fit_pod(SIZES, found)
    assert "Firth" in pod.method and any("parts hits from misses" in n for n in pod.notes)
    assert 0 < pod.slope < 1000 and 0 < pod.a50 < pod.a90
    if found.sum() in (1, 59):  # one bit is too little for a bound
        assert pod.a90_95 is None and any("there is no a90/95" in n for n in pod.notes)
    else:
        assert pod.a90 < pod.a90_95 < 1.5 * pod.a90


def test_touching_is_parted_too():
    "A hit and a miss of the same size at the border: the likelihood still has no maximum."
    pod = fit_pod([1, 2, 3, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert "Firth" in pod.method and np.isfinite(pod.a90)


def test_more_confidence_means_a_larger_size():
    sizes = [fit_pod(SIZES, outcomes(), level).a90_95 for level in (0.6, 0.9, 0.95, 0.99)]
    assert sizes == sorted(sizes) and sizes[0] > fit_pod(SIZES, outcomes()).a90


def test_beyond_what_was_tested_is_said():
    small = SIZES < 25
    pod = fit_pod(SIZES[small], outcomes(3)[small])
    assert pod.a90_95 > 25 and any("a90/95 lies beyond" in n for n in pod.notes)


def test_curve_over_plain_size():
    pod = fit_pod(np.append(0.0, SIZES), np.append(False, outcomes()), log=False)
    assert pod([pod.a90]) == pytest.approx(0.9) and pod.a90_95 > pod.a90


def test_signal_with_a_floor_ignores_what_is_below():
    scores = 3 * np.log(SIZES / 15) + np.random.default_rng(1).normal(0, 0.7, 60)
    deep = np.where(scores < -1, -50, scores)
    one, other = (fit_signal(SIZES, s, 0.0, floor=-1.0) for s in (scores, deep))
    assert one.a90_95 == pytest.approx(other.a90_95, rel=1e-6)
    assert fit_signal(SIZES, deep, 0.0).a90_95 > 1.2 * one.a90_95  # taken at their word, they spoil the line


def test_numbers_are_ready_for_json():
    for pod in (fit_pod(SIZES, outcomes()), fit_pod(SIZES, SIZES > 0), fit_signal(SIZES, np.log(SIZES) + outcomes(), 2.5)):
        assert json.loads(json.dumps(pod.facts(), allow_nan=False))["n"] == 60


# ---- defects and studies


@pytest.mark.parametrize("angle", [0, 30, 45, 90])
def test_extent_is_a_length(angle):
    y, x = np.mgrid[:101, :101] - 50
    along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    across = y * np.cos(np.radians(angle)) - x * np.sin(np.radians(angle))
    assert longest_extent((abs(along) <= 30) & (abs(across) <= 1.5)) == pytest.approx(61, abs=2.5)


def test_set_is_reproducible_and_its_parts_differ():
    one, again, other = (render_pod_set("rough", 4, seed=s, size=48) for s in (7, 7, 8))
    assert (one.images == again.images).all() and not (one.images == other.images).all()
    assert one.images.shape == (4, 1, 48, 48) and one.severities.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert not set(one.seeds) & set(other.seeds) and one.areas.tolist() == one.masks.sum((1, 2)).tolist()
    assert pod_seeds("rough", 3, 7) == one.seeds[:3] != pod_seeds("good", 3, 7)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"kind": "rouhg"}, "Did you mean rough"),
        ({"kind": "rough", "n": 0}, "n=0"),
        ({"kind": "rough", "seed": -1}, "seed=-1"),
        ({"kind": "rough", "scene": "nut"}, "scene=nut"),
    ],
)
def test_set_refuses_what_it_cannot_draw(arguments, said):
    with pytest.raises(InputError, match=said):
        render_pod_set(**arguments)


class Judge:
    "A detector whose score rises from picture to picture, as severities do."

    def __init__(self, score=None, mask=True):
        self.score, self.mask = score, mask

    def predict_each(self, pictures):
        for i, picture in enumerate(pictures):
            score = i / 10 if self.score is None else self.score
            yield SimpleNamespace(score=score, is_anomalous=score > 0.5, mask=np.ones(picture.shape[-2:], bool) if self.mask else None)


@pytest.fixture(scope="module")
def rows():
    return pod_study(Judge(), ["rough", "fabric_border"], 12, size=64, n_good=5)


def test_study_files(rows, tmp_path):
    said = write_study(rows, tmp_path / "new" / "out", {"run": "x"}, threshold=0.5)
    assert "rough" in said and "false calls: 0 of 5" in said
    facts = json.loads((tmp_path / "new/out/pod.json").read_text(encoding="utf-8"))
    assert facts["run"] == "x" and facts["data"] == "rendered" and set(facts["curves"]) == {"rough", "fabric_border"}
    assert read_rows(tmp_path / "new/out/pod.csv") == rows
    assert (tmp_path / "new/out/pod.png").read_bytes()[1:4] == b"PNG"


def test_study_without_masks_or_good_parts():
    rows = pod_study(Judge(mask=False), ["rough"], 12, size=64, n_good=0)
    facts = study_facts(rows)
    assert facts["false_calls"] is None and "curves_located" not in facts
    with pytest.raises(InputError, match="hit=located"):
        study_curves(rows, hit="located")
    assert signal_curves(rows, 0.5)["rough"].link == "probit"


def test_study_of_screws():
    rows = pod_study(Judge(), ["thread_top"], 3, size=64, scene="screw", n_good=0)
    assert [r["kind"] for r in rows] == ["thread_top"] * 3


def test_study_refuses(rows, tmp_path):
    with pytest.raises(InputError, match="no such defect of a screw"):
        pod_study(Judge(), ["rough"], scene="screw")
    with pytest.raises(InputError, match="score is not finite"):
        pod_study(Judge(score=float("nan")), ["rough"], 2, size=48)
    with pytest.raises(InputError, match="by=size"):
        study_curves(rows, by="size")
    with pytest.raises(InputError, match="no rows"):
        write_rows([], tmp_path / "x.csv")
    with pytest.raises(InputError, match="changed a pixel visibly"):
        study_curves([r | {"extent": 0.0} for r in rows])
    for file in ("absent.csv", "wrong.csv"):
        (tmp_path / "wrong.csv").write_text("kind,seed\nrough,x\n")
        with pytest.raises(InputError, match="not the rows of a study"):
            read_rows(tmp_path / file)


def test_pictures_of_every_case(rows):
    cases = [fit_pod(SIZES, f) for f in (outcomes(), SIZES > 15, SIZES > 0, SIZES < 0, ~outcomes())]
    for pod in cases:
        assert plot_pod(pod).axes
    assert len(plot_study({"a": cases[0], "b_c": {"x": cases[1], "y": cases[2]}}).axes) == 2
    with pytest.raises(InputError, match="no curves"):
        plot_study({})
    with pytest.raises(InputError, match="5 curves"):
        plot_pod(dict(zip("abcde", cases, strict=True)))


def test_29_of_29():
    assert [needed_in_a_row(), needed_in_a_row(0.9, 0.9), needed_in_a_row(0.5, 0.75)] == [29, 22, 2]


def test_hits_parted_from_misses_without_firth_give_no_curve():
    pod = fit_pod(np.arange(5.0, 45), np.arange(5, 45) > 20, firth=False)
    assert pod.slope is None and "no curve. Leave firth=None" in pod.notes[0]
    assert fit_pod(np.arange(5.0, 45), np.arange(5, 45) > 20).slope > 0


def test_one_defect_can_be_drawn():
    assert plot_pod(fit_pod([5.0], [1])).axes


def test_scores_on_a_line_give_no_curve():
    sizes = np.arange(5.0, 45)
    assert "without any scatter" in fit_signal(sizes, np.log(sizes), 3.0).notes[0]
