"""One training by two processes, for real: gloo on the processor, started by torchrun."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from zipper_ad.synth import render_dataset

EXACT = [  # no batch normalisation, nothing drawn inside the network
    "model=vit", "model.hide=0", "model.width=32", "model.heads=2", "model.blocks=1", "model.stem=linear", "model.decoder=transformer",
    "model.decoder_width=32", "model.decoder_blocks=1", "model.skip=none", "train.precision=fp32",
]
CRITIC = ["model=resnet", "model.depth=10", "model.width=8", "model.latent=16", "loss.adversarial=0.05", "train.ema=0.9"]
SETTINGS = ["data.size=32", "train.threads=1", "train.device=cpu", "train.bs=8", "train.minutes=0", "train.epochs=4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("pictures") / "zippers", n_train=40, n_test=1, n_good=1, size=32)


def start(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zipper_ad", "train", *SETTINGS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def run(*arguments, expect=0):
    process = start(*arguments)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expect, err
    return out, err


def history(folder):
    lines = (folder / "history.csv").read_text().splitlines()[1:]
    return torch.tensor([[float(v) for v in line.split(",")[:-1]] for line in lines])


def differences(a, b):
    one, other = (load_file(f / "checkpoints/last.safetensors") for f in (a, b))
    return {k: (v.float() - other[k].float()).abs().max().item() for k, v in one.items()}


def test_two_processes_train_the_same_network_as_one(pictures, tmp_path):
    run(f"data={pictures}", f"out={tmp_path}/one", *EXACT)
    out, _ = run(f"data={pictures}", f"out={tmp_path}/two", "launch=2", *EXACT)
    assert out.count("detector:") == 1  # one speaks
    assert torch.allclose(history(tmp_path / "one"), history(tmp_path / "two"), rtol=1e-4)
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == len(list((tmp_path / "one/tensorboard").iterdir()))
    found = differences(tmp_path / "one", tmp_path / "two")
    # a bias of attention's keys shifts all of a softmax's inputs alike: its gradient is nothing but rounding, which Adam enlarges
    assert max(v for k, v in found.items() if not k.endswith("qkv.bias")) < 1e-5
    assert max(found.values()) < 0.02


@pytest.mark.parametrize("settings, told", [
    (["launch=2", "train.bs=5"], "multiple of 2"), (["launch=0"], "launch=0"), (["launch=two"], "launch=two"),
])
def test_what_cannot_be_shared_is_told_before_training(settings, told, pictures, tmp_path):
    _, err = run(f"data={pictures}", f"out={tmp_path}/run", *EXACT, *settings, expect=2)
    assert told in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_dead_process_ends_the_training_and_it_can_be_resumed(pictures, tmp_path):
    folder = tmp_path / "run"
    process = start(f"data={pictures}", f"out={folder}", "launch=2", "train.epochs=2000", "train.patience=2000", *EXACT)
    while not (folder / "checkpoints/state.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = [int(p) for p in children.stdout.split() if rank_of(p) == "1"]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "resume=true" in err.strip().splitlines()[-1]
    best = load_file(folder / "checkpoints/best.safetensors")
    assert all(v.isfinite().all() for v in best.values())
    done = len(history(folder))
    _, err = run(f"data={pictures}", f"out={folder}", "resume=true", "launch=2", "train.epochs=2000", "train.patience=3", *EXACT, expect=2)
    assert "train.patience" in err  # a resumed training keeps its settings, so this one is not let run to its end
    assert len(history(folder)) >= done


def rank_of(pid):
    "RANK in a process's environment; empty where torchrun has set none."
    try:
        environment = open(f"/proc/{pid}/environ", "rb").read().split(b"\0")
    except OSError:
        return ""
    return next((e[5:].decode() for e in environment if e.startswith(b"RANK=")), "")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    CRITIC, [*EXACT, "train.minutes=0.1", "train.epochs=1000"], [*EXACT, "train.patience=1", "train.epochs=50"],
])
def test_processes_stay_together(settings, pictures, tmp_path):
    "With a discriminator, a clock, and early stopping: it ends."
    run(f"data={pictures}", f"out={tmp_path}/run", "launch=2", *settings)
    assert (tmp_path / "run/detector.json").exists()
    assert history(tmp_path / "run").isfinite().all()
