"Rendered zippers: determinism, masks, data sets on disk."

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zipper_ad import synth
from zipper_ad.core import InputError
from zipper_ad.synth import KINDS, Zipper, render_dataset, render_defect, render_zipper


def digest(folder):
    "A hash of every file's name and bytes below a folder."
    h = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        h.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return h.hexdigest()


def test_same_bytes_in_another_process():
    code = (
        "import hashlib; from zipper_ad.synth import KINDS, render_defect, render_zipper\n"
        "h = hashlib.sha256(render_zipper(11, 128).tobytes())\n"
        "[h.update(part.tobytes()) for kind in KINDS for part in render_defect(kind, 11, 128, 0.7)]\n"
        "print(h.hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    h = hashlib.sha256(render_zipper(11, 128).tobytes())
    for kind in KINDS:
        for part in render_defect(kind, 11, 128, 0.7):
            h.update(part.tobytes())
    assert h.hexdigest() == there


def test_seeds_differ():
    assert len({render_zipper(s, 64).tobytes() for s in range(12)}) == 12


@pytest.mark.parametrize("size", [32, 64, 100, 256, 300, 512, 700, 1024])
def test_any_size(size):
    image = render_zipper(2, size)
    assert image.shape == (size, size) and image.dtype == np.uint8
    assert (image[:, 0] == 255).all() and (image[:, -1] == 255).all()
    assert 45 < image[:, size // 4].mean() < 75


def test_one_seed_is_one_zipper_at_every_size():
    small = render_zipper(5, 128).astype(float)
    for size in (256, 512):
        k = size // 128
        large = render_zipper(5, size).reshape(128, k, 128, k).mean((1, 3))
        assert np.abs(large - small).mean() < 2.5
        assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.995


def test_normal_zippers_look_as_measured():
    images = np.stack([render_zipper(s) for s in range(12)]) / 255
    dark = images < 0.6
    left, right = dark.argmax(2).mean(1) / 256, 1 - dark[:, :, ::-1].argmax(2).mean(1) / 256
    assert abs((right - left).mean() - 0.776) < 0.01
    assert 0.002 < left.std() < 0.012 and 0.002 < right.std() < 0.012
    assert abs(images[:, :, 40:100].mean() - 0.237) < 0.01
    assert 0.027 < images[:, :, 40:100].std((1, 2)).mean() < 0.04


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 256])
def test_masks(kind, size):
    for seed in range(6):
        good = render_zipper(seed, size)
        for severity in (0.3, 1.0):
            image, mask = render_defect(kind, seed, size, severity)
            assert image.shape == mask.shape == (size, size) and mask.dtype == bool
            assert mask.any() and mask.mean() < 0.15
            change = np.abs(image.astype(int) - good)
            assert change[mask].mean() > 4  # the mask holds what changed …
            assert (change[~mask] >= 6).mean() < 0.002  # … and nearly nothing visible lies outside


@pytest.mark.parametrize("kind", KINDS)
def test_severity_from_nothing_to_gross(kind):
    areas, changes = [], []
    for severity in (0, 0.15, 0.3, 0.6, 1):
        pairs = [(*render_defect(kind, seed, 64, severity), render_zipper(seed, 64)) for seed in range(8)]
        areas.append(np.mean([mask.mean() for _, mask, _ in pairs]))
        changes.append(np.mean([np.abs(image.astype(int) - good).sum() for image, _, good in pairs]))
    assert areas[0] < 1e-4 and changes[0] < 40
    assert all(np.diff(areas[1:]) > 0) and all(np.diff(changes) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_rows_need_drawing(kind):
    "The rows that are drawn again are enough: drawing all rows gives the same picture."
    for seed in range(5):
        image, _ = render_defect(kind, seed, 128, 1.0)
        zipper, rng = Zipper(seed), synth.generator(seed, 5, KINDS.index(kind))
        for single, v0 in synth._places(kind, rng):
            synth._DEFECTS[single](zipper, rng, 1.0, v0)
        _, v, u = synth._fine_grid(128)
        whole = zipper.photograph(zipper.surface(v, u), 128)
        assert np.abs(whole.astype(int) - image).max() <= 8
        assert (whole != image).mean() < 1e-3


def test_combined_has_two_places():
    for seed in range(8):
        rows = render_defect("combined", seed, 128, 0.8)[1].any(1)
        assert rows[:64].any() and rows[64:].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="melted", seed=0), "kind=melted"),
        (dict(kind="rough", seed=0, severity=1.5), "severity=1.5"),
        (dict(kind="rough", seed=-1), "seed=-1"),
        (dict(kind="rough", seed=0, size=8), "size=8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        render_defect(**arguments)


def test_dataset_layout(tmp_path):
    out = render_dataset(tmp_path / "a" / "zippers", n_train=3, n_test=2, size=64, progress=False)
    assert out == tmp_path / "a" / "zippers"
    assert len(list((out / "train/good").iterdir())) == 3
    assert len(list((out / "test/good").iterdir())) == 6
    assert sorted(p.name for p in (out / "test").iterdir()) == sorted(["good", *KINDS])
    for kind in KINDS:
        masks = sorted((out / "ground_truth" / kind).iterdir())
        assert [m.name for m in masks] == ["000_mask.png", "001_mask.png"]
        for path in masks:
            mask = np.asarray(Image.open(path))
            assert mask.shape == (64, 64) and set(np.unique(mask)) == {0, 255}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["zippers"]  # nothing temporary is left


def test_dataset_description(tmp_path):
    out = render_dataset(tmp_path / "z", n_train=2, n_good=1, n_test=3, size=64, seed=4, progress=False)
    about = json.loads((out / "synth.json").read_text())
    assert (about["seed"], about["size"], len(about["images"])) == (4, 64, 2 + 1 + 3 * 7)
    assert len({item["seed"] for item in about["images"]}) == len(about["images"])
    for item in about["images"]:
        image = np.asarray(Image.open(out / item["file"]))
        if item["kind"] == "good":
            again = render_zipper(item["seed"], 64)
        else:
            again, mask = render_defect(item["kind"], item["seed"], 64, item["severity"])
            assert (np.asarray(Image.open(out / item["mask"])) == mask * 255).all()
        assert (image == again).all()
    severities = [item["severity"] for item in about["images"] if item["kind"] == "rough"]
    assert severities == [0.3, 0.65, 1.0]


def test_rendering_starts_no_process(tmp_path, monkeypatch):
    "A process with threads, such as a notebook's, that forks may find its child locked up for ever."

    def start(*_):
        raise AssertionError("a process was started")

    for name in ("fork", "posix_spawn"):
        monkeypatch.setattr(os, name, start, raising=False)
    monkeypatch.setattr("_posixsubprocess.fork_exec", start, raising=False)
    out = render_dataset(tmp_path / "zippers", n_train=16, n_good=1, n_test=1, size=32, workers=2, progress=False)
    assert len(list(out.rglob("*.png"))) == 16 + 1 + 2 * len(KINDS)


def test_dataset_does_not_depend_on_workers(tmp_path):
    options = dict(n_train=6, n_test=2, size=64, progress=False)
    digests = [digest(render_dataset(tmp_path / str(n), workers=n, **options)) for n in (1, 2, 3)]
    assert len(set(digests)) == 1


def test_more_training_images_leave_the_test_images_alone(tmp_path):
    a = render_dataset(tmp_path / "a", n_train=1, n_test=1, size=64, progress=False)
    b = render_dataset(tmp_path / "b", n_train=3, n_test=1, size=64, progress=False)
    assert digest(a / "test") == digest(b / "test")
    assert (a / "train/good/000.png").read_bytes() == (b / "train/good/000.png").read_bytes()


def test_dataset_refuses(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        render_dataset(tmp_path / "full", n_train=1, n_test=0, progress=False)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="is a file"):
        render_dataset(tmp_path / "full" / "notes.txt", n_train=1, n_test=0, progress=False)
    with pytest.raises(InputError, match="0 or more"):
        render_dataset(tmp_path / "new", n_train=-1, progress=False)
    (tmp_path / "empty").mkdir()
    render_dataset(tmp_path / "empty", n_train=1, n_test=0, size=64, progress=False)
    assert (tmp_path / "empty/train/good/000.png").exists()


def test_nothing_is_left_when_it_fails(tmp_path, monkeypatch):
    def fail(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        render_dataset(tmp_path / "z", n_train=2, n_test=0, size=64, progress=False)
    assert list(tmp_path.iterdir()) == []
