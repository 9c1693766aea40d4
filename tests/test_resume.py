"""A training that is killed, by signal 9 and for real, carries on and ends with the same bits."""

import json
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zipper_ad.synth import render_dataset

TINY = {
    "cnn": ["model.widths=[8,16]", "model.latent=8"],
    "resnet": ["model.depth=10", "model.width=8", "model.latent=16", "loss.adversarial=0.05"],
    "vit": ["model.width=32", "model.heads=2", "model.blocks=1", "model.decoder_width=32"],
    "diffusion": ["model.widths=[8,16]", "train.ema=0.9"],
}
SETTINGS = ["data.size=32", "train.epochs=12", "train.threads=1", "train.device=cpu", "train.bs=4", "train.minutes=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("pictures") / "zippers", n_train=24, n_test=1, n_good=1, size=32)


def start(*arguments):
    return subprocess.Popen([sys.executable, "-m", "zipper_ad", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def kill_somewhere(seed, folder, *arguments):
    "Start, wait until a state is there and for a random time more, kill; False where the training was faster."
    process = start(*arguments)
    while not (folder / "checkpoints/state.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.8))
    process.kill()
    process.communicate()
    return not (folder / "detector.json").exists()


def curve(folder, name):
    events = EventAccumulator(str(folder)).Reload().Scalars(name)
    return [(e.step, e.value) for e in events]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    runs = {}

    def of(model):
        if model not in runs:
            runs[model] = tmp_path_factory.mktemp(model) / "whole"
            run("train", f"data={pictures}", f"out={runs[model]}", f"model={model}", *TINY[model], *SETTINGS)
        return runs[model]

    return of


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("moment", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed(pictures, whole, tmp_path, model, moment):
    killed = tmp_path / "killed"
    arguments = ("train", f"data={pictures}", f"out={killed}", f"model={model}", *TINY[model], *SETTINGS)
    if not kill_somewhere(moment, killed, *arguments):
        pytest.skip("the training was over before it was killed")
    refused = start(*arguments)
    assert "unfinished training" in refused.communicate()[1] and refused.returncode == 2
    (killed / "pictures").mkdir(exist_ok=True)
    (killed / "pictures/.part-abc.jpg").write_bytes(b"half a picture")  # as a kill at that moment leaves it
    run("train", f"out={killed}", "resume=true")
    assert not (killed / "checkpoints/state.safetensors").exists() and not list(killed.rglob(".part-*"))
    for name in ("weights.safetensors", "checkpoints/best.safetensors", "checkpoints/last.safetensors"):
        ours, theirs = load_file(killed / name), load_file(whole(model) / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name
    ours, theirs = ([line.rpartition(",")[0] for line in (f / "history.csv").read_text().splitlines()] for f in (killed, whole(model)))
    assert ours == theirs
    ours, theirs = (curve(f / "tensorboard", "valid/PSNR") for f in (killed, whole(model)))
    assert len(ours) == 12 and ours == theirs, "what the killed run wrote beyond its last state is dropped"
    thresholds = [json.loads((f / "detector.json").read_text())["threshold"]["value"] for f in (killed, whole(model))]
    assert thresholds[0] == thresholds[1]


def test_resume_says_what_is_wrong(pictures, whole, tmp_path):
    assert "nothing to carry on" in run("train", f"out={whole('cnn')}", "resume=true")
    for arguments, told in (
        ([f"out={tmp_path / 'none'}", "resume=true"], "data=… is missing"),
        ([f"out={whole('cnn')}", f"data={pictures}"], "holds a detector already"),
    ):
        process = start("train", *arguments)
        assert told in process.communicate()[1] and process.returncode == 2
