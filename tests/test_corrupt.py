"""Properties of the damage: any size, any setting, every kind; the membrane; the probes that training never uses."""

import pytest
import torch
import torch.nn.functional as F

from zipper_ad import corrupt
from zipper_ad.corrupt import (
    ALIGNED,
    KINDS,
    MIXTURES,
    PROBES,
    RADII,
    TEXTURES,
    Corruption,
    Damaged,
    blob_mask,
    busy_places,
    damage_once,
    damage_stats,
    find_piece,
    lint,
    membrane,
    noise_mask,
    piece_mask,
    probe,
    probe_once,
    seamless,
    smooth_noise,
    thread_mask,
    visible_change,
)

SHAPES = [(1, 1, 16, 16), (3, 3, 16, 16), (1, 3, 33, 47), (5, 1, 47, 33), (2, 1, 64, 100)]
MAKERS = {f"damage {k}": k for k in KINDS} | {f"probe {k}": k for k in PROBES}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_busy_places_of_any_size(shape):
    busy = busy_places(torch.rand(shape, generator=seeded()))
    assert busy.shape == (shape[0], 1, 64, 64) and busy.flatten(1).any(1).all() and set(busy.unique().tolist()) <= {0.0, 1.0}


def test_damage_lies_on_the_part():
    ground = 0.7 + 0.01 * torch.randn(64, 1, 128, 128, generator=seeded())
    ground[..., 50:78, 30:100] = torch.rand(64, 1, 28, 70, generator=seeded(1))  # an eighth of the picture
    masks = blob_mask(ground, generator=seeded(2))
    rows, columns = ((masks.sum(d).flatten(1) * torch.arange(128)).sum(1) / masks.sum((1, 2, 3)) for d in (-1, -2))
    on_part = ((rows - 64).abs() < 24) & ((columns - 65).abs() < 45)
    assert on_part.float().mean() > 0.85
    plain = blob_mask(torch.full_like(ground, 0.7), generator=seeded(2))
    assert (plain.flatten(1).argmax(1) // 128 < 40).float().mean() > 0.15, "on a plain picture it may lie anywhere"


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def make(name, x, generator, **settings):
    if name.startswith("probe"):
        return probe_once(x, MAKERS[name], generator=generator, **settings).image
    return damage_once(x, MAKERS[name], generator=generator, **settings)


def check_picture(image, x):
    assert image.shape == x.shape and image.dtype == x.dtype
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1


@pytest.fixture(scope="module")
def zippers():
    from zipper_ad.synth import render_zipper

    return torch.stack([torch.from_numpy(render_zipper(s, 128).copy()) for s in range(12)])[:, None].float() / 255


# ---------------------------------------------------------------- every kind and every probe
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_any_shape(name, shape):
    x = pictures(*shape)
    before = x.clone()
    for seed in range(3):
        check_picture(make(name, x, seeded(seed)), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", MAKERS)
def test_chance_comes_from_the_generator(name):
    x = pictures(4, 1, 48, 48)
    state = torch.get_rng_state()
    a, b, c = (make(name, x, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    torch.manual_seed(1)
    d = make(name, x, None)
    torch.manual_seed(1)
    assert torch.equal(d, make(name, x, None))


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", MAKERS)
def test_even_pictures(name, grey):
    x = torch.full((2, 1, 32, 32), grey)
    for seed in range(3):
        check_picture(make(name, x, seeded(seed)), x)


@pytest.mark.parametrize("strength", [(0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("name", MAKERS)
def test_extreme_strength(name, strength):
    x = pictures(3, 1, 40, 40)
    for seed in range(3):
        check_picture(make(name, x, seeded(seed), strength=strength), x)


@pytest.mark.parametrize("radius", [(0.0, 0.0), (1e-9, 1e-9), (0.0, 50.0), (5.0, 5.0), (0.2, 0.01)])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_radius(kind, radius):
    x = pictures(3, 1, 40, 40)
    for seed in range(3):
        check_picture(damage_once(x, kind, radius=radius, generator=seeded(seed)), x)


@pytest.mark.parametrize("name", MAKERS)
def test_most_damage_can_be_seen(name, zippers):
    seen = [damage_stats(zippers, make(name, zippers, seeded(s)))[0] for s in range(4)]
    assert sum(seen) / len(seen) > 0.7


@pytest.mark.parametrize("make_mask", [blob_mask, noise_mask, thread_mask, piece_mask])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks(make_mask, shape):
    mask = make_mask(pictures(*shape), generator=seeded())
    assert mask.shape == (shape[0], 1, *shape[2:]) and mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1


@pytest.mark.parametrize("cells", [(1, 1), (6, 6), (3, 40), (128, 128)])
def test_smooth_noise_is_the_bicubic_enlargement(cells):
    x = torch.zeros(2, 1, 33, 47)
    grid = torch.randn(2, 1, cells[0] + 3, cells[1] + 3, generator=seeded())
    asked = F.interpolate(grid, (33, 47), mode="bicubic", align_corners=True) * 1.3
    assert torch.allclose(smooth_noise(x, cells, seeded()), asked, atol=1e-4)


@pytest.mark.parametrize("window", [1, 3, 5, 11, 41])
def test_mean_over_a_square(window):
    x = pictures(2, 3, 17, 23)
    if window <= 17:
        assert torch.allclose(corrupt._box_mean(x, window), F.avg_pool2d(x, window, 1, window // 2), atol=1e-6)
    assert corrupt._box_mean(x, window).shape == x.shape


# ---------------------------------------------------------------- threads
def test_threads_stand_out_both_ways(zippers):
    "Almost every thread shows, some darker and some brighter than what they cross, on black and on white too."
    x = torch.cat([zippers] * 4)
    damaged = damage_once(x, "thread", generator=seeded())
    assert damage_stats(x, damaged)[0] > 0.95
    change = (damaged - x).mean((1, 2, 3))
    assert (change > 0).float().mean() > 0.15 and (change < 0).float().mean() > 0.15
    for grey in (0.0, 1.0):
        even = torch.full((16, 1, 128, 128), grey)
        assert damage_stats(even, damage_once(even, "thread", generator=seeded()))[0] > 0.9


def test_threads_cross_edges():
    "In a picture of two halves, more threads lie over the line between them than in an even picture."
    x = torch.zeros(100, 1, 64, 64)
    x[..., 32:] = 1

    def crossing(pictures):
        return (thread_mask(pictures, generator=seeded())[..., 30:34].amax((1, 2, 3)) > 0.3).float().mean()

    assert crossing(x) > 1.5 * crossing(torch.zeros_like(x))


# ---------------------------------------------------------------- membrane and seamless pieces
def disc(size=64, radius=0.3, n=1):
    t = (torch.arange(size) + 0.5) / size - 0.5
    return ((t[:, None] ** 2 + t[None] ** 2) < radius**2).float().expand(n, 1, size, size)


def ring_of(mask):
    return F.max_pool2d(mask, 3, 1, 1) - mask


def test_membrane_keeps_what_is_known():
    values, ring = pictures(2, 3, 64, 64), ring_of(disc(n=2))
    surface = membrane(values * ring, ring)
    assert torch.allclose(surface * ring, values * ring, atol=1e-6)


def test_membrane_stays_between_its_values():
    ring = ring_of(disc(n=4))
    values = pictures(4, 1, 64, 64)
    surface = membrane(values * ring, ring)
    low, high = (values + 9 * (1 - ring)).amin(), (values - 9 * (1 - ring)).amax()
    assert surface.min() >= low - 1e-5 and surface.max() <= high + 1e-5


def test_membrane_of_a_constant_and_of_a_plane():
    inside = disc()
    ring = ring_of(inside)
    assert torch.allclose(membrane(0.3 * ring, ring), torch.tensor(0.3), atol=1e-5)
    plane = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)  # a plane solves Laplace's equation
    error = ((membrane(plane * ring, ring) - plane) * inside).abs().max()
    assert error < 0.06


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 9), (2, 3, 7, 5), (1, 1, 33, 64)])
def test_membrane_where_nothing_or_all_is_known(shape):
    values = pictures(*shape)
    nothing = torch.zeros(shape[0], 1, *shape[2:])
    assert not membrane(values * nothing, nothing).any()
    assert torch.allclose(membrane(values, nothing + 1), values, atol=1e-6)


def test_a_constant_offset_leaves_the_gradients_of_the_piece():
    x = pictures(3, 3, 48, 48) * 0.4 + 0.1
    piece = x.clone()
    mask = disc(48, n=3)
    piece[..., 20:28, 20:28] += 0.05  # something new, away from the border of the mask
    blended = seamless(x, mask, piece + 0.3)
    assert torch.allclose(blended, piece, atol=1e-4)
    assert torch.allclose(seamless(x, mask, x - 0.1), x, atol=1e-4)


def test_outside_the_mask_nothing_changes():
    x, mask = pictures(2, 1, 48, 48), disc(48, n=2)
    blended = seamless(x, mask, pictures(2, 1, 48, 48, seed=1))
    assert torch.equal(blended[mask == 0], x[mask == 0]) and not torch.equal(blended, x)


@pytest.mark.parametrize("cover", [0.0, 1.0])
def test_masks_without_a_border(cover):
    x, piece = pictures(2, 1, 32, 32), pictures(2, 1, 32, 32, seed=1)
    blended = seamless(x, torch.full_like(x, cover), piece)
    assert torch.allclose(blended, piece if cover else x, atol=1e-6)


def test_blended_pieces_have_no_seam(zippers):
    "Across the outline of the mask, grey values step less than where the piece is pasted."
    mask = (piece_mask(zippers, generator=seeded(3)) > 0.5).float()
    piece = zippers.roll(1, 0).roll((17, 29), (-2, -1))
    crossing = mask.diff(dim=-1).abs()

    def step(image):
        return (image.diff(dim=-1).abs() * crossing).sum() / crossing.sum()

    assert step(seamless(zippers, mask, piece)) < 0.6 * step(torch.lerp(zippers, piece, mask))


def test_pieces_fit_better_than_chance(zippers):
    mask = piece_mask(zippers, generator=seeded(1))
    ring = ring_of((mask > 0).float())

    def misfit(tries):
        pieces = [find_piece(zippers, mask, zippers.roll(1, 0), seeded(s), tries) for s in range(6)]
        return sum(((p - zippers).abs() * ring).sum() for p in pieces)

    assert misfit(4) < 0.8 * misfit(1)


@pytest.mark.parametrize("kind", ["patch", "seamless"])
def test_pieces_come_from_another_picture(kind):
    "Dark and bright pictures in turn: each one's piece comes from the other kind, from the batch of one it comes from itself."
    x = torch.stack([torch.full((1, 64, 64), 0.2), pictures(1, 64, 64)])
    change = (damage_once(x, kind, (1.0, 1.0), generator=seeded(1)) - x).abs()
    assert change[0].max() > 0.02  # an even picture has nothing to give itself
    assert torch.allclose(damage_once(x[:1], kind, (1.0, 1.0), generator=seeded(1)), x[:1], atol=1e-4)
    given = damage_once(x[:1], kind, (1.0, 1.0), generator=seeded(1), other=x[1:])
    assert (given - x[:1]).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["patch", "seamless"])
def test_batch_of_one(kind, zippers):
    seen = 0
    for seed in range(8):
        damaged = Corruption({kind: 1.0}, whole=0.0)(zippers[:1], seeded(seed))
        check_picture(damaged.image, zippers[:1])
        seen += int(damaged.mask.any())
    assert seen >= 3  # dark cloth on dark cloth is hardly seen


# ---------------------------------------------------------------- the mixture
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, zippers):
    mixture = MIXTURES[name]
    assert set(mixture) <= set(KINDS) and sum(mixture.values()) == pytest.approx(1)
    damaged = Corruption(dict(mixture), whole=0.0, radius=RADII[name])(zippers, seeded())
    assert isinstance(damaged, Damaged)
    check_picture(damaged.image, zippers)
    assert torch.equal(damaged.mask, visible_change(zippers, damaged.image))
    assert damaged.mask.flatten(1).any(1).float().mean() > 0.8


def test_textures_assume_no_arrangement():
    assert not set(TEXTURES) & {"seamless", "warp", "stretch", "shift"}
    assert set(ALIGNED) == set(KINDS) and MIXTURES == {"aligned": ALIGNED, "textures": TEXTURES}


def test_whole_pictures_stay():
    x = pictures(6, 1, 32, 32)
    damaged = Corruption(whole=1.0)(x, seeded())
    assert torch.equal(damaged.image, x) and not damaged.mask.any()


def test_strength_may_change_during_training(zippers):
    corruption = Corruption({"texture": 1.0}, whole=0.0, again=0.0, strength=(1.0, 1.0))
    strong = corruption(zippers, seeded()).image
    corruption.strength = (0.1, 0.1)
    weak = corruption(zippers, seeded()).image
    assert torch.allclose(weak - zippers, 0.1 * (strong - zippers), atol=1e-5)


@pytest.mark.parametrize("kinds", [{"nothing": 1.0}, {"dent": 1.0}, {"patch": -1.0}, {}])
def test_unknown_kinds_of_damage(kinds):
    with pytest.raises(ValueError, match="kinds of damage"):
        Corruption(kinds)


def test_stats():
    x = torch.zeros(4, 1, 32, 32)
    assert damage_stats(x, x) == (0.0, 0.0, 0.0)
    damaged = x.clone()
    damaged[0, :, :16] = 0.5
    seen, area, contrast = damage_stats(x, damaged)
    assert seen == 0.25 and 0.5 <= area < 0.6 and 0.4 < contrast <= 0.5


# ---------------------------------------------------------------- probes
def test_probes_are_no_training_kinds():
    assert not set(PROBES) & set(KINDS) and not set(PROBES.values()) & {fill for fill, _ in KINDS.values()}
    for kind in PROBES:
        with pytest.raises(ValueError, match=kind):
            Corruption({kind: 1.0})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_probe_of_any_batch(shape):
    x = pictures(*shape)
    damaged = probe(x, seeded())
    check_picture(damaged.image, x)
    assert torch.equal(damaged.mask, visible_change(x, damaged.image))


def test_every_picture_is_probed_and_kinds_are_even(monkeypatch):
    counts = {}

    def count(x, kind, strength, generator):
        counts[kind] = counts.get(kind, 0) + len(x)
        return Damaged(x + 1, x)

    monkeypatch.setattr(corrupt, "probe_once", count)
    x = torch.zeros(22, 1, 8, 8)
    assert (probe(x, seeded()).image == 1).all()
    assert set(counts) == set(PROBES) and max(counts.values()) - min(counts.values()) <= 1
    counts.clear()
    for seed in range(300):
        probe(x[:1], seeded(seed), ("scratch", "dent"))
    assert set(counts) == {"scratch", "dent"} and 110 < counts["dent"] < 190


def test_probe_follows_its_generator():
    x = pictures(6, 1, 48, 48)
    state = torch.get_rng_state()
    a, b, c = (probe(x, seeded(s)).image for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", PROBES)
def test_severity_counts(kind, zippers):
    def change(severity):
        return sum((probe_once(zippers, kind, (severity, severity), seeded(s)).image - zippers).abs().sum() for s in range(3))

    assert change(0.9) > 1.2 * change(0.1) > 0


@pytest.mark.parametrize("kinds", [[], ["patch"], ["scratch", "nothing"]])
def test_unknown_probes(kinds):
    with pytest.raises(ValueError, match="choose from"):
        probe(pictures(2, 1, 16, 16), seeded(), kinds)


def test_unknown_names():
    for call in (damage_once, probe_once):
        with pytest.raises(KeyError):
            call(pictures(2, 1, 16, 16), "nothing")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MAKERS)
def test_on_a_gpu(name):
    x = pictures(4, 1, 64, 64).cuda()
    image = make(name, x, torch.Generator("cuda").manual_seed(0))
    check_picture(image, x)
    assert image.is_cuda


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_lint_is_little_and_leaves_the_rest_alone(shape, share):
    x = pictures(*shape)
    copy = x.clone()
    out = lint(x, share, seeded(3))
    check_picture(out, x)
    assert torch.equal(x, copy) and torch.equal(out, lint(x, share, seeded(3)))
    touched = (out != x).flatten(1).any(1)
    assert not touched.any() if share == 0 else touched.all() if share == 1 else True
    assert ((out - x).abs() > 0.02).float().mean() < 0.1


def test_lint_share_and_size():
    x = torch.full((400, 1, 64, 64), 0.4)
    changed = (lint(x, 0.25, seeded()) - x).abs()[:, 0]
    touched = changed.flatten(1).amax(1) > 0.01
    assert 0.18 < touched.float().mean() < 0.32
    assert (changed[touched] > 0.05).float().sum((1, 2)).max() < 64  # of 4096 pixels


def test_lint_is_no_damage_to_a_learner():
    "Training shows it in the input and in the target, and never in the mask."
    from types import SimpleNamespace

    from zipper_ad.callbacks import CorruptionCallback

    callback = CorruptionCallback(Corruption(whole=1.0), lint=1.0)
    x = torch.full((4, 1, 64, 64), 0.4)
    learn = SimpleNamespace(xb=(x,), yb=(x,), training=True, pct_train=1.0, model=torch.nn.Identity())
    callback.learn = learn
    callback.before_batch()
    (damaged,), (clean, mask) = learn.xb, learn.yb
    assert torch.equal(damaged, clean) and not torch.equal(clean, x) and not mask.any()
