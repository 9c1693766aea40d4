"""The command line: what it writes, what it says about wrong input, and what it leaves alone."""

import csv
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zipper_ad import __version__
from zipper_ad.cli import COLUMNS, COMMANDS, main
from zipper_ad.config import load_config
from zipper_ad.core import InputError


def python(*words):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120)


def rows_of(out):
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def pngs(folder):
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


@pytest.fixture
def good(trained):
    return sorted((trained.data / "test/good").iterdir())[0]


@pytest.fixture
def predict(cli, trained, tmp_path):
    "Judge what is given; returns the rows of the CSV and the folder."

    def run(source, *settings, code=0):
        out = tmp_path / "verdicts"
        done = cli("predict", f"run={trained.run}", f"input={source}", f"out={out}", *settings)
        assert done.code == code, done
        return rows_of(out), out, done

    return run


def huge_png(path):
    "The header of a picture of 20000×20000 pixels, and no pixels."

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b""))


def spoil(kind, path, good):
    "A file that is no usable picture."
    if kind == "text":
        path.write_text("no picture")
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "1x1":
        Image.new("L", (1, 1)).save(path)
    elif kind == "20000x20000":
        huge_png(path)
    elif kind == "empty":
        path.touch()
    return path


SPOILT = ["text", "truncated", "1x1", "20000x20000", "empty"]


# ---------------------------------------------------------------- the shell
def test_module_says_its_version():
    done = python("-m", "zipper_ad", "--version")
    assert done.returncode == 0 and __version__ in done.stdout and done.stderr == ""


def test_errors_reach_the_shell():
    done = python("-m", "zipper_ad", "predict", "run=nowhere", "input=x.png", "out=y")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("zipper_ad: nowhere: ")


def test_help_and_predict_leave_fastai_alone(trained, good, tmp_path):
    code = f"""
import sys
import time
from zipper_ad.cli import main
for words in (["-h"], ["train", "-h"]):
    try:
        main(words)
    except SystemExit as e:
        assert e.code == 0
heavy = [m for m in ("fastai", "matplotlib", "sklearn", "scipy", "pandas") if m in sys.modules]
assert not heavy, heavy
assert main(["predict", {f"run={trained.run}"!r}, {f"input={good}"!r}, {f"out={tmp_path / 'out'}"!r}]) == 0
heavy = [m for m in ("fastai", "torchvision") if m in sys.modules]
assert not heavy, heavy
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([*command.split(), "-h"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "usage: zipper_ad" in out and command in out
    if command in COMMANDS:
        assert "key=value" in out and "--debug" in out and "=" in COMMANDS[command].__doc__
    else:
        assert all(c.split()[-1] in out for c in COMMANDS if c.startswith(command))


@pytest.mark.parametrize("words", ["trian", "", "data", "data chek", "train --foo"])
def test_unknown_commands(words, capsys):
    with pytest.raises(SystemExit) as e:
        main(words.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and "Traceback" not in err and err.splitlines()[-1].startswith("zipper_ad")


def test_debug_raises(trained, tmp_path, capsys):
    with pytest.raises(InputError, match="nowhere"):
        main(["predict", f"run={trained.run}", f"input={tmp_path / 'nowhere'}", "out=x", "--debug"])


def test_interrupt_is_told_in_a_word(monkeypatch, cli, trained):
    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr("zipper_ad.data.check_data", stop)
    done = cli("data", "check", f"data={trained.data}")
    assert done.code == 130 and done.lines == ["stopped"]


# ---------------------------------------------------------------- training
def test_what_training_leaves(trained):
    files = {p.name for p in trained.run.iterdir()}
    assert {"detector.json", "weights.safetensors", "config.yaml", "history.csv", "log.txt", "checkpoints"} <= files
    assert not [f for f in files if f.startswith(".")]
    config = load_config(trained.run / "config.yaml")
    assert config.data.size == 64 and config.model.widths == [8, 16, 32] and config.train.epochs == 3
    log = (trained.run / "log.txt").read_text()
    assert "epoch" in log and "threshold" in log and "INFO" in log
    history = list(csv.DictReader((trained.run / "history.csv").open()))
    assert len(history) == 3 and "damage_auprc" in history[0]


def test_config_trains_the_same_again(trained):
    facts = json.loads((trained.run / "detector.json").read_text())
    config = load_config(trained.run / "config.yaml")
    assert facts["config"]["train"]["lr"] == config.train.lr and facts["config"]["model"]["latent"] == config.model.latent


def test_a_detector_is_not_overwritten(trained, refused, contents):
    before = contents(trained.run)
    line = refused("train", f"data={trained.data}", f"out={trained.run}", *trained.settings)
    assert str(trained.run) in line and "overwrite=true" in line
    assert contents(trained.run) == before


def test_retrain_only_where_parts_have_changed(trained, cli, tmp_path):
    "From the run's weights and with its settings; the old run stays as it was."
    words = ["retrain", f"run={trained.run}", f"out={tmp_path / 'again'}", "train.epochs=1"]
    done = cli(*words, f"data={trained.data / 'train/good'}")
    assert done.code == 1 and "nothing was trained" in done.out and not (tmp_path / "again").exists()
    (tmp_path / "dim").mkdir()
    for file in (trained.data / "train/good").iterdir():
        Image.fromarray((np.asarray(Image.open(file)) * 0.6).astype(np.uint8)).save(tmp_path / "dim" / file.name)
    before = (trained.run / "detector.json").read_bytes()
    done = cli(*words, f"data={tmp_path / 'dim'}")
    config = load_config(tmp_path / "again/config.yaml")
    assert done.code == 0 and "Something has changed" in done.out and (trained.run / "detector.json").read_bytes() == before
    assert config.train.start == str(trained.run) and config.model == load_config(trained.run / "config.yaml").model


@pytest.mark.parametrize("settings, said", [(["model.latent=4"], "another network"), (["train.start=nowhere"], "no such file"),
                                            (["always=maybe"], "must be a bool"), (["train.epocs=3"], "epochs")])
def test_retrain_what_cannot_be(settings, said, trained, refused, tmp_path):
    words = [f"run={trained.run}", f"data={trained.data}", f"out={tmp_path / 'again'}", *settings]
    assert said in refused("retrain", *words) and not (tmp_path / "again").exists()


def test_overwrite_trains_again(trained, cli, tmp_path):
    shutil.copytree(trained.run, tmp_path / "run")
    (tmp_path / "run/detector.json").write_text("{}")
    done = cli("train", f"data={trained.data}", f"out={tmp_path / 'run'}", *trained.settings, "train.epochs=1", "overwrite=true")
    assert done.code == 0 and json.loads((tmp_path / "run/detector.json").read_text())["format"]


def test_overwrite_loses_nothing_when_it_fails(trained, refused, contents, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    before = contents(run)
    for wrong in (f"data={tmp_path / 'nowhere'}", "data.held_out=.05"):  # told before, and after the folder was opened
        refused("train", f"data={trained.data}", f"out={run}", *trained.settings, wrong, "overwrite=true")
        after = contents(run)
        assert {k: v for k, v in after.items() if k != "log.txt"} == {k: v for k, v in before.items() if k != "log.txt"}


@pytest.mark.parametrize(
    "setting",
    [
        "seed=abc",
        "seed=1.5",
        "train.epochs=abc",
        "data.size=64.5",
        "model.widths=8",
        "model.widths=[8,x]",
        "data.channels=2",
        "data.cache=foo",
        "train.device=foo",
        "model.head=foo",
        "data.held_out=0",
        "data.held_out=1.5",
        "train.epohcs=2",
        "model=foo",
        "preset=foo",
        "model.name=foo",
        "data.root.x=3",
        "train=3",
        "train.epochs",
        "overwrite=maybe",
        "lr=3",
        pytest.param("train.device=cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
        "score.pool=foo",
        "score.map=foo",
        "score.map=damage model.head=none",
        "score.target_fpr=2",
        "score.sigma=-1",
        "data.held_out=.05",
        "data.size=0",
        "data.size=-5",
        "data.size=7",
        "data.size=[64",
        "data.size={",
        "data.size=${foo}",
        "seed=99999999999999999999",
        "model.widths=[]",
        "model.widths=[8]",
        "model.latent=0",
        "model.convolutions=0",
        "model.dropout=3",
        "model.skip=foo",
        "train.bs=0",
        "train.precision=foo",
        "train.precision=fp16",
        "train.lr=nan",
        "train.lr=-1",
        "train.threads=-1",
        "damage.kinds.foo=1",
        "damage.kinds.patch=0",
        "train.epochs=0",
        "train.epochs=-1",
        "train.minutes=-1",
        "damage.whole=2",
        "loss.mse=-1",
    ],
)
def test_wrong_settings_are_told_before_training(setting, trained, refused, tmp_path):
    out = tmp_path / "run"
    settings = [*trained.settings, "train.epochs=1", "train.precision=fp32", *setting.split()]
    line = refused("train", f"data={trained.data}", f"out={out}", *settings)
    key = "kinds" if "kinds" in setting else setting.split()[0].partition("=")[0].split(".")[-1]
    assert key in line or setting in line.replace("model=", "model.name="), line
    assert not (out / "checkpoints").exists() and not (out / "detector.json").exists()


def test_wrong_names_are_answered_with_the_right_ones(trained, refused, tmp_path):
    assert "train.epochs" in refused("train", f"data={trained.data}", f"out={tmp_path / 'r'}", "train.epohcs=2")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "words, hint",
    [
        ("data render out=X sizs=3", "size"),
        ("data render", "out="),
        ("data render out=X n_train=abc", "n_train=200"),
        ("data render out=X size=5", "size=5"),
        ("data render out=X seed=-1 n_train=1 n_test=0", "seed"),
        ("data render out=X n_train=-1 n_test=0", "n_train"),
        ("data fetch", "out="),
        ("data fetch out=X uri=Y", "url"),
        ("data fetch out=X url=Y", "url="),
        ("data check", "data="),
        ("data check data=X dta=Y", "data"),
        ("evaluate run=RUN", "data="),
        ("evaluate data=X", "run="),
        ("evaluate run=RUN data=DATA oit=Z", "out"),
        ("evaluate run=RUN data=DATA device=foo", "device=foo"),
        ("predict run=RUN out=X", "input="),
        ("predict run=RUN input=DATA", "out="),
        ("predict input=DATA out=X", "run="),
        ("predict run=RUN input=DATA out=X picturs=true", "pictures"),
        ("predict run=RUN input=DATA out=X pictures=7", "pictures=7"),
        ("predict run=RUN input=DATA out=X device=foo", "device=foo"),
        ("predict run=RUN input=DATA out=X pictures", "key=value"),
        ("train", "data="),
        ("train data=", "data="),
        ("demo n_trian=3 out=X", "n_trian"),
        ("demo n_train=x out=X", "n_train"),
    ],
)
def test_wrong_settings_of_every_command(words, hint, trained, refused, tmp_path):
    words = words.replace("=X", f"={tmp_path / 'x'}").replace("RUN", str(trained.run)).replace("DATA", str(trained.data))
    assert hint in refused(*words.split()) and not (tmp_path / "x").exists()


@pytest.mark.parametrize("few", [0, 1])
def test_too_few_normals(few, trained, refused, tmp_path):
    (tmp_path / "few").mkdir()
    for f in sorted((trained.data / "train/good").iterdir())[:few]:
        shutil.copy(f, tmp_path / "few")
    assert "good" in refused("train", f"data={tmp_path / 'few'}", f"out={tmp_path / 'run'}", *trained.settings)
    assert not (tmp_path / "run/detector.json").exists()


@pytest.mark.parametrize("few", [2, 5, 12])
def test_no_normals_to_calibrate_on_is_told_before_training(few, trained, refused, tmp_path):
    (tmp_path / "few").mkdir()
    for f in sorted((trained.data / "train/good").iterdir())[:few]:
        shutil.copy(f, tmp_path / "few")
    line = refused("train", f"data={tmp_path / 'few'}", f"out={tmp_path / 'run'}", *trained.settings, "train.epochs=1")
    assert "held_out" in line and "photographs" in line and "at least 3" in line
    assert not (tmp_path / "run/checkpoints").exists()


def test_three_held_out_normals_are_enough_and_promise_little(trained, cli, tmp_path):
    (tmp_path / "few").mkdir()
    for f in sorted((trained.data / "train/good").iterdir())[:15]:
        shutil.copy(f, tmp_path / "few")
    done = cli("train", f"data={tmp_path / 'few'}", f"out={tmp_path / 'run'}", *trained.settings, "train.epochs=1")
    assert done.code == 0 and "Hold out 19 or more" in done.err
    threshold = json.loads((tmp_path / "run/detector.json").read_text())["threshold"]
    assert threshold["promised_fpr"] == pytest.approx(1 / (threshold["n_calibration"] + 1)) and threshold["n_calibration"] < 3


def test_defects_among_the_training_pictures(trained, refused, tmp_path):
    shutil.copytree(trained.data / "train", tmp_path / "data/train")
    shutil.copytree(trained.data / "test/rough", tmp_path / "data/train/rough")
    line = refused("train", f"data={tmp_path / 'data'}", f"out={tmp_path / 'run'}", *trained.settings)
    assert str(tmp_path / "data/train/rough") in line and "good" in line


@pytest.mark.parametrize("kind", SPOILT)
def test_training_on_an_unreadable_picture(kind, trained, refused, good, tmp_path):
    shutil.copytree(trained.data / "train/good", tmp_path / "good")
    bad = spoil(kind, tmp_path / "good/bad.png", good)
    assert str(bad) in refused("train", f"data={tmp_path / 'good'}", f"out={tmp_path / 'run'}", *trained.settings)


def test_training_in_a_place_that_is_a_file(trained, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused("train", f"data={trained.data}", f"out={tmp_path / 'file'}", *trained.settings)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
@pytest.mark.parametrize("command", ["train data=DATA", "predict run=RUN input=GOOD", "data render"])
def test_read_only_folder(command, trained, refused, good, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    words = command.replace("DATA", str(trained.data)).replace("RUN", str(trained.run)).replace("GOOD", str(good))
    assert "locked" in refused(*words.split(), f"out={tmp_path / 'locked/x'}")


@pytest.mark.parametrize("command", ["train data=DATA", "predict run=RUN input=GOOD", "data render n_train=1 n_test=0"])
def test_a_folder_that_cannot_be_made(command, trained, refused, good, tmp_path, monkeypatch):
    make = Path.mkdir

    def refuse(self, *a, **k):
        if "locked" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return make(self, *a, **k)

    monkeypatch.setattr(Path, "mkdir", refuse)
    words = command.replace("DATA", str(trained.data)).replace("RUN", str(trained.run)).replace("GOOD", str(good))
    line = refused(*words.split(), f"out={tmp_path / 'locked/x'}")
    assert "locked" in line and "Permission denied" in line


@pytest.mark.parametrize("command", ["train data=DATA", "evaluate run=RUN data=DATA"])
def test_an_empty_out(command, trained, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*trained.settings, "train.epochs=1"] if "train" in command[:5] else []
    words = command.replace("DATA", str(trained.data)).replace("RUN", str(trained.run))
    line = refused(*words.split(), "out=", *settings)
    assert "out=" in line and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- data
def test_render_leaves_a_full_folder_alone(trained, refused, contents):
    before = contents(trained.data)
    assert str(trained.data) in refused("data", "render", f"out={trained.data}")
    assert contents(trained.data) == before


def test_check_finds_what_is_wrong(trained, cli, tmp_path):
    done = cli("data", "check", f"data={trained.data}")
    assert done.code == 0 and "sets the threshold with 5 others: at best 16.7% false alarms, where 5% is the default" in done.out
    assert done.out.rstrip().endswith(f"next: zipper_ad train data={trained.data} out=runs/first")
    root = shutil.copytree(trained.data, tmp_path / "data")
    (root / "test/good/bad.png").write_text("no picture")
    done = cli("data", "check", f"data={root}")
    assert done.code == 1 and "bad.png" in done.out and "next:" not in done.out


@pytest.mark.parametrize("command", ["data check", "train", "evaluate"])
def test_missing_and_empty_folders(command, trained, refused, tmp_path):
    run = [f"run={trained.run}"] if command == "evaluate" else [f"out={tmp_path / 'run'}"] if command == "train" else []
    assert "nowhere" in refused(*command.split(), f"data={tmp_path / 'nowhere'}", *run)
    (tmp_path / "empty").mkdir()
    if command != "data check":
        assert "empty" in refused(*command.split(), f"data={tmp_path / 'empty'}", *run)


def test_quiet_draws_no_bars_and_the_next_command_does(trained, cli, tmp_path):
    words = ["evaluate", f"run={trained.run}", f"data={trained.data}", f"out={tmp_path / 'm.json'}"]
    quiet, usual = cli(*words, "-q"), cli(*words)
    assert quiet.code == usual.code == 0 and "AUROC" in quiet.out
    assert quiet.err == "" and "judging" in usual.err


# ---------------------------------------------------------------- evaluate
def test_evaluate(trained, cli, tmp_path):
    done = cli("evaluate", f"run={trained.run}", f"data={trained.data}", f"out={tmp_path / 'deep/m.json'}")
    m = json.loads((tmp_path / "deep/m.json").read_text())
    assert done.code == 0 and m["n"] == {"good": 6, "defective": 14, "with_mask": 14}
    assert 0 <= m["image"]["auroc"] <= 1 and len(m["image"]["ci"]["auroc"]) == 2 and 0 <= m["pixel"]["aupro"] <= 1
    assert set(m["per_defect"]) == {p.name for p in (trained.data / "test").iterdir()} - {"good"}
    assert m["threshold"]["n_calibration"] == 5 and 0 <= m["threshold"]["observed_fpr"] <= 1
    assert m["speed"]["device"] in ("cpu", "cuda") and m["speed"]["ms_per_image_p95"] >= m["speed"]["ms_per_image_p50"] > 0
    assert {"model", "seed", "data_fingerprint", "versions"} <= set(m)
    assert f"{m['image']['auroc']:.3f}" in done.out


@pytest.mark.parametrize("parts, masks", [(["test"], 0), (["test", "ground_truth"], 14)])
def test_evaluate_needs_no_more_than_test(parts, masks, trained, cli, tmp_path):
    for part in parts:
        shutil.copytree(trained.data / part, tmp_path / "root" / part)
    done = cli("evaluate", f"run={trained.run}", f"data={tmp_path / 'root'}", f"out={tmp_path / 'm.json'}")
    m = json.loads((tmp_path / "m.json").read_text())
    assert done.code == 0 and m["n"]["with_mask"] == masks and m["image"]["auroc"] is not None
    assert ((m["pixel"] or {}).get("auroc") is None) == (masks == 0)
    assert not (tmp_path / "root/metrics.json").exists()


def test_evaluate_leaves_defects_without_masks_out_of_pixel_figures(trained, cli, tmp_path):
    root = shutil.copytree(trained.data, tmp_path / "root")
    shutil.rmtree(root / "ground_truth/rough")
    assert cli("evaluate", f"run={trained.run}", f"data={root}", f"out={tmp_path / 'm.json'}").code == 0
    m = json.loads((tmp_path / "m.json").read_text())
    assert m["n"] == {"good": 6, "defective": 14, "with_mask": 12} and m["per_defect"]["rough"]["n"] == 2


@pytest.mark.parametrize("kept", ["good", "rough"])
def test_evaluate_with_one_class_only(kept, trained, cli, tmp_path):
    shutil.copytree(trained.data / "test" / kept, tmp_path / "root/test" / kept)
    done = cli("evaluate", f"run={trained.run}", f"data={tmp_path / 'root'}", f"out={tmp_path / 'm.json'}")
    assert done.code == 0 and json.loads((tmp_path / "m.json").read_text())["image"]["auroc"] is None


def test_mask_of_another_size(trained, refused, contents, tmp_path):
    root = shutil.copytree(trained.data, tmp_path / "root")
    mask = sorted((root / "ground_truth/rough").iterdir())[0]
    Image.new("L", (50, 64), 255).save(mask)
    before = contents(trained.run)
    line = refused("evaluate", f"run={trained.run}", f"data={root}")
    assert str(mask) in line and "50×64" in line and contents(trained.run) == before


@pytest.mark.parametrize("kind", SPOILT)
def test_evaluate_an_unreadable_picture(kind, trained, refused, good, tmp_path):
    root = shutil.copytree(trained.data / "test", tmp_path / "root/test").parent
    bad = spoil(kind, root / "test/rough/bad.png", good)
    assert str(bad) in refused("evaluate", f"run={trained.run}", f"data={root}", f"out={tmp_path / 'm.json'}")
    assert not (tmp_path / "m.json").exists()


def test_evaluate_into_a_folder_names_it(trained, refused, tmp_path):
    (tmp_path / "folder").mkdir()
    out = tmp_path / "folder"
    assert f"{out}:" in refused("evaluate", f"run={trained.run}", f"data={trained.data}", f"out={out}")


# ---------------------------------------------------------------- damaged runs
def seal(run):
    "Write the checksum of the weights that are there, so that what lies behind the checksum is tested too."
    facts = json.loads((run / "detector.json").read_text())
    facts["weights_sha256"] = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
    (run / "detector.json").write_text(json.dumps(facts))


def damage_run(run, how):
    facts, weights = run / "detector.json", run / "weights.safetensors"
    edited = json.loads(facts.read_text())
    if how == "another version":
        facts.write_text(json.dumps(edited | {"format": 99, "version": "9.9"}))
    elif how == "no format":
        facts.write_text("{}")
    elif how == "a list":
        facts.write_text("[]")
    elif how == "half of the facts":
        facts.write_bytes(facts.read_bytes()[:300])
    elif how == "bytes":
        facts.write_bytes(bytes(range(256)))
    elif how == "other widths":
        edited["config"]["model"]["widths"] = [8, 16, 33]
        facts.write_text(json.dumps(edited))
    elif how == "unknown setting":
        edited["config"]["train"]["colour"] = 3
        facts.write_text(json.dumps(edited))
    elif how == "no threshold":
        del edited["threshold"]
        facts.write_text(json.dumps(edited))
    elif how == "text for a threshold":
        edited["threshold"]["value"] = "high"
        facts.write_text(json.dumps(edited))
    elif how == "text for a picture's size":
        edited["config"]["data"]["size"] = "large"
        facts.write_text(json.dumps(edited))
    elif how == "no weights":
        weights.unlink()
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "half of the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "text for weights":
        weights.write_text("weights")
    elif how == "nan weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        save_file({k: v * float("nan") if k.startswith("model.") else v for k, v in tensors.items()}, weights)
        seal(run)
    elif how == "another calibration's size":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        save_file({k: v[..., :32].contiguous() if k.startswith("location.") else v for k, v in tensors.items()}, weights)
        seal(run)
    elif how == "no calibration":
        from safetensors.torch import load_file, save_file

        save_file({k: v for k, v in load_file(weights).items() if not k.startswith("location.ssim")}, weights)
        seal(run)
    elif how == "no checksum":
        del edited["weights_sha256"]
        facts.write_text(json.dumps(edited))


@pytest.mark.parametrize(
    "how, hint",
    [
        ("another version", "9.9"),
        ("no format", "detector.json"),
        ("a list", "detector.json"),
        ("half of the facts", "detector.json"),
        ("bytes", "detector.json"),
        ("other widths", "run"),
        ("unknown setting", "colour"),
        ("no threshold", "run"),
        ("no weights", "weights.safetensors"),
        ("empty weights", "weights.safetensors"),
        ("half of the weights", "weights.safetensors"),
        ("text for weights", "weights.safetensors"),
        ("nan weights", "finite"),
        ("another calibration's size", "calibration"),
        ("text for a picture's size", "size"),
        ("text for a threshold", "high"),
        ("no calibration", "location.ssim"),
        ("no checksum", "weights.safetensors"),
    ],
)
def test_damaged_runs(how, hint, trained, refused, good, contents, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    damage_run(run, how)
    before = contents(run)
    assert hint in refused("predict", f"run={run}", f"input={good}", f"out={tmp_path / 'out'}")
    assert contents(run) == before and not (tmp_path / "out").exists()


def test_no_run(refused, good, tmp_path):
    for run in (tmp_path / "nowhere", tmp_path, good):
        assert str(run) in refused("predict", f"run={run}", f"input={good}", f"out={tmp_path / 'out'}")
        assert str(run) in refused("evaluate", f"run={run}", f"data={tmp_path}")


# ---------------------------------------------------------------- predict
def test_predict_one_file(predict, good):
    rows, out, done = predict(good)
    assert list(rows[0]) == COLUMNS and len(rows) == 1 and done.lines == []
    row = rows[0]
    assert row["file"] == str(good) and row["error"] == "" and row["is_anomalous"] in ("True", "False")
    assert (row["is_anomalous"] == "True") == (float(row["score"]) > float(row["threshold"])) and 0 < float(row["p_value"]) <= 1
    assert pngs(out / "heatmaps") == pngs(out / "masks") == {f"{good.stem}.png"}
    heat, mask = Image.open(out / "heatmaps" / f"{good.stem}.png"), Image.open(out / "masks" / f"{good.stem}.png")
    assert heat.size == mask.size == (64, 64) and heat.mode == "RGB" and set(np.unique(mask)) <= {0, 255}


def test_predict_a_folder_and_a_pattern(predict, trained, monkeypatch):
    folder = trained.data / "test/good"
    rows, out, done = predict(folder)
    assert [r["file"] for r in rows] == [str(p) for p in sorted(folder.iterdir())] and "6 judged" in done.out
    assert len(pngs(out / "heatmaps")) == len(pngs(out / "masks")) == 6
    again, *_ = predict(f"{folder}/*.png")
    assert again == rows
    monkeypatch.chdir(trained.data)
    relative, *_ = predict("test/good/00[0-2].png")
    assert [r["score"] for r in relative] == [r["score"] for r in rows[:3]] or np.allclose(
        [float(r["score"]) for r in relative], [float(r["score"]) for r in rows[:3]], atol=1e-4
    )


def test_predict_without_pictures(predict, good):
    _, out, _ = predict(good, "pictures=false")
    assert [p.name for p in out.iterdir()] == ["predictions.csv"]


def test_equal_names_below_a_pattern_keep_their_pictures(predict, trained):
    rows, out, _ = predict(f"{trained.data}/test/*/000.png")
    assert len(rows) == 8 and len({r["file"] for r in rows}) == 8
    assert len(pngs(out / "heatmaps")) == len(pngs(out / "masks")) == 8


def test_equal_stems_keep_their_pictures(predict, good, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.bmp", "a.tif", "A.png"):
        Image.open(good).save(tmp_path / "in" / name)
    rows, out, _ = predict(tmp_path / "in")
    assert len(rows) == len(pngs(out / "heatmaps")) == len(pngs(out / "masks")) == 4


def test_names_made_of_folders_never_collide(predict, good, tmp_path):
    for name in ("a/b.png", "a_b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, tmp_path / "in" / name)
    rows, out, _ = predict(f"{tmp_path / 'in'}/**/*.png")
    assert len(rows) == 2 and len(pngs(out / "heatmaps")) == 2


def test_predict_a_folder_of_folders(predict, trained):
    rows, out, _ = predict(trained.data / "test")
    assert len(rows) == 20 and len(pngs(out / "heatmaps")) == 20


NAMES = [
    "Reißverschluß ü 日本.png",
    "<script>alert(1)<.png",
    'komma, "quote".png',
    "line\nbreak.png",
    "=1+1.png",
    "%s{0}$HOME.png",
    "-rf.png",
    "[1].png",
    " lead.png",
    "a.b.c.png",
    "UPPER.PNG",
]


@pytest.mark.skipif(os.name == "nt", reason="such names cannot be there")
def test_strange_names(predict, good, tmp_path):
    (tmp_path / "in").mkdir()
    for name in NAMES:
        shutil.copy(good, tmp_path / "in" / name)
    rows, out, _ = predict(tmp_path / "in")
    assert {Path(r["file"]).name for r in rows} == set(NAMES) and not [r for r in rows if r["error"]]
    assert pngs(out / "heatmaps") == {Path(n).stem + ".png" for n in NAMES} == pngs(out / "masks")
    one, *_ = predict(tmp_path / "in" / "[1].png")
    assert Path(one[0]["file"]).name == "[1].png"


@pytest.mark.skipif(os.name == "nt", reason="such names cannot be there")
@pytest.mark.parametrize("name", ["a" * 250 + ".png", "/".join(["b" * 100] * 3) + ".png"])
def test_long_names(name, predict, good, tmp_path):
    for path in (tmp_path / "in" / name, tmp_path / "in/ok.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, path)
    rows, out, _ = predict(f"{tmp_path / 'in'}/**/*.png")
    assert len(rows) == 2 and len(pngs(out / "heatmaps")) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names need not be UTF-8 only there")
def test_a_name_that_is_not_utf8(cli, trained, good, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(good, tmp_path / "in/ok.png")
    shutil.copy(good, os.fsencode(tmp_path / "in") + b"/\xff.png")
    assert cli("predict", f"run={trained.run}", f"input={tmp_path / 'in'}", f"out={tmp_path / 'out'}").code == 0
    assert len(rows_of(tmp_path / "out")) == 2


@pytest.mark.skipif(os.name == "nt", reason="such names cannot be there")
def test_a_name_of_two_lines_makes_one_line(trained, refused, tmp_path):
    (tmp_path / "two\nlines.png").write_text("no picture")
    refused("predict", f"run={trained.run}", f"input={tmp_path}/two\nlines.png", f"out={tmp_path / 'out'}")


@pytest.mark.parametrize("kind", SPOILT)
def test_predict_an_unreadable_file(kind, trained, refused, good, tmp_path):
    bad = spoil(kind, tmp_path / "bad.png", good)
    assert str(bad) in refused("predict", f"run={trained.run}", f"input={bad}", f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_unreadable_files_among_many(predict, good, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(good, tmp_path / "in/a.png")
    shutil.copy(good, tmp_path / "in/z.png")
    for kind in SPOILT:
        spoil(kind, tmp_path / "in" / f"{kind}.png", good)
    rows, out, done = predict(tmp_path / "in")
    by_name = {Path(r["file"]).stem: r for r in rows}
    assert set(by_name) == {"a", "z", *SPOILT}
    for name, row in by_name.items():
        assert bool(row["error"]) == (name in SPOILT) == (row["score"] == "") == (row["is_anomalous"] == "")
        assert not row["error"] or name in row["error"]
    assert pngs(out / "heatmaps") == pngs(out / "masks") == {"a.png", "z.png"} and "5 could not be read" in done.out
    assert done.err.count("WARNING: ") == 5 and "Traceback" not in done.err


def test_warnings_and_progress_have_lines_of_their_own(predict, good, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(good, tmp_path / "in/a.png")
    spoil("text", tmp_path / "in/b.png", good)
    *_, done = predict(tmp_path / "in")
    assert not [line for line in done.err.replace("\r", "\n").splitlines() if "WARNING" in line and "%|" in line]


def test_nothing_but_unreadable_files(predict, good, tmp_path):
    (tmp_path / "in").mkdir()
    for kind in SPOILT:
        spoil(kind, tmp_path / "in" / f"{kind}.png", good)
    rows, *_ = predict(tmp_path / "in", code=1)
    assert all(r["error"] for r in rows) and len(rows) == 5


def test_predict_what_is_not_there(trained, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in ("nowhere", "nowhere.png", "*.png", "empty", "empty/*"):
        line = refused("predict", f"run={trained.run}", f"input={tmp_path / source}", f"out={tmp_path / 'out'}")
        assert str(tmp_path / source) in line and not (tmp_path / "out").exists()


def test_predict_into_a_file(trained, refused, good, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert "file" in refused("predict", f"run={trained.run}", f"input={good}", f"out={tmp_path / out}")
    assert (tmp_path / "file").read_text() == "mine"


def test_predict_leaves_run_and_photographs_alone(predict, trained, contents):
    before = contents(trained.run), contents(trained.data)
    predict(trained.data / "test/good")
    assert (contents(trained.run), contents(trained.data)) == before


def save_formats(image, folder):
    "The same picture in many formats: names of the lossless ones and of the others."
    grey, rgb = np.asarray(image), image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "16bit.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "16bit.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tif")
    rgb.save(folder / "rgb.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("LA").save(folder / "la.png")
    image.convert("P").save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    turned.save(folder / "exif.png", exif=exif)
    turned.save(folder / "exif.tif", exif=exif)
    image.save(folder / "tiff.tiff", compression="tiff_lzw")
    image.save(folder / "bmp.bmp")
    rgb.save(folder / "webp.webp", lossless=True)
    lossless = sorted(p.name for p in folder.iterdir())
    image.save(folder / "lossy1.jpg", quality=95)
    rgb.convert("CMYK").save(folder / "lossy2.jpeg", quality=95)
    turned.save(folder / "lossy3.jpg", quality=95, exif=exif)
    rgb.save(folder / "lossy4.webp", quality=95)
    return lossless


def test_formats_give_the_same_verdict(predict, good, tmp_path):
    (tmp_path / "in").mkdir()
    image = Image.open(good).convert("L").crop((0, 0, 64, 48))  # not square, so that a turned one is told apart
    lossless = save_formats(image, tmp_path / "in")
    image.save(tmp_path / "in/plain.png")
    rows = {Path(r["file"]).name: r for r in predict(tmp_path / "in")[0]}
    plain = rows["plain.png"]
    assert not [r for r in rows.values() if r["error"]] and len(rows) == len(lossless) + 5
    for name in lossless:
        assert abs(float(rows[name]["score"]) - float(plain["score"])) < 1e-4, name
        assert rows[name]["is_anomalous"] == plain["is_anomalous"], name


def test_lossy_formats_look_the_same(trained, good, tmp_path):
    from zipper_ad.detector import Detector

    image = Image.open(good).convert("L").crop((0, 0, 64, 48))
    save_formats(image, tmp_path)
    detector = Detector.load(trained.run)
    plain = detector.predict(image)
    for path in sorted(tmp_path.glob("lossy*")):
        assert np.abs(detector.predict(path).image - plain.image).mean() < 0.03, path.name


# ---------------------------------------------------------------- the demonstration
def test_demo(cli, tmp_path):
    pytest.importorskip("zipper_ad.report")
    done = cli("demo", f"out={tmp_path}", "n_train=24", "n_test=1", "size=64", "train.epochs=1", "model.widths=[8,16]", "model.latent=8")
    assert done.code == 0, done
    assert {"report.html", "metrics.json", "detector.json", "config.yaml"} <= {p.name for p in tmp_path.iterdir()}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_demo_takes_no_data(trained, refused, tmp_path):
    small = ["n_train=24", "n_test=1", "size=64", "train.epochs=1", "model.widths=[8,16]", "model.latent=8"]
    assert "data" in refused("demo", f"out={tmp_path}", f"data={trained.data}", *small)


# ---------------------------------------------------------------- one folder, one training, one detector


def digests(run, *names):
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names]


@pytest.fixture
def copied(trained, tmp_path):
    "A copy of the trained run."
    return Path(shutil.copytree(trained.run, tmp_path / "copied"))


def killed_while_overwriting(run, trained, epochs, at):
    "Train over the run in a process of its own, and kill it when the function says so."
    words = ["train", f"data={trained.data}", f"out={run}", *trained.settings, "seed=3", f"train.epochs={epochs}", "overwrite=true"]
    process = subprocess.Popen([sys.executable, "-c", "import sys; from zipper_ad.cli import main; sys.exit(main())", *words],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not at() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None and at()
    process.kill()
    process.wait()


def test_a_killed_overwrite_is_carried_on_and_the_old_detector_lasts_until_then(copied, trained, cli):
    before = digests(copied, "detector.json", "weights.safetensors", "config.yaml")
    killed_while_overwriting(copied, trained, 300, (copied / "checkpoints/state.safetensors").exists)
    assert digests(copied, "detector.json", "weights.safetensors", "config.yaml") == before
    assert cli("predict", f"run={copied}", f"input={trained.data / 'test/good'}", f"out={copied.parent / 'verdicts'}").code == 0
    config = copied / "unfinished.yaml"
    config.write_text(config.read_text().replace("epochs: 300", "epochs: 2"))  # the test need not wait for the rest
    done = cli("train", f"out={copied}", "resume=true")
    assert done.code == 0 and "finished" not in done.out and "detector:" in done.out
    assert load_config(copied / "config.yaml").seed == 3 and digests(copied, "detector.json") != before[:1]
    assert "finished" in cli("train", f"out={copied}", "resume=true").out and not config.exists()


def test_what_was_measured_does_not_outlive_its_detector(copied, trained, cli):
    assert cli("evaluate", f"run={copied}", f"data={trained.data}").code == 0 and "| image auroc |" in (copied / "card.md").read_text()
    for name in ("recalibration.json", "report.html", "report.json", "detector-fp32.onnx"):
        (copied / name).write_text("{}")
    settings = [f"data={trained.data}", f"out={copied}", *trained.settings, "seed=7"]
    assert cli("train", *settings).code == 2 and (copied / "metrics.json").exists()
    assert cli("train", *settings, "overwrite=true").code == 0
    left = {p.name for p in copied.iterdir()}
    assert not left & {"metrics.json", "recalibration.json", "report.html", "report.json", "detector-fp32.onnx"}
    assert "Not yet" in (copied / "card.md").read_text()


@pytest.mark.parametrize("command, name", [("report", "detector.html"), ("report", "training.html"), ("bench", "detector.html"),
                                           ("evaluate", "detector.json")])
def test_no_command_writes_over_the_detector(copied, trained, refused, command, name):
    before = digests(copied, "detector.json", "training.json")
    data = [] if command == "bench" else [f"data={trained.data}"]
    line = refused(command, f"run={copied}", *data, f"out={copied / name}")
    assert "belongs to the detector there" in line and "report.json" in line
    assert digests(copied, "detector.json", "training.json") == before


def test_the_demo_spares_other_runs(copied, refused, cli):
    before = digests(copied, "detector.json")
    small = ["n_train=24", "n_test=1", "size=64", "train.epochs=1", "model.widths=[8,16]", "model.latent=8"]
    assert "holds a detector already" in refused("demo", f"out={copied}", *small)
    assert digests(copied, "detector.json") == before
    assert cli("demo", f"out={copied.parent / 'demo'}", *small).code == 0
    assert cli("demo", f"out={copied.parent / 'demo'}", *small).code == 0  # its own


def test_two_trainings_do_not_share_a_folder(copied, trained, refused):
    from zipper_ad.watch import lock_folder

    held = lock_folder(copied, "train.lock", "training")
    settings = [f"data={trained.data}", f"out={copied}", *trained.settings, "train.epochs=1", "overwrite=true"]
    before = digests(copied, "detector.json")
    assert "another training writes there" in refused("train", *settings)
    assert digests(copied, "detector.json") == before
    held.close()
    assert main(["train", *settings]) == 0


def test_a_start_that_knew_the_held_out_pictures_is_told(trained, cli, tmp_path):
    settings = [f"data={trained.data}", *trained.settings, "train.epochs=1", f"train.start={trained.run}"]
    same = cli("train", *settings, f"out={tmp_path / 'same'}")
    other = cli("train", *settings, f"out={tmp_path / 'other'}", "seed=1")
    assert same.code == other.code == 0 and "had learned from" not in same.err
    assert "had learned from" in other.err and "pictures that set the threshold now" in other.err


def test_quiet_predictions_warn_of_nothing(trained, cli, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/broken.png").write_bytes(b"no picture")
    shutil.copy(sorted((trained.data / "test/good").iterdir())[0], tmp_path / "photos")
    words = ["predict", f"run={trained.run}", f"input={tmp_path / 'photos'}", f"out={tmp_path / 'out'}"]
    assert "broken.png" in cli(*words).err and "broken.png" not in cli(*words, "-q").err


def test_a_terminal_without_the_letters(trained):
    code = f"from zipper_ad.cli import main; raise SystemExit(main(['data', 'check', 'data={trained.data}']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"64?64" in done.stdout, done


def test_pictures_of_one_stem_are_all_drawn(trained, cli, tmp_path):
    folder = tmp_path / "data/test/good"
    folder.mkdir(parents=True)
    picture = Image.open(sorted((trained.data / "test/good").iterdir())[0])
    for name in ("000.png", "000.bmp"):
        picture.save(folder / name)
    assert cli("visualize", f"run={trained.run}", f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}").code == 0
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2


def test_inputs_that_are_left_out_are_told(trained, predict, caplog):
    rows, _, _ = predict(trained.data)
    assert len(rows) == sum(p.is_file() for split in ("train", "test") for p in (trained.data / split).rglob("*"))  # and no masks
