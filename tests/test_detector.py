"""The detector: one verdict whatever the picture comes as, and a folder that can be trusted and moved."""

import dataclasses
import json
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import Trap
from PIL import Image
from sklearn.metrics import roc_auc_score

from zipper_ad.config import make_config
from zipper_ad.core import InputError
from zipper_ad.detector import Detector, Verdict, choose_maps
from zipper_ad.models.head import Restorer
from zipper_ad.pixels import at_size
from zipper_ad.synth import render_defect, render_zipper

SMALL = ["data.size=64", "model.widths=[4,8]", "model.latent=8", "model.head_widths=[4,8]"]


def zippers(n, channels=1, size=64):
    grey = torch.from_numpy(np.stack([render_zipper(seed, size) for seed in range(n)])).float().div(255)[:, None]
    return grey.repeat(1, channels, 1, 1)


def fitted(*settings, n=12):
    "A detector around a network that was never trained."
    config = make_config([*SMALL, *settings])
    torch.manual_seed(0)
    model = Restorer(config.model)
    with torch.no_grad():
        for p in model.parameters():  # a fresh damage map is almost flat
            p.add_(0.05 * torch.randn_like(p))
    return Detector.fit(model, zippers(n, config.data.channels), config)


def same(a: Verdict, b: Verdict, tolerance=0.0):
    for name in ("anomaly_map", "image", "reconstruction"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape and x.dtype == y.dtype == np.float32
        assert np.abs(x - y).max() <= tolerance * max(np.abs(x).max(), 1), name
    assert abs(a.score - b.score) <= tolerance * max(abs(a.score), 1)
    if tolerance == 0:
        assert (a.mask == b.mask).all() and a.p_value == b.p_value
    assert a.is_anomalous == b.is_anomalous


@pytest.fixture(scope="module")
def detector(trained):
    return Detector.load(trained.run, "cpu")


@pytest.fixture
def paths(trained):
    return sorted((trained.data / "test/good").iterdir())


# ---------------------------------------------------------------- what a verdict is
def test_verdict(detector, paths):
    v = detector.predict(paths[0])
    assert v.path == paths[0] and v.error is None and type(v.score) is float and type(v.is_anomalous) is bool
    assert v.anomaly_map.shape == v.mask.shape == v.image.shape == v.reconstruction.shape == (64, 64)
    assert v.mask.dtype == bool and (v.mask == (v.anomaly_map > detector.pixel_threshold)).all()
    assert v.is_anomalous == (v.score > detector.threshold.value)
    assert v.score == pytest.approx(v.anomaly_map.max())  # pooled by max
    assert v.p_value == (1 + (detector.calibration_scores >= v.score).sum()) / (len(detector.calibration_scores) + 1)
    assert 0 <= v.image.min() and v.image.max() <= 1 and 0 <= v.reconstruction.min() and v.reconstruction.max() <= 1
    low, high = detector.map_scale
    assert low < high and np.isfinite([low, high, detector.pixel_threshold]).all()


def test_threshold_is_one_of_the_calibration_scores(detector):
    assert detector.threshold.value in detector.calibration_scores and detector.threshold.n_calibration == len(detector.calibration_scores)
    assert (detector.calibration_scores > detector.threshold.value).mean() <= detector.threshold.promised_fpr


def test_the_same_picture_as_anything(detector, paths):
    array = np.asarray(Image.open(paths[0]).convert("L"))
    once = detector.predict(paths[0])
    same(detector.predict(str(paths[0])), once)
    for thing in (
        Image.open(paths[0]),
        Image.open(paths[0]).convert("RGB"),
        array,
        array[..., None],
        np.stack([array] * 3, -1),
        array / 255,
        (array / 255).astype(np.float32),
        array.astype(np.int64),
        array.astype(np.uint16) * 257,
        np.asfortranarray(array),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy())[None],
        torch.from_numpy(array / 255)[None],
        torch.from_numpy(array / 255).float().expand(3, -1, -1),
        torch.from_numpy(array / 255).requires_grad_(),
    ):
        v = detector.predict(thing)
        assert isinstance(v, Verdict) and v.path is None
        same(v, once)


def test_views_with_other_strides(detector, paths):
    array = np.asarray(Image.open(paths[0]).convert("L"))
    for view in (array[::-1], array[:, ::-1], array.T, array[::2, ::2], np.repeat(array, 2, 1)[:, ::2]):
        same(detector.predict(view), detector.predict(view.copy()))


def test_batches_lists_and_folders(detector, paths):
    arrays = [np.asarray(Image.open(p).convert("L")) for p in paths]
    alone = [detector.predict(p) for p in paths]
    batch = torch.from_numpy(np.stack(arrays)).float().div(255)[:, None]
    forms = paths, tuple(paths), arrays, [Image.open(p) for p in paths], batch, list(batch), paths[0].parent, f"{paths[0].parent}/*.png"
    for form in forms:
        verdicts = detector.predict(form)
        assert isinstance(verdicts, list) and len(verdicts) == len(alone)
        for v, w in zip(verdicts, alone, strict=True):
            same(v, w, 1e-4)
    for bs in (1, 2, 4, 6, 50):
        assert [v.path for v in detector.predict(paths, bs=bs)] == paths
    assert detector.predict([]) == [] and detector.predict(batch[:0]) == []
    assert isinstance(detector.predict([paths[0]]), list) and isinstance(detector.predict(batch[:1]), list)
    mixed = detector.predict([paths[0], arrays[1], batch[2], Image.open(paths[3])])
    assert [v.path is None for v in mixed] == [False, True, True, True]


def test_predicting_leaves_its_input_alone(detector, paths):
    array = np.asarray(Image.open(paths[0]).convert("L")) / 255
    tensor = torch.from_numpy(array.copy())[None]
    before = array.copy(), tensor.clone()
    detector.predict([array, tensor])
    assert (array == before[0]).all() and torch.equal(tensor, before[1])


def test_predicting_takes_no_chance(detector, paths):
    state = torch.get_rng_state()
    same(detector.predict(paths[0]), detector.predict(paths[0]))
    assert torch.equal(torch.get_rng_state(), state) and not detector.model.training


@pytest.mark.parametrize("shape", [(37, 91), (300, 17), (64, 63), (1000, 40), (64, 64, 3), (33, 47, 3)])
def test_any_size(shape, detector):
    v = detector.predict(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert v.anomaly_map.shape == (64, 64) and np.isfinite(v.score) and np.isfinite(v.anomaly_map).all()


@pytest.mark.parametrize("value", [0, 255])
def test_flat_pictures(value, detector):
    assert np.isfinite(detector.predict(np.full((64, 64), value, np.uint8)).score)


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.full((64, 64), np.nan),
        lambda: np.where(np.eye(64) > 0, np.inf, 0.5),
        lambda: np.full((64, 64), np.nan, np.float32),
        lambda: torch.full((1, 64, 64), float("nan")),
        lambda: np.zeros((64, 64, 2)),
        lambda: np.zeros((2, 64, 64, 3, 1)),
        lambda: np.zeros(5),
        lambda: np.float32(3),
        lambda: torch.zeros(2, 64, 64),
        lambda: np.zeros((0, 64)),
        lambda: np.array([["a"]]),
        lambda: None,
    ],
)
def test_what_is_no_picture(make, detector, paths):
    with pytest.raises(InputError):
        detector.predict(make())
    verdicts = detector.predict([paths[0], make(), paths[1]])
    assert [v.error is None for v in verdicts] == [True, False, True]
    assert np.isnan(verdicts[1].score) and verdicts[1].anomaly_map is None and not verdicts[1].is_anomalous


def test_bad_files_among_good_ones(detector, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    verdicts = detector.predict([bad, *paths, bad], bs=2)
    assert [v.path for v in verdicts] == [bad, *paths, bad] and [bool(v.error) for v in verdicts] == [True, *[False] * 6, True]
    with pytest.raises(InputError, match="bad.png"):
        detector.predict(bad)
    with pytest.raises(InputError, match="nowhere"):
        detector.predict(tmp_path / "nowhere.png")


def test_before_fitting_it_says_so(detector):
    with pytest.raises(InputError, match="threshold"):
        Detector(detector.model, detector.config).predict(np.zeros((64, 64), np.uint8))


def test_many_threads_at_once(detector, paths):
    alone, found = [detector.predict(p) for p in paths], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: detector.predict(paths[i])})) for i in range(len(paths))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, v in enumerate(alone):
        same(found[i], v, 1e-4)


# ---------------------------------------------------------------- settings
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("head", ["joint", "discrepancy", "none", "image"])
def test_heads(head, channels, tmp_path):
    detector = fitted(f"model.head={head}", f"data.channels={channels}")
    picture = np.repeat(render_defect("rough", 5, 64, 1.0)[0][..., None], 3, -1)
    verdict = detector.predict(picture)
    assert verdict.image.shape == verdict.reconstruction.shape == ((64, 64) if channels == 1 else (64, 64, 3))
    assert np.isfinite(verdict.score) and verdict.anomaly_map.std() > 0
    detector.save(tmp_path)
    again = Detector.load(tmp_path)
    same(again.predict(picture), verdict)
    same(again.predict(picture[..., 0]), verdict)


@pytest.mark.parametrize(
    "setting",
    [
        "score.map=l1",
        "score.map=l2",
        "score.map=ssim",
        "score.map=msgms",
        "score.map=damage",
        "score.map=damage+ssim",
        "score.map=msgms+l1",
        "score.pool=max",
        "score.pool=mean",
        "score.pool=topk",
        "score.pool=topk score.topk=1",
        "score.pool=topk score.topk=99999",
        "score.calibrate=false",
        "score.sigma=0",
        "score.sigma=20",
        "score.target_fpr=0.3",
        "score.target_fpr=0.9",
        "data.size=61 model.fold=1",
    ],
)
def test_score_settings(setting, tmp_path):
    if "data.size" in setting:
        config = make_config([*SMALL, *setting.split()])
        detector = Detector.fit(Restorer(config.model), zippers(12, size=61), config)
    else:
        detector = fitted(*setting.split())
    picture = render_zipper(99, 64)
    verdict = detector.predict(picture)
    assert np.isfinite(verdict.score)
    kind = detector.config.score.pool
    assert verdict.score <= verdict.anomaly_map.max() + 1e-5
    if kind == "mean" or "99999" in setting:
        assert verdict.score == pytest.approx(verdict.anomaly_map.mean(), abs=1e-4)
    if kind == "max" or setting.endswith("topk=1"):
        assert verdict.score == pytest.approx(verdict.anomaly_map.max(), abs=1e-6)
    detector.save(tmp_path)
    same(Detector.load(tmp_path).predict(picture), verdict)


@pytest.mark.parametrize(
    "settings, hint",
    [
        ("model.head=none score.map=damage", "score.map=auto"),
        ("score.map=damge", "damage"),
        ("score.map=damage+x", "no such map"),
        ("score.map=l1+ssim score.calibrate=false", "calibrate"),
        ("score.pool=median", "max, topk, mean"),
        ("score.sigma=-1", "sigma"),
        ("score.pool=topk score.topk=0", "k="),
        ("score.target_fpr=1", "target_fpr"),
    ],
)
def test_wrong_score_settings(settings, hint):
    with pytest.raises(InputError, match=hint.replace(".", "[.]")):
        fitted(*settings.split())


@pytest.mark.parametrize(
    "settings, kinds",
    [
        ("", ["damage", "l2", "ssim", "msgms"]),
        ("model.head=discrepancy", ["damage", "l2", "ssim", "msgms"]),
        ("model.head=none", ["l2", "ssim", "msgms"]),
        ("model.head=image", ["damage"]),
        ("score.calibrate=false", ["damage"]),
        ("model.head=none score.calibrate=false", ["msgms"]),
        ("score.map=msgms", ["msgms"]),
        ("score.map=l1+damage", ["l1", "damage"]),
    ],
)
def test_which_maps_make_the_score(settings, kinds):
    config = make_config([*SMALL, *settings.split()])
    detector = Detector(Restorer(config.model), config)
    assert choose_maps(config) == detector.map_kinds == kinds and detector.locations == {}


def test_each_map_has_its_calibration():
    detector = fitted("score.map=damage+ssim+l1")
    assert list(detector.locations) == ["damage", "ssim", "l1"] and not fitted("score.calibrate=false").locations
    _, *maps = detector.raw_maps(zippers(2))
    damage, *errors = (detector.locations[k](m) for k, m in zip(detector.map_kinds, maps, strict=True))
    assert torch.allclose(detector.maps_and_scores(zippers(2))[0], (damage + torch.maximum(*errors)) / 2, atol=1e-6)


@pytest.mark.parametrize("stride", [2, 4])
def test_judging_coarser_maps(stride, tmp_path):
    detector = fitted(f"score.stride={stride}")
    _, *maps = detector.raw_maps(zippers(8))
    assert {m.shape for m in maps} == {(8, 1, 64 // stride, 64 // stride)}
    assert {loc.mean.shape for loc in detector.locations.values()} == {(1, 64 // stride, 64 // stride)}
    found, scores, _ = detector.maps_and_scores(zippers(8))
    assert found.shape == (8, 1, 64, 64) and torch.equal(scores, found.flatten(1).amax(1))  # anomalous where a pixel is marked
    detector.save(tmp_path)
    assert torch.equal(Detector.load(tmp_path).maps_and_scores(zippers(8))[0], found)
    with pytest.raises(InputError, match="score.stride=3: must divide data.size=64"):
        make_config([*SMALL, "score.stride=3"])


@pytest.mark.parametrize("kinds", ["damage", "ssim", "ssim+l1"])
def test_one_witness_is_not_averaged(kinds):
    detector = fitted(f"score.map={kinds}")
    _, *maps = detector.raw_maps(zippers(2))
    parts = [detector.locations[k](m) for k, m in zip(detector.map_kinds, maps, strict=True)]
    assert torch.allclose(detector.maps_and_scores(zippers(2))[0], torch.stack(parts).amax(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "ssim", "damage+ssim"])
def test_the_control_has_no_error_maps(kind):
    with pytest.raises(InputError, match="score.map"):
        fitted("model.head=image", f"score.map={kind}")


@pytest.mark.parametrize("normals, reference", [(0, None), (1, None), (2, None), (5, 1), (0, 5), (5, 0)])
def test_too_few_normals(normals, reference):
    config = make_config(SMALL)
    with pytest.raises(InputError, match="normal"):
        Detector.fit(
            Restorer(config.model),
            zippers(normals) if normals else torch.zeros(0, 1, 64, 64),
            config,
            None if reference is None else zippers(12)[:reference],
        )


def test_a_rate_that_is_kept_with_confidence(tmp_path, caplog):
    "Of 24 scores the fourth keeps 18 % on average, and in 95 of 100 cases only the highest does; too few pictures say so."
    usual, sure = (fitted("score.target_fpr=0.18", *more, n=40) for more in ([], ["score.confidence=0.95"]))
    n = sure.threshold.n_calibration
    assert n == 24 and (sure.calibration_scores == usual.calibration_scores).all()
    assert [round(d.threshold.promised_fpr * (n + 1)) for d in (usual, sure)] == [4, 1]
    assert sure.threshold.value == sure.calibration_scores[-1] and not sure.threshold.message
    assert sure.pixel_threshold >= usual.pixel_threshold
    sure.save(tmp_path)
    assert Detector.load(tmp_path).threshold == sure.threshold
    few = fitted("score=guaranteed", n=12)
    assert few.config.score.confidence == 0.95 and "Hold out 59 or more" in few.threshold.message == caplog.messages[-1]


def test_batch_size_of_fitting_does_not_matter():
    "19 normals are judged in batches of 16 and 3."
    config = make_config([*SMALL, "score.calibrate=false"])
    torch.manual_seed(1)
    detector = Detector.fit(Restorer(config.model), zippers(19), config, zippers(2))
    alone = np.sort([detector.predict(z).score for z in zippers(19)])
    assert np.allclose(alone, detector.calibration_scores, atol=1e-4) and detector.threshold.promised_fpr == pytest.approx(0.05)


# ---------------------------------------------------------------- on disk
def test_saving_and_loading_changes_nothing(detector, paths, tmp_path, contents):
    detector.save(tmp_path / "a")
    again = Detector.load(tmp_path / "a")
    for (k, v), (name, w) in zip(detector.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert k == name and v.dtype == w.dtype and torch.equal(v, w)
    assert again.threshold == detector.threshold and again.config == detector.config and again.map_scale == detector.map_scale
    assert again.pixel_threshold == detector.pixel_threshold and again.data_fingerprint == detector.data_fingerprint
    assert again.calibration_scores.dtype == np.float64 and (again.calibration_scores == detector.calibration_scores).all()
    for p in paths:
        same(again.predict(p), detector.predict(p))
    again.save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and set(contents(tmp_path / "a")) == {
        "detector.json",
        "weights.safetensors",
    }


def test_a_moved_folder_is_the_same(trained, detector, paths, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("detector.json", "weights.safetensors"):  # nothing else is needed
        shutil.copy(trained.run / name, tmp_path / "elsewhere")
    same(Detector.load(tmp_path / "elsewhere").predict(paths[0]), detector.predict(paths[0]))


def test_from_a_learner(trained, paths, tmp_path):
    "What training leaves in memory and what is read from disk judge alike."
    from zipper_ad.learner import train_autoencoder

    config = make_config([*trained.settings, f"data={trained.data}", "train.epochs=1", "train.precision=fp32"])
    learn, dataset, split = train_autoencoder(config)
    detector = Detector.fit(learn, dataset.batch(split.calibration), config, dataset.batch(split.valid))
    detector.save(tmp_path)
    again = Detector.load(tmp_path)
    for p in paths:
        same(again.predict(p), detector.predict(p), 1e-4)
    normals = dataset.batch(split.calibration)
    assert np.allclose(sorted(v.score for v in again.predict(normals)), detector.calibration_scores, atol=1e-4)


def test_detector_json_is_plain(trained):
    facts = json.loads((trained.run / "detector.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert {"format", "version", "config", "threshold", "pixel_threshold", "map_scale", "calibration_scores", "data_fingerprint"} <= set(
        facts
    )
    assert len(facts["weights_sha256"]) == 64 and facts["threshold"]["value"] in facts["calibration_scores"]
    assert len(facts["data_fingerprint"]) == 16


@pytest.mark.parametrize("how", ["pickle", "torch", "torch-legacy", "numpy"])
def test_nothing_is_unpickled(how, trained, tmp_path):
    from zipper_ad.models.base import BaseAutoencoder

    marker, run = tmp_path / "marker", shutil.copytree(trained.run, tmp_path / "run")
    weights = run / "weights.safetensors"
    with weights.open("wb") as f:
        if how == "pickle":
            pickle.dump({"model": Trap(marker)}, f)
        elif how == "numpy":
            np.save(f, np.array([Trap(marker)], dtype=object), allow_pickle=True)
        else:
            torch.save({"model": Trap(marker)}, f, _use_new_zipfile_serialization=how == "torch")
    for load, place in ((Detector.load, run), (BaseAutoencoder.load, weights)):
        with pytest.raises(InputError, match="weights.safetensors"):
            load(place)
    assert not marker.exists()
    with weights.open("rb") as f:  # the trap does work
        (np.load(f, allow_pickle=True) if how == "numpy" else pickle.load(f) if how == "pickle" else torch.load(f, weights_only=False))
    assert marker.exists()


def test_yaml_runs_nothing(tmp_path):
    from zipper_ad.config import load_config

    marker = tmp_path / "marker"
    (tmp_path / "config.yaml").write_text(f"seed: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    with pytest.raises(Exception):  # noqa: B017
        load_config(tmp_path / "config.yaml")
    assert not marker.exists()


def test_weights_of_another_network(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    other = fitted()
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other/weights.safetensors", run)
    with pytest.raises(InputError, match="not the one"):
        Detector.load(run)
    facts, others = (json.loads((tmp_path / f / "detector.json").read_text()) for f in ("run", "other"))
    (run / "detector.json").write_text(json.dumps(facts | {"weights_sha256": others["weights_sha256"]}))
    with pytest.raises(InputError, match="do not fit"):
        Detector.load(run)


@pytest.mark.parametrize("how", ["another run's", "one bit"])
def test_weights_changed_behind_its_back(how, trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    weights = run / "weights.safetensors"
    if how == "one bit":
        data = bytearray(weights.read_bytes())
        data[-20_000] ^= 64
        weights.write_bytes(data)
    else:
        detector = Detector.load(run)
        with torch.no_grad():
            next(detector.model.parameters()).mul_(2)
        detector.save(tmp_path / "other")
        shutil.copy(tmp_path / "other/weights.safetensors", run)
    with pytest.raises(InputError, match="weights"):
        Detector.load(run)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": {"value": float("nan")}},  # nothing would ever be anomalous
        {"threshold": {"promised_fpr": "x"}},
        {"threshold": {"n_calibration": "x"}},
        {"pixel_threshold": float("nan")},
        {"map_scale": ["a", "b"]},
        {"map_scale": [1]},
        {"calibration_scores": []},
        {"config": {"data": {"size": 0}}},
        {"config": {"data": {"size": 256}}},  # the calibration is for 64
        {"config": {"model": {"widths": []}}},
        {"config": {"model": "cnn"}},
        {"config": []},
    ],
    ids=str,
)
def test_numbers_that_cannot_be(change, trained, tmp_path):
    def merge(old, new):
        return {**old, **{k: merge(old[k], v) for k, v in new.items()}} if isinstance(new, dict) else new

    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "detector.json").write_text(json.dumps(merge(json.loads((run / "detector.json").read_text()), change)))
    with pytest.raises(InputError):
        Detector.load(run)


@pytest.mark.parametrize("family", ["cnn", "resnet", "vit", "diffusion"])
def test_settings_that_ask_for_a_network_that_no_memory_holds(family, trained, tmp_path):
    import resource

    run = shutil.copytree(trained.run, tmp_path / "run")
    facts = json.loads((run / "detector.json").read_text())
    vast = {"widths": [64, 12_000], "width": 12_000 if family == "vit" else 1024}  # gigabytes
    known = dataclasses.asdict(make_config([f"model={family}"]).model)
    facts["config"]["model"] = known | {k: v for k, v in vast.items() if k in known}
    (run / "detector.json").write_text(json.dumps(facts))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="do not fit|model"):
        Detector.load(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(trained):
    with pytest.raises(InputError, match="cuda"):
        Detector.load(trained.run, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_agrees(trained, detector, paths):
    gpu = Detector.load(trained.run, "cuda")
    for p in paths:
        assert abs(gpu.predict(p).score - detector.predict(p).score) < 0.02


# ---------------------------------------------------------------- measuring
def test_evaluate(trained, detector):
    metrics, verdicts, dataset = detector.evaluate(trained.data, n_bootstrap=20)
    assert len(verdicts) == len(dataset) == 20 and [v.path for v in verdicts] == dataset.paths
    same(verdicts[3], detector.predict(dataset.paths[3]), 1e-4)
    assert metrics["data_fingerprint"] != metrics["training_fingerprint"] == detector.data_fingerprint
    json.dumps(metrics, allow_nan=False)


def test_pixel_figures_are_measured_at_the_size_of_the_masks(trained, detector, tmp_path):
    "Pictures and masks enlarged without any change of content and of another aspect: figures of the same maps at that size."
    root = shutil.copytree(trained.data / "test", tmp_path / "root/test").parent
    shutil.copytree(trained.data / "ground_truth", root / "ground_truth")
    files = sorted(root.glob("test/rough/*")) + sorted(root.glob("ground_truth/rough/*"))
    for file in files:
        image = Image.open(file)
        image.resize((image.width * 2, image.height * 3), Image.NEAREST).save(file)
    metrics, verdicts, dataset = detector.evaluate(root, n_bootstrap=10)
    pixel, masks = metrics["pixel"], dataset.native_masks()
    assert pixel["resolution"] == "native masks" and {m.shape for m in masks} == {(64, 64), (192, 128)}
    truth = np.concatenate([m.ravel() for m in masks])
    values = np.concatenate([at_size(v.anomaly_map, m.shape).ravel() for v, m in zip(verdicts, masks, strict=True)])
    assert abs(pixel["auroc"] - roc_auc_score(truth, values)) <= pixel["bound"]["auroc"] + 1e-12
    tp, union = (truth & (values > detector.pixel_threshold)).sum(), (truth | (values > detector.pixel_threshold)).sum()
    assert pixel["iou"] == pytest.approx(tp / union)


def test_evaluate_with_broken_weights_is_one_line(trained):
    broken = Detector.load(trained.run)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="8 of 8 scores are not finite. Is the model broken"):
        broken.evaluate(trained.data, n_bootstrap=0)


def test_evaluate_with_an_empty_mask_or_none(trained, detector, tmp_path):
    root = shutil.copytree(trained.data / "test", tmp_path / "root/test").parent
    bare = detector.evaluate(root, n_bootstrap=0)[0]
    assert bare["pixel"]["auroc"] is None and bare["pixel"]["notes"] and bare["n"]["with_mask"] == 0
    shutil.copytree(trained.data / "ground_truth", root / "ground_truth")
    Image.new("L", (64, 64), 0).save(sorted((root / "ground_truth/rough").iterdir())[0])
    metrics = detector.evaluate(root, n_bootstrap=0)[0]
    assert metrics["n"]["with_mask"] == 13 and "1 defective images have an empty mask" in metrics["pixel"]["notes"][-1]
    assert bare["image"] == metrics["image"]


def test_evaluate_uses_no_label_for_its_decisions(trained, detector, tmp_path):
    "The same pictures under other labels get the same verdicts."
    root = tmp_path / "root/test"
    shutil.copytree(trained.data / "test/good", root / "rough")
    shutil.copytree(trained.data / "test/rough", root / "good")
    swapped = {v.image.tobytes(): (v.score, v.is_anomalous) for v in detector.evaluate(root.parent, n_bootstrap=5)[1]}
    straight = {v.image.tobytes(): (v.score, v.is_anomalous) for v in detector.evaluate(trained.data, n_bootstrap=5)[1]}
    for key, (score, anomalous) in swapped.items():
        assert straight[key][0] == pytest.approx(score, abs=1e-4) and straight[key][1] == anomalous
