"""Broken pictures, arrays, detector folders, settings and exported files by the thousand: each must end in a verdict or in one clear line.

    python tools/fuzz.py [OUT.json] [cases=2000] [seed=0] [rooms=pictures,arrays,folders,settings,exported]

A case is made of its seed, its room and its number alone. Each room works in a process of its own, so that a case that kills it, or that
takes over a minute, is noticed and counted; the next case goes on in a new one. What is counted: `accepted` (a picture of the promised
shape and type, a verdict with a finite score, a configuration), `refused` (`InputError`, one line, which names what was given), and
`crashed` (anything else, with the case's number and what was raised). The detector is a small CNN that was never trained.
"""

import io
import json
import math
import multiprocessing
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from zipper_ad.core import InputError, atomic_path
from zipper_ad.picture import read_image

SIZE, PATIENCE = 32, 60  # pixels a side of the detector; seconds for one case
ODD = [None, True, False, -1, 0, 1, 2, 7, 0.5, -0.5, 1e-300, 1e308, 10**12, 10**400, math.nan, math.inf, -math.inf, "", "x", "nan",
       "../../x", [], [1], [[]], {}, {"a": 1}]  # fmt: skip


# ---- damage


def image_files() -> dict[str, bytes]:
    "Small whole pictures of every format, mode and compression that cameras and programs write."
    rng = np.random.default_rng(0)
    grey = (np.add.outer(np.arange(24), np.arange(40)) * 4 + rng.integers(0, 20, (24, 40))).astype(np.uint8)
    image, colour = Image.fromarray(grey), Image.fromarray(np.dstack([grey, grey[::-1], 255 - grey]))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    kinds = {
        "grey.png": (image, {}), "colour.png": (colour, {}), "16bit.png": (wide, {}), "palette.png": (colour.convert("P"), {}),
        "alpha.png": (colour.convert("RGBA"), {}), "one.png": (image.convert("1"), {}), "clear.png": (image, {"transparency": 3}),
        "grey.jpg": (image, {}), "colour.jpg": (colour, {"exif": exif}), "progressive.jpg": (colour, {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}), "grey.bmp": (image, {}), "colour.bmp": (colour, {}),
        "palette.bmp": (image.convert("P"), {}),
        "raw.tif": (image, {"exif": exif}), "lzw.tif": (colour, {"compression": "tiff_lzw"}),
        "deflate.tif": (image, {"compression": "tiff_adobe_deflate"}), "jpeg.tif": (colour, {"compression": "jpeg"}),
        "16bit.tif": (wide, {}), "float.tif": (Image.fromarray(grey.astype(np.float32) / 255), {}),
        "lossy.webp": (colour, {"quality": 80}), "lossless.webp": (colour.convert("RGBA"), {"lossless": True}),
    }  # fmt: skip
    formats, found = {"jpg": "JPEG", "tif": "TIFF"}, {}
    for name, (picture, settings) in kinds.items():
        suffix = name.rpartition(".")[2]
        picture.save(buffer := io.BytesIO(), format=formats.get(suffix, suffix.upper()), **settings)
        found[name] = buffer.getvalue()
    return found


def damage(data: bytes, rng: np.random.Generator, other: bytes = b"") -> tuple[str, bytes]:
    "(kind of damage, damaged bytes)."
    kind = str(rng.choice(["cut", "flip", "flips", "zeros", "noise", "twice", "splice", "longer", "number"]))
    raw, n = bytearray(data), len(data)
    a, b = sorted(int(i) for i in rng.integers(0, n + 1, 2))
    b = min(b, a + 64)
    if kind == "cut":
        raw = raw[:a]
    elif kind in ("flip", "flips"):
        for i in rng.integers(0, n, 1 if kind == "flip" else int(rng.integers(2, 30))):
            raw[i] ^= 1 << int(rng.integers(8))
    elif kind == "zeros":
        raw[a:b] = bytes(b - a)
    elif kind == "noise":
        raw[a:b] = rng.bytes(b - a)
    elif kind == "twice":
        raw[a:a] = raw[a:b]
    elif kind == "splice":
        raw = raw[:a] + other[int(rng.integers(0, len(other) + 1)) :]
    elif kind == "longer":
        raw += rng.bytes(int(rng.integers(1, 200)))
    else:  # a length, a width or an offset that is far too large
        value = int(rng.choice([0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
        width = 1 if value < 256 else 2 if value < 65536 else 4
        raw[a : a + width] = value.to_bytes(width, str(rng.choice(["little", "big"])))
    return kind, bytes(raw)


def places(tree, path=()):
    "The path of every value in a tree of JSON."
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def alter(tree, rng: np.random.Generator) -> str:
    "Change a tree of JSON in one place; what was done, in words."
    *path, last = (found := list(places(tree)))[rng.integers(len(found))]
    holder = tree
    for key in path:
        holder = holder[key]
    where = ".".join(map(str, (*path, last)))
    if rng.random() < 0.3:
        del holder[last]
        return f"{where} removed"
    holder[last] = ODD[rng.integers(len(ODD))]
    return f"{where} = {str(holder[last])[:20]}"


# ---- rooms: each makes a case of a generator of chance, and returns (kind, function, words of which a refusal names one)


def checked_picture(pixels: np.ndarray, channels: int):
    assert pixels.dtype == np.uint8 and pixels.ndim == (2 if channels == 1 else 3) and min(pixels.shape[:2]) >= 16, pixels.shape


def checked_verdict(judge, picture):
    "The verdict on a picture has a finite score, and a map of the promised size."
    v = judge.predict(picture)
    assert math.isfinite(v.score) and 0 <= v.p_value <= 1 and isinstance(v.is_anomalous, bool), (v.score, v.p_value, v.is_anomalous)
    assert v.anomaly_map.ndim == 2 and np.isfinite(v.anomaly_map).all() and v.mask.shape == v.anomaly_map.shape


class Pictures:
    def __init__(self, folder: Path):
        self.files, self.path = image_files(), folder / "picture.png"

    def case(self, rng):
        names = list(self.files)
        name, other = rng.choice(names, 2)
        kind, data = damage(self.files[name], rng, self.files[other])
        channels, by_path = int(rng.choice([1, 3])), rng.random() < 0.1
        if by_path:
            self.path.write_bytes(data)
        source = self.path if by_path else data
        return f"{kind} {name}", lambda: checked_picture(read_image(source, channels), channels), ("picture",)


class Arrays:
    "What programs hand over: arrays of any type and shape, PIL images of any mode, tensors, and things that are none."

    def __init__(self, folder: Path):
        self.judges = open_judges(folder)

    def case(self, rng):
        import torch

        types = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64 object U1 M8[s]".split()
        shape = tuple(int(s) for s in rng.choice([0, 1, 2, 3, 4, 5, 16, 31, 33], int(rng.integers(0, 5))))
        kind = str(rng.choice(["array", "array", "array", "tensor", "pil", "thing"]))
        dtype = str(rng.choice(types))
        array = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 6))
        if rng.random() < 0.1 and array.size:
            array.flat[int(rng.integers(array.size))] = rng.choice([np.nan, np.inf, -np.inf])
        with np.errstate(all="ignore"):
            thing = np.zeros(shape, dtype) if dtype in ("M8[s]", "U1") else array.astype(dtype)
        if kind == "tensor":
            dtype = str(rng.choice(["bfloat16", "float16", "float32", "uint8", "int64", "bool", "complex64"]))
            thing = torch.tensor(np.nan_to_num(array)).to(getattr(torch, dtype))
        elif kind == "pil":
            dtype = str(rng.choice("1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16".split()))
            shape = tuple(int(s) for s in rng.integers(1, 40, 2))
            thing = Image.new(dtype, shape)
        elif kind == "thing":
            things = [None, 3, "", "no such file.png", b"", b"x", object(), [], [[1], [1, 2]], {}, io.BytesIO(), io.BytesIO(b"x"),
                      np.float32(1), lambda: 1, Path("."), "\0", "a" * 5000]  # fmt: skip
            thing = things[rng.integers(len(things))]
        judge = self.judges[rng.integers(len(self.judges))]
        def run():
            found = judge.predict([thing])[0]
            if found.error:
                raise InputError(found.error)
            checked_verdict(judge, thing if not isinstance(thing, list) else [thing])

        return f"{kind} {dtype} {shape}", run, ()


def make_folder(root: Path, formats=("onnx", "openvino", "torchscript", "torch")) -> Path:
    "A detector around a network that was never trained, as a folder and exported in several formats."
    import torch

    from zipper_ad.config import make_config, save_config
    from zipper_ad.detector import Detector
    from zipper_ad.export import export_detector
    from zipper_ad.models.head import Restorer
    from zipper_ad.synth import render_zipper

    config = make_config([f"data.size={SIZE}", "model.widths=[4,8]", "model.latent=8", "train.device=cpu", "score.map=damage+l2"])
    torch.manual_seed(0)
    normals = torch.from_numpy(np.stack([render_zipper(s, SIZE) for s in range(40)]))[:, None] / 255
    Detector.fit(Restorer(config.model), normals, config).save(root / "run")
    save_config(config, root / "run/config.yaml")
    for form in formats:
        export_detector(Detector.load(root / "run"), root / "exported", form)
    return root


def open_judges(root: Path) -> list:
    from zipper_ad.detector import Detector
    from zipper_ad.predictor import Predictor

    return [Detector.load(root / "run"), Predictor(root / "exported/detector-fp32.onnx", threads=1)]


class Folders:
    "Detector folders with a damaged detector.json, or weights that its digest was made to fit."

    def __init__(self, root: Path):
        from zipper_ad.detector import Detector
        from zipper_ad.synth import render_zipper

        self.load, self.picture, self.run = Detector.load, render_zipper(5, 40), root / "changed"
        self.facts = (root / "run/detector.json").read_bytes()
        self.weights = (root / "run/weights.safetensors").read_bytes()
        self.run.mkdir(exist_ok=True)
        checked_verdict(self.load(root / "run"), self.picture)

    def case(self, rng):
        import hashlib

        facts, weights = json.loads(self.facts), self.weights
        how = str(rng.choice(["json", "json", "text", "bytes", "tensors", "swap", "deep"]))
        if how == "json":
            what = alter(facts, rng)
        elif how == "bytes":
            what, weights = damage(weights, rng, self.facts)
        elif how == "tensors":
            what, weights = self.changed_tensors(rng)
        else:
            what = how
        if rng.random() < 0.9 and "weights_sha256" in facts:
            facts["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        text = json.dumps(facts).encode()
        if how == "text":
            what, text = damage(text, rng, self.weights)
        elif how == "swap":
            text, weights = weights, text
        elif how == "deep":
            text = b"[" * 100_000 if rng.random() < 0.5 else text[:-1] + b', "x": ' + b'{"a":' * 50_000
        (self.run / "detector.json").write_bytes(text)
        (self.run / "weights.safetensors").write_bytes(weights)
        return f"{how}: {what}", lambda: checked_verdict(self.load(self.run), self.picture), (str(self.run), "not finite")

    def changed_tensors(self, rng):
        import torch
        from safetensors.torch import load, save

        tensors = load(self.weights)
        name = str(rng.choice(list(tensors)))
        t, how = tensors[name].float(), int(rng.integers(9))
        changes = (lambda: t.flatten(), lambda: t.flatten()[:1].clone(), lambda: t.double(), lambda: t.to(torch.bfloat16),
                   lambda: t.to(torch.int8), lambda: t * math.nan, lambda: t + math.inf, lambda: torch.zeros(0))  # fmt: skip
        if how == len(changes):
            del tensors[name]
        else:
            tensors[name] = changes[how]().contiguous()
        return f"{name} by {how}", save(tensors)


class Settings:
    "config.yaml, changed as a tree and as bytes."

    def __init__(self, root: Path):
        import yaml

        from zipper_ad.config import load_config

        self.load, self.file, self.text = load_config, root / "changed.yaml", (root / "run/config.yaml").read_bytes()
        self.tree = yaml.safe_load(self.text)

    def case(self, rng):
        import copy

        import yaml

        if rng.random() < 0.5:
            tree = copy.deepcopy(self.tree)
            what = alter(tree, rng)
            data = yaml.safe_dump(tree).encode()
        else:
            bad = [b"a: &a [*a, *a]", b"\0", b"${oc.env:HOME}", b"- " * 3000, b"!!python/object/apply:os.getcwd []", b"{" * 3000]
            what, data = damage(self.text, rng, bad[rng.integers(len(bad))])
        self.file.write_bytes(data)
        return what, lambda: self.load(self.file), (str(self.file),)


class Exported:
    "Exported files of every format; the JSON beside them, which holds their digest, is left out in nine of ten cases."

    def __init__(self, root: Path):
        from zipper_ad.predictor import Predictor
        from zipper_ad.synth import render_zipper

        self.open, self.picture, self.folder = Predictor, render_zipper(5, 40), root / "changed-export"
        self.folder.mkdir(exist_ok=True)
        self.files = {f.name: f.read_bytes() for f in sorted((root / "exported").iterdir())}
        for name in (n for n in self.files if not n.endswith((".json", ".bin"))):  # what is whole, so that no library is counted later
            checked_verdict(Predictor(root / "exported" / name, threads=1), self.picture)

    def case(self, rng):
        names = [n for n in self.files if not n.endswith(".json")]
        name = str(rng.choice(names))
        kind, data = damage(self.files[name], rng, self.files[str(rng.choice(names))])
        for old in self.folder.iterdir():
            old.unlink()
        main = name.replace(".bin", ".xml")
        for n in {main, main.replace(".xml", ".bin")} & set(self.files):
            (self.folder / n).write_bytes(data if n == name else self.files[n])
        if rng.random() < 0.1:
            note = self.files[f"{main}.json"]
            (self.folder / f"{main}.json").write_bytes(note if rng.random() < 0.5 else damage(note, rng, data)[1])
        words = str(self.folder), "not finite"
        return f"{kind} {name}", lambda: checked_verdict(self.open(self.folder / main, threads=1), self.picture), words


ROOMS = {"pictures": Pictures, "arrays": Arrays, "folders": Folders, "settings": Settings, "exported": Exported}


# ---- running them


def outcome(function, words=()) -> tuple[str, str]:
    "(accepted, refused or crashed; what was said)."
    try:
        function()
        return "accepted", ""
    except InputError as e:
        said = str(e)
        clear = "\n" not in said and said and (not words or any(w in said for w in words))
        return ("refused", said) if clear else ("crashed", f"unclear: {said!r}")
    except BaseException as e:  # noqa: BLE001 - whatever it is, it is what we look for
        if isinstance(e, KeyboardInterrupt):
            raise
        return "crashed", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def most_memory() -> float:
    "Megabytes that this process ever held at once; 0 where Linux does not say."
    try:
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0


def work(pipe, room: str, root: Path, seed: int, first: int, last: int):
    "In a process of its own: tell the number of each case, then what became of it, and the most memory so far."
    rooms = list(ROOMS)
    cases = ROOMS[room](root)
    base = most_memory()
    for i in range(first, last):
        kind, function, words = cases.case(np.random.default_rng([seed, rooms.index(room), i]))
        pipe.send((i, kind))
        start = time.monotonic()
        said = outcome(function, words)
        pipe.send((*said, time.monotonic() - start, most_memory() - base))
    pipe.send(None)


def run_room(room: str, root: Path, seed: int, cases: int) -> dict:
    "Counts, crashes, the slowest case and the memory that was added."
    context, at, counts, crashes, slowest, grown = multiprocessing.get_context("spawn"), 0, Counter(), [], 0.0, 0.0
    while at < cases:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, room, root, seed, at, cases))
        process.start()
        theirs.close()
        current = None
        try:
            while True:
                if not ours.poll(PATIENCE + (60 if current is None else 0)):
                    raise TimeoutError
                if (heard := ours.recv()) is None:
                    at = cases
                    break
                if len(heard) == 2:
                    current = heard
                    continue
                what, said, seconds, megabytes = heard
                counts[what] += 1
                slowest, grown, at = max(slowest, seconds), max(grown, megabytes), current[0] + 1
                if what == "crashed":
                    crashes.append({"case": current[0], "damage": current[1], "said": said})
        except (TimeoutError, EOFError, ConnectionError) as e:
            process.kill()
            process.join()
            if current is None:
                raise RuntimeError(f"{room}: the process did not begin") from e
            counts["crashed"] += 1
            how = f"no answer in {PATIENCE} s" if isinstance(e, TimeoutError) else f"the process died ({process.exitcode})"
            crashes.append({"case": current[0], "damage": current[1], "said": how})
            at = current[0] + 1
        process.join()
    return {"cases": sum(counts.values()), **{k: counts[k] for k in ("accepted", "refused", "crashed")},
            "slowest_s": round(slowest, 2), "memory_added_mb": round(grown), "crashes": crashes}  # fmt: skip


def largest(pipe, mode: str, form: str, settings: dict, channels: int):
    "In a process of its own: what reading the largest picture that is let through adds to its memory, in MB."
    Image.new(mode, (10_000, 10_000)).save(buffer := io.BytesIO(), format=form, **settings)
    data, before = buffer.getvalue(), None
    del buffer
    read_image(image_files()["grey.png"])
    with open("/proc/self/clear_refs", "w") as file:  # the most so far begins anew
        file.write("5")
    before = most_memory()
    read_image(data, channels)
    pipe.send({"picture": f"{mode} as {form}", "channels": channels, "file_mb": round(len(data) / 1e6, 2),
               "memory_mb": round(most_memory() - before)})  # fmt: skip


_lzw = {"compression": "tiff_lzw"}
LARGEST = [("L", "PNG", {}, 1), ("RGB", "JPEG", {"quality": 20}, 3), ("RGBA", "PNG", {}, 3), ("I;16", "TIFF", _lzw, 1),
           ("F", "TIFF", _lzw, 1)]  # fmt: skip


def measure_largest() -> list[dict]:
    context, found = multiprocessing.get_context("spawn"), []
    for words in LARGEST:
        ours, theirs = context.Pipe()
        (process := context.Process(target=largest, args=(theirs, *words))).start()
        found.append(ours.recv())
        process.join()
    return found


def main():
    options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    target = next((a for a in sys.argv[1:] if "=" not in a), None)
    cases, seed = int(options.get("cases", 2000)), int(options.get("seed", 0))
    rooms = options.get("rooms", ",".join(ROOMS)).split(",")
    import PIL
    import torch

    words = " ".join(["python tools/fuzz.py", target or "OUT.json", f"cases={cases} seed={seed}", *(a for a in sys.argv if "rooms=" in a)])
    facts = {
        "command": words, "detector": "a CNN of 32 pixels, never trained", "rooms": (found := {}),
        "largest_pictures": measure_largest() if "pictures" in rooms else [],
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__, "torch": torch.__version__,
                     **{m: __import__(m).__version__ for m in ("onnxruntime", "openvino", "safetensors")}},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = make_folder(Path(folder))
        for room in rooms:
            found[room] = run_room(room, root, seed, cases)
            print(room, json.dumps(found[room]), flush=True)
            if target:  # after each room, so that a stop loses one at most
                with atomic_path(target) as temporary:
                    temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))
    return int(any(r["crashed"] for r in found.values()))


if __name__ == "__main__":
    sys.exit(main())
