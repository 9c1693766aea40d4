"""Settings: Hydra's groups, any text as a value, mistakes answered with the right name, and files that repeat a run."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors.torch import load_file

from zipper_ad.config import (
    CONF,
    GROUPS,
    MODEL_CONFIGS,
    PRESETS,
    change_config,
    check_config,
    compare_configs,
    compose,
    config_from_dict,
    finish_config,
    group_options,
    hydra_session,
    load_config,
    make_config,
    quote,
    save_config,
    to_hydra,
)
from zipper_ad.core import InputError
from zipper_ad.corrupt import ALIGNED, KINDS

NAMES = [
    "a b", "a=b", "[1]", "{x: y}", "it's", 'say "x"', "a,b", "ü 日本", "50%", "$HOME", "${seed}",
    r"\${seed}", r"end\\", "tab\there", "#1", " lead",
    "null", "3", "true", "off", "-x", "~", "a:b", "(x)", "choice(1,2)", "", "new\nline", r"\'", "??", "./???", "a@b", "!x", "&x", "*",
]  # fmt: skip


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize("group, model", [(g, m) for g in ("data", "train", "score") for m in MODEL_CONFIGS])  # experiments: see below
def test_every_option_composes(group, model):
    assert set(GROUPS) == {"model", "preset", "data", "train", "score", "experiment", "launch"}
    for option in group_options(group):
        config = make_config([f"model={model}", f"{group}={option}"])
        assert config.model.name == model
        assert option == "default" or compare_configs(make_config([f"model={model}"]), config), f"{group}={option} changes nothing"


@pytest.fixture(scope="module")
def default_config():
    return make_config(["model=cnn"])


@pytest.mark.parametrize("experiment", group_options("experiment"))
def test_experiments_change_exactly_what_they_name(experiment, default_config):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    asked = {}
    for group, settings in yaml.safe_load(text).items():
        asked |= {f"{group}.{name}": value for name, value in settings.items()}
    config = check_config(make_config(["model=cnn", f"experiment={experiment}"]))
    assert {name: new for name, (_, new) in compare_configs(default_config, config).items()} == asked
    assert text.startswith("# @package _global_\n# ") and text.count("#") == 2  # said in one line


@pytest.mark.parametrize("family, preset", PRESETS)
def test_presets_are_what_their_files_say(family, preset):
    config = dataclasses.asdict(make_config([f"model={family}", f"preset={preset}"]))
    plain = dataclasses.asdict(MODEL_CONFIGS[family]())
    changes = PRESETS[family, preset]
    assert changes == yaml.safe_load((CONF / "preset" / preset / f"{family}.yaml").read_text())
    assert all(config["train"][k] == v for k, v in changes["train"].items()) and config["preset"] == preset
    assert config["model"] == plain | changes.get("model", {})


@pytest.mark.parametrize("kind", ALIGNED)
def test_ablations_leave_one_kind_out_of_the_usual_mixture(kind):
    assert make_config([f"experiment=without_{kind}"]).damage.kinds == {k: w for k, w in ALIGNED.items() if k != kind}
    assert set(ALIGNED) <= set(KINDS)


def test_who_wins():
    assert make_config(["train=fast", "preset=spec"]).train.epochs == 20, "the group over the preset"
    assert make_config(["train=fast", "train.epochs=3"]).train.epochs == 3, "by hand over the group"
    assert make_config(["train.epochs=3", "train=fast"]).train.epochs == 3, "in any order"
    assert make_config(["data=colour", "data.root=x"]).model.channels == 3


def test_own_kinds_of_damage():
    assert make_config(["damage.kinds.patch=2", "damage.kinds.hole=1"]).damage.kinds == {"patch": 2.0, "hole": 1.0}
    assert make_config(["damage.kinds={patch: 2, hole: 1}"]).damage.kinds == {"patch": 2.0, "hole": 1.0}
    assert make_config(["experiment=without_patch", "damage.kinds.hole=7"]).damage.kinds["hole"] == 7


def test_data_names_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (make_config(["data=colour"]).data.channels, make_config(["data=colour"]).data.root) == (3, "")
    (tmp_path / "colour").mkdir()
    assert (make_config(["data=colour"]).data.channels, make_config(["data=colour"]).data.root) == (1, "colour")


def test_configs_are_not_shared():
    make_config(["train=fast"]).model.widths.append(3)
    assert make_config(["train=fast"]).model.widths == [32, 64, 128, 128]


def test_a_program_that_uses_hydra_may_call_us():
    with hydra_session():
        before = GlobalHydra.instance().hydra
        assert make_config(["seed=977"]).seed == 977
        assert GlobalHydra.instance().hydra is before
    assert not GlobalHydra.instance().is_initialized()


def test_reading_and_help_leave_hydra_alone(tmp_path):
    save_config(make_config(), tmp_path / "c.yaml")
    code = f"""
import sys
from zipper_ad.cli import main
from zipper_ad.config import load_config
import zipper_ad.detector, zipper_ad.sweep
load_config({str(tmp_path / "c.yaml")!r})
try:
    main(["train", "-h"])
except SystemExit:
    pass
assert "hydra" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- any text
@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder(name):
    assert make_config([f"data={name}"]).data.root == name
    (o,) = OverridesParser.create().parse_overrides([f"data.root={quote(name)}"])
    again = f"data.root={o.get_value_element_as_str()}"  # as a sweep hands it on
    assert finish_config(compose([again])).data.root == name


def test_any_text_at_all():
    chance = random.Random(0)
    for _ in range(100):
        text = "".join(chance.choices("'\"\\${}[](),=: #ab~", k=chance.randint(0, 8)))
        (o,) = OverridesParser.create().parse_overrides([f"data.root={quote(text)}"])
        (o,) = OverridesParser.create().parse_overrides([f"data.root={o.get_value_element_as_str()}"])
        assert OmegaConf.create({"x": o.value()}).x == text, (text, quote(text))


def test_words_that_yaml_would_read_otherwise():
    assert make_config(["data.cache=off"]).data.cache == "off"
    assert make_config(["score.map=l2+ssim"]).score.map == "l2+ssim"
    assert make_config(["train.device=cuda:1"]).train.device == "cuda:1"
    assert make_config(["train.device='cpu'"]).train.device == "cpu"
    assert make_config(["train.lr=1e-3", "data.shift=.05", "train.minutes=3"]).train.lr == 1e-3


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "wrong, told",
    [
        ("model=resnt", "Did you mean resnet?"),
        ("preset=qick", "Did you mean quick?"),
        ("experiment=plan", "Did you mean plain?"),
        ("train=carefull", "Did you mean careful?"),
        ("score=strickt", "Did you mean strict?"),
        ("train.epohcs=3", "Did you mean train.epochs?"),
        ("epochs=3", "Did you mean train.epochs?"),
        ("model.latnet=3", "Did you mean model.latent?"),
        ("trian.epochs=3", "Did you mean train.epochs?"),
        ("train.epochs=many", "train.epochs=many: Value 'many'"),
        ("train.tensorboard=perhaps", "train.tensorboard=perhaps"),
        ("model.widths=[8,x]", "model.widths=[8,x]"),
        ("train.epochs=[1", "Lists are written [1,2]"),
        ("train.epochs=${seeed}", "train.epochs"),
        ("train.accumulate=0", "between 1 and 4096"),
        ("seed=1,2", "train -m"),
        ("seed=range(3)", "train -m"),
        ("launch=slurm", "Add -m"),
        ("hydra.launcher.n_jobs=2", "Add -m"),
        ("+train.foo=1", "+train.foo"),
        ("~train", "key=value"),
        ("model.name=vit", "model="),
    ],
)
def test_mistakes_are_told_in_one_line(wrong, told):
    with pytest.raises(InputError) as e:
        make_config([wrong])
    assert told in str(e.value) and "\n" not in str(e.value)


def test_a_launcher_that_is_not_installed(monkeypatch):
    for option, package in (("slurm", "hydra-submitit-launcher"), ("ray", "hydra-ray-launcher")):
        name = yaml.safe_load((CONF / "launch" / f"{option}.yaml").read_text())["defaults"][0]["override /hydra/launcher"]
        monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{name}.yaml", raising=False)
        with pytest.raises(InputError, match=f"pip install {package}"):
            compose(to_hydra({"launch": option}, sweep=True))


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("model", MODEL_CONFIGS)
def test_a_file_and_changes_to_it(model, tmp_path):
    config = make_config([f"model={model}", "data=a b", "experiment=without_patch"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config == change_config(config, [])
    changed = change_config(config, ["train.epochs=2", "data=[c]", f"model={model}"])
    assert set(compare_configs(config, changed)) == {"train.epochs", "data.root"} and changed.data.root == "[c]"
    for wrong, told in (("train=fast", "has its groups"), ("train.epohcs=1", "train.epochs"), ("seed=x", "seed=x")):
        with pytest.raises(InputError, match=told):
            change_config(config, [wrong])


def test_files_of_before(tmp_path):
    settings = dataclasses.asdict(make_config())
    settings["damage"]["kinds"] = None
    del settings["train"]["accumulate"], settings["train"]["compile"]
    assert config_from_dict(settings) == make_config()


# ---------------------------------------------------------------- the command line
def test_cfg_prints_and_does_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("train", "model=vit", "--cfg", "job", "train=fast", "data=no such=folder")
    assert done.code == 0 and done.err == "" and not os.listdir(tmp_path)
    assert config_from_dict(yaml.safe_load(done.out)) == make_config(["model=vit", "train=fast", "data=no such=folder"])


def test_config_repeats_a_run_bit_for_bit(cli, trained, tmp_path):
    done = cli("train", "--config", trained.run / "config.yaml", f"out={tmp_path / 'again'}")
    assert done.code == 0, done
    ours, theirs = load_file(tmp_path / "again/weights.safetensors"), load_file(trained.run / "weights.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert load_config(tmp_path / "again/config.yaml") == load_config(trained.run / "config.yaml")
    shown = cli("train", "--config", trained.run / "config.yaml", "--cfg", "job", "seed=4")
    assert compare_configs(load_config(trained.run / "config.yaml"), config_from_dict(yaml.safe_load(shown.out))) == {"seed": (0, 4)}


@pytest.mark.parametrize(
    "words, told",
    [
        ("--config RUN/config.yaml out=RUN", "holds a detector already"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--config RUN/config.yaml train=fast out=X", "has its groups"),
        ("--config RUN/config.yaml resume=true out=X", "resume=true"),
        ("-m --config RUN/config.yaml out=X", "-m"),
        ("--config RUN/history.csv out=X", "history.csv"),
    ],
)
def test_config_is_refused(words, told, trained, refused, tmp_path):
    words = words.replace("RUN", str(trained.run)).replace("=X", f"={tmp_path / 'x'}")
    assert told in refused("train", *words.split()) and not (tmp_path / "x").exists()
