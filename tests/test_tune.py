"""A search for settings: wrong spaces, kills and interruptions, trials that fail or are pruned, and a judge that asks all the same."""

import csv
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState

from zipper_ad import tune as tuning
from zipper_ad.config import load_config, make_config
from zipper_ad.core import InputError
from zipper_ad.models.base import Restored
from zipper_ad.synth import render_dataset
from zipper_ad.tune import best_config, best_trial, done_trials, judge, make_questions, make_space, read_space, settings_of, tune

SETTINGS = [
    "data.size=32", "data.held_out=0.4", "model.widths=[8,16]", "model.latent=8", "model.fold=1", "train.epochs=3", "train.minutes=0",
    "train.bs=4", "train.device=cpu", "train.precision=fp32", "train.threads=1", "data.cache=memory", "damage.lint=0",
]  # fmt: skip
SPACE = {"train.lr": [1e-4, 1e-2, "log"], "damage.whole": [0.0, 0.5], "data.size": {"choices": [24, 32]}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("pictures") / "zippers", n_train=24, n_test=1, n_good=1, size=32, progress=False)


@pytest.fixture(scope="module")
def config(pictures):
    return make_config([f"data={pictures}", *SETTINGS])


def search(config, out, n_trials=3, **kwargs):
    return tune(config, out, n_trials, progress=False, **({"space": SPACE} | kwargs))


def table(out):
    "trials.csv without what differs from run to run: the seconds."
    with (out / "trials.csv").open(newline="", encoding="utf-8") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


@pytest.fixture
def quick(monkeypatch):
    "Trials that train nothing: the score is known, and `quick.faults` maps the number of the call to an exception."

    def run_trial(trial, config, questions, told=None):
        run_trial.calls += 1
        if error := run_trial.faults.get(run_trial.calls):
            raise error
        score = 1 / (1 + abs(math.log10(config.train.lr / 0.002))) - config.damage.whole / 10
        for epoch in range(1, 4):
            trial.report(score * epoch / 3, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("kept", 3)
        return score

    run_trial.calls, run_trial.faults = 0, {}
    monkeypatch.setattr(tuning, "run_trial", run_trial)
    monkeypatch.setattr(tuning, "gc", SimpleNamespace(collect=int))  # nothing was trained; and figures are drawn in the notebook
    monkeypatch.setattr(tuning, "chart", lambda draw, alt: "")
    return run_trial


# ---- the space


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"train.lrr": [1e-4, 1e-2]}, "train.lrr: no such setting. Did you mean train.lr?"),
        ({"trian.lr": [1e-4, 1e-2]}, "Did you mean train.lr?"),
        ({"model.patch": [8, 16]}, "model.patch: no such setting"),  # another family's
        ({"train": {"lr": [1e-4, 1e-2]}}, "train: no such setting"),
        ({"train.lr": [1e-2, 1e-4]}, "the smaller first"),
        ({"train.lr": [1e-3, 1e-3]}, "the smaller first"),
        ({"train.lr": [1e-3, math.nan]}, "the smaller first"),
        ({"train.lr": [-1, 1, "log"]}, "must begin above 0"),
        ({"train.lr": [1e-3, 20]}, "train.lr=20.0: must lie between"),
        ({"train.lr": [1e-3]}, "is no range"),
        ({"train.lr": {"low": 1e-3, "high": 1e-2}}, "is no range"),
        ({"train.lr": {"choices": []}}, "two or more different choices"),
        ({"train.lr": {"choices": [1e-3, 1e-3]}}, "two or more different choices"),
        ({"train.bs": [4.5, 8]}, "takes whole numbers"),
        ({"train.bs": {"choices": [4, "many"]}}, "train.bs=many"),
        ({"model.skip": ["add", "sum"]}, "model.skip=sum: choose from"),
        ({"model.skip": [0, 1]}, "not a number"),
        ({"damage.restore": [0, 1]}, "not a number"),
        ({"model.widths": [[8, 16], [8]]}, "model.widths=[8]: two or more levels"),
        ({"seed": [0, 9]}, "seed: cannot be searched"),
        ({"data.held_out": [0.1, 0.3]}, "cannot be searched: it says which pictures judge"),
        ({"score.pool": ["max", "mean"]}, "cannot be searched"),
        ({}, "space: is empty"),
    ],
)
def test_wrong_spaces_are_told(entry, told, config, tmp_path):
    with pytest.raises(InputError) as e:
        search(config, tmp_path / "out", space=entry)
    assert told in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"), [("train.lr: [1", "not YAML"), ("- train.lr", "must have lines"), ("", "must have lines"), ("a: ${b}", "not YAML")]
)
def test_wrong_space_files_are_told(text, told, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    if text:
        with pytest.raises(InputError, match=told) as e:
            read_space(file)
        assert str(file) in str(e.value)
    for bad in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(InputError, match="Give a YAML file"):
            read_space(bad)
    file.write_bytes(b"\xff\xfe\x00binary\x80")
    with pytest.raises(InputError):
        read_space(file)


def test_marks_and_types_of_a_space(config):
    written = "{train.bs: [2, 16, log], train.ema: {choices: [0, 0.9]}, loss.focal: [1, 9, int], train.lr: [1e-4, 1e-2]}"
    space = make_space(read_space(written), config)
    assert space["train.bs"] == optuna.distributions.IntDistribution(2, 16, log=True)
    assert space["train.ema"].choices == (0, 0.9)
    assert space["loss.focal"] == optuna.distributions.IntDistribution(1, 9)
    assert space["train.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2)


def test_wrong_arguments_are_told(config, tmp_path):
    for wrong in ({"n_trials": 0}, {"minutes": -1.0}, {"pruner": "medan"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            search(config, tmp_path / "out", **wrong)


# ---- the judge


class Oracle(torch.nn.Module):
    "Knows where the questions' damage is, at whatever size it is asked; its map is turned round for `sign=-1`."

    def __init__(self, questions, sign=1):
        super().__init__()
        self.weight, self.mask, self.sign, self.at, self.sizes = torch.nn.Parameter(torch.zeros(1)), questions.mask, sign, 0, set()

    def forward(self, x):
        mask = self.mask[self.at : self.at + len(x)]
        self.at += len(x)
        self.sizes.add(x.shape[-1])
        logit = torch.nn.functional.interpolate(mask, x.shape[-2:], mode="bilinear", antialias=True) * 8 - 4
        torch.rand(3)  # a network that draws noise
        return Restored(x, self.sign * logit)


def test_the_judge_measures_at_one_size_and_leaves_chance_alone():
    questions = make_questions(torch.rand(6, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4, rounds=2)
    guess = questions.mask.mean().item()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    scores = {}
    for size in (64, 32):
        oracle = Oracle(questions).train()
        scores[size] = judge(oracle, questions, size, bs=5)
        assert oracle.sizes == {size} and oracle.training
    assert torch.equal(torch.get_rng_state(), before)
    assert scores[64] > 0.8 and guess < scores[32] <= scores[64]
    assert judge(Oracle(questions, -1), questions, 64) < guess
    assert judge(Oracle(questions), questions, 64, bs=64) == pytest.approx(scores[64])


def test_blank_questions_are_refused():
    with pytest.raises(InputError, match="too few or too small"):
        make_questions(torch.full((1, 1, 16, 16), 0.5), lint_share=0, rounds=0)


def test_questions_do_not_depend_on_what_is_searched(config, quick, monkeypatch, tmp_path):
    asked = []

    def run_trial(trial, config, questions, told=None):
        asked.append((config, questions))
        return 0.5

    monkeypatch.setattr(tuning, "run_trial", run_trial)
    search(config, tmp_path / "out", 6)
    assert {c.data.size for c, _ in asked} == {24, 32} and len({c.damage.whole for c, _ in asked}) > 3
    assert all(q is asked[0][1] for _, q in asked) and asked[0][1].x.shape[-1] == 32
    assert {c.data.root for c, _ in asked} == {config.data.root}


# ---- going on


def test_in_parts_as_in_one_go(config, quick, tmp_path):
    search(config, tmp_path / "whole", 12)  # the first ten are random
    for n in (1, 5, 5, 12):
        study = search(config, tmp_path / "parts", n)
        assert len(done_trials(study)) == n
    assert table(tmp_path / "whole") == table(tmp_path / "parts") and len(table(tmp_path / "whole")) == 12
    search(config, tmp_path / "other", 3, seed=1)
    assert table(tmp_path / "other")[0] == table(tmp_path / "whole")[0]  # the settings as given come first
    assert table(tmp_path / "other")[1:] != table(tmp_path / "whole")[1:3]


def test_ctrl_c_keeps_what_is_there(config, quick, tmp_path):
    quick.faults = {1: KeyboardInterrupt(), 5: KeyboardInterrupt(), 7: OSError(28, "No space left on device")}
    out = tmp_path / "out"
    for done, error in ((0, KeyboardInterrupt), (3, KeyboardInterrupt), (4, OSError)):
        with pytest.raises(error):
            search(config, out, 6)
        assert len(table(out)) == done and (out / "tune.html").exists() and (out / "best.yaml").exists() == (done > 0)
    search(config, out, 6)
    quick.faults = {}
    search(config, tmp_path / "whole", 6)
    assert table(out) == table(tmp_path / "whole")
    assert not list(out.glob(".part-*"))


@pytest.mark.parametrize("at", [0, 2])
def test_a_stale_trial_is_tried_again(config, quick, tmp_path, at):
    study = search(config, tmp_path / "out", at or 1)
    if not at:  # killed within the first trial
        shutil.rmtree(tmp_path / "out")
        quick.faults = {quick.calls + 1: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            search(config, tmp_path / "out", 4)
        study = tuning.open_study(tmp_path / "out")
    study.ask(make_space(SPACE, config))  # as a killed process leaves it
    assert [t.state for t in study.trials].count(TrialState.RUNNING) == 1
    study = search(config, tmp_path / "out", 4)
    search(config, tmp_path / "whole", 4)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert len(done_trials(study)) == 4 and not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


SCRIPT = """
import sys
from zipper_ad.config import load_config
from zipper_ad.tune import tune
tune(load_config(sys.argv[1]), sys.argv[2], 3, space={space}, progress=False)
"""


def test_killed_and_resumed(config, tmp_path):
    out, file = tmp_path / "a ?#%20 name", tmp_path / "config.yaml"
    tuning.save_config(config, file)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.replace("{space}", repr(SPACE)), file, out], stderr=subprocess.PIPE, text=True)
    while not (out / "trials.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    with pytest.raises(InputError, match="another search is running here"):
        search(config, out)
    process.kill()
    process.communicate()
    before = len(table(out))
    assert 1 <= before < 3
    study = search(config, out)
    search(config, tmp_path / "whole")
    assert table(out) == table(tmp_path / "whole") and len(table(out)) == 3
    assert {r["state"] for r in table(out)} <= {"complete", "pruned"} and all(float(r["score"]) > 0 for r in table(out))

    best = max((r for r in table(out) if r["state"] == "complete"), key=lambda r: float(r["score"]))
    kept = load_config(out / "best.yaml")
    assert (str(kept.train.lr), str(kept.damage.whole), str(kept.data.size)) == tuple(best[k] for k in SPACE)
    assert kept == best_config(study) and settings_of(best_trial(study))["train.lr"] == kept.train.lr
    assert kept.data.root == config.data.root and kept.train.epochs == 3
    assert make_config([f"{k}={v}" for k, v in settings_of(best_trial(study)).items()]).train.lr == kept.train.lr


# ---- trials that end otherwise


def test_failures_are_written_down_and_do_not_stop(config, quick, tmp_path):
    quick.faults = {
        2: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 3: InputError("model.x=1: does not fit."),
        4: MemoryError(), 5: ArithmeticError("the loss was nan in epoch 1"),
    }  # fmt: skip
    study = search(config, tmp_path / "out", 7)
    rows = table(tmp_path / "out")
    assert [r["state"] for r in rows] == ["complete"] + ["failed"] * 4 + ["complete"] * 2
    for row, told in zip(rows[1:5], ("out of memory", "does not fit", "MemoryError", "nan"), strict=True):
        assert told in row["failure"] and row["score"] == ""
    assert "4 failed" in tuning.describe_study(study) and "does not fit" in (tmp_path / "out/tune.html").read_text()
    quick.faults = {quick.calls + 1: TypeError("a mistake in the program")}
    with pytest.raises(TypeError):
        search(config, tmp_path / "out", 8)


def test_all_failed(config, quick, tmp_path):
    quick.faults = {i: RuntimeError("boom") for i in range(1, 4)}
    study = search(config, tmp_path / "out", 3)
    assert not (tmp_path / "out/best.yaml").exists() and (tmp_path / "out/tune.html").exists()
    with pytest.raises(InputError, match="the last one failed: boom"):
        best_config(study)


def test_pruned_trials_count_but_are_never_the_best(config, quick, monkeypatch, tmp_path):
    monkeypatch.setitem(tuning.PRUNERS, "none", lambda epochs: optuna.pruners.ThresholdPruner(lower=2, n_warmup_steps=2))
    study = search(config, tmp_path / "out", 4, pruner="none")
    rows = table(tmp_path / "out")
    assert [r["state"] for r in rows] == ["pruned"] * 4 and {r["epochs"] for r in rows} == {"2"}
    assert all(0 < float(r["score"]) < 1 for r in rows) and best_trial(study) is None and quick.calls == 4
    search(config, tmp_path / "out", 4, pruner="none")
    assert quick.calls == 4  # nothing is left to do


def test_the_median_pruner_ends_hopeless_trials(config, quick, tmp_path):
    study = search(config, tmp_path / "out", 16)
    pruned = [t for t in done_trials(study) if t.state == TrialState.PRUNED]
    assert 1 < len(pruned) < 11 and all(len(t.intermediate_values) < 3 or t.value < best_trial(study).value for t in pruned)
    assert abs(math.log10(settings_of(best_trial(study))["train.lr"] / 0.002)) < 0.5


def test_time_is_kept(config, quick, tmp_path):
    study = search(config, tmp_path / "out", 5, minutes=1e-12)
    assert not done_trials(study) and (tmp_path / "out/trials.csv").exists()


# ---- one folder, one search


def test_another_search_is_refused(config, pictures, quick, tmp_path):
    out = tmp_path / "out"
    search(config, out, 2)
    before = table(out)
    others = [
        (make_config([f"data={pictures}", *SETTINGS, "train.epochs=4"]), {}, "train.epochs=3, not 4"),
        (config, {"space": SPACE | {"train.lr": [1e-4, 1e-1]}}, "train.lr=.* in its space"),
        (config, {"seed": 1}, "another seed"),
        (config, {"pruner": "none"}, "another pruner"),
    ]
    more = render_dataset(tmp_path / "more", n_train=25, n_test=1, n_good=1, size=32, progress=False, seed=9)
    others.append((make_config([f"data={more}", *SETTINGS]), {}, "other pictures"))
    for other, kwargs, told in others:
        with pytest.raises(InputError, match=told):
            search(other, out, 3, **kwargs)
    assert table(out) == before
    moved = shutil.copytree(pictures, tmp_path / "moved")
    study = search(make_config([f"data={moved}", *SETTINGS]), out, 3)  # the same pictures elsewhere
    assert len(done_trials(study)) == 3


def test_what_is_no_study_is_told(config, tmp_path):
    (tmp_path / "study.db").write_text("no database, but a letter to a friend, and long enough to be taken for one" * 20)
    with pytest.raises(InputError, match="study.db: cannot be used"):
        search(config, tmp_path)
    assert (tmp_path / "study.db").read_text().startswith("no database")


def test_best_yaml_is_plain(config, quick, tmp_path):
    search(config, tmp_path / "out", 2, space={"model.widths": [[8, 16], [8, 16, 32]], "train.lr": [1e-3, 1e-2]})
    kept = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert kept["model"]["widths"] in ([8, 16], [8, 16, 32]) and kept["train"]["epochs"] == 3
