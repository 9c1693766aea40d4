"""Whatever comes, a verdict or one clear line: pictures, arrays, settings and detector folders that hypothesis makes up and damages.

`tools/fuzz.py` does the same by the thousand, with exported files too, in processes that may die; here a few hundred cases take seconds.
"""

import contextlib
import io
import json
import math
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from zipper_ad.core import InputError
from zipper_ad.picture import MAX_PIXELS, MIN_SIDE, as_pixels, from_pil, need, read_image, to_pixels, to_uint8

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import fuzz
finally:
    sys.path.pop(0)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
FILES = fuzz.image_files()


@contextlib.contextmanager
def clear(*words):
    "What the block raises may be `InputError` alone, in one line, which holds one of the words."
    try:
        yield
    except InputError as e:
        assert str(e) and "\n" not in str(e), str(e)
        assert not words or any(w in str(e) for w in words), str(e)


# ---- pictures as bytes


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_an_open_file_and_a_path_are_one_picture(name, channels, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    pixels = read_image(tmp_path / name, channels)
    assert pixels.shape[:2] == ((40, 24) if name in ("colour.jpg", "raw.tif") else (24, 40))
    assert (read_image(FILES[name], channels) == pixels).all() and (read_image(bytearray(FILES[name]), channels) == pixels).all()
    with open(tmp_path / name, "rb") as file:
        assert (read_image(file, channels) == pixels).all() and not file.closed
    assert (as_pixels(FILES[name], 32, channels) == as_pixels(tmp_path / name, 32, channels)).all()
    assert (as_pixels(io.BytesIO(FILES[name]), 32, channels) == as_pixels(tmp_path / name, 32, channels)).all()


def test_errors_name_what_was_given(tmp_path):
    for source, words in ((b"", "the picture: .*empty"), (b"x", "the picture: not an image"),
                          (io.BytesIO(b"x"), "the picture: not an image"),
                          (FILES["grey.png"][:90], "the picture: damaged or cut short")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_image(source)
        with pytest.raises(InputError, match=words.replace("the picture", "part 7")):
            read_image(source, name="part 7")
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"^part 7: not an image"):
        read_image(tmp_path / "x.png", name="part 7")


@few
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_pictures(name, data):
    raw = bytearray(FILES[name])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=8)):
        raw[at] = value
    cut = data.draw(st.integers(0, len(raw)))
    with clear("the picture"):
        fuzz.checked_picture(read_image(bytes(raw[:cut]) if data.draw(st.booleans()) else bytes(raw)), 1)


BEGINNINGS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP"]


@few
@given(st.binary(max_size=300), st.sampled_from(BEGINNINGS))
def test_bytes_that_only_begin_like_a_picture(rest, start):
    with pytest.raises(InputError) as e:
        read_image(start + rest)
    assert "\n" not in str(e.value)


def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@few
@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_bombs_are_refused_by_their_header(width, height):
    "No matter what the header says, no memory is taken for it where the pixels are not there."
    tracemalloc.start()
    with pytest.raises(InputError):
        read_image(png(width, height, zlib.compress(bytes(1000))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, "Python's own memory; Pillow's is below"


def test_a_bomb_takes_no_memory():
    "120 bytes that claim a hundred million pixels and one more; a text that unpacks to a gigabyte."
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="million pixels"):
        read_image(png(MAX_PIXELS // 1000 + 1, 1000, zlib.compress(b"")))
    text = b"note\0\0" + zlib.compress(bytes(2**28), 9)
    body = png(32, 32, zlib.compress(bytes(33 * 32)))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    bomb = body[:33] + chunk + body[33:]
    with clear("the picture"):
        read_image(bomb)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 300_000, "kilobytes"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes in folders")
def test_pipes_and_devices_are_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            read_image(path)


# ---- arrays, images and tensors


numbers = st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64)))
others = st.one_of(hnp.complex_number_dtypes(), hnp.unicode_string_dtypes(max_len=3), hnp.datetime64_dtypes())
colour = st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))
shapes = st.one_of(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40), colour)


@few
@given(numbers.flatmap(lambda d: hnp.arrays(d, shapes)))
def test_any_array_becomes_bytes_or_a_line(array):
    with clear():
        pixels = to_uint8(array)
        assert pixels.dtype == np.uint8 and pixels.shape == array.shape
        if array.dtype == np.uint8:
            assert (pixels == array).all()


@few
@given(st.one_of(numbers, others).flatmap(lambda d: hnp.arrays(d, shapes)), st.integers(1, 64), st.sampled_from([None, 1, 3]))
def test_any_array_becomes_a_square_or_a_line(array, size, channels):
    with clear():
        pixels = to_pixels(array, size, channels)
        assert pixels.dtype == np.uint8 and pixels.shape == (channels or (1 if array.ndim == 2 or array.shape[-1] == 1 else 3), size, size)


@few
@given(st.sampled_from("1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16".split()), st.integers(1, 40), st.integers(1, 40),
       st.sampled_from([1, 3]), st.binary(min_size=4, max_size=4))  # fmt: skip
def test_any_mode_of_pil(mode, width, height, channels, colour):
    image = Image.frombytes(mode, (width, height), (colour * 4 * width * height)[: len(Image.new(mode, (width, height)).tobytes())])
    with clear():
        assert as_pixels(image, 16, channels).shape == (channels, 16, 16)
    if mode not in ("LAB", "F", "I"):
        assert from_pil(image, channels).shape == (height, width, 3)[: 2 if channels == 1 else 3]


@few
@given(st.sampled_from("bfloat16 float16 float32 float64 uint8 int8 int32 int64 bool complex64".split()), shapes)
def test_any_tensor(dtype, shape):
    with clear():
        assert as_pixels(torch.ones(shape, dtype=getattr(torch, dtype)), 16, 1).shape == (1, 16, 16)


# ---- judges


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fuzz.make_folder(tmp_path_factory.mktemp("robust"), ("onnx", "torchscript"))


@pytest.fixture(scope="module")
def judges(root):
    return fuzz.open_judges(root)


@pytest.mark.parametrize("which", [0, 1], ids=["detector", "predictor"])
def test_any_array_gets_a_verdict_or_a_line(which, judges):
    @few
    @given(st.one_of(numbers, others).flatmap(lambda d: hnp.arrays(d, shapes)), st.integers(1, 4))
    def judged(array, n):
        found = judges[which].predict([array] * n)
        assert len(found) == n
        for v in found:
            if v.error:
                assert "\n" not in v.error and math.isnan(v.score) and not v.is_anomalous and v.anomaly_map is None
            else:
                assert math.isfinite(v.score) and 0 < v.p_value <= 1 and v.is_anomalous == (v.score > judges[which].threshold.value)
                assert v.anomaly_map.shape == v.mask.shape == (fuzz.SIZE, fuzz.SIZE) and np.isfinite(v.anomaly_map).all()
                assert v.image.dtype == np.float32 and 0 <= v.image.min() and v.image.max() <= 1

    judged()


def test_things_that_are_no_pictures(judges):
    for judge in judges:
        cut = Image.open(io.BytesIO(FILES["grey.png"][:100]))
        for thing in (None, 3, object(), {}, b"", b"x", [[1], [1, 2]], io.BytesIO(b"x"), lambda: 1, np.float32(1), cut, "\0", "a" * 5000,
                      Path("."), Path("")):  # fmt: skip
            found = judge.predict([thing])[0]
            assert found.error and "\n" not in found.error and not found.is_anomalous, thing


@pytest.mark.parametrize("room", ["folders", "settings", "exported", "arrays", "pictures"])
def test_a_few_of_the_fuzzers_cases(room, root):
    "Cases of `tools/fuzz.py` in this process; the exported files only as far as no native code can die of them."
    cases = fuzz.ROOMS[room](root)
    if room == "exported":
        cases.files = {n: data for n, data in cases.files.items() if n.endswith((".pt", ".pt.json"))}
    kinds = set()
    for i in range(40):
        kind, function, words = cases.case(np.random.default_rng([1, i]))
        what, said = fuzz.outcome(function, words)
        assert what != "crashed", f"case {i}, {kind}: {said}"
        kinds.add(what)
    assert "refused" in kinds, "the damage did nothing"


@few
@given(st.text(max_size=30))
def test_any_text_as_detector_json(text):
    from zipper_ad.detector import _read_facts

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Path, "is_file", lambda self: True)
        m.setattr(Path, "read_text", lambda self, **k: text)
        with pytest.raises(InputError, match="run/detector.json"):
            _read_facts(Path("run"))


@pytest.mark.slow
def test_the_fuzzer_finds_nothing(tmp_path):
    "A thousand cases of each room, in processes of their own."
    root = fuzz.make_folder(tmp_path)
    for room in fuzz.ROOMS:
        found = fuzz.run_room(room, root, 1, 1000)
        assert found["cases"] == 1000 and not found["crashes"], json.dumps(found, indent=1)


def test_the_fuzzer_notices_what_it_looks_for():
    for function, words, wanted in ((lambda: None, (), "accepted"), (lambda: 1 / 0, (), "crashed")):
        assert fuzz.outcome(function, words)[0] == wanted

    def raises(text):
        raise InputError(text)

    assert fuzz.outcome(lambda: raises("a.png: bad"), ("a.png",))[0] == "refused"
    assert fuzz.outcome(lambda: raises("bad"), ("a.png",))[0] == "crashed"
    assert fuzz.outcome(lambda: raises("a.png:\nbad"), ("a.png",))[0] == "crashed"


# ---- what is missing is named with what brings it


@pytest.mark.parametrize("extra, said", [("export", r'pip install "zipper_ad\[export\]"'), ("serve", r'pip install "zipper_ad\[serve\]"'),
                                         ("scale", r'pip install "zipper_ad\[scale\]"'), ("", "pip install zipper_ad$")])  # fmt: skip
def test_the_remedy_names_the_right_extra(extra, said):
    with pytest.raises(InputError, match=said):
        need("no_such_package", "this", extra)


def test_least_side():
    assert MIN_SIDE == 16 and read_image(FILES["grey.png"]).shape == (24, 40)
