"""Bad input, every format, the split, the cache, the download and the check of zipper_ad.data."""

import hashlib
import http.server
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from zipper_ad import data
from zipper_ad.core import InputError
from zipper_ad.data import (
    AnomalyDataset,
    Augment,
    check_data,
    content_hash,
    fetch_mvtec,
    find_items,
    fingerprint,
    list_images,
    read_image,
    split_normals,
    to_tensor,
)
from zipper_ad.picture import from_pil, to_uint8

REAL = Path(os.environ.get("ZIPPER_AD_REAL") or Path(__file__).parents[2] / "shared/data/zipper_mvtec_subset")
needs_real = pytest.mark.skipif(not (REAL / "train/good").is_dir(), reason="no real photographs (set ZIPPER_AD_REAL)")
RAMP = np.uint8(np.add.outer(np.arange(40) * 2, np.arange(60) * 2))  # 40 rows, 60 columns


def picture(seed, shape=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


@pytest.fixture
def mvtec(tmp_path):
    "Ten good, two good test, two scratches, one of them with a mask."
    root = tmp_path / "part"
    for i in range(10):
        save(root / f"train/good/{i:03}.png", picture(i))
    for i in range(2):
        save(root / f"test/good/{i:03}.png", picture(100 + i))
        save(root / f"test/scratch/{i:03}.png", picture(200 + i))
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:24] = 255
    save(root / "ground_truth/scratch/000_mask.png", mask)
    return root


# --- formats


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".PNG"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"ramp{suffix}"
    Image.fromarray(RAMP).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    a = read_image(path)
    assert a.dtype == np.uint8 and a.shape == RAMP.shape
    assert np.abs(a.astype(int) - RAMP).max() <= (6 if suffix == ".jpg" else 0)
    assert read_image(path, channels=3).shape == (*RAMP.shape, 3)
    assert list_images(tmp_path) == [path]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit(tmp_path, suffix):
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert (read_image(path) == RAMP).all()


@pytest.mark.parametrize("values", [RAMP.astype(np.float32) / 255, RAMP.astype(np.float32), RAMP.astype(np.int32) * 257])
def test_float_and_32_bit_tiff(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert (read_image(tmp_path / "deep.tif") == RAMP).all()


def test_big_endian_16_bit(tmp_path):
    image = Image.frombytes("I;16B", RAMP.shape[::-1], (RAMP.astype(">u2") * 257).tobytes())
    assert (from_pil(image) == RAMP).all()


def test_not_finite(tmp_path):
    bad = RAMP.astype(np.float32)
    bad[3, 3] = np.nan
    Image.fromarray(bad).save(tmp_path / "nan.tif")
    with pytest.raises(InputError, match=r"nan\.tif.*not finite"):
        read_image(tmp_path / "nan.tif")


def test_transparency_over_white(tmp_path):
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:10, :, 3] = 255  # black above, nothing below
    for name, image in [
        ("rgba.png", Image.fromarray(rgba)),
        ("la.png", Image.fromarray(rgba).convert("LA")),
        ("rgba.webp", Image.fromarray(rgba)),
        ("rgba.tif", Image.fromarray(rgba)),
    ]:
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        a = read_image(tmp_path / name)
        assert (a[:10] == 0).all() and (a[10:] == 255).all(), name
    indexed = Image.fromarray(np.repeat([[0], [1]], 10, 0).astype(np.uint8).repeat(20, 1), "P")
    indexed.putpalette([10, 10, 10, 20, 20, 20])
    indexed.save(tmp_path / "p.png", transparency=1)
    a = read_image(tmp_path / "p.png")
    assert (a[:10] == 10).all() and (a[10:] == 255).all()


def test_palette_cmyk_and_one_bit(tmp_path):
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    red.quantize(4).save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png", 3)[5, 5] == (255, 0, 0)).all()
    for name in ("cmyk.tif", "cmyk.jpg"):
        red.convert("CMYK").save(tmp_path / name)
        assert np.abs(read_image(tmp_path / name, 3)[5, 5].astype(int) - (255, 0, 0)).max() <= 3
    Image.fromarray(RAMP > 100).save(tmp_path / "bits.png")
    assert (read_image(tmp_path / "bits.png") == (RAMP > 100) * 255).all()
    assert read_image(tmp_path / "palette.png").ndim == 2


@pytest.mark.parametrize("name", ["x.png", "x.tif", "lzw.tif", "x.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation, name):
    turns = [lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud, np.transpose, lambda a: np.rot90(a, -1),
             lambda a: np.rot90(a, 2).T, lambda a: np.rot90(a)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"x.webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}}.get(name, {})
    Image.fromarray(RAMP).save(tmp_path / name, exif=exif, **options)
    expected = turns[orientation - 1](RAMP)
    assert np.array_equal(read_image(tmp_path / name), expected)
    assert data._upright_size(tmp_path / name) == expected.shape[::-1]


def test_broken_exif_is_no_reason_to_refuse(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert read_image(tmp_path / "odd.jpg").shape == RAMP.shape


# --- files that are no photographs


def one_line(path, match, call=read_image):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one clear line, and no warning beside it
        with pytest.raises(InputError, match=match) as e:
            call(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert re.search(r"\. [A-Z]", str(e.value)), "names no remedy"


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "empty"),
        (b"this is a text file\n" * 50, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (png_header(20000, 20000), "million pixels"),
        (png_header(11000, 11000), "million pixels"),
        (png_header(1, 1), "1×1"),
        (png_header(0, 64), "."),
    ],
)
def test_bad_content(tmp_path, content, match):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    one_line(path, match)


def test_missing_folder_small_and_forbidden(tmp_path, monkeypatch):
    one_line(tmp_path / "none.png", "no such file")
    one_line(tmp_path, "is a folder")
    one_line(save(tmp_path / "dot.png", np.zeros((1, 1), np.uint8)), "too small")
    one_line(save(tmp_path / "thin.png", np.zeros((15, 400), np.uint8)), "400×15")
    assert read_image(save(tmp_path / "least.png", np.zeros((16, 16), np.uint8))).shape == (16, 16)
    if os.name == "posix" and os.geteuid():
        (tmp_path / "least.png").chmod(0)
    else:

        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Image, "open", denied)
    one_line(tmp_path / "least.png", "permission denied")


@pytest.mark.parametrize("name, options", [("x.png", {}), ("x.jpg", {}), ("x.tif", {}), ("x.tif", {"compression": "tiff_lzw"}),
                                           ("x.bmp", {}), ("x.webp", {"lossless": True})])
def test_truncated_is_never_filled_up(tmp_path, name, options):
    path = tmp_path / name
    Image.fromarray(picture(0, (64, 64))).save(path, **options)
    whole, pixels = path.read_bytes(), read_image(path)
    refused = 0
    for keep in np.unique(np.linspace(1, len(whole) - 1, 60).astype(int)):
        path.write_bytes(whole[:keep])
        try:
            assert (read_image(path) == pixels).all()  # what is missing at the very end may be no pixel
        except InputError:
            refused += 1
    assert refused > 50
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_channels():
    with pytest.raises(InputError, match="channels=2"):
        from_pil(Image.new("L", (20, 20)), 2)


# --- preprocessing


def test_to_tensor_shapes_types_and_range():
    for a in (RAMP, RAMP[..., None], RAMP / 255.0, RAMP.astype(np.uint16) * 257):
        x = to_tensor(a, 32)
        assert x.shape == (1, 32, 32) and x.dtype == torch.float32
        assert torch.equal(x, to_tensor(RAMP, 32))
    assert to_tensor(np.full((50, 90, 3), 255, np.uint8), 32).eq(1).all()
    assert to_tensor(RAMP, 32, channels=3).shape == (3, 32, 32)
    assert torch.equal(to_tensor(picture(0), 32) * 255, torch.from_numpy(picture(0))[None].float())  # its own size: untouched
    for shape in [(3,), (4, 4, 2), (1, 3, 20, 20)]:
        with pytest.raises(InputError, match="not an image"):
            to_tensor(np.zeros(shape, np.uint8))


def test_resize_averages():
    checks = np.uint8(np.indices((512, 512)).sum(0) % 2 * 255)
    x = to_tensor(checks, 64)
    assert (x - 0.5).abs().max() < 0.02


def test_to_uint8_does_not_depend_on_the_picture():
    dark = np.full((4, 4), 0.25)
    assert to_uint8(dark).max() == 64
    assert to_uint8(np.array([-5, 300, 65535], np.int32)).tolist() == [0, 1, 255]


# --- finding


def test_find_items(mvtec):
    items = find_items(mvtec, "test")
    assert [(i.kind, i.label) for i in items] == [("good", 0)] * 2 + [("scratch", 1)] * 2
    assert items[2].mask_path == mvtec / "ground_truth/scratch/000_mask.png" and items[3].mask_path is None
    assert [i.path.name for i in find_items(mvtec)] == [f"{i:03}.png" for i in range(10)]


def test_test_only_and_plain_folder(mvtec, tmp_path):
    plain = mvtec / "train/good"
    assert len(find_items(plain)) == 10
    with pytest.raises(InputError, match="no test images"):
        find_items(plain, "test")
    (mvtec / "train").rename(tmp_path / "away")
    assert len(find_items(mvtec, "test")) == 4
    with pytest.raises(InputError, match="no images to train on"):
        find_items(mvtec, "train")


def test_find_items_bad_input(mvtec, tmp_path):
    for root, split, match in [
        (tmp_path / "nowhere", "train", "no such folder"),
        (mvtec / "train/good/000.png", "train", "is a file"),
        (mvtec, "valid", "split=valid"),
    ]:
        with pytest.raises(InputError, match=match):
            find_items(root, split)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images to train on"):
        find_items(tmp_path / "empty")
    save(mvtec / "train/scratch/000.png", picture(9))
    with pytest.raises(InputError, match="train/scratch: training takes good parts only"):
        find_items(mvtec)


def test_hidden_files_are_skipped(tmp_path):
    for name in ("a/.x.png", "a/x.png", "__MACOSX/x.png", ".git/x.png", "x10.png", "x9.png", "x.txt"):
        save(tmp_path / name, RAMP) if name.endswith("png") else (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["x9.png", "x10.png"]
    assert len(list_images(tmp_path, recursive=True)) == 3


# --- dataset


def test_dataset_items(mvtec):
    ds = AnomalyDataset(mvtec, "test", size=16)
    assert len(ds) == 4 and ds.labels.tolist() == [0, 0, 1, 1] and ds.kinds[2] == "scratch"
    x, y = ds[2]
    assert x.shape == (1, 16, 16) and y == 1 and torch.equal(x, to_tensor(read_image(ds.paths[2]), 16))
    assert torch.equal(ds[-1][0], ds[3][0]) and len(list(ds)) == 4
    assert AnomalyDataset(mvtec, channels=3, size=16)[0][0].shape == (3, 16, 16)
    assert AnomalyDataset(mvtec, size=16, transform=lambda x: x + 1)[0][0].min() >= 1
    assert ds.images.dtype == torch.uint8


def test_unreadable_images_are_named_at_once(mvtec):
    (mvtec / "train/good/003.png").write_text("x")
    (mvtec / "train/good/005.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"003\.png.*1 more"):
        AnomalyDataset(mvtec)


def test_masks(mvtec):
    ds = AnomalyDataset(mvtec, "test", size=16)
    mask = ds.get_anomaly_mask(2)
    assert mask.shape == (1, 16, 16) and mask.dtype == torch.float32 and mask.sum() == 4 * 8
    assert set(mask.unique().tolist()) == {0, 1}
    assert ds.get_anomaly_mask(0).sum() == 0
    assert ds.get_anomaly_mask(3) is None
    save(mvtec / "ground_truth/scratch/001_mask.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(InputError, match=r"001_mask\.png: 64×64 pixels, but its image has 32×32"):
        AnomalyDataset(mvtec, "test").get_anomaly_mask(3)


def test_mask_with_values_0_and_1_and_tiny_defect(mvtec):
    mask = np.zeros((32, 32), np.uint8)
    mask[7, 9] = 1
    save(mvtec / "ground_truth/scratch/001_mask.png", mask)
    found = AnomalyDataset(mvtec, "test", size=16).get_anomaly_mask(3)
    assert found[0, 3, 4] == 1 and found.sum() <= 4


def test_native_masks(mvtec):
    mask = np.zeros((32, 32), np.uint8)
    mask[7, 9], mask[8, 9] = 255, 100  # a soft border
    save(mvtec / "ground_truth/scratch/001_mask.png", mask)
    ds = AnomalyDataset(mvtec, "test", size=16)
    masks = ds.native_masks()
    assert len(masks) == len(ds) and masks[3].dtype == bool and np.argwhere(masks[3]).tolist() == [[7, 9]]
    assert masks[0].shape == (32, 32) and not masks[0].any()  # a good part needs no file
    save(mvtec / "ground_truth/scratch/001_mask.png", mask // 100)  # 1 and 2
    assert np.argwhere(ds.native_masks()[3]).tolist() == [[7, 9], [8, 9]]
    (mvtec / "ground_truth/scratch/001_mask.png").unlink()
    assert AnomalyDataset(mvtec, "test").native_masks()[3] is None
    save(mvtec / "ground_truth/scratch/001_mask.png", np.zeros((32, 64), np.uint8))
    with pytest.raises(InputError, match=r"001_mask\.png: 64×32 pixels, but its image has 32×32"):
        ds.native_masks()


def test_packed_masks_of_any_size():
    rng = np.random.default_rng(0)
    masks = [rng.random(shape) < 0.3 for shape in ((1, 1), (7, 3), (1, 64), (33, 65))]
    packed = data.PackedMasks(masks)
    assert all((a == b).all() and a.shape == b.shape for a, b in zip(packed, masks, strict=True))
    assert sum(bits.nbytes for _, bits in packed.kept if bits is not None) < sum(mask.size for mask in masks) / 8 + len(masks)


def test_cache_kinds_agree(mvtec, tmp_path):
    reference = AnomalyDataset(mvtec, size=24, cache="memory")
    for kind in ("disk", "disk", "auto", "off"):
        ds = AnomalyDataset(mvtec, size=24, cache=kind, cache_dir=tmp_path / "cache")
        assert torch.equal(ds.batch(range(10)), reference.batch(range(10))) and ds.hashes == reference.hashes
    assert len(list((tmp_path / "cache").iterdir())) == 2  # pixels and hashes, and no leftovers
    with pytest.raises(InputError, match="cache=ram"):
        AnomalyDataset(mvtec, cache="ram")


def test_auto_goes_to_disk_when_memory_is_short(mvtec, tmp_path, monkeypatch):
    monkeypatch.setenv("ZIPPER_AD_CACHE", str(tmp_path / "elsewhere"))
    AnomalyDataset(mvtec, size=24)
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(data, "_free_memory", lambda: 1000)
    AnomalyDataset(mvtec, size=24)
    assert len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1
    assert data._free_memory() == 1000


def test_disk_cache_is_used_and_invalidated(mvtec, tmp_path, monkeypatch):
    def build():
        return AnomalyDataset(mvtec, size=24, cache="disk", cache_dir=tmp_path / "cache")

    first = build()
    with monkeypatch.context() as m:
        m.setattr(data, "_decode_all", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(build().images, first.images)
    save(mvtec / "train/good/000.png", picture(77))
    second = build()
    assert not torch.equal(second.images[0], first.images[0]) and torch.equal(second.images[1:], first.images[1:])
    save(mvtec / "train/good/new.png", picture(78))
    assert len(build()) == 11
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_damaged_cache_is_made_again(mvtec, tmp_path):
    def build():
        return AnomalyDataset(mvtec, size=24, cache="disk", cache_dir=tmp_path)

    good = build().images.clone()
    for name, content in [("*.npy", b""), ("*.npy", b"junk"), ("*.json", b"[]"), ("*.json", b"{")]:
        next(tmp_path.glob(name)).write_bytes(content)
        assert torch.equal(build().images, good)


def test_interrupted_cache_leaves_nothing(mvtec, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_decode_all", stop)
    with pytest.raises(KeyboardInterrupt):
        AnomalyDataset(mvtec, size=24, cache="disk", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unwritable_cache_folder(mvtec, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cache cannot be written"):
        AnomalyDataset(mvtec, cache="disk", cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("kind", ["memory", "disk", "off"])
def test_replaced_file_is_noticed_on_access(mvtec, tmp_path, kind):
    ds = AnomalyDataset(mvtec, size=32, cache=kind, cache_dir=tmp_path / "cache")
    save(mvtec / "train/good/001.png", picture(55))
    assert torch.equal(ds[1][0], to_tensor(picture(55), 32))
    assert ds.hashes[1] == content_hash(mvtec / "train/good/001.png")


def test_file_that_is_gone_stays_in_memory(mvtec):
    ds = AnomalyDataset(mvtec, size=32)
    (mvtec / "train/good/001.png").unlink()
    assert torch.equal(ds[1][0], to_tensor(picture(1), 32))


# --- content, fingerprint, split


def test_content_hash_is_of_pixels(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(RAMP).convert("RGB").save(tmp_path / "b.tif", compression="tiff_lzw")
    Image.fromarray(RAMP).convert("RGBA").save(tmp_path / "c.webp", lossless=True)
    assert len({content_hash(p) for p in list_images(tmp_path)}) == 1
    Image.fromarray(RAMP.T).save(tmp_path / "d.png")
    assert len({content_hash(p) for p in list_images(tmp_path)}) == 2


def held_out_contents(ds, **kw):
    return {ds.hashes[i] for i in split_normals(ds, **kw)[1]}


def test_split_is_a_partition_of_the_normals(mvtec):
    ds = AnomalyDataset(mvtec, size=16)
    for share, n in [(0.2, 2), (0.5, 5), (0.01, 1), (0.99, 9)]:
        train, held = split_normals(ds, share)
        assert sorted(train + held) == list(range(10)) and len(held) == n
    assert split_normals(ds) == split_normals(ds) == split_normals(ds.items)
    assert split_normals(ds, size := 0.3, seed=0) != split_normals(ds, size, seed=1)
    test = AnomalyDataset(mvtec, "test", size=16)
    assert sorted(sum(split_normals(test, 0.5), [])) == [0, 1]  # never a defective one


def test_split_depends_on_content_only(mvtec, tmp_path):
    ds = AnomalyDataset(mvtec, size=16)
    for i, seed in enumerate(np.random.default_rng(1).permutation(10)):
        save(tmp_path / f"renamed/{i}.bmp", picture(seed))
    for other in (AnomalyDataset(tmp_path / "renamed", size=16), AnomalyDataset(mvtec, size=64, channels=3)):
        assert held_out_contents(other) == held_out_contents(ds) and fingerprint(other) == fingerprint(ds)


def test_adding_a_file_moves_at_most_one_other(mvtec):
    before = held_out_contents(AnomalyDataset(mvtec, size=16), held_out=0.4)
    for i in range(20):
        new = save(mvtec / "train/good/new.png", picture(1000 + i))
        after = held_out_contents(AnomalyDataset(mvtec, size=16), held_out=0.4) - {content_hash(new)}
        assert len(before ^ after) <= 1


def test_duplicates_never_straddle(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i}.{'png' if i % 2 else 'bmp'}", picture(i // 4))  # each picture four times
    ds = AnomalyDataset(tmp_path, size=16)
    for seed in range(20):
        train, held = split_normals(ds, 0.3, seed)
        assert len(held) == 12 and not {ds.hashes[i] for i in train} & {ds.hashes[i] for i in held}


def test_split_bad_input(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", RAMP)
    with pytest.raises(InputError, match="1 distinct"):
        split_normals(AnomalyDataset(tmp_path, size=16))
    for share in (0, 1, -1, 20):
        with pytest.raises(InputError, match="held_out="):
            split_normals([], share)


# --- augmentation and loaders


@pytest.mark.parametrize("channels", [1, 3])
def test_augment_keeps_shape_range_and_input(channels):
    xb = torch.rand(5, channels, 24, 32)
    copy = xb.clone()
    out = Augment(shift=0.2, brightness=0.5, contrast=0.5)(xb)
    assert out.shape == xb.shape and out.min() >= 0 and out.max() <= 1 and torch.equal(xb, copy)


def test_augment_shift_repeats_the_edge():
    xb = torch.arange(16.0).div(16).repeat(64, 1, 16, 1)
    out = Augment(0, 0, 0.25, 0, 0)(xb, torch.Generator().manual_seed(0))
    for row in out[:, 0, 0]:
        shift = round(float((row[8] - xb[0, 0, 0, 8]) * 16))
        assert torch.allclose(row, xb[0, 0, 0, (torch.arange(16) + shift).clamp(0, 15)], atol=1e-6) and abs(shift) <= 4
    assert len(out.unique(dim=0)) > 4  # each image its own


def test_augment_brightness_and_contrast():
    xb = torch.rand(200, 1, 16, 16) * 0.2 + 0.4
    brighter = Augment(0, 0, 0, 0.1, 0)(xb) - xb
    assert torch.allclose(brighter, brighter.mean((1, 2, 3), keepdim=True).expand_as(xb), atol=1e-5)
    assert 0.08 < brighter.abs().max() <= 0.1 + 1e-5
    out = Augment(0, 0, 0, 0, 0.3)(xb)
    assert torch.allclose(out.mean((1, 2, 3)), xb.mean((1, 2, 3)), atol=1e-5)
    ratio = out.std((1, 2, 3)) / xb.std((1, 2, 3))
    assert 0.7 - 1e-4 <= ratio.min() < 0.8 and 1.2 < ratio.max() <= 1.3 + 1e-4


def test_loaders(mvtec):
    ds = AnomalyDataset(mvtec, size=16)
    train, held = split_normals(ds, 0.2)
    dls = data.anomaly_dls(ds, train, held, bs=3, augment=Augment(), device="cpu")
    assert [len(x) for x, _ in dls.train] == [3, 3] and [len(x) for x, _ in dls.valid] == [2]
    x, y = dls.one_batch()
    assert type(x).__name__ == "TensorImage" and torch.equal(x, y) and x.dtype == torch.float32
    assert torch.equal(torch.cat([x for x, _ in dls.valid]), ds.batch(held))
    small = data.anomaly_dls(ds, train, held, bs=64, device="cpu")
    assert [len(x) for x, _ in small.train] == [8]  # fewer than a batch: still trained on
    seen = torch.cat([x for x, _ in small.train]).as_subclass(torch.Tensor)
    assert {x.sum().item() for x in seen} == {x.sum().item() for x in ds.batch(train)}  # each once, not augmented
    with pytest.raises(InputError, match="0 to validate on"):
        data.anomaly_dls(ds, train, [])


def test_loaders_repeat_with_the_seed(mvtec):
    ds = AnomalyDataset(mvtec, size=16)

    def epochs(seed, augment):
        dls = data.anomaly_dls(ds, range(8), [8, 9], bs=4, augment=augment, seed=seed, device="cpu")
        return torch.stack([x.as_subclass(torch.Tensor) for _ in range(2) for x, _ in dls.train])

    for augment in (None, Augment()):
        a, b, c = epochs(1, augment), epochs(1, augment), epochs(2, augment)
        assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[:2], a[2:])
    doubled = epochs(1, lambda x: x / 2)
    assert torch.equal(doubled, epochs(1, None) / 2)


def test_loader_uses_the_datasets_own_transform(mvtec):
    ds = AnomalyDataset(mvtec, size=16, transform=lambda x: 1 - x)
    dls = data.anomaly_dls(ds, range(8), [8, 9], bs=4, device="cpu")
    assert torch.equal(next(iter(dls.valid))[0].as_subclass(torch.Tensor), 1 - ds.batch([8, 9]))


def test_importing_data_does_not_import_fastai():
    code = "import sys, zipper_ad.data; sys.exit(any(m in sys.modules for m in ('fastai', 'torchvision', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- download


class Server(http.server.BaseHTTPRequestHandler):
    "Serves `content`, honours Range, and cuts the connection after `cuts.pop(0)` bytes."

    content, cuts, seen, ranges = b"", [], [], True

    def do_GET(self):
        start = 0
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.seen.append(int(match[1]) if match else 0)
        if self.path.endswith("/gone.tar.xz"):
            return self.send_error(404)
        if match and self.ranges:
            start = int(match[1])
            if start >= len(self.content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        body = self.content[start:]
        self.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data, "_PAUSE", 0)
    handler = type("Handler", (Server,), {"cuts": [], "seen": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/zipper.tar.xz"
    yield handler
    httpd.shutdown()
    httpd.server_close()


def pack(*members, top="zipper"):
    "A .tar.xz of a small data set, and what else is asked for: (TarInfo, bytes)."
    out, image = io.BytesIO(), io.BytesIO()
    Image.fromarray(RAMP).save(image, "png")
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        for name in ("train/good/000.png", "test/good/000.png", "test/broken_teeth/000.png"):
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size, info.mode = len(image.getvalue()), 0o444
            tar.addfile(info, io.BytesIO(image.getvalue()))
        for info, content in members:
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content) if content else None)
    return out.getvalue()


def fetch(server, out, content=None, **kw):
    if content is not None:
        server.content = content
    kw = {"sha256": hashlib.sha256(server.content).hexdigest(), "size": len(server.content), "url": server.url} | kw
    return fetch_mvtec(out, progress=False, **kw)


def test_fetch(server, tmp_path, capsys):
    root = fetch(server, tmp_path / "out", pack())
    assert root == tmp_path / "out/zipper" and len(find_items(root, "test")) == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["zipper"]  # no archive, no temporary folder
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out
    assert os.access(root / "train/good/000.png", os.W_OK) and fetch(server, tmp_path / "out") == root
    assert len(server.seen) == 1  # the second time nothing was asked for


def test_fetch_resumes_after_cut_connections(server, tmp_path):
    content = pack()
    server.cuts[:] = [100, 50]
    assert len(find_items(fetch(server, tmp_path, content))) == 1
    assert server.seen == [0, 100, 150]


def test_fetch_keeps_what_has_arrived_for_the_next_call(server, tmp_path):
    content = pack()
    server.cuts[:] = [60, 0, 0, 0]
    with pytest.raises(InputError, match="60 bytes are kept; run the command again"):
        fetch(server, tmp_path, content)
    assert (tmp_path / "zipper.tar.xz.part").stat().st_size == 60 and not (tmp_path / "zipper").exists()
    assert fetch(server, tmp_path).is_dir() and server.seen[-1] == 60


def test_fetch_from_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    server.cuts[:] = [100]
    assert fetch(server, tmp_path, pack()).is_dir()


@pytest.mark.parametrize("left", [b"x" * 10_000_000, b"stale"])
def test_fetch_over_a_stale_part(server, tmp_path, left):
    (tmp_path / "zipper.tar.xz.part").write_bytes(left)
    if len(left) < 100:  # an honest beginning of something else: seen by the checksum, then fetched anew
        with pytest.raises(InputError, match="not the file expected"):
            fetch(server, tmp_path, pack())
    assert fetch(server, tmp_path, pack()).is_dir()


def test_fetch_without_size_or_checksum(server, tmp_path):
    server.cuts[:] = [10]
    assert fetch(server, tmp_path, pack(), size=None, sha256=None).is_dir()


def test_fetch_wrong_file(server, tmp_path):
    content = pack()
    for wrong, match in [({"sha256": "0" * 64}, "SHA-256"), ({"size": len(content) - 1}, "more than expected")]:
        with pytest.raises(InputError, match=match):
            fetch(server, tmp_path, content, **wrong)
        assert not (tmp_path / "zipper").exists()
        (tmp_path / "zipper.tar.xz.part").unlink(missing_ok=True)
    with pytest.raises(InputError, match="gone.*404.*url="):
        fetch(server, tmp_path, url=server.url.replace("zipper.tar", "gone.tar"))
    with pytest.raises(InputError, match="not an address"):
        fetch(server, tmp_path, url="ftp://example/zipper.tar.xz")
    with pytest.raises(InputError, match="cannot be unpacked"):
        fetch(server, tmp_path, b"this is no archive")


def test_fetch_does_not_overwrite(server, tmp_path):
    (tmp_path / "zipper").mkdir()
    (tmp_path / "zipper/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        fetch(server, tmp_path, pack())
    assert (tmp_path / "zipper/thesis.txt").read_text() == "mine" and not server.seen


def test_fetch_address_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ZIPPER_AD_MVTEC_URL", server.url)
    assert fetch(server, tmp_path, pack(), url=None).is_dir()
    assert re.fullmatch("[0-9a-f]{64}", data.MVTEC_ZIPPER_SHA256) and data.MVTEC_ZIPPER_URL.startswith("https://")


def special(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    "member",
    [
        (special("../evil"), b"x"),
        (special("zipper/../../evil"), b"x"),
        (special("/tmp/zipper_ad_evil"), b"x"),
        (special("C:/evil"), b"x"),
        (special("zipper\\..\\..\\evil"), b"x"),
        (special("zipper/link", tarfile.SYMTYPE, "../../.."), b""),
        (special("zipper/link", tarfile.SYMTYPE, "train"), b""),
        (special("zipper/hard", tarfile.LNKTYPE, "zipper/train/good/000.png"), b""),
        (special("zipper/null", tarfile.CHRTYPE), b""),
        (special("zipper/disk", tarfile.BLKTYPE), b""),
        (special("zipper/pipe", tarfile.FIFOTYPE), b""),
        (special("zipper/train/good/000.png"), b"the same name again"),
        (special("zipper/train"), b"a file where a folder is"),
    ],
    ids=lambda m: f"{m[0].type.decode()}:{m[0].name}",
)
def test_nothing_leaves_the_folder(server, tmp_path, member):
    out = tmp_path / "a/b/out"
    with pytest.raises(InputError, match="unsafe archive, nothing was unpacked|cannot be unpacked"):
        fetch(server, out, pack(member))
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == ["a/b/out/zipper.tar.xz.part"]
    assert len(list(tmp_path.rglob("*"))) == 4  # that file and its three folders
    assert not Path("/tmp/zipper_ad_evil").exists()


@pytest.mark.parametrize("limit, value", [("_MAX_MEMBER", 1000), ("_MAX_TOTAL", 300), ("_MAX_MEMBERS", 3)])
def test_archives_that_are_too_large(server, tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(data, limit, value)
    with pytest.raises(InputError, match="unsafe archive"):
        fetch(server, tmp_path, pack((special("zipper/big"), b"0" * 5000)))
    assert not (tmp_path / "zipper").exists()


def test_archive_without_a_data_set(server, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        tar.addfile(special("readme.txt"), io.BytesIO())
    with pytest.raises(InputError, match="no folder train"):
        fetch(server, tmp_path, out.getvalue())


# --- check


def test_check_in_order(mvtec):
    (mvtec / "ground_truth/scratch/001_mask.png").write_bytes((mvtec / "ground_truth/scratch/000_mask.png").read_bytes())
    report = check_data(mvtec)
    assert report.ok and report.problems == [] and report.notes == []
    assert report.counts == {"train/good": 10, "test/good": 2, "test/scratch": 2} and report.masks == {"test/scratch": 2}
    assert "MVTec layout, 14 images, 32×32" in str(report) and "no problems" in repr(report)
    assert check_data(mvtec / "train/good").layout.startswith("plain folder")
    with pytest.raises(InputError, match="no such folder"):
        check_data(mvtec / "nowhere")


def broken(mvtec, name):
    if name == "unreadable":
        (mvtec / "test/good/000.png").write_text("x")
    elif name == "leak":
        save(mvtec / "test/good/seen.png", picture(3))
    elif name == "contradiction":
        save(mvtec / "test/scratch/good.png", picture(100))
    elif name == "train":
        save(mvtec / "train/scratch/1.png", picture(500))
    elif name == "mask size":
        save(mvtec / "ground_truth/scratch/000_mask.png", np.full((64, 64), 255, np.uint8))
    elif name == "mask empty":
        save(mvtec / "ground_truth/scratch/000_mask.png", np.zeros((32, 32), np.uint8))
    elif name == "mask inverted":
        save(mvtec / "ground_truth/scratch/000_mask.png", np.full((32, 32), 255, np.uint8))
    elif name == "mask unreadable":
        (mvtec / "ground_truth/scratch/000_mask.png").write_text("x")
    elif name == "orphan":
        save(mvtec / "ground_truth/dent/000_mask.png", picture(0))
    elif name == "flat":
        save(mvtec / "train/good/000.png", np.full((32, 32), 4000, np.uint16))
    elif name == "few":
        for path in list_images(mvtec / "train/good")[1:]:
            path.unlink()
    elif name == "empty":
        (mvtec / "test/dent").mkdir()


@pytest.mark.parametrize(
    "name, match",
    [
        ("unreadable", r"^test/good/000\.png: not an image"),
        ("leak", r"^train/good/003\.png = test/good/seen\.png: .*in train and in test"),
        ("contradiction", r"test/good/000\.png = test/scratch/good\.png|test/scratch/good\.png = "),
        ("train", r"^train/scratch: 1 image in a folder"),
        ("mask size", r"^ground_truth/scratch/000_mask\.png: 64×64, but its image is 32×32"),
        ("mask empty", "the mask is empty"),
        ("mask inverted", "Is it inverted"),
        ("mask unreadable", r"000_mask\.png: cannot be read"),
        ("orphan", r"^ground_truth/dent/000_mask\.png: belongs to no image"),
        ("flat", "hardly any contrast"),
        ("few", "1 distinct good image"),
        ("empty", "^test/dent: no images"),
    ],
)
def test_check_finds(mvtec, name, match):
    usual = check_data(mvtec).problems
    assert [p for p in usual if "no mask" in p] == usual and len(usual) == 1  # 001.png has none, its neighbour has one
    broken(mvtec, name)
    report = check_data(mvtec)
    assert not report.ok and any(re.search(match, p) for p in report.problems), str(report)
    assert all("\n" not in p for p in report.problems)


def test_check_notes(mvtec):
    save(mvtec / "train/good/copy.bmp", picture(0))
    save(mvtec / "test/unmasked/000.png", picture(300, (48, 48)))
    save(mvtec / "test/unmasked/001.png", picture(301, (30, 48)))
    (mvtec / "test/good/notes.txt").touch()
    notes = "\n".join(check_data(mvtec).notes)
    for words in ("train/good: 1 image copied", "test/unmasked: no masks", "3 sizes", "1 .txt", "1 image not square, for example 48×30"):
        assert re.search(words, notes), words


def test_check_many_problems_stay_readable(mvtec):
    for i in range(60):
        (mvtec / f"train/good/bad{i}.png").write_text("x")
    text = str(check_data(mvtec))
    assert text.count("\n") < 50 and "more" in text


def test_check_empty_folder(tmp_path):
    report = check_data(tmp_path)
    assert not report.ok and "no images. Put the photographs right into this folder" in str(report)


# --- real photographs, where there are some


@needs_real
def test_real_photographs():
    ds = AnomalyDataset(REAL, "test", size=64)
    unmasked = [i for i, k in enumerate(ds.kinds) if k == "unmasked"]
    assert all(ds.get_anomaly_mask(i) is None for i in unmasked)
    masked = [i for i in range(len(ds)) if ds.labels[i] and i not in unmasked]
    assert all(ds.get_anomaly_mask(i).sum() > 0 for i in masked)
    assert 0 < ds.batch(range(4)).mean() < 1


@needs_real
def test_real_photographs_are_in_order():
    report = check_data(REAL)
    assert report.ok, str(report)


def test_good_in_other_letters(mvtec):
    (mvtec / "test/good").rename(mvtec / "test/Good")
    report = check_data(mvtec)
    assert any(re.match("test/Good: would be taken for a kind of defect", p) for p in report.problems)
    with pytest.raises(InputError, match="Rename it to good"):
        find_items(mvtec, "test")


def test_two_pictures_of_one_mask(mvtec):
    image = Image.open(mvtec / "test/scratch/000.png")
    image.save(mvtec / "test/scratch/000.bmp")
    assert any("would be the mask of 000.bmp and of 000.png" in p for p in check_data(mvtec).problems)


def test_a_plain_folder_tells_what_it_leaves_out(tmp_path):
    for name in ("a.png", "b.png", "line2/c.png", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, picture(ord(name[-5])))
    (tmp_path / "e.HEIC").write_text("x")
    notes = " ".join(check_data(tmp_path).notes)
    assert "1 image in folders that are not looked into, for example line2" in notes and "1 .HEIC" in notes


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room")
def test_a_full_disk_while_the_cache_is_written_is_an_error(mvtec, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="the cache cannot be written.*No space left"):
        AnomalyDataset(mvtec, "train", size=32, cache="disk", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(".part-*"))


def test_what_a_kill_left_in_the_cache_goes_after_a_day(mvtec, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in ((".part-old.npy", 90000), (".part-new.npy", 60)):
        (cache / name).write_text("x")
        os.utime(cache / name, (time.time() - age,) * 2)
    dataset = AnomalyDataset(mvtec, "train", size=32, cache="disk", cache_dir=cache)
    assert len(dataset) and [p.name for p in cache.glob(".part-*")] == [".part-new.npy"]
