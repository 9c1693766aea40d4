"Rendered screws: determinism, exact masks, severity, and the scenes that `render_dataset` can write."

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zipper_ad import synth
from zipper_ad.cli import main
from zipper_ad.core import InputError
from zipper_ad.screw import KINDS, SCENE, Screw, render_screw, render_screw_defect
from zipper_ad.synth import find_scene, render_dataset, render_zipper


def digest(seed=11, size=96):
    "A hash of a good picture and of one with each kind of defect."
    h = hashlib.sha256(render_screw(seed, size).tobytes())
    for kind in KINDS:
        for part in render_screw_defect(kind, seed, size, 0.7):
            h.update(part.tobytes())
    return h.hexdigest()


def python(code):
    "What a fresh Python prints."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_same_bytes_in_another_process():
    code = (
        "import hashlib; from zipper_ad.screw import KINDS, render_screw, render_screw_defect\n"
        "h = hashlib.sha256(render_screw(11, 96).tobytes())\n"
        "[h.update(part.tobytes()) for kind in KINDS for part in render_screw_defect(kind, 11, 96, 0.7)]\n"
        "print(h.hexdigest())"
    )
    assert python(code) == digest()


def test_seeds_differ():
    assert len({render_screw(s, 64).tobytes() for s in range(12)}) == 12


def test_poses_vary():
    screws = [Screw(s) for s in range(200)]
    assert np.histogram([s.angle for s in screws], 4, (0, 2 * np.pi))[0].min() > 30
    assert all(0.6 <= s.length <= 0.75 for s in screws)
    assert np.abs([s.centre - 0.5 for s in screws]).max() < 0.02


@pytest.mark.parametrize("size", [32, 64, 100, 256, 300, 512, 700, 1024])
def test_any_size(size):
    image = render_screw(2, size)
    assert image.shape == (size, size) and image.dtype == np.uint8
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert 150 < edge.mean() < 200 and edge.std() < 12  # ground all around
    assert image[size // 4 : -size // 4, size // 4 : -size // 4].min() < 90  # and metal within


def test_one_seed_is_one_screw_at_every_size():
    small = render_screw(5, 128).astype(float)
    for size in (256, 512):
        k = size // 128
        large = render_screw(5, size).reshape(128, k, 128, k).mean((1, 3))
        assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.98


def test_the_lamp_stays_when_the_screw_turns():
    "Turned by half a turn the picture is not the picture rotated: the light comes from the upper left all the same."
    screw, other = Screw(3), Screw(3)
    other.cos, other.sin, other.centre = -screw.cos, -screw.sin, 1 - screw.centre
    a, b = screw.photograph(128).astype(int), other.photograph(128).astype(int)[::-1, ::-1]
    assert np.abs(a - b).max() > 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 256])
def test_masks_are_exact(kind, size):
    for seed in range(4):
        good = render_screw(seed, size)
        for severity in (0.3, 1.0):
            image, mask = render_screw_defect(kind, seed, size, severity)
            assert image.shape == mask.shape == (size, size) and (image.dtype, mask.dtype) == (np.uint8, bool)
            assert mask.any() and mask.mean() < 0.05
            change = np.abs(image.astype(int) - good)
            assert change[mask].mean() > 6 and (change[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_severity_from_nothing_to_gross(kind):
    good = [render_screw(seed, 96) for seed in range(6)]
    areas, changes = [], []
    for severity in (0, 0.15, 0.3, 0.6, 1):
        pairs = [render_screw_defect(kind, seed, 96, severity) for seed in range(6)]
        areas.append(np.mean([mask.mean() for _, mask in pairs]))
        changes.append(np.mean([np.abs(image.astype(int) - g).sum() for (image, _), g in zip(pairs, good, strict=True)]))
    assert areas[0] == 0 and changes[0] == 0
    assert all(np.diff(areas) > 0) and all(np.diff(changes) > 0)


def test_defects_lie_where_their_names_say():
    spans = {"manipulated_front": (0.7, 1.1), "scratch_head": (-0.02, 0.2), "scratch_neck": (0.1, 0.42)}
    spans |= {"thread_side": (0.36, 0.96), "thread_top": (0.36, 0.96)}
    at = ((np.arange(128) + 0.5) / 128).astype(np.float32)
    for kind, (low, high) in spans.items():
        for seed in range(6):
            mask = render_screw_defect(kind, seed, 128, 0.6)[1]
            u = Screw(seed).place(at[None], at[:, None])[0][mask]
            assert low < u.min() and u.max() < high, kind


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="melted", seed=0), "kind=melted"),
        (dict(kind="thread_top", seed=0, severity=1.5), "severity=1.5"),
        (dict(kind="thread_top", seed=0, severity=float("nan")), "severity=nan"),
        (dict(kind="thread_top", seed=-1), "seed=-1"),
        (dict(kind="thread_top", seed=0, size=8), "size=8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        render_screw_defect(**arguments)


# ---- scenes


def test_scenes():
    assert find_scene("screw") == SCENE and SCENE.kinds == KINDS
    assert find_scene("zipper") == synth.SCENES["zipper"] and find_scene("zipper").kinds == synth.KINDS
    with pytest.raises(InputError, match="scene=screws: no such scene.*screw"):
        find_scene("screws")
    with pytest.raises(InputError, match="scene=teapot.*screw, zipper"):
        find_scene("teapot")


def test_the_screw_is_found_without_importing_it():
    code = (
        "import sys, zipper_ad.synth as s; assert 'zipper_ad.screw' not in sys.modules\n"
        "print(len(s.find_scene('screw').kinds), s.find_scene('screw').render_good(1, 32).shape)"
    )
    assert python(code) == "5 (32, 32)"


def test_dataset_of_screws(tmp_path):
    out = render_dataset(tmp_path / "screws", n_train=3, n_test=2, size=64, seed=4, scene="screw", progress=False)
    assert sorted(p.name for p in (out / "test").iterdir()) == sorted(["good", *KINDS])
    assert len(list((out / "train/good").iterdir())) == 3 and len(list((out / "test/good").iterdir())) == 6
    about = json.loads((out / "synth.json").read_text())
    assert (about["scene"], about["seed"], about["size"], len(about["images"])) == ("screw", 4, 64, 3 + 6 + 2 * 5)
    for item in about["images"]:
        image = np.asarray(Image.open(out / item["file"]))
        if item["kind"] == "good":
            assert (image == render_screw(item["seed"], 64)).all()
            continue
        again, mask = render_screw_defect(item["kind"], item["seed"], 64, item["severity"])
        assert (image == again).all() and (np.asarray(Image.open(out / item["mask"])) == mask * 255).all()
        assert "seed" in item and item["severity"] in (0.3, 1.0)


def test_dataset_of_screws_does_not_depend_on_workers(tmp_path):
    folders = [render_dataset(tmp_path / str(n), n_train=8, n_test=2, size=32, scene="screw", workers=n, progress=False) for n in (1, 2)]
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert contents[0] == contents[1]


def test_unknown_scene_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="scene=nail"):
        render_dataset(tmp_path / "x", n_train=1, n_test=0, scene="nail", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_scene_of_ones_own(tmp_path, monkeypatch):
    def defect(kind, seed, size, severity):
        return render_zipper(seed, size), np.ones((size, size), bool)

    monkeypatch.setitem(synth.SCENES, "mine", synth.Scene(("odd",), render_zipper, defect))
    out = render_dataset(tmp_path / "m", n_train=1, n_good=1, n_test=1, size=32, scene="mine", progress=False)
    assert (out / "ground_truth/odd/000_mask.png").exists()
    assert json.loads((out / "synth.json").read_text())["scene"] == "mine"


# ---- the command line


def test_render_command(tmp_path, capsys):
    assert main(["data", "render", f"out={tmp_path / 's'}", "scene=screw", "n_train=2", "n_test=1", "size=32"]) == 0
    assert "2 good screws to train on and a test set of 3 good and 5 defective ones" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "synth.json").read_text())["scene"] == "screw"


def test_render_command_with_an_unknown_scene(tmp_path, capsys):
    assert main(["data", "render", f"out={tmp_path / 's'}", "scene=scrw"]) == 2
    message = capsys.readouterr().err.strip()
    assert "scene=scrw: no such scene" in message and "screw" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []
