"""Sweeps: what is planned, what is trained, what is left alone, what fails, and where it runs."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from safetensors.torch import load_file

from zipper_ad.config import CONF, compose, finish_config, group_options, make_config, save_config, to_hydra
from zipper_ad.core import InputError
from zipper_ad.learner import train_autoencoder
from zipper_ad.sweep import best_score, job_name, plan_jobs, run_sweep, share_threads
from zipper_ad.synth import render_dataset

SMALL = ["data.size=32", "model.widths=[8,16]", "model.latent=8", "train.epochs=2", "train.threads=1", "train.device=cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("pictures") / "my zippers=1, [x]", n_train=24, n_test=1, n_good=1, size=32)


@pytest.fixture(scope="module")
def swept(pictures, tmp_path_factory):
    "A sweep of two from the command line, in a process of its own: its folder, and what was said."
    out = tmp_path_factory.mktemp("swept") / "sweep"
    words = ["train", "-m", f"data={pictures}", *SMALL, "experiment=default,control", f"out={out}"]
    done = subprocess.run([sys.executable, "-m", "zipper_ad", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def table(out):
    with (out / "sweep.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def same_weights(one, other):
    ours, theirs = (load_file(f / "weights.safetensors") for f in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---------------------------------------------------------------- planning
def test_every_combination_is_planned_as_one_run_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = plan_jobs(["model=cnn,vit", "seed=range(2)", "data=a b,c=[d]", "train=fast", "damage.kinds.patch=1"])
    assert len(jobs) == len({j.name for j in jobs}) == 8
    for job in jobs:
        chosen = [f"{k}={v}" for k, v in job.chosen.items()]
        assert job.config == make_config([*chosen, "train=fast", "damage.kinds.patch=1"]), job.name
    assert {j.config.data.root for j in jobs} == {"a b", "c=[d]"}


def test_values_of_every_kind():
    def planned(word, name):
        return [eval(f"c.{name}", {"c": j.config}) for j in plan_jobs([word])]

    assert planned("data.cache=off,memory", "data.cache") == ["off", "memory"]
    assert planned("model.widths=[8,16],[8,16,32]", "model.widths") == [[8, 16], [8, 16, 32]]
    assert planned("model=choice(cnn,vit)", "model.name") == ["cnn", "vit"]
    assert planned("damage.kinds.patch=1,2", "damage.kinds") == [{"patch": 1}, {"patch": 2}]
    assert planned("data='a,b',c", "data.root") == ["a,b", "c"]
    assert planned("experiment=default,plain", "model.head") == ["joint", "none"]


def test_names_differ_where_values_do():
    jobs = plan_jobs(["data='a/x','b/x'", "train.lr=1e-3,1e-4"])
    assert [j.name for j in jobs] == ["data=x_lr=0.001", "data=x_lr=0.0001", "data=x_lr=0.001~2", "data=x_lr=0.0001~2"]
    assert job_name({}) == "job" and "/" not in job_name({"data": "'../../etc/..'"}) and job_name({"data": "'..'"}) == "data=empty"


@pytest.mark.parametrize(
    "words, told",
    [
        ("model=cnn,resnt", "Did you mean resnet"),
        ("experiment=plan,control", "Did you mean plain"),
        ("train.epohcs=1,2", "train.epochs"),
        ("train.epochs=1,many", "train.epochs=many"),
        ("train.epochs=1,0", "between 1"),
        ("model=cnn,vit model.latent=8", "model.latent: no such setting"),
        ("train.lr=interval(0,1)", "Name some"),
        ("seed=0,1 hydra.launcher.n_jobs=2", "It depends on launch"),
        ("seed=0,1 launch=slrm", "Did you mean slurm"),
        ("seed=0,1 hydra/launcher=joblb", "Did you mean joblib"),
        ("seed=0,1 launch=parallel hydra.launcher.n_jobs=x", "n_jobs=x"),
        ("seed=0,1 data=", "data=… is missing"),
        ("seed=0,1 --cfg job", "-m"),
    ],
)
def test_mistakes_are_told_before_the_first_training(words, told, refused, pictures, tmp_path):
    assert told in refused("train", "-m", f"data={pictures}", f"out={tmp_path / 'x'}", *words.split())
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- training
def test_what_a_sweep_leaves(swept):
    out, said = swept
    rows = table(out)
    assert [r["experiment"] for r in rows] == ["default", "control"] and {r["status"] for r in rows} == {"trained"}
    for row in rows:
        folder = out / row["job"]
        detector = json.loads((folder / "detector.json").read_text())
        assert float(row["damage_auprc"]) == best_score(folder) > 0
        assert float(row["threshold"]) == detector["threshold"]["value"] and float(row["minutes"]) > 0
    assert not [c for c in rows[0] if "auroc" in c.lower()], "no figure of the test set"
    assert "damage_auprc" in said and "experiment=control" in said and not list(out.rglob("*.part*"))
    logs = [(out / r["job"] / "log.txt").read_text() for r in rows]
    assert all(log.count("trained on") == 1 for log in logs), "each has its own log"


def test_a_job_is_the_same_as_a_run_alone(swept, cli, pictures, tmp_path):
    out, _ = swept
    assert cli("train", f"data={pictures}", *SMALL, "experiment=control", f"out={tmp_path / 'alone'}").code == 0
    assert same_weights(tmp_path / "alone", out / "experiment=control")


def test_again_and_further(swept, cli, contents, pictures, tmp_path):
    out = shutil.copytree(swept[0], tmp_path / "sweep")
    before = contents(out / "experiment=control")
    (out / "experiment=default/detector.json").unlink()
    done = cli("train", "-m", f"data={pictures}", *SMALL, "experiment=default,control", f"out={out}")
    assert done.code == 0 and [r["status"] for r in table(out)] == ["trained", "there already"]
    assert contents(out / "experiment=control") == before and table(out)[1]["minutes"] == table(swept[0])[1]["minutes"]


def test_a_training_cut_short_is_carried_on(swept, pictures, tmp_path):
    config = make_config([f"data={pictures}", *SMALL, "experiment=control"])
    folder = tmp_path / "sweep/experiment=control"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    train_autoencoder(config, folder, terminal=True)  # ends without a detector, and leaves its state
    (row, _) = run_sweep([f"data={pictures}", *SMALL, "experiment=control,default"], tmp_path / "sweep")
    assert row["status"] == "carried on" and same_weights(folder, swept[0] / "experiment=control")


def test_other_settings_are_refused_unless_overwritten(swept, refused, cli, contents, pictures, tmp_path):
    out = shutil.copytree(swept[0], tmp_path / "sweep")
    before, other = contents(out), [f"data={pictures}", *SMALL, "experiment=default,control", "train.epochs=1", f"out={out}"]
    assert "train.epochs=2, not 1" in refused("train", "-m", *other)
    assert contents(out) == before
    assert cli("train", "-m", *other, "overwrite=true").code == 0
    assert [r["status"] for r in table(out)] == ["trained", "trained"]


def test_one_that_fails_does_not_stop_the_others(cli, pictures, tmp_path, monkeypatch):
    def train(config, *rest, **settings):
        if config.seed == 1:
            raise RuntimeError("out of\nmemory")
        raise InputError("not today")

    monkeypatch.setattr("zipper_ad.learner.train_autoencoder", train)
    done = cli("train", "-m", f"data={pictures}", *SMALL, "seed=0,1", f"out={tmp_path}")
    assert done.code == 1 and [r["status"] for r in table(tmp_path)] == ["failed", "failed"]
    assert done.lines == [f"zipper_ad: {tmp_path}/seed=0: not today",
                          f"zipper_ad: {tmp_path}/seed=1: RuntimeError: out of memory. See {tmp_path}/seed=1/error.txt"]
    assert "Traceback" in (tmp_path / "seed=1/error.txt").read_text()


def test_an_interrupted_sweep_leaves_a_table(cli, pictures, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("zipper_ad.learner.train_autoencoder", stop)
    done = cli("train", "-m", f"data={pictures}", *SMALL, "seed=0,1", f"out={tmp_path}")
    assert done.code == 130 and done.lines == ["stopped"] and {r["status"] for r in table(tmp_path)} == {"not finished"}


# ---------------------------------------------------------------- launchers
@pytest.mark.slow
def test_side_by_side(swept, pictures, tmp_path):
    words = ["train", "-m", f"data={pictures}", *SMALL, "experiment=default,control", "launch=parallel", "hydra.launcher.n_jobs=2"]
    done = subprocess.run([sys.executable, "-m", "zipper_ad", *words, f"out={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 0 and "%|" not in done.stderr, done.stderr
    assert all(same_weights(tmp_path / r["job"], swept[0] / r["job"]) for r in table(tmp_path))


def test_threads_are_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("zipper_ad.sweep._processors", lambda: 8)
    parallel = to_hydra({"launch": "parallel"}, sweep=True)
    assert share_threads([], 4) == ("basic", 0)
    assert share_threads(parallel, 4) == ("joblib", 2) and share_threads(parallel, 100) == ("joblib", 1)
    assert share_threads([*parallel, "hydra.launcher.n_jobs=2"], 4) == ("joblib", 4)
    assert share_threads([*parallel, "hydra.launcher.n_jobs=-2"], 9) == ("joblib", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_threads(parallel, 4) == ("joblib", 0)


@dataclass
class SlurmFields:
    "The settings of hydra-submitit-launcher 1.2.0 for Slurm, as that package declares them."

    _target_: str = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    timeout_min: int = 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int = 1
    mem_gb: int | None = None
    nodes: int = 1
    name: str = "${hydra.job.name}"
    partition: str | None = None
    max_num_timeout: int = 0
    array_parallelism: int = 256


@dataclass
class RayInit:
    init: dict[str, Any] = field(default_factory=lambda: {"address": None})
    remote: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayFields:
    "The settings of hydra-ray-launcher 1.2.2, as that package declares them."

    _target_: str = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    ray: RayInit = field(default_factory=RayInit)


@pytest.mark.parametrize("option, name, fields", [("slurm", "submitit_slurm", SlurmFields), ("ray", "ray", RayFields)])
def test_files_for_clusters_fit_their_launchers(option, name, fields, monkeypatch):
    launchers = dict(ConfigStore.instance().repo["hydra"]["launcher"])
    monkeypatch.setitem(ConfigStore.instance().repo["hydra"], "launcher", launchers)
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=fields)
    words = to_hydra({"launch": option, "seed": "3"}, sweep=True)
    composed = compose(words, launcher=True).hydra
    assert composed.runtime.choices["hydra/launcher"] == name
    written = yaml.safe_load((CONF / f"launch/{option}.yaml").read_text())["hydra"]["launcher"]
    for key, value in written.items():
        ours = composed.launcher[key]
        assert value == ours if not isinstance(value, dict) else value["remote"] == dict(ours.remote)
    assert finish_config(compose(words)) == make_config(["seed=3"]), "where it runs changes no setting"
    with pytest.raises(InputError, match="depends on launch"):
        compose([*words, "hydra.launcher.partitio=gpu"])


def test_every_way_to_launch_is_documented():
    notebook = (CONF.parent.parent / "nbs/25_sweep.ipynb").read_text(encoding="utf-8")
    assert all(f"launch={option}" in notebook for option in group_options("launch"))
