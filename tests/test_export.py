"""An exported file says what the detector says, in every family, format and precision, and wrong input is answered in a line."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from zipper_ad.config import make_config
from zipper_ad.core import InputError
from zipper_ad.corrupt import Corruption
from zipper_ad.data import to_tensor
from zipper_ad.detector import Detector
from zipper_ad.export import DetectorGraph, Preprocess, export_detector, export_path, fold_norms, resize_matrix, to_onnx
from zipper_ad.losses import ReconstructionLoss, focal_loss
from zipper_ad.models.head import Restorer
from zipper_ad.picture import need
from zipper_ad.pose import Upright
from zipper_ad.predictor import Predictor, check_files, read_facts, refuse_pickles
from zipper_ad.screw import render_screw
from zipper_ad.synth import render_defect, render_zipper

TINY = {
    "cnn": ["model.widths=[8,16]", "model.latent=8"],
    "resnet": ["model.depth=10", "model.width=8", "model.latent=16"],
    "vit": ["model.width=32", "model.heads=2", "model.blocks=1", "model.decoder_width=32", "model.passes=3"],
    "diffusion": ["model.widths=[8,16]", "model.passes=2"],
}
FAMILIES = list(TINY)


def fitted(family, *settings, n=40):
    "A detector around a network that was never trained."
    config = make_config([f"model={family}", "data.size=32", *TINY[family], *settings])
    torch.manual_seed(0)
    model = Restorer(config.model)
    with torch.no_grad():
        for p in model.parameters():  # a fresh damage map is almost flat
            p.add_(0.05 * torch.randn_like(p))
    x = torch.from_numpy(np.stack([render_zipper(s, 32) for s in range(n)]))[:, None].expand(-1, config.data.channels, -1, -1) / 255
    return Detector.fit(model, x, config)


@pytest.fixture(scope="module")
def detectors():
    made = {}
    return lambda family: made.setdefault(family, None) or made.update({family: fitted(family)}) or made[family]


def trained(family, steps=80):
    "A detector whose network was trained for some seconds, so that its maps lie where those of a real one do."
    config = make_config([f"model={family}", "data.size=32", *TINY[family]])
    torch.manual_seed(0)
    x = torch.from_numpy(np.stack([render_zipper(s, 32) for s in range(80)]))[:, None] / 255
    model, corruption, loss = Restorer(config.model), Corruption(), ReconstructionLoss({"mse": 10, "l1": 1, "ssim": 1})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        damaged = corruption(clean := x[torch.randint(40, (8,))])
        restored = model(damaged.image)
        optimizer.zero_grad()
        (loss(restored.image, clean) + 5 * focal_loss(restored.logit, damaged.mask)).backward()
        optimizer.step()
    return Detector.fit(model, x[40:], config)


@pytest.fixture(scope="module")
def trained_detectors():
    made = {}
    return lambda family: made[family] if family in made else made.setdefault(family, trained(family))


@pytest.fixture(scope="module")
def photographs():
    return [render_zipper(70, 32), render_zipper(71, 50)[:44], *(render_defect(k, 72, 32, 1.0)[0] for k in ("broken_teeth", "rough"))]


def compare(verdicts, expected, tolerance):
    for v, e in zip(verdicts, expected, strict=True):
        assert v.error is None and abs(v.score - e.score) <= tolerance * max(1, abs(e.score))
        assert np.abs(v.anomaly_map - e.anomaly_map).max() <= 10 * tolerance * max(1, np.abs(e.anomaly_map).max())
        assert (v.image == e.image).all() and v.mask.shape == e.mask.shape and v.mask.dtype == bool
        assert type(v.is_anomalous) is bool and type(v.score) is float


# ---------------------------------------------------------------- the graph
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_says_what_the_detector_says(detectors, family, photographs):
    detector = detectors(family)
    graph, expected = DetectorGraph(detector), detector.predict(photographs)
    for photograph, e in zip(photographs, expected, strict=True):
        with torch.inference_mode():
            score, p, anomalous, anomaly_map = (o.numpy() for o in graph(torch.from_numpy(photograph)[None, ..., None]))
        assert abs(score[0] - e.score) <= 1e-4 * max(1, abs(e.score)) and bool(anomalous[0]) == e.is_anomalous
        assert p[0] == pytest.approx(e.p_value) and np.abs(anomaly_map[0] - e.anomaly_map).max() < 2e-3


@pytest.mark.parametrize("settings", [
    ["score=topk"], ["score.calibrate=false", "score.map=msgms"], ["data.channels=3"], ["score.sigma=0"], ["score.stride=2"],
    ["score.stride=4", "score.sigma=0", "score.map=damage+l2"],
])  # fmt: skip
def test_graph_in_other_settings(settings, photographs):
    detector = fitted("cnn", *settings)
    graph, channels = DetectorGraph(detector), detector.config.data.channels
    pixels = np.repeat(photographs[2][None, ..., None], channels, 3)
    with torch.inference_mode():
        score = graph(torch.from_numpy(pixels))[0].item()
    assert score == pytest.approx(detector.predict(pixels[0].squeeze()).score, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("head", ["none", "discrepancy", "image"])
def test_graph_with_other_heads(head, photographs):
    detector = fitted("cnn", f"model.head={head}", "model.head_widths=[4,8]")
    with torch.inference_mode():
        score = DetectorGraph(detector)(torch.from_numpy(photographs[2])[None, ..., None])[0].item()
    assert score == pytest.approx(detector.predict(photographs[2]).score, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_parts_that_lie_at_any_angle(format, tmp_path):
    x = torch.from_numpy(np.stack([render_screw(s, 64) for s in range(24)]))[:, None] / 255
    config = make_config(["data.size=64", "data.pose=turned", *TINY["cnn"], "score.map=damage+l2"])
    torch.manual_seed(0)
    detector = Detector.fit(Restorer(config.model), x[8:], config, x[:8], upright=Upright().fit(x[:8]))
    with torch.no_grad():
        for p in detector.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    screws = [render_screw(s, 64) for s in range(100, 104)] + [render_screw(104, 80)]
    expected = detector.predict(screws)
    verdicts = Predictor(export_detector(detector, tmp_path, format), threads=1).predict(screws)
    compare(verdicts, expected, 1e-3)  # sums in another order move the pixels of a turned part a little


def test_graph_leaves_the_detector_alone(detectors, photographs):
    detector = detectors("cnn")
    before = detector.predict(photographs[0]).score
    DetectorGraph(detector)(torch.zeros(1, 32, 32, 1, dtype=torch.uint8))
    assert detector.predict(photographs[0]).score == before
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in detector.model.modules())


@pytest.mark.parametrize("side", [16, 31, 32, 33, 64, 100, 251])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_that_of_the_detector(side, channels):
    picture = np.random.default_rng(side).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
    assert torch.equal(Preprocess(32, channels)(torch.from_numpy(picture)[None])[0], to_tensor(picture, 32, channels))


def test_float_pixels_are_rounded_to_grey_levels():
    picture = torch.rand(1, 32, 32, 1)
    assert torch.equal(Preprocess(32, 1)(picture)[0], to_tensor(picture[0].numpy(), 32))


def test_resize_weights_are_a_mean():
    for n in (7, 32, 90):
        assert (resize_matrix(n, 32).sum(1) / 2**22 - 1).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["cnn", "resnet"])
def test_no_norm_is_left(detectors, family):
    import copy

    model = detectors(family).model
    folded = fold_norms(copy.deepcopy(model))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with torch.inference_mode():
        x = torch.rand(2, 1, 32, 32)
        assert (folded(x).image - model(x).image).abs().max() < 1e-5


# ---------------------------------------------------------------- every format
@pytest.mark.parametrize("format", ["torchscript", "torch"])
def test_torch_formats(detectors, format, photographs, tmp_path):
    detector = detectors("cnn")
    file = export_detector(detector, tmp_path, format)
    compare(Predictor(file).predict(photographs), detector.predict(photographs), 1e-4)


@pytest.fixture(scope="module")
def onnx_file(detectors, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    return export_detector(detectors("cnn"), tmp_path_factory.mktemp("onnx"), "onnx")


def test_onnx(detectors, onnx_file, photographs):
    expected = detectors("cnn").predict(photographs)
    predictor = Predictor(onnx_file, threads=1)
    compare(predictor.predict(photographs), expected, 1e-4)
    assert [v.is_anomalous for v in predictor.predict(photographs, bs=1)] == [v.is_anomalous for v in expected]
    own = [predictor.judge_pixels(p[None, ..., None])["score"][0] for p in photographs]  # resized by the graph
    assert own == pytest.approx([e.score for e in expected], rel=1e-4, abs=1e-4)


def test_file_shows_no_path_and_keeps_its_facts(onnx_file, detectors):
    assert b".py" not in onnx_file.read_bytes()
    facts = Predictor(onnx_file).facts
    assert facts["threshold"]["value"] == detectors("cnn").threshold.value
    beside = json.loads(onnx_file.with_name(onnx_file.name + ".json").read_text())
    assert set(beside["files"]) == {onnx_file.name} and beside["precision"] == "fp32"


SLOW = [(f, format, p) for f in FAMILIES for format, p in (
    ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "bf16"),
    ("openvino", "int8"), ("torchscript", "fp32"), ("torchscript", "bf16"), ("torch", "fp32"), ("torch", "bf16"))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family,format,precision", SLOW)
def test_every_family_format_and_precision(trained_detectors, family, format, precision, photographs, tmp_path):
    detector = trained_detectors(family)
    normals = torch.from_numpy(np.stack([render_zipper(s, 32) for s in range(100, 140)]))[:, None] / 255
    file = export_detector(detector, tmp_path, format, precision, calibration=normals, agreement=0.7)
    expected, verdicts = detector.predict(photographs), Predictor(file, threads=1).predict(photographs)
    if precision == "fp32":
        compare(verdicts, expected, 1e-4 if format != "openvino" else 3e-4)
        assert [v.is_anomalous for v in verdicts] == [e.is_anomalous for e in expected]
    else:
        spread = np.std(detector.calibration_scores)
        assert max(abs(v.score - e.score) for v, e in zip(verdicts, expected, strict=True)) < max(spread, 1)


# ---------------------------------------------------------------- bad input
def one_line(match, call, *arguments, **named):
    with pytest.raises(InputError, match=match) as e:
        call(*arguments, **named)
    assert "\n" not in str(e.value)


def test_bad_pixels(onnx_file):
    judge = Predictor(onnx_file, threads=1).judge_pixels
    one_line("3 channels", judge, np.zeros((1, 32, 32, 3), np.uint8))
    one_line("none of them 0", judge, np.zeros((0, 32, 32, 1), np.uint8))
    one_line("none of them 0", judge, np.zeros((1, 0, 32, 1), np.uint8))
    one_line("shape", judge, np.zeros((32, 32), np.uint8))
    one_line("sides of 16", judge, np.zeros((1, 8, 32, 1), np.uint8))
    one_line("takes uint8", judge, np.zeros((1, 32, 32, 1), np.float32))


def test_bad_files(onnx_file, tmp_path):
    whole, note = onnx_file.read_bytes(), onnx_file.with_name(onnx_file.name + ".json").read_text()
    cut = tmp_path / onnx_file.name
    cut.write_bytes(whole[: len(whole) // 2])
    one_line("damaged, or not an exported detector", Predictor, cut)
    (tmp_path / f"{cut.name}.json").write_text(note)
    one_line("changed or cut short", Predictor, cut)
    (tmp_path / f"{cut.name}.json").write_text("{")
    one_line("damaged", Predictor, cut)
    (tmp_path / "empty.onnx").touch()
    one_line("empty", Predictor, tmp_path / "empty.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"nothing of the kind" * 100)
    one_line("noise.onnx: damaged, or not", Predictor, tmp_path / "noise.onnx")
    for suffix in (".pt", ".pt2"):
        (tmp_path / f"noise{suffix}").write_bytes(b"nothing of the kind" * 100)
        one_line("damaged, or not", Predictor, tmp_path / f"noise{suffix}")
    one_line("no such file", Predictor, tmp_path / "none.onnx")
    one_line("those end with", Predictor, tmp_path / "detector.json")
    one_line("provider=TPU", Predictor, onnx_file, provider="TPU")


def test_other_versions(tmp_path):
    one_line("reads format", read_facts, '{"format": 99, "version": "9.9"}', tmp_path / "new.onnx")
    for text in (None, "", "[]", '{"format": 1}', "not json"):
        one_line("not an exported detector", read_facts, text, tmp_path / "other.onnx")


def test_a_foreign_onnx_file_is_no_detector(tmp_path):
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("y", 1, [1])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), tmp_path / "foreign.onnx")
    one_line("not an exported detector", Predictor, tmp_path / "foreign.onnx")


@pytest.mark.parametrize("name,data", [
    ("m/data/weights/w_weights_config.json", '{"config": {"w": {"use_pickle": true}}}'), ("m/data/constants/custom_obj_0", "x"),
    ("m/data/constants/opaque_obj_0", "x"), ("m/data/weights/model.pt", "x"), ("m/data/aotinductor/model/x.so", "x"),
])  # fmt: skip
def test_archives_that_would_unpickle_are_refused(tmp_path, name, data):
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        archive.writestr(name, data)
    one_line("run code", refuse_pickles, tmp_path / "evil.pt2")
    one_line("run code", Predictor, tmp_path / "evil.pt2")


def test_a_pickle_among_the_sample_inputs_is_not_loaded(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ("unpickled",)

    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        archive.writestr("m/data/sample_inputs/model.pt", pickle.dumps(Evil()))
    one_line("damaged, or not", Predictor, tmp_path / "evil.pt2")


def test_what_cannot_be_exported(detectors, tmp_path):
    detector = detectors("cnn")
    one_line("no such format", export_path, tmp_path, "tflite")
    one_line("not with format=torchscript", export_path, tmp_path, "torchscript", "int8")
    one_line("ends with .onnx", export_path, tmp_path / "a.pt", "onnx")
    one_line("8 or more normal", export_detector, detector, tmp_path, "onnx", "int8")
    one_line("no threshold yet", DetectorGraph, Detector(detector.model, detector.config))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_told(monkeypatch, detectors, tmp_path):
    for module in ("onnx", "onnxscript"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            one_line(r"zipper_ad\[export\]", to_onnx, DetectorGraph(detectors("cnn")), torch.zeros(2, 32, 32, 1, dtype=torch.uint8))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").write_bytes(b"x")
    one_line("needs the package onnxruntime", Predictor, tmp_path / "a.onnx")
    one_line(r"zipper_ad\[export\]", need, "no_such_package")


def test_json_is_not_needed(onnx_file, tmp_path, photographs):
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(onnx_file.read_bytes())
    check_files(alone)
    assert Predictor(alone, threads=1).predict(photographs[0]).error is None


def test_predict_with_a_file_loads_no_torch_for_its_heatmaps(onnx_file, photographs, tmp_path):
    Image.fromarray(photographs[0]).save(tmp_path / "part.png")
    words = ["predict", f"run={onnx_file}", f"input={tmp_path / 'part.png'}", f"out={tmp_path}"]
    code = (f"import sys; from zipper_ad.cli import main; code = main({words}); "
            "print(code, {'torch', 'fastai', 'scipy', 'sklearn', 'matplotlib.pyplot'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["0 set()"] and len(list((tmp_path / "heatmaps").iterdir())) == 1, done.stderr


def test_predictor_process_loads_no_torch(onnx_file):
    code = ("import sys, numpy as np; from zipper_ad.predictor import Predictor; v = Predictor(sys.argv[1], threads=1).predict("
            "np.zeros((40, 40), np.uint8)); print(v.error, *(m in sys.modules for m in ('torch', 'fastai', 'scipy', 'matplotlib')))")
    done = subprocess.run([sys.executable, "-c", code, str(onnx_file)], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False", "False", "False", "False"], done.stderr
