"""A new threshold without a training, a card that invents nothing, and a doctor that names what is broken."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zipper_ad import care
from zipper_ad.care import card, check_packages, check_run, doctor, recalibrate
from zipper_ad.config import make_config, save_config
from zipper_ad.core import InputError
from zipper_ad.data import AnomalyDataset, find_items, fingerprint, split_normals
from zipper_ad.detector import Detector
from zipper_ad.export import export_detector
from zipper_ad.models.head import Restorer
from zipper_ad.synth import render_zipper
from zipper_ad.threshold import conformal_threshold


def photographs(where, seeds, darker=0):
    where.mkdir(parents=True)
    for s in seeds:
        Image.fromarray(np.clip(render_zipper(s, 32).astype(int) - darker, 0, 255).astype(np.uint8)).save(where / f"{s}.png")
    return where


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of pictures, and a detector that was never trained, with the split that a training makes."
    root = tmp_path_factory.mktemp("care")
    photographs(root / "zippers/train/good", range(50))
    small = ["data.size=32", "data.held_out=0.6", "model.widths=[8,16]", "model.latent=8", "train.device=cpu", "score.map=l2"]
    config = make_config([*small, f"data={root / 'zippers'}"])
    torch.manual_seed(0)
    items, pictures = find_items(config.data.root), AnomalyDataset(config.data.root, size=32)
    train, held = split_normals(items, 0.6, config.seed)
    x = pictures.batch(held)
    Detector.fit(Restorer(config.model), x[8:], config, x[:8], fingerprint([items[i] for i in train])).save(root / "run")
    save_config(config, root / "run/config.yaml")
    photographs(root / "new", range(100, 130))
    return root


@pytest.fixture
def ill(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "ill")
    return tmp_path / "ill"


# ---------------------------------------------------------------- recalibrate
def test_threshold_is_the_conformal_one_of_the_new_scores(made, tmp_path, contents):
    before = contents(made / "run")
    found = recalibrate(made / "run", made / "new", tmp_path / "out")
    assert contents(made / "run") == before
    new, old = Detector.load(tmp_path / "out"), Detector.load(made / "run")
    scores = [v.score for v in old.predict(made / "new", bs=16)]
    np.testing.assert_allclose(found.new_scores, np.sort(scores), rtol=1e-5)
    assert new.threshold == found.new == conformal_threshold(found.new_scores, 0.05) and new.threshold.n_calibration == 30
    assert found.old == old.threshold and (new.calibration_scores == found.new_scores).all()
    assert new.data_fingerprint == old.data_fingerprint
    assert all(torch.equal(a, b) for a, b in zip(old.model.state_dict().values(), new.model.state_dict().values(), strict=True))
    record = json.loads((tmp_path / "out/recalibration.json").read_text())
    assert record["old"]["value"] == found.old.value and record["new"]["value"] == found.new.value
    assert not found.drifted and "look like the old" in found.describe()


def test_drift_is_told(made, tmp_path):
    photographs(tmp_path / "dark", range(200, 240), darker=40)
    found = recalibrate(made / "run", tmp_path / "dark", tmp_path / "out")
    assert found.drifted and "do not look like the old" in found.describe()
    assert found.alarms == np.mean(found.new_scores > found.old.value)


def test_asked_rate_decides_how_many_are_enough(made, tmp_path):
    photographs(tmp_path / "few", range(300, 309))
    with pytest.raises(InputError, match=r"9 distinct.*10.0%, not 5.0%. Give 19 or more, or say target_fpr=0.1"):
        recalibrate(made / "run", tmp_path / "few", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = recalibrate(made / "run", tmp_path / "few", tmp_path / "out", target_fpr=0.1)
    assert (found.new.target_fpr, found.new.promised_fpr) == (0.1, 0.1)
    assert Detector.load(tmp_path / "out").config.score.target_fpr == 0.1


def test_copies_count_once(made, tmp_path):
    photographs(tmp_path / "twins", range(400, 412))
    for s in range(400, 412):
        shutil.copy(tmp_path / f"twins/{s}.png", tmp_path / f"twins/copy-{s}.png")
    with pytest.raises(InputError, match="12 distinct"):
        recalibrate(made / "run", tmp_path / "twins", tmp_path / "out")


def test_training_pictures_are_refused(made, tmp_path):
    with pytest.raises(InputError, match="20 of 50 photographs were trained on"):
        recalibrate(made / "run", made / "zippers", tmp_path / "out")


@pytest.mark.parametrize("rate", [0, 1, -1, float("nan")])
def test_rates_that_are_none(made, tmp_path, rate):
    with pytest.raises(InputError, match="between 0 and 1"):
        recalibrate(made / "run", made / "new", tmp_path / "out", target_fpr=rate)


def test_recalibrate_command(made, tmp_path, cli, refused):
    done = cli("recalibrate", f"run={made / 'run'}", f"data={made / 'new'}", f"out={tmp_path / 'out'}")
    assert done.code == 0 and "threshold:" in done.out and (tmp_path / "out/card.md").is_file()
    assert "holds a detector already" in refused("recalibrate", f"run={made / 'run'}", f"data={made / 'new'}", f"out={tmp_path / 'out'}")
    assert "must be a float" in refused("recalibrate", f"run={made / 'run'}", f"data={made / 'new'}", "out=x", "target_fpr=few")


# ---------------------------------------------------------------- card
def test_card_says_what_is_known_and_no_more(made, ill, cli):
    text = card(ill)
    facts = json.loads((ill / "detector.json").read_text())
    assert facts["data_fingerprint"] in text and f"{facts['threshold']['value']:.6g}" in text and facts["weights_sha256"] in text
    assert "Not yet" in text and "None" not in text and "nan" not in text
    metrics = {"n": {"good": 20, "defective": 30}, "image": {"auroc": 0.91, "f1": 0.8, "ci": {"auroc": [0.85, 0.95]}}, "pixel": None,
               "threshold": {"observed_fpr": 0.1}}  # fmt: skip
    (ill / "metrics.json").write_text(json.dumps(metrics))
    assert cli("card", f"run={ill}").code == 0
    text = (ill / "card.md").read_text(encoding="utf-8")
    assert "20 good and 30 defective" in text and "0.910 (0.850 to 0.950)" in text and "2 of 20" in text and "| image f1 | 0.800 |" in text
    assert "image precision" not in text


def test_card_of_a_real_training(trained):
    text = card(trained.run)
    training = json.loads((trained.run / "training.json").read_text())
    assert f"| good photographs trained on | {training['images']['train']} |" in text and f"| epochs | {training['epochs']} |" in text
    assert torch.__version__ in text


def test_training_leaves_a_card_and_evaluating_renews_it(trained, tmp_path, cli):
    run = shutil.copytree(trained.run, tmp_path / "run")
    assert "Not yet" in (run / "card.md").read_text(encoding="utf-8")
    assert cli("evaluate", f"run={run}", f"data={trained.data}").code == 0
    measured = json.loads((run / "metrics.json").read_text())["image"]["auroc"]
    assert f"| image auroc | {measured:.3f} (" in (run / "card.md").read_text(encoding="utf-8")
    assert [f.level for f in check_run(run)].count("PROBLEM") == 0 and cli("doctor", f"run={run}").code == 0


def test_text_from_outside_stays_text(ill):
    hostile = "<img src=x onerror=alert(1)>"
    rewrite(ill / "detector.json", lambda d: d["config"]["data"].update(root=hostile))
    assert "<img" not in card(ill.rename(ill.with_name(hostile)))


def test_a_broken_metrics_file_is_left_out(ill):
    (ill / "metrics.json").write_text("[1")
    assert "Not yet" in card(ill)


# ---------------------------------------------------------------- doctor
def rewrite(file, change):
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


DAMAGE = {
    "no detector.json": (lambda f: (f / "detector.json").unlink(), "PROBLEM", "detector.json is missing"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "PROBLEM", "weights.safetensors is missing"),
    "weights cut": (lambda f: (f / "weights.safetensors").write_bytes(b"x" * 99), "PROBLEM", "changed or cut short"),
    "no JSON": (lambda f: (f / "detector.json").write_bytes(b"\xff\x00{"), "PROBLEM", "no JSON"),
    "other format": (lambda f: rewrite(f / "detector.json", lambda d: d.update(format=1)), "PROBLEM", "format 1, by zipper_ad"),
    "no number": (lambda f: rewrite(f / "detector.json", lambda d: d["threshold"].update(value=None)), "PROBLEM", "threshold: None"),
    "NaN": (lambda f: rewrite(f / "detector.json", lambda d: d["threshold"].update(value=float("nan"))), "PROBLEM", "threshold: nan"),
    "other model": (lambda f: rewrite(f / "detector.json", lambda d: d["config"]["model"].update(latent=99)), "PROBLEM", "do not fit"),
    "data gone": (lambda f: rewrite(f / "detector.json", lambda d: d["config"]["data"].update(root="gone")), "WARNING", "gone: no such"),
    "other data": (lambda f: rewrite(f / "detector.json", lambda d: d.update(data_fingerprint="0")), "WARNING", "holds other ones"),
    "half a file": (lambda f: (f / ".part-abc").write_bytes(b"x"), "WARNING", "half-written"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_each_damage_is_named(ill, what):
    assert {f.level for f in check_run(ill)} == {"OK"}
    change, level, said = DAMAGE[what]
    change(ill)
    found = [f for f in check_run(ill) if f.level != "OK"]
    assert [f.level for f in found] == [level] and said in found[0].what and "\n" not in str(found[0])
    assert found[0].remedy or "train again" in found[0].what


def test_unfinished_training_and_no_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/state.safetensors").write_bytes(b"x")
    assert "resume=true" in check_run(tmp_path)[0].remedy
    assert check_run(tmp_path / "gone")[0].level == "PROBLEM"


def test_exported_file(made, tmp_path):
    file = export_detector(Detector.load(made / "run"), tmp_path, "torchscript")
    assert [f.level for f in check_run(file)] == ["OK"] * 3
    (tmp_path / (file.name + ".json")).unlink()
    assert [f.level for f in check_run(file)] == ["WARNING", "OK", "OK"]
    file.write_bytes(file.read_bytes()[:500])
    assert [f.level for f in check_run(file)] == ["PROBLEM"]


def test_missing_old_and_optional_packages(monkeypatch):
    real = care._installed
    fake = {"safetensors": None, "numpy": "1.0", "fsspec": None}
    monkeypatch.setattr(care, "_installed", lambda name: fake.get(name, real(name)) if name in fake else real(name))
    found = {f.what.split(":")[0]: f for f in check_packages()}
    assert found["packages"].level == "PROBLEM" and "safetensors" in found["packages"].what and "numpy 1.0" in found["packages"].what
    assert found["scale"].level == "WARNING" and "fsspec" in found["scale"].what
    assert "pip install 'zipper_ad[scale]'" in found["scale"].remedy


def test_old_python_no_torch_no_room_no_browser(monkeypatch, tmp_path):
    monkeypatch.setattr(care.sys, "version_info", (3, 8, 0))
    assert check_packages()[0].level == "PROBLEM"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "Torch cannot be used" in care.check_torch()[0].what
    monkeypatch.undo()
    monkeypatch.setattr(care.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5e7})())
    monkeypatch.setattr(care.shutil, "which", lambda name: None)
    assert [f.level for f in care.check_system(tmp_path)] == ["OK", "PROBLEM", "WARNING"]
    assert care.check_system(tmp_path / "gone")[0].level == "PROBLEM"


def test_doctor_command(made, ill, cli):
    assert not [f for f in doctor(made / "run") if f.level == "PROBLEM"]
    assert cli("doctor", f"run={made / 'run'}").code == 0
    (ill / "weights.safetensors").unlink()
    done = cli("doctor", f"run={ill}")
    assert done.code == 1 and "PROBLEM  weights.safetensors is missing" in done.out


def test_recalibrate_keeps_what_is_guaranteed(made, tmp_path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    facts = json.loads((run / "detector.json").read_text())
    facts["config"]["score"]["confidence"] = 0.95
    (run / "detector.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="with 95% confidence, not .* Give 59 or more"):
        recalibrate(run, made / "new", tmp_path / "out", target_fpr=0.05)
    assert not (tmp_path / "out").exists()
