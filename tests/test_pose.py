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
from zipper_ad.pose import Upright, UprightPictures, Window, find_pose, turn, turn_back
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
    seen, pose = upright(lying[24:])
    turned = turn(lying[24:], pose)
    off = pose[:, 0] + poses(40)[24:, 0]
    off = (off - off[0] + math.pi) % (2 * math.pi) - math.pi
    assert off.abs().max() < math.radians(2)
    apart = lambda t: (t - t.mean(0)).abs().mean()  # noqa: E731
    assert apart(turned) < 0.6 * apart(lying[24:])
    assert pose[:, 1:].abs().max() < 0.15
    assert seen.shape == (16, channels, 96, 64)  # the wedge is 0.6 by 0.2 of the side, lies along it, and is seen twice as large
    assert torch.allclose(seen, upright.look(lying[24:], pose)) and (seen[..., :4] - 0.4).abs().max() < 0.1  # its longest side is up
    middle = (seen > 0.6).float().mean((0, 1))
    assert middle[48, 32] > 0.5 and middle[:, 0].max() == 0 == middle[0].max()


def test_a_window_is_the_middle_enlarged():
    x = smooth(parts(4), 16)
    pose = poses(4)
    whole, seen = turn(x, pose), turn(x, pose, Window(64, 64, 32, 2))
    assert torch.allclose(torch.nn.functional.avg_pool2d(seen, 2), whole[..., 16:48, 24:40], atol=0.01)
    assert torch.allclose(turn(x, pose, Window(64, 64, 64, 1)), whole, atol=1e-6)
    again = turn_back(seen, pose, Window(64, 64, 32, 2))
    assert again.shape == x.shape and (again == 0).any()
    inside = turn_back(torch.ones_like(seen), pose, Window(64, 64, 32, 2)) == 1
    assert inside.any() and (again - x)[inside].abs().max() < 0.02


@pytest.mark.parametrize("crop", [True, False])
def test_what_was_seen_is_put_back(crop):
    lying = turn(parts(24), poses(24))
    upright = Upright().fit(lying, crop=crop)
    seen, pose = upright(lying)
    assert (upright.box is None) != crop and (seen.shape[-2:] == lying.shape[-2:]) != crop
    again = upright.put_back(seen, pose, lying)
    assert again.shape == lying.shape and (again - lying)[..., 12:52, 12:52].abs().mean() < 0.01
    outside = upright.put_back(torch.zeros_like(seen), pose, torch.full_like(lying, 7))
    assert (outside.amax() == 7) == crop and outside.amin() == 0


def test_what_lies_beside_the_part_does_not_count():
    lying = turn(parts(24), poses(24))
    upright = Upright().fit(lying)
    seen, pose = upright(lying)
    maps = torch.rand(24, 1, *seen.shape[-2:], generator=seeded())
    maps[..., 48, 32], maps[..., 4, 4] = 7, 9  # on the part, and on the ground in a corner of the box
    counted = upright.on_part(maps, 64)
    assert (counted.amax((1, 2, 3)) == 7).all() and (counted.amin((1, 2, 3)) == maps.amin((1, 2, 3))).all()
    body = seen > 0.6  # nearly all of the bright wedge is within the outline
    assert (counted == maps)[body].float().mean() > 0.99
    half = upright.on_part(torch.nn.functional.max_pool2d(maps, 2), 64)  # maps with a stride see the same outline
    inside = lambda m: (m > m.amin((1, 2, 3), keepdim=True)).float()  # noqa: E731
    assert (inside(half) - torch.nn.functional.max_pool2d(inside(counted), 2)).abs().mean() < 0.1
    whole = Upright().fit(lying, crop=False)
    assert whole.outline is None and torch.equal(whole.on_part(maps, 64), maps)


def test_a_box_has_the_pixels_of_the_picture():
    for box in ((0.9, 0.05), (0.8, 0.3), (0.7, 0.7), (1.0, 1.0)):
        window = Upright(torch.ones(1, 1, 64, 64), box).window(256)
        assert 1 <= window.zoom <= 2 and window.height % 32 == 0 == window.width % 32
        assert window.height >= box[0] * 256 * window.zoom - 1e-6 and window.height * window.width <= 1.35 * 256**2


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
    assert batch.shape[-2:] == (128, 64)
    upright = torch.nn.functional.pad(torch.nn.functional.avg_pool2d(batch, 2), (16, 16, 0, 0), mode="replicate")
    again = detector.upright.find(upright)  # what training saw was upright already
    assert again[:, 0].abs().max() < math.radians(3)
    for pose in ("aligned", "turned"):
        dls = make_dls(make_config([*SMALL, f"data={screws}", f"data.pose={pose}"]))[2]
        assert (dls.upright is None) == (pose == "aligned")


def test_maps_come_back_as_the_part_lay(trained_on_screws):
    _, dataset, detector = trained_on_screws
    x = dataset.batch(range(4))
    maps, scores, images = detector.maps_and_scores(x)
    pose = detector.upright.find(x)
    seen, *raw = detector.raw_maps(x, pose)
    window = detector.upright.window(64)
    assert all(m.shape[-2:] == (128, 64) for m in (seen, *raw))
    inside = turn_back(torch.ones_like(seen), pose, window) == 1
    assert torch.allclose(images[inside], turn_back(seen, pose, window)[inside], atol=1e-5)
    outside = turn_back(torch.ones_like(seen), pose, window) == 0
    assert torch.equal(images[outside], x[outside])  # where nothing is looked at the picture is as it was
    assert (maps.where(outside, torch.nan).nanmedian() <= maps.flatten(1).amin(1) + 1e-5).any()
    assert maps.shape == (4, 1, 64, 64) and (maps.flatten(1).amax(1) <= scores + 1e-4).all()


def test_a_saved_detector_turns_alike(trained_on_screws, tmp_path):
    _, dataset, detector = trained_on_screws
    detector.save(tmp_path / "run")
    again = Detector.load(tmp_path / "run")
    a, b = detector.predict(dataset.batch([0]))[0], again.predict(dataset.batch([0]))[0]
    assert abs(a.score - b.score) < 0.01 and np.abs(a.anomaly_map - b.anomaly_map).max() < 0.01 * np.abs(a.anomaly_map).max()
    tensors = load_file(tmp_path / "run/weights.safetensors")
    for change in ({"upright.template": None}, {"upright.box": torch.tensor([0.5, 2.0])}, {"upright.box": torch.tensor([0.5, torch.nan])},
                   {"upright.box": torch.tensor([0.5, 0.1])}, {"upright.box": torch.ones(3)},
                   {"upright.outline": torch.ones(3)}, {"upright.outline": None}):
        rewrite(tmp_path / "run", tensors | change)
        with pytest.raises(InputError, match="train again"):
            Detector.load(tmp_path / "run")


def test_a_folder_from_before_there_was_a_box_sees_the_whole_picture(screws, tmp_path):
    from zipper_ad.learner import reference_indices, train_autoencoder

    config = make_config([*SMALL, f"data={screws}", "data.crop=false"])
    learn, dataset, split = train_autoencoder(config)
    normals, reference = dataset.batch(split.calibration), dataset.batch(reference_indices(split))
    detector = Detector.fit(learn, normals, config, reference, upright=learn.dls.upright)
    detector.save(tmp_path / "run")
    assert "upright.box" not in load_file(tmp_path / "run/weights.safetensors")
    again = Detector.load(tmp_path / "run")
    x = dataset.batch([0])
    assert again.upright.box is None and again.raw_maps(x)[0].shape == x.shape
    assert abs(detector.predict(x)[0].score - again.predict(x)[0].score) < 0.01


FAMILIES = {
    "resnet": ["model.width=8", "model.latent=8"],
    "vit": ["model.width=32", "model.heads=2", "model.blocks=1", "model.decoder_width=32"],
    "diffusion": ["model.widths=[8,16]"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sees_a_box_that_is_not_square(family, screws, tmp_path):
    from zipper_ad.learner import reference_indices, train_autoencoder

    about = [f"model={family}", *FAMILIES[family], "model.head_widths=[4,8]", "train.epochs=1", "data.size=64", f"data={screws}"]
    config = make_config([*about, "train.precision=fp32", "data.pose=turned", "train.device=cpu"])
    learn, dataset, split = train_autoencoder(config)
    assert learn.dls.valid.one_batch()[0].shape[-2:] == (128, 64)
    normals, reference = dataset.batch(split.calibration), dataset.batch(reference_indices(split))
    detector = Detector.fit(learn, normals, config, reference, upright=learn.dls.upright)
    detector.save(tmp_path)
    verdict = Detector.load(tmp_path).predict(dataset.batch([0]))[0]
    assert verdict.anomaly_map.shape == verdict.reconstruction.shape == (64, 64) and np.isfinite(verdict.score)


def rewrite(run, tensors):
    "Weights that fit their folder's checksum; None leaves one out."
    save_file({k: v for k, v in tensors.items() if v is not None}, run / "weights.safetensors")
    facts = json.loads((run / "detector.json").read_text())
    facts["weights_sha256"] = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
    (run / "detector.json").write_text(json.dumps(facts))
