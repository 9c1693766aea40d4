"""What SECURITY.md says, held: nothing loaded runs code, no name leaves its folder, no text becomes markup, no request reaches a file.

More of it is held elsewhere: detector folders and config.yaml in test_detector.py, archives of torch.export in test_export.py,
unpacking in test_data.py, single pages in test_report.py and test_training_report.py, limits of the service in test_serve.py.
"""

import ast
import inspect
import io
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Trap
from PIL import Image

from zipper_ad.core import InputError
from zipper_ad.export import export_detector
from zipper_ad.picture import read_image
from zipper_ad.predictor import Predictor

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def marker(tmp_path):
    "A path at which nothing may stand when the test is over."
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from a file was executed"


def pickles(marker):
    "The trap in every form that something unpickles by default."
    torch.save({"weight": Trap(marker)}, whole := io.BytesIO())
    torch.save({"weight": Trap(marker)}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    np.save(array := io.BytesIO(), np.array([Trap(marker)], dtype=object), allow_pickle=True)
    plain = pickle.dumps({"weight": Trap(marker)})
    return {"pickle": plain, "torch": whole.getvalue(), "legacy": legacy.getvalue(), "numpy": array.getvalue()}


def test_the_traps_work(tmp_path):
    "Otherwise the tests below would say nothing."
    for name, load in (("pickle", pickle.loads), ("torch", lambda b: torch.load(io.BytesIO(b), weights_only=False)),
                       ("legacy", lambda b: torch.load(io.BytesIO(b), weights_only=False)),
                       ("numpy", lambda b: np.load(io.BytesIO(b), allow_pickle=True))):  # fmt: skip
        load(pickles(tmp_path / name)[name])
        assert (tmp_path / name).exists(), name


# ---- what is loaded


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    from zipper_ad.detector import Detector

    folder = tmp_path_factory.mktemp("exported")
    return {form: export_detector(Detector.load(trained.run), folder, form) for form in ("onnx", "torchscript", "torch")}


FORMS = ["pickle", "torch", "legacy", "numpy"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_a_training_begins_with(form, trained, marker, tmp_path):
    from zipper_ad.config import load_config
    from zipper_ad.learner import start_from
    from zipper_ad.models.head import Restorer

    (tmp_path / "weights.safetensors").write_bytes(pickles(marker)[form])
    with pytest.raises(InputError, match="not a safetensors file"):
        start_from(Restorer(load_config(trained.run / "config.yaml").model), tmp_path)


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt", ".pt2"])
@pytest.mark.parametrize("form", FORMS)
def test_exported_files(suffix, form, marker, tmp_path):
    file = tmp_path / f"detector{suffix}"
    file.write_bytes(pickles(marker)[form])
    with pytest.raises(InputError, match=f"detector{suffix}"):
        Predictor(file)


@pytest.mark.parametrize("form", ["torchscript", "torch"])
def test_a_pickle_within_an_exported_archive(form, exported, marker, tmp_path):
    "An archive that is whole but for one part, which is a trap; a part of each folder and kind in turn."
    source, refused = exported[form], 0
    names = zipfile.ZipFile(source).namelist()
    parts = {(Path(n).parent, Path(n).suffix): n for n in names if not n.endswith((".py", ".debug_pkl"))}
    for part in parts.values():
        file = tmp_path / source.name
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
            for name in names:
                new.writestr(name, pickles(marker)["pickle"] if name == part else old.read(name))
        try:
            Predictor(file)
        except InputError as e:
            refused += 1
            assert source.name in str(e) and "\n" not in str(e)
        assert not marker.exists(), part
    assert refused


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_entries_of_one_name(exported, tmp_path):
    "One of them might be looked at, and the other loaded."
    source, file = exported["torch"], tmp_path / "detector-fp32.pt2"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            for _ in range(1 + name.endswith("weights_config.json")):
                new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="two entries of one name"):
        Predictor(file)


@pytest.mark.parametrize("form", FORMS)
def test_json_beside_an_exported_file(form, exported, marker, tmp_path):
    file = Path(shutil.copy(exported["onnx"], tmp_path))
    file.with_name(file.name + ".json").write_bytes(pickles(marker)[form])
    with pytest.raises(InputError, match="json: damaged"):
        Predictor(file)


def test_weights_of_an_onnx_file_come_from_its_folder(exported, tmp_path):
    "A file may name another one that holds its weights; one outside is not read."
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported["onnx"])
    weight = max(model.graph.initializer, key=lambda w: len(w.raw_data))
    (tmp_path / "outside.bin").write_bytes(weight.raw_data)
    (tmp_path / "inside").mkdir()
    for place in ("../outside.bin", str(tmp_path / "outside.bin")):
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        del weight.external_data[:]
        weight.external_data.add(key="location", value=place)
        (tmp_path / "inside/detector.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match="detector.onnx"):
            Predictor(tmp_path / "inside/detector.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_state_of_a_training(form, marker, tmp_path):
    from zipper_ad.resume import STATE, read_state

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / STATE).write_bytes(pickles(marker)[form])
    with pytest.raises(InputError, match=STATE):
        read_state(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_the_perceptual_loss(form, suffix, marker, tmp_path):
    from zipper_ad.losses import read_tensors

    (tmp_path / f"vgg{suffix}").write_bytes(pickles(marker)[form])
    with pytest.raises(InputError, match="vgg"):
        read_tensors(tmp_path / f"vgg{suffix}")


@pytest.mark.parametrize("form", FORMS)
def test_caches_are_made_again(form, trained, marker, tmp_path):
    from zipper_ad.app import open_store
    from zipper_ad.data import AnomalyDataset

    whole = AnomalyDataset(trained.data, size=64, cache="disk", cache_dir=tmp_path / "cache").batch([0])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(pickles(marker)[form])
    assert torch.equal(AnomalyDataset(trained.data, size=64, cache="disk", cache_dir=tmp_path / "cache").batch([0]), whole)
    (tmp_path / "store").mkdir()
    for name in ("images.npy", "thumbs.npy", "facts.json"):
        (tmp_path / "store" / name).write_bytes(pickles(marker)[form])
    assert open_store(tmp_path / "store") is None


def test_yaml_makes_no_objects(marker, tmp_path):
    from zipper_ad.tune import read_space

    (tmp_path / "space.yaml").write_text(f"train.lr: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    with pytest.raises(InputError, match="space.yaml"):
        read_space(tmp_path / "space.yaml")


def test_results_of_a_tuning_and_of_a_score(marker, tmp_path):
    from zipper_ad.archive import claim, read_scores
    from zipper_ad.tune import open_study

    for data in pickles(marker).values():
        (tmp_path / "study.db").write_bytes(data)
        with pytest.raises(InputError, match="study.db"):
            open_study(tmp_path)
        (tmp_path / "archive.json").write_bytes(data)
        with pytest.raises(InputError, match="archive.json"):
            claim(tmp_path, {})
        (tmp_path / "shard-00000000.parquet").write_bytes(data)
        with pytest.raises((InputError, ValueError)):
            read_scores(tmp_path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jpg"])
def test_pictures_of_other_formats_start_no_program(name, tmp_path, monkeypatch):
    "PIL hands PostScript to Ghostscript, whatever the file's name says; here it is not even recognised."
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    (tmp_path / name).write_bytes(POSTSCRIPT)
    Image.new("L", (32, 32)).save(gif := io.BytesIO(), "GIF")
    for source in (tmp_path / name, POSTSCRIPT, gif.getvalue()):
        with pytest.raises(InputError, match="not an image"):
            read_image(source)


# ---- what the package does not do


def calls():
    "(module, the call, its arguments by name) for every call in the package."
    for path in sorted((ROOT / "zipper_ad").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_text_is_run():
    for where, call, named in calls():
        assert call not in ("eval", "exec", "os.system", "os.popen", "compile", "yaml.load", "yaml.unsafe_load"), where
        assert named.get("shell", "False") == "False", where


def test_servers_listen_on_this_machine_alone_unless_told():
    from zipper_ad import app, serve

    assert inspect.signature(serve.serve).parameters["host"].default == "127.0.0.1"
    assert "host" not in inspect.signature(app.serve).parameters and "--Voila.ip=127.0.0.1" in app._voila(Path("x.ipynb"), 1)


# ---- names in pages


HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def hostile(trained, tmp_path_factory):
    "A run and test pictures whose folders and files are called what a browser would take for a picture with a script."
    root = tmp_path_factory.mktemp("hostile")
    run = shutil.copytree(trained.run, root / f"run {HOSTILE}")
    for split in ("test", "ground_truth"):
        shutil.copytree(trained.data / split / "rough", root / f"data {HOSTILE}" / split / HOSTILE)
    data = root / f"data {HOSTILE}"
    shutil.copytree(trained.data / "test/good", data / "test/good")
    for file in [*sorted(data.glob("test/*/*.png")), *sorted(data.glob("ground_truth/*/*.png"))]:
        file.rename(file.with_name(HOSTILE + file.name))
    return run, data


def test_names_stay_text_in_every_page(hostile, cli, tmp_path):
    run, data = hostile
    done = [
        cli("report", f"run={run}", f"data={data}", f"out={tmp_path / 'report.html'}"),
        cli("compare", f"runs=[{run},{shutil.copytree(run, run.with_name('other'))}]", f"data={data}", f"out={tmp_path / 'compare'}"),
        cli("training-report", f"run={run}", f"out={tmp_path / 'training.html'}"),
        cli("card", f"run={run}"),
    ]
    assert [d.code for d in done] == [0] * 4, done
    pages = [*tmp_path.rglob("*.html"), run / "card.md"]
    assert len(pages) == 4
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<img src=x" not in text, page.name
        assert "&lt;img src=x" in text, f"{page.name}: the name is not there at all"


def test_names_of_pictures_do_not_leave_the_folder_of_verdicts(trained, cli, tmp_path):
    names = ["..png", "...png", "a%2f..%2fb.png", "..\\..\\x.png", "~.png", "-rf.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(next((trained.data / "test/good").iterdir()), tmp_path / "in" / name)
    assert cli("predict", f"run={trained.run}", f"input={tmp_path / 'in'}", f"out={tmp_path / 'a/out'}").code == 0
    assert cli("watch", f"run={trained.run}", f"input={tmp_path / 'in'}", f"out={tmp_path / 'a/watch'}", "once=true", "settle=0",
               "review=0.3").code == 0  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"in", "a"} and {p.name for p in (tmp_path / "a").iterdir()} == {"out", "watch"}
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == sorted(names)


# ---- requests


class Listener:
    "What Python opens while `on`, besides its own libraries; an audit hook, which cannot be taken away again."

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if self.on and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "subprocess.Popen"):
            path = str(arguments[0])
            if not path.startswith((sys.prefix, sys.base_prefix)):
                self.seen.append((event, path))


@pytest.fixture(scope="module")
def listener():
    return Listener()


def test_requests_reach_no_file(exported, listener, tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'zipper_ad[serve]'")
    from fastapi.testclient import TestClient

    from zipper_ad.serve import make_app

    secret = tmp_path / "secret.png"
    Image.new("L", (32, 32), 7).save(secret)
    image, text = secret.read_bytes(), str(secret).encode()
    paths = ["/", "/../" * 9 + "etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", str(secret), f"/{secret}", f"/v1/judge/{secret}", "/static/x",
             f"/v1/model?file={secret}", f"/metrics?path={secret}"]  # fmt: skip
    names = [str(secret), "../../x.png", "file:///etc/passwd", "|id", "a\0b.png"]
    with TestClient(make_app(Predictor(exported["onnx"], threads=1), max_mb=1), raise_server_exceptions=False) as client:
        for _ in range(2):  # the first time Python reads its own libraries
            listener.seen.clear()
            listener.on = True
            try:
                codes = [client.get(p).status_code for p in paths]
                posted = [client.post(f"/v1/judge?path={secret}", content=c).status_code for c in (image, text, b"file://" + text)]
                forms = [client.post("/v1/judge", files={"file": (name, image)}).status_code for name in names]
                forms += [client.post("/v1/judge", **{k: {"file": str(secret)}}).status_code for k in ("data", "json")]
            finally:
                listener.on = False
    assert listener.seen == []
    assert codes == [200, 404, 404, 404, 404, 404, 404, 200, 200] and posted == [200, 422, 422]
    assert all(c in (200, 422) for c in forms) and forms[-2:] == [422, 422]


def test_the_listener_hears(listener, tmp_path):
    listener.seen.clear()
    listener.on = True
    (tmp_path / "x").write_text("x")
    listener.on = False
    assert listener.seen == [("open", str(tmp_path / "x"))]


def test_security_md_names_every_entry_point():
    "A command that is added is thought about."
    from zipper_ad.cli import COMMANDS

    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"`{name}`" not in text and f"`zipper_ad {name}`" not in text]
    assert not missing, f"SECURITY.md says nothing of {missing}"
    assert json.dumps(text).isprintable()
