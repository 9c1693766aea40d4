"Scores and thresholds: properties that a notebook would be tedious for."

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from zipper_ad.core import InputError
from zipper_ad.score import ERROR_KINDS, LEAST_WIDTH, LocationCalibration, calibrate, error_map, fuse, pool, smooth


def test_import_is_light():
    "Prediction imports this module: neither fastai nor scikit-learn nor matplotlib may come with it."
    heavy = ("fastai", "sklearn", "matplotlib", "torchvision")
    code = f"import sys, zipper_ad.score; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ERROR_KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (2, 3, 48, 40)])
def test_error_maps_are_bounded_and_symmetric(kind, shape):
    x, y = torch.rand(2, *shape)
    maps = error_map(x, y, kind)
    assert maps.shape == (shape[0], 1, *shape[2:])
    assert -1e-5 <= maps.min() and maps.max() <= 1 + 1e-5
    torch.testing.assert_close(maps, error_map(y, x, kind), atol=1e-5, rtol=0)


def test_error_map_grows_with_the_difference():
    x = torch.rand(1, 1, 64, 64) * 0.5 + 0.25
    noise = torch.randn(1, 1, 64, 64) * 0.05
    for kind in ERROR_KINDS:
        assert error_map(x, x + noise, kind).mean() < error_map(x, x + 3 * noise, kind).mean()


def test_error_map_rejects_other_shapes():
    with pytest.raises(InputError, match="differ in shape"):
        error_map(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_smooth_keeps_dtype_and_mean(dtype):
    maps = torch.rand(2, 1, 40, 64).to(dtype)
    smoothed = smooth(maps, 6)
    assert smoothed.dtype == dtype and smoothed.shape == maps.shape
    assert abs(smoothed.float().mean() - maps.float().mean()) < 0.02


def test_smooth_after_inference_mode_can_be_differentiated():
    "The cached matrix must not be tied to the mode in which it was first made."
    with torch.inference_mode():
        smooth(torch.rand(1, 1, 37, 41), 5)
    maps = torch.rand(1, 1, 37, 41, requires_grad=True)
    smooth(maps, 5).square().sum().backward()
    assert maps.grad.abs().sum() > 0


def test_calibration_works_with_constant_and_with_few_maps():
    constant = LocationCalibration().fit(torch.ones(5, 1, 16, 16))
    assert torch.isfinite(constant(torch.rand(2, 1, 16, 16))).all()
    two = LocationCalibration().fit(torch.rand(2, 1, 16, 16))
    assert two(torch.rand(3, 1, 16, 16)).shape == (3, 1, 16, 16)


def test_calibration_does_not_depend_on_order_or_scale():
    maps, new = torch.rand(12, 1, 32, 32), torch.rand(4, 1, 32, 32)
    expected = LocationCalibration().fit(maps)(new)
    torch.testing.assert_close(LocationCalibration().fit(maps.flip(0))(new), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(LocationCalibration().fit(maps * 1000)(new * 1000), expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("maps", [torch.zeros(3, 16, 16), torch.zeros(3, 2, 16, 16), torch.full((3, 1, 16, 16), float("nan"))])
def test_calibration_rejects_bad_maps(maps):
    with pytest.raises(InputError):
        LocationCalibration().fit(maps)


def test_calibration_rejects_another_size_and_incomplete_state():
    calibration = LocationCalibration().fit(torch.rand(3, 1, 16, 16))
    with pytest.raises(InputError, match="do not fit"):
        calibration(torch.rand(1, 1, 32, 32))
    with pytest.raises(InputError, match="damaged"):
        LocationCalibration.from_state({"mean": np.zeros((1, 16, 16), np.float32)})
    with pytest.raises(InputError, match="nothing to keep"):
        LocationCalibration().state_dict()


def test_pool_of_a_batch():
    maps = torch.rand(5, 1, 20, 30)
    torch.testing.assert_close(pool(maps), maps.flatten(1).max(1).values)
    torch.testing.assert_close(pool(maps, "topk", k=7), maps.flatten(1).sort(1, descending=True).values[:, :7].mean(1))
    with pytest.raises(InputError):
        pool(maps, "topk", k=0)


# ---------------------------------------------------------------- surprise
def test_calibrated_peaks_follow_gumbels_law():
    maps = smooth(torch.randn(300, 1, 48, 48, generator=torch.Generator().manual_seed(0)), 12)
    peaks = calibrate(maps[:200])(maps[200:]).flatten(1).amax(1)
    assert abs(peaks.mean() - 0.577) < 0.35 and abs(peaks.std() - 1.28) < 0.4


def test_calibration_ignores_the_unit_of_a_map():
    maps = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(0)) ** 3
    a, b = calibrate(maps)(maps), calibrate(1000 * maps + 7)(1000 * maps + 7)
    assert torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("n", [2, 3, 7, 8])
def test_calibration_works_with_few_pictures(n):
    maps = torch.rand(n, 1, 24, 24, generator=torch.Generator().manual_seed(n))
    assert torch.isfinite(calibrate(maps)(maps)).all()


def test_calibration_of_equal_maps_is_finite():
    assert torch.isfinite(calibrate(torch.ones(9, 1, 16, 16))(torch.ones(2, 1, 16, 16))).all()


def test_a_useless_map_does_little_harm():
    "One map sees the faults, the other is heavy-tailed noise: the fused score stays close to the better one's."
    rng = torch.Generator().manual_seed(3)
    good, noise = torch.randn(600, 1, 16, 16, generator=rng), torch.randn(600, 1, 16, 16, generator=rng).mul(1.5).exp()
    good[400:, 0, 8, 8] += 6

    def auroc(maps):
        score = maps.flatten(1).amax(1)
        return (score[400:, None] > score[None, 200:400]).float().mean().item()

    good, noise = calibrate(good[:200])(good), calibrate(noise[:200])(noise)
    assert auroc(noise) < 0.6 and auroc(fuse([good, noise])) > auroc(good) - 0.06


def test_surprise_beyond_what_the_pictures_can_tell_grows_slowly():
    maps = torch.randn(50, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    calibration = calibrate(maps)
    assert calibration.limit == pytest.approx(np.log(51))
    steps = calibration(torch.linspace(-3, 60, 500).view(-1, 1, 1, 1).expand(-1, 1, 16, 16))[:, 0, 8, 8]
    free = LocationCalibration.from_state({k: v for k, v in calibration.state_dict().items() if k != "limit"})  # an older folder
    unlimited = free(torch.linspace(-3, 60, 500).view(-1, 1, 1, 1).expand(-1, 1, 16, 16))[:, 0, 8, 8]
    ended = unlimited < -calibration.limit  # calmer than calm: the scale ends there
    assert ended.any() and (steps[ended] == -calibration.limit).all()
    assert (steps[~ended].diff() > 0).all()  # the order stays
    below = unlimited <= calibration.limit
    assert below.any() and not below.all() and torch.allclose(steps[below & ~ended], unlimited[below & ~ended])
    assert torch.allclose(steps[~below], calibration.limit + (unlimited[~below] - calibration.limit).log1p(), atol=1e-4)
    again = LocationCalibration.from_state(calibration.state_dict())
    assert torch.equal(again(maps), calibration(maps))
    with pytest.raises(InputError, match="limit"):
        LocationCalibration.from_state(calibration.state_dict() | {"limit": np.array([-1.0], dtype=np.float32)})


# ---------------------------------------------------------------- a map that says nothing


def dead_map(n, seed):
    "The same picture n times, but for rounding."
    pattern = torch.zeros(1, 1, 32, 32)
    pattern[..., 4:8, 4:8] = 0.01
    return pattern + 1e-6 * torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_surprise_has_two_ends():
    calibration = calibrate(dead_map(40, 0))
    limit = math.log(41)
    low, high = torch.full((1, 1, 32, 32), -1e6), torch.full((1, 1, 32, 32), 1e6)
    assert calibration.limit == limit and calibration(low).min() == calibration(low).max() == -limit
    assert limit < calibration(high).max() < limit + math.log(1e20)
    again = LocationCalibration.from_state(calibration.state_dict())
    assert torch.allclose(again(low), calibration(low), atol=1e-6)
    assert LocationCalibration().fit(dead_map(40, 0))(low).min() < -1e6  # deviations, which are no surprises, have none


def test_peaks_that_agree_too_well_scatter_like_noise():
    maps = dead_map(60, 0)
    deviations, surprises = LocationCalibration().fit(maps[:40]), calibrate(maps[:40])
    width = surprises.spread / deviations.spread
    assert torch.allclose(width, torch.tensor(LEAST_WIDTH), rtol=1e-5)
    peaks = surprises(maps[40:]).flatten(1).amax(1)
    assert peaks.abs().max() < 0.1  # the same each time, and no sensation


def test_a_dead_map_leaves_the_other_witness_its_say():
    chance = torch.Generator().manual_seed(0)
    error = torch.randn(240, 1, 32, 32, generator=chance)
    error[140:, 0, 20, 20] += 8  # a hundred faults
    dead = dead_map(240, 1)
    maps = [calibrate(error[:40])(error), calibrate(dead[:40])(dead)]
    good, bad = fuse(maps[:1], maps[1:]).flatten(1).amax(1)[40:].split(100)
    assert (bad[:, None] > good).float().mean() > 0.9
    coin = LocationCalibration().fit(dead[:40])(dead) / 1e-3  # a scale made of how well the peaks agree
    good, bad = fuse(maps[:1], [coin]).flatten(1).amax(1)[40:].split(100)
    assert (bad[:, None] > good).float().mean() < 0.7
