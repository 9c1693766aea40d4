"""Parts at any angle: found, turned upright, judged there, and turned back."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zipper_ad.config import make_config
from zipper_ad.core import InputError
from zipper_ad.detector import Detector
from zipper_ad.pose import Upright, UprightPictures, find_pose, turn, turn_back
from zipper_ad.score import smooth
from zipper_ad.synth import render_dataset

SMALL = ["data.size=64", "model.widths=[4,8]", "model.latent=8", "model.head_widths=[4,8]", "train.epochs=1", "train.precision=fp32"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parts(n, channels=1, size=64, seed=0):
    "A bright wedge with one thick end on a grey ground, all the same way, and a little noise."
    line = torch.linspace(-1, 1, size)
    y, x = line[:, None], line
    body = (y.abs() < 0.06 + 0.12 * (x < -0.4)) & (x.abs() < 0.6)
    picture = (0.4 + 0.4 * body.float()).expand(n, channels, size, size)
    return (picture + 0.005 * torch.randn(n, channels, size, size, generator=seeded(seed))).clamp(0, 1)


def poses(n, seed=1, far=0.05):
    u = torch.rand(n, 3, generator=seeded(seed))
    return torch.stack([2 * math.pi * u[:, 0], far * (2 * u[:, 1] - 1), far * (2 * u[:, 2] - 1)], 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_there_and_back(channels):
    x = smooth(parts(8, 1), 16).repeat(1, channels, 1, 1)
    pose = poses(8)
    again = turn_back(turn(x, pose), pose)
    assert (again - x)[..., 20:44, 20:44].abs().max() < 0.03 and (turn(x, pose) - x).abs().max() > 0.1
    assert torch.allclose(turn(x, torch.zeros(8, 3)), x, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_poses_are_found(channels):
    x = parts(40, channels)
    lying = turn(x, poses(40))
    upright = Upright().fit(lying[:24])
    turned, pose = upright(lying[24:])
    off = pose[:, 0] + poses(40)[24:, 0]
    off = (off - off[0] + math.pi) % (2 * math.pi) - math.pi
    assert off.abs().max() < math.radians(2)
    apart = lambda t: (t - t.mean(0)).abs().mean()  # noqa: E731
    assert apart(turned) < 0.6 * apart(lying[24:])
    assert torch.allclose(turned, turn(lying[24:], pose)) and pose[:, 1:].abs().max() < 0.15


@pytest.mark.parametrize("channels", [1, 3])
def test_find_pose(channels):
    aligned = parts(60, channels)
    assert find_pose(aligned)[0] == "aligned"
    assert find_pose(turn(aligned, poses(60)))[0] == "turned"
    assert find_pose(aligned[:7]) == ("aligned", float("inf"))  # too few to tell
    assert find_pose(torch.zeros(20, channels, 48, 48))[0] == "aligned"


def test_pictures_without_a_part_are_no_error():
    upright = Upright().fit(torch.full((3, 1, 32, 32), 0.5))
    turned, pose = upright(torch.full((2, 1, 32, 32), 0.5))
    assert turned.isfinite().all() and pose.isfinite().all()
    with pytest.raises(InputError, match="never learned"):
        Upright()(torch.zeros(1, 1, 32, 32))


@pytest.fixture(scope="module")
def screws(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("pose") / "screws", n_train=24, n_good=2, n_test=1, size=64, scene="screw", workers=1)


@pytest.fixture(scope="module")
def trained_on_screws(screws):
    from zipper_ad.learner import reference_indices, train_autoencoder

    config = make_config([*SMALL, f"data={screws}", "data.flip_vertical=1"])
    learn, dataset, split = train_autoencoder(config)
    normals = dataset.batch(split.calibration)
    detector = Detector.fit(learn, normals, config, dataset.batch(reference_indices(split)), upright=learn.dls.upright)
    return learn, dataset, detector


def test_training_finds_out(trained_on_screws, screws):
    from zipper_ad.learner import make_dls

    learn, dataset, detector = trained_on_screws
    assert detector.config.data.pose == "turned" and isinstance(learn.dls.train_ds.dataset, UprightPictures)
    batch = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor).cpu()
    again = detector.upright.find(batch)  # what training saw was upright already
    assert again[:, 0].abs().max() < math.radians(3)
    for pose in ("aligned", "turned"):
        dls = make_dls(make_config([*SMALL, f"data={screws}", f"data.pose={pose}"]))[2]
        assert (dls.upright is None) == (pose == "aligned")


def test_maps_come_back_as_the_part_lay(trained_on_screws):
    _, dataset, detector = trained_on_screws
    x = dataset.batch(range(4))
    maps, scores, images = detector.maps_and_scores(x)
    pose = detector.upright.find(x)
    upright_images = detector.raw_maps(x, pose)[0]
    assert torch.allclose(images, turn_back(upright_images, pose), atol=1e-5)
    assert maps.shape == (4, 1, 64, 64) and (maps.flatten(1).amax(1) <= scores + 1e-4).all()


def test_a_saved_detector_turns_alike(trained_on_screws, tmp_path):
    _, dataset, detector = trained_on_screws
    detector.save(tmp_path / "run")
    again = Detector.load(tmp_path / "run")
    a, b = detector.predict(dataset.batch([0]))[0], again.predict(dataset.batch([0]))[0]
    assert abs(a.score - b.score) < 0.01 and np.abs(a.anomaly_map - b.anomaly_map).max() < 0.01 * np.abs(a.anomaly_map).max()
    tensors = load_file(tmp_path / "run/weights.safetensors")
    del tensors["upright.template"]
    save_file(tensors, tmp_path / "run/weights.safetensors")
    facts = json.loads((tmp_path / "run/detector.json").read_text())
    facts["weights_sha256"] = hashlib.sha256((tmp_path / "run/weights.safetensors").read_bytes()).hexdigest()
    (tmp_path / "run/detector.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="train again"):
        Detector.load(tmp_path / "run")
