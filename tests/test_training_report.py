"The training's own report: finished, interrupted and bare runs, hostile names, and pictures that change nothing."

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import HOSTILE, checked

from zipper_ad.config import load_config, make_config, save_config
from zipper_ad.core import InputError, import_torchvision
from zipper_ad.learner import train_autoencoder, training_callbacks
from zipper_ad.lr_find import advice, plot_search, search_lr
from zipper_ad.models.base import Restored
from zipper_ad.models.head import Restorer
from zipper_ad.tensorboard import (
    MostVisible,
    PicturesCallback,
    RecordCallback,
    TensorBoardCallback,
    reconstructs,
    restoration_figure,
    save_mosaic,
    visible_damage,
)
from zipper_ad.training_report import findings, read_mosaic, read_pictures, read_run, training_report

import_torchvision()
from fastai.callback.core import Callback, CancelFitException  # noqa: E402
from fastai.callback.tracker import EarlyStoppingCallback  # noqa: E402

SMALL = ["data.size=32", "model.widths=[4,8]", "model.latent=8", "model.head_widths=[4,8]", "train.device=cpu", "train.precision=fp32"]


def settings(data, *more):
    return make_config([f"data={data}", *SMALL, "train.minutes=0", "train.epochs=4", *more])


def watchers(folder, kept=False):
    "Both callbacks; none where a training that is kept in a folder has them anyway."
    config = make_config(SMALL)
    has = kept and any(isinstance(c, RecordCallback) for c in training_callbacks(config, torch.device("cpu"), folder))
    return [] if has else [PicturesCallback(folder / "pictures"), RecordCallback(folder)]


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    "A finished run with pictures, record and events."
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = settings(trained.data)
    train_autoencoder(config, folder, terminal=True, cbs=watchers(folder, kept=True))
    save_config(config, folder / "config.yaml")
    shutil.copy(trained.run / "detector.json", folder)
    (folder / "checkpoints/state.safetensors").unlink()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


# ---------------------------------------------------------------- the page
def test_finished_run(run):
    page = checked(training_report(run))
    assert page.text.count("<img") > 20 and "Nothing was recorded" not in page.text
    told = ["Score on held-out pictures", "Parts of the loss, training", "Learning rate", "PSNR", "Gradient", "kept weights"]
    told += ["model.widths", "fp32", "fingerprint of the photographs trained on", "on average, at most", "Few pictures to choose by"]
    assert not [t for t in told if t not in page.text]
    assert json.loads((run / "detector.json").read_text())["data_fingerprint"] in page.text
    assert "did not finish" not in page.text and not list(run.glob(".part-*"))


def test_figures_on_the_page_are_those_of_the_history(run):
    files, text = read_run(run), training_report(run).read_text("utf-8")
    assert files.epochs == 4 and f"{np.nanmax(files.scores):.3f} (damage_auprc, epoch {files.best_epoch})" in text
    assert int(files.best["epoch"]) == files.best_epoch
    x, y = files.scalars["valid/damage_auprc"]
    assert x.tolist() == [0, 1, 2, 3] and np.allclose(y, files.scores)


def test_run_without_pictures_record_and_events(copy):
    for name in ("pictures", "tensorboard", "checkpoints"):
        shutil.rmtree(copy / name)
    for name in ("training.json", "detector.json"):
        (copy / name).unlink()
    page = checked(training_report(copy))
    assert "No pictures were kept" in page.text and "PSNR" not in page.text and "The training did not finish" in page.text


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_interrupted_run(copy, lines):
    "Killed before the first epoch, after it, and in the middle of a line."
    (copy / "detector.json").unlink()
    record = json.loads((copy / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps(record | {"ended": None, "reason": None}))
    text = (copy / "history.csv").read_text().splitlines()
    (copy / "history.csv").write_text("\n".join(text[: lines + 1]) + ("\n3,0.1" if lines == 3 else "\n"))
    (copy / "checkpoints/state.safetensors").touch()
    page = checked(training_report(copy))
    told = f"It ended after {lines} of 4 epochs" if lines else "No epoch was finished"
    assert told in page.text and (not lines or "resume=true" in page.text)


def test_only_a_configuration_or_only_a_history(run, tmp_path):
    for name in ("config.yaml", "history.csv"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(run / name, folder)
        checked(training_report(folder))


def test_no_run_is_refused(tmp_path):
    (tmp_path / "some").mkdir()
    for folder in (tmp_path / "some", tmp_path / "absent"):
        with pytest.raises(InputError, match="no run here"):
            training_report(folder)
    assert not list((tmp_path / "some").iterdir())


def test_damaged_files_are_done_without(copy):
    for name in ("training.json", "detector.json", "checkpoints/best.safetensors", "pictures/final.jpg"):
        (copy / name).write_bytes(b"\xff{")
    (copy / "log.txt").write_bytes(b"\xff broken")
    page = checked(training_report(copy))
    assert "kept weights" not in page.text and "epoch 3" in page.text


def test_hostile_names_stay_text(copy):
    config = load_config(copy / "config.yaml")
    config.data.root = HOSTILE.replace("${body}", "$body")
    save_config(config, copy / "config.yaml")
    (copy / "log.txt").write_text(HOSTILE)
    record = json.loads((copy / "training.json").read_text())
    record["sessions"] = [{HOSTILE: HOSTILE, "epoch": HOSTILE}, {"epoch": 2}]
    (copy / "training.json").write_text(json.dumps(record | {"fingerprint": HOSTILE}))
    tiles = {c: torch.zeros(1, 1, 32, 32) for c in ("good", "damaged", "restored", "truth", HOSTILE)}
    save_mosaic(tiles, copy / "pictures/final.jpg")
    hostile = copy.rename(copy.with_name("<b>&${body}'\""))
    page = checked(training_report(hostile))
    assert page.text.count("&lt;script&gt;alert(1)") >= 5 and "Training of &lt;b&gt;&amp;${body}" in page.text


def test_a_failure_leaves_the_old_report(copy):
    (copy / "training_report.html").write_text("old")
    for wrong in ("nonsense: 1", "seed: [", "seed: ${absent}", "- 1"):
        (copy / "config.yaml").write_text(wrong)
        with pytest.raises(InputError, match="nonsense|config.yaml"):
            training_report(copy)
    assert (copy / "training_report.html").read_text() == "old"


ENDS = [("patience", "stopped early"), ("minutes", "ended by the clock"), ("interrupted", "did not finish")]


@pytest.mark.parametrize("reason,told", ENDS)
def test_the_end_is_said(copy, reason, told):
    record = json.loads((copy / "training.json").read_text())
    assert record["reason"] == "epochs"
    (copy / "training.json").write_text(json.dumps(record | {"reason": reason}))
    assert any(told in head for head, _ in findings(read_run(copy)))


# ---------------------------------------------------------------- pictures and record
class StopAtOnce(Callback):
    "Ends the training after its first batch, before anything was validated."

    def after_batch(self):
        raise CancelFitException()


class StopAfter(Callback):
    "Ends the training after an epoch, as early stopping does."

    order = 100

    def __init__(self, epoch):
        self.last = epoch

    def after_epoch(self):
        if self.epoch == self.last:
            raise CancelFitException()


def weights(learn):
    return list(learn.model.state_dict().values())


def test_watching_changes_no_weight(trained, tmp_path):
    config = settings(trained.data, "train.epochs=2")
    plain, *_ = train_autoencoder(config, terminal=True)
    state = torch.get_rng_state()
    cbs = [*watchers(tmp_path), TensorBoardCallback(tmp_path / "tensorboard", every=1)]
    watched, *_ = train_autoencoder(config, terminal=True, cbs=cbs)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True))
    assert torch.equal(state, torch.get_rng_state()) and (tmp_path / "pictures/final.jpg").exists()


def test_the_last_epoch_is_kept_whatever_ended_it(trained, tmp_path):
    config = settings(trained.data, "train.epochs=50")
    train_autoencoder(config, terminal=True, cbs=[*watchers(tmp_path), StopAfter(2)])
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["epoch-000.jpg", "epoch-002.jpg", "final.jpg"]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["reason"] == "interrupted" and len(record["seconds"]) == 3


def test_a_training_cut_short_in_its_first_epoch_has_no_pictures(trained, tmp_path):
    train_autoencoder(settings(trained.data), terminal=True, cbs=[*watchers(tmp_path), StopAtOnce()])
    assert [p.name for p in tmp_path.iterdir()] == ["training.json"]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["reason"] == "interrupted" and record["seconds"] == []


def test_a_new_training_drops_the_pictures_of_the_old(trained, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("epoch-007.jpg", "final.jpg", "epoch-mine.jpg", "notes.txt"):
        (tmp_path / "pictures" / name).touch()
    train_autoencoder(settings(trained.data, "train.epochs=1"), terminal=True, cbs=watchers(tmp_path))
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["epoch-000.jpg", "epoch-mine.jpg", "final.jpg", "notes.txt"]


class Killed(Exception):
    pass


class KillAfter(StopAfter):
    order = 300  # when the state is written

    def after_epoch(self):
        if self.epoch == self.last:
            raise Killed("here")


def test_resumed_run_has_the_pictures_and_record_of_a_whole_one(trained, run, tmp_path):
    config = settings(trained.data)
    with pytest.raises(Killed):
        train_autoencoder(config, tmp_path, terminal=True, cbs=[*watchers(tmp_path, kept=True), KillAfter(1)])
    (tmp_path / "pictures/epoch-003.jpg").write_bytes(b"of an epoch beyond the state")
    train_autoencoder(config, tmp_path, terminal=True, resume=True, cbs=watchers(tmp_path, kept=True))
    ours, theirs = ({p.name: p.read_bytes() for p in (folder / "pictures").iterdir()} for folder in (tmp_path, run))
    assert ours == theirs
    record = json.loads((tmp_path / "training.json").read_text())
    assert [s["epoch"] for s in record["sessions"]] == [0, 2] and len(record["seconds"]) == 4 and record["reason"] == "epochs"


def test_validating_alone_writes_nothing(trained, tmp_path):
    learn, *_ = train_autoencoder(settings(trained.data, "train.epochs=1"), terminal=True)
    learn.remove_cbs(learn.cbs.filter(lambda c: isinstance(c, EarlyStoppingCallback)))  # it has nothing to compare
    learn.add_cbs(watchers(tmp_path))
    learn.validate()
    assert not list(tmp_path.iterdir())


def test_the_most_visible_are_chosen():
    clean = torch.full((12, 1, 16, 16), 0.5)
    damaged, generator = clean.clone(), torch.Generator().manual_seed(0)
    for i, contrast in enumerate(torch.rand(10, generator=generator)):  # the last two are whole
        damaged[i, :, : i + 1, :8] += 0.5 * contrast
    seen = visible_damage(clean, damaged)
    mask = (damaged != clean).float()
    for size in (1, 5, 12):
        chosen = MostVisible()
        for batch in zip(clean.split(size), damaged.split(size), mask.split(size), strict=True):
            chosen.add(*batch, Restored(batch[0]))
        assert torch.equal(chosen.columns()["damaged"], damaged[seen.argsort(descending=True, stable=True)[:4]])
    few = MostVisible()
    few.add(clean[8:], damaged[8:], mask[8:], Restored(clean[8:]))
    assert len(few) == 2  # whole ones show nothing
    none = MostVisible()
    none.add(clean, clean, mask, Restored(clean))
    assert len(none) == 1


@pytest.mark.parametrize("channels,side", [(1, 32), (3, 300)])
def test_mosaics_come_back(tmp_path, channels, side):
    grey = {"good": 0.2, "restored": 0.7, "truth": 1.0}
    save_mosaic({k: torch.full((3, channels, side, side), v) for k, v in grey.items()}, tmp_path / "a.jpg", epoch=7, extra="x")
    mosaic = read_mosaic(tmp_path / "a.jpg")
    assert mosaic.name == "epoch 7" and list(mosaic.tiles) == list(grey)
    for name, tiles in mosaic.tiles.items():
        assert len(tiles) == 3 and all(abs(t.mean() - grey[name]) < 0.01 for t in tiles)
    Image.new("RGB", (20, 20)).save(tmp_path / "small.jpg", comment=Image.open(tmp_path / "a.jpg").info["comment"])
    assert read_mosaic(tmp_path / "small.jpg") is None and read_pictures(tmp_path) == []


def test_the_control_shows_no_restoration(trained, tmp_path):
    config = settings(trained.data, "model.head=image", "train.epochs=2")
    train_autoencoder(config, tmp_path, terminal=True, cbs=watchers(tmp_path))
    files = read_run(tmp_path)
    assert "valid/loss" in files.scalars and not {"valid/PSNR", "valid/SSIM"} & set(files.scalars)
    assert list(files.pictures[-1].tiles) == ["good", "damaged", "damage map", "truth"]
    assert "restored" not in checked(training_report(tmp_path)).text.split("base64")[0]


@pytest.mark.parametrize("head", ["joint", "none", "image"])
def test_figure_has_titles_once(head):
    model = Restorer(make_config([*SMALL, f"model.head={head}"]).model).train()
    x, state = torch.rand(2, 1, 32, 32), torch.get_rng_state()
    figure = restoration_figure(model, x, x, x > 0.5)
    titles = [a.get_title() for a in figure.axes]
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert ("restored" in titles) == reconstructs(model) and ("damage map" in titles) == (head != "none")
    half = len(titles) // 2
    assert all(titles[:half]) and not any(titles[half:])


# ---------------------------------------------------------------- the learning rate
def test_search_is_repeatable_and_writes_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(trained.data)
    first, second = (search_lr(config, steps=40, terminal=True) for _ in range(2))
    assert first.points == second.points and np.array_equal(first.losses, second.losses)
    assert (np.diff(first.rates) > 0).all() and first.rates[0] <= first.suggested <= first.rates[-1]
    assert f"{first.suggested:g}" in advice(first) and plot_search(first).axes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"steps": 5}, {"lowest": 0}, {"lowest": 1, "highest": 0.1}])
def test_search_refuses_nonsense(trained, wrong):
    with pytest.raises(InputError, match="30 steps or more"):
        search_lr(settings(trained.data), **wrong)
