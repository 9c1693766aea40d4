"""Training, the callbacks, the damage, and the contract that every autoencoder keeps with every head."""

import csv
import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from zipper_ad import callbacks
from zipper_ad.config import HEADS, MODEL_CONFIGS, make_config
from zipper_ad.core import InputError, import_torchvision
from zipper_ad.corrupt import KINDS, Corruption, Damaged
from zipper_ad.data import AnomalyDataset
from zipper_ad.learner import ae_learner, make_dls, reference_indices, split_three, train_autoencoder
from zipper_ad.models.base import MODELS, BaseAutoencoder, Restored
from zipper_ad.models.head import Restorer

import_torchvision()
from fastai.callback.core import Callback  # noqa: E402

SMALL = {"cnn": ["model.widths=[4,8,8]", "model.latent=8", "model.head_widths=[4,8]"]}  # settings that make a family quick to test


def config_of(family="cnn", *settings, preset="quick"):
    return make_config([f"model={family}", f"preset={preset}", *SMALL.get(family, []), *settings])


@pytest.fixture(scope="module")
def quick(trained):
    "Train two epochs with these settings, unless they say otherwise: (learner, normals, split)."

    def run(*settings, folder=None, cbs=()):
        config = config_of(
            "cnn",
            f"data={trained.data}",
            "data.size=64",
            "train.epochs=2",
            "train.minutes=0",
            "train.precision=fp32",
            "train.device=cpu",
            *settings,
        )
        return train_autoencoder(config, folder, terminal=True, cbs=cbs)

    return run


def weights(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def history(folder):
    with (folder / "history.csv").open() as f:
        return [{k: float(v) for k, v in row.items() if ":" not in v} for row in csv.DictReader(f)]


def epoch_in(file):
    with safe_open(str(file), "pt") as f:
        return int(f.metadata()["epoch"])


# ---------------------------------------------------------------- training
def test_the_same_seed_trains_the_same_weights(quick):
    first, _, split = quick("seed=3")
    torch.rand(17)  # whatever chance was used in between
    second, _, again = quick("seed=3")
    assert split == again and equal(weights(first), weights(second))
    assert first.recorder.values == second.recorder.values
    assert not equal(weights(first), weights(quick("seed=4")[0]))


class Untrained(Callback):
    "Keeps the weights that training begins with."

    def before_fit(self):
        self.weights = weights(self.learn)


@pytest.mark.parametrize("head", HEADS)
def test_training_changes_every_weight(head, quick):
    "Nothing is left out of the optimiser, and everything stays finite."
    untrained = Untrained()
    learn, *_ = quick(f"model.head={head}", "train.epochs=1", cbs=[untrained])
    before = {k: v for k, v in untrained.weights.items() if "num_batches" not in k}
    after = weights(learn)
    assert all(v.isfinite().all() and v.dtype == torch.float32 for k, v in after.items() if "num_batches" not in k)
    assert not [k for k in before if torch.equal(before[k], after[k])]
    tuned = [p for group in learn.opt.param_lists for p in group]
    assert {id(p) for p in tuned} == {id(p) for p in learn.model.parameters()} and len(tuned) == len({id(p) for p in tuned})


def test_training_learns(quick):
    learn, *_ = quick("train.epochs=8", "data.size=32")
    losses = [v[1] for v in learn.recorder.values]  # of the damaged held-out pictures
    assert losses[-1] < 0.8 * losses[0]


def test_norms_and_biases_do_not_decay(quick):
    learn, *_ = quick("train.epochs=1", "train.weight_decay=0.5")
    decayed, free = learn.opt.opt.param_groups  # PyTorch's own
    assert decayed["weight_decay"] == 0.5 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in free["params"])


class Look(Callback):
    "Keeps what the network was given, batch by batch."

    order = 50

    def before_fit(self):
        self.seen = []

    def after_pred(self):
        self.seen.append((self.training, self.xb[0].clone(), self.yb[0].clone(), self.yb[1].clone(), self.pred.image.dtype))


@pytest.mark.parametrize("head", ["joint", "none"])
def test_plain_training_sees_whole_pictures(head, quick):
    look = Look()
    quick("damage.restore=false", f"model.head={head}", "train.epochs=1", cbs=[look])
    for training, x, clean, mask, _ in look.seen:
        assert torch.equal(x, clean) == training and bool(mask.any()) == (not training)  # validation is damaged all the same


def test_restoring_sees_damage_and_validates_on_the_same(quick):
    look = Look()
    quick("damage.whole=0", cbs=[look])
    training, valid = [s for s in look.seen if s[0]], [s for s in look.seen if not s[0]]
    assert all(not torch.equal(x, clean) and mask.any() for _, x, clean, mask, _ in training)
    half = len(valid) // 2
    for a, b in zip(valid[:half], valid[half:], strict=True):
        assert torch.equal(a[1], b[1]) and torch.equal(a[3], b[3])
    assert not torch.equal(training[0][1], training[len(training) // 2][1])


def test_split(quick):
    _, dataset, split = quick("train.epochs=1", "data.size=32")
    parts = split.train, split.valid, split.calibration
    assert sorted(sum(parts, [])) == list(range(40)) and [len(p) for p in parts] == [32, 3, 5]
    hashes = [{dataset.hashes[i] for i in p} for p in parts]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]
    reference = reference_indices(split, 20)
    assert reference == split.valid + split.train[:20] and not set(reference) & set(split.calibration)


@pytest.mark.parametrize("n, held_out, enough", [(15, 0.2, True), (12, 0.2, False), (6, 0.5, True), (4, 0.5, False), (1, 0.5, False)])
def test_three_must_be_held_out(n, held_out, enough, trained, tmp_path):
    for f in sorted((trained.data / "train/good").iterdir())[:n]:
        shutil.copy(f, tmp_path)
    dataset = AnomalyDataset(tmp_path, "train", size=32)
    if enough:
        split = split_three(dataset, held_out, 0)
        assert split.train and split.valid and split.calibration
    else:
        with pytest.raises(InputError, match="good"):
            split_three(dataset, held_out, 0)


def test_duplicates_never_straddle_validation_and_calibration(trained, tmp_path):
    from PIL import Image

    for k, f in enumerate(sorted((trained.data / "train/good").iterdir())[:12]):
        for copy in "abc":
            Image.open(f).save(tmp_path / f"{copy}{k:02d}.png")
    dataset = AnomalyDataset(tmp_path, "train", size=32)
    for seed in range(4):
        split = split_three(dataset, 0.5, seed)
        hashes = [{dataset.hashes[i] for i in p} for p in (split.train, split.valid, split.calibration)]
        assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]


def test_fewer_pictures_than_a_batch(quick):
    learn, *_ = quick("train.bs=64", "train.epochs=1")
    assert len(learn.recorder.losses) == 1


def test_bf16_leaves_weights_and_outputs_in_float32(quick):
    look = Look()
    learn, *_ = quick("train.precision=bf16", "train.epochs=1", cbs=[look])
    assert all(v.dtype == torch.float32 for v in weights(learn).values() if v.is_floating_point())
    assert {s[4] for s in look.seen} == {torch.float32} and not torch.is_autocast_enabled("cpu")
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])
    assert not equal(weights(learn), weights(quick("train.epochs=1")[0]))  # it did compute otherwise


def test_an_error_ends_autocast(trained):
    config = config_of("cnn", f"data={trained.data}", "data.size=32", "train.precision=bf16", "train.device=cpu", "train.minutes=0")
    learn = ae_learner(make_dls(config)[2], config)
    assert [c for c in learn.cbs if isinstance(c, callbacks.AutocastCallback)]
    learn.model.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"), learn.no_bar(), learn.no_logging():
        learn.fit_run(config)
    assert not torch.is_autocast_enabled("cpu")


def test_an_interrupt_leaves_the_network_as_it_was(trained):
    config = config_of("cnn", f"data={trained.data}", "data.size=32", "train.precision=bf16", "train.device=cpu", "train.minutes=0")
    learn = ae_learner(make_dls(config)[2], config)
    hook = learn.model.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit_run(config)
    hook.remove()
    assert "forward" not in vars(learn.model)


def test_early_stopping(quick, tmp_path):
    quick("train.epochs=60", "train.patience=2", "data.size=32", "train.lr=1e-9", folder=tmp_path)
    scores = [row["damage_auprc"] for row in history(tmp_path)]
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    assert len(scores) == best + 3 < 60
    assert epoch_in(tmp_path / "checkpoints/last.safetensors") == len(scores) - 1


def test_checkpoints(quick, tmp_path):
    learn, *_ = quick("train.epochs=4", folder=tmp_path)
    files = tmp_path / "checkpoints/best.safetensors", tmp_path / "checkpoints/last.safetensors"
    best, last = map(load_file, files)
    assert set(f.name for f in files[0].parent.iterdir()) == {"best.safetensors", "last.safetensors", "state.safetensors"}
    assert best.keys() == last.keys() == learn.model.state_dict().keys()
    assert equal(weights(learn), best)  # training ends with the best
    scores = [row["damage_auprc"] for row in history(tmp_path)]
    assert epoch_in(files[0]) == scores.index(max(scores)) and epoch_in(files[1]) == 3
    with safe_open(str(files[0]), "pt") as f:
        assert json.loads(f.metadata()["monitor"])["damage_auprc"] == pytest.approx(max(scores), abs=1e-6)
    Restorer(config_of().model).load_state_dict(best)


class Clock(Callback):
    "Seconds of each epoch and of the whole."

    def before_fit(self):
        self.epochs, self.start = [], time.monotonic()

    def before_epoch(self):
        self.begun = time.monotonic()

    def after_cancel_fit(self):
        self.epochs.append(time.monotonic() - self.begun)

    def after_epoch(self):
        self.epochs.append(time.monotonic() - self.begun)

    def after_fit(self):
        self.total = time.monotonic() - self.start


def test_a_time_budget_ends_in_time(quick, tmp_path):
    clock = Clock()
    learn, *_ = quick("train.epochs=100000", "train.minutes=0.04", "train.patience=100000", folder=tmp_path, cbs=[clock])
    assert 2.4 <= clock.total < 2.4 + 3 * max(clock.epochs) + 1
    assert learn.schedule.lrs[-1] < 0.5 * max(learn.schedule.lrs)  # the cosine came to its end
    assert len(history(tmp_path)) > 1


def test_the_last_epoch_of_a_time_budget_is_kept(quick, tmp_path):
    learn, *_ = quick("train.epochs=100000", "train.minutes=0.01", "train.patience=100000", folder=tmp_path)
    scores = [row["damage_auprc"] for row in history(tmp_path)]
    assert epoch_in(tmp_path / "checkpoints/last.safetensors") == len(scores) - 1
    assert epoch_in(tmp_path / "checkpoints/best.safetensors") == scores.index(max(scores))


def test_an_epoch_longer_than_the_budget_is_cut_short(quick, monkeypatch, tmp_path):
    "A clock that runs a second with every look at it."
    now = iter(range(10**9))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    learn, *_ = quick("train.epochs=50", "train.minutes=0.05", "train.bs=1", folder=tmp_path)  # 3 s; an epoch takes over 32
    assert 1 <= len(learn.recorder.losses) < 32
    assert all(v.isfinite().all() for v in weights(learn).values())


def test_the_rate_rises_and_falls(quick):
    learn, *_ = quick("train.epochs=10", "data.size=32", "train.warmup=0.2", "train.lr=0.004")
    lrs = learn.schedule.lrs
    top = lrs.index(max(lrs))
    assert max(lrs) == pytest.approx(0.004) and top == round(0.2 * len(lrs)) and lrs[-1] < 0.02 * max(lrs)
    assert lrs[:top] == sorted(lrs[:top]) and lrs[top:] == sorted(lrs[top:], reverse=True)


def test_the_gradient_is_clipped(quick):
    class Norm(Callback):
        order = 99

        def before_fit(self):
            self.norms = []

        def before_step(self):
            self.norms.append(sum(p.grad.square().sum().item() for p in self.model.parameters()) ** 0.5)

    norm = Norm()
    quick("train.clip=0.01", "train.epochs=1", cbs=[norm])
    assert norm.norms and max(norm.norms) <= 0.0101


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu(precision, quick, tmp_path):
    learn, *_ = quick("train.device=cuda", f"train.precision={precision}", folder=tmp_path)
    assert all(v.isfinite().all() and v.is_cuda for v in weights(learn).values())
    assert load_file(tmp_path / "checkpoints/best.safetensors")


# ---------------------------------------------------------------- the contract of autoencoders and heads
FAMILIES = pytest.mark.parametrize("family", sorted(MODEL_CONFIGS))
ALL_HEADS = pytest.mark.parametrize("head", HEADS)
CHANNELS = pytest.mark.parametrize("channels", [1, 3])


def restorer(family, head, channels=1):
    torch.manual_seed(0)
    model = Restorer(config_of(family, f"model.head={head}", f"data.channels={channels}").model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def check(restored, x, head, bounded=True):
    assert isinstance(restored, Restored) and restored.image.shape == x.shape and restored.image.dtype == torch.float32
    assert not bounded or 0 <= restored.image.min() and restored.image.max() <= 1
    if head == "none":
        assert restored.logit is None
    else:
        assert restored.logit.shape == (len(x), 1, *x.shape[-2:]) and restored.logit.dtype == torch.float32
        assert restored.logit.isfinite().all()


@FAMILIES
@ALL_HEADS
@CHANNELS
def test_shapes_and_ranges(family, head, channels):
    "While it trains, diffusion's output is linear by its specification: a clamp would stop the gradient."
    model = restorer(family, head, channels)
    for shape in ((2, 64, 64), (1, 64, 64), (3, 33, 47), (1, 50, 127), (2, 96, 32)):
        for mode in (True, False):
            x = torch.rand(shape[0], channels, *shape[1:])
            check(model.train(mode)(x), x, head, bounded=not mode or family != "diffusion")


@FAMILIES
@ALL_HEADS
def test_extreme_inputs_stay_finite(family, head):
    model = restorer(family, head).eval()
    for x in (torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64), torch.full((2, 1, 64, 64), 0.5)):
        check(model(x), x, head)


@FAMILIES
@ALL_HEADS
def test_gradients_reach_every_parameter(family, head):
    model, x = restorer(family, head).train(), torch.rand(4, 1, 64, 64)
    restored = model(x)
    loss = (restored.image - x).square().mean() + (0 if restored.logit is None else restored.logit.square().mean())
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]


@FAMILIES
@ALL_HEADS
def test_evaluation_takes_no_chance_and_no_company(family, head):
    "The same picture gives the same, again and in any batch."
    model, x = restorer(family, head).train(), torch.rand(4, 1, 64, 64)
    for _ in range(3):
        model(x)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        a, b, alone = model(x), model(x), model(x[1:2])
    assert torch.equal(a.image, b.image) and (a.logit is None or torch.equal(a.logit, b.logit))
    assert torch.allclose(a.image[1:2], alone.image, atol=1e-5)
    assert a.logit is None or torch.allclose(a.logit[1:2], alone.logit, atol=1e-3)
    assert torch.equal(state, torch.get_rng_state()) and equal(before, model.state_dict())


@FAMILIES
@ALL_HEADS
def test_half_precision(family, head):
    model, x = restorer(family, head).eval(), torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    check(half, x, head)
    assert (full.image - half.image).abs().mean() < 0.03
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@FAMILIES
@CHANNELS
@pytest.mark.parametrize("head", ["joint", "none"])
def test_the_autoencoder_alone(family, head, channels, tmp_path):
    model, x = restorer(family, head, channels).autoencoder.train(), torch.rand(2, channels, 40, 56)
    before = x.clone()
    for _ in range(2):
        model(x)
    restored = model.reconstruct(x)
    assert model.training and not restored.requires_grad and torch.equal(x, before)
    model.eval()
    assert torch.equal(model(x), restored) and torch.allclose(model.decode(model.encode(x)), restored)
    for kind in ("l1", "l2"):
        error = model.calculate_reconstruction_error(x, kind)
        assert error.shape == (2, 1, 40, 56) and error.min() >= 0 and error.max() <= 1
    model.save(tmp_path / "model.safetensors")
    again = BaseAutoencoder.load(tmp_path / "model.safetensors")
    assert type(again) is MODELS[family] and again.config == model.config and not again.training
    assert equal(model.state_dict(), again.state_dict()) and torch.equal(again.reconstruct(x), restored)


@FAMILIES
@pytest.mark.parametrize("preset", ["quick", "realtime", "spec"])
def test_presets(family, preset):
    "The presets as they are: built, and run on one small picture."
    config = make_config([f"model={family}", f"preset={preset}"])
    x = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        check(Restorer(config.model).eval()(x), x, config.model.head)


def test_the_discrepancy_head_never_sees_the_picture():
    "Equal input and reconstruction give the same map, whatever the picture."
    model = restorer("cnn", "discrepancy").eval()
    model.autoencoder.restore = lambda x: Restored(x)
    with torch.inference_mode():
        a, b = model(torch.rand(1, 1, 64, 64)).logit, model(torch.rand(1, 1, 64, 64)).logit
    assert torch.allclose(a, b, atol=1e-5)


# ---------------------------------------------------------------- damage
def check_damage(x, damaged):
    assert isinstance(damaged, Damaged) and damaged.image.shape == x.shape and damaged.image.dtype == x.dtype
    assert damaged.mask.shape == (len(x), 1, *x.shape[-2:]) and set(damaged.mask.unique().tolist()) <= {0.0, 1.0}
    assert damaged.image.isfinite().all() and damaged.image.min() >= 0 and damaged.image.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (32, 300), (300, 32), (33, 47), (64, 64), (127, 50), (96, 101)])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_damage_of_any_batch(n, size, channels):
    x = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(n))
    before = x.clone()
    for seed in range(3):
        check_damage(x, Corruption()(x, torch.Generator().manual_seed(seed)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_damage(kind):
    for x in (torch.rand(6, 1, 64, 64), torch.rand(1, 3, 50, 70), torch.zeros(2, 1, 32, 32), torch.ones(2, 1, 32, 32)):
        for seed in range(4):
            check_damage(x, Corruption({kind: 1.0}, whole=0)(x, torch.Generator().manual_seed(seed)))


def test_whole_pictures_stay_whole():
    x = torch.rand(50, 1, 32, 32)
    damaged = Corruption(whole=1.0)(x)
    assert torch.equal(damaged.image, x) and not damaged.mask.any() and damaged.image is not x


def test_damage_damages():
    "Almost every picture of a zipper shows it, in a small part of the picture, where the mask says."
    from zipper_ad.synth import render_zipper

    x = torch.stack([torch.from_numpy(render_zipper(s, 256).copy()) for s in range(24)])[:, None].float() / 255
    damaged = Corruption(whole=0.0)(x, torch.Generator().manual_seed(0))
    change = (damaged.image - x).abs()
    assert (change.amax((1, 2, 3)) > 0.02).float().mean() > 0.9 and (damaged.mask.amax((1, 2, 3)) > 0).float().mean() > 0.9
    assert 0.005 < damaged.mask.mean() < 0.3
    assert change[damaged.mask > 0].mean() > 10 * change[damaged.mask == 0].mean()


def test_share_of_whole_pictures():
    x = torch.rand(2000, 1, 32, 32)
    damaged = Corruption(whole=0.4)(x, torch.Generator().manual_seed(0))
    untouched = (damaged.image == x).flatten(1).all(1).float().mean()
    assert 0.35 < untouched < 0.5  # a few misses of the picture besides


def test_damage_follows_its_generator():
    x = torch.rand(8, 1, 48, 48)
    state = torch.get_rng_state()
    a, b, c = (Corruption()(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())  # and leaves the global one alone
    assert torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) and not torch.equal(a.image, c.image)
    torch.manual_seed(5)
    d = Corruption()(x)
    torch.manual_seed(5)
    assert torch.equal(Corruption()(x).image, d.image)


def test_pictures_are_damaged_independently():
    x = torch.rand(1, 1, 48, 48).expand(16, -1, -1, -1)
    images = Corruption({"hole": 1.0}, whole=0.0)(x, torch.Generator().manual_seed(0)).image
    assert len({i.numpy().tobytes() for i in images}) >= 14


@pytest.mark.parametrize("kinds", [{}, {"patch": 0.0}, {"scratch": 1.0}, {"patch": 1.0, "scratch": 0.0}])
def test_kinds_that_cannot_be(kinds):
    with pytest.raises(ValueError, match="kinds of damage"):
        Corruption(kinds)


def test_a_kind_without_weight_never_comes():
    x = torch.rand(1, 1, 32, 32).expand(100, -1, -1, -1) * 0 + 0.5  # nothing to move in an even grey
    damaged = Corruption({"warp": 1.0, "texture": 0.0, "stretch": 1.0}, whole=0.0)(x, torch.Generator().manual_seed(0))
    assert torch.allclose(damaged.image, x, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_damage_on_a_gpu():
    x = torch.rand(8, 1, 64, 64, device="cuda")
    damaged = Corruption()(x, torch.Generator("cuda").manual_seed(0))
    check_damage(x, damaged)
    assert damaged.image.is_cuda and damaged.mask.is_cuda


class Steps(Callback):
    "Counts the batches and the optimiser's steps."

    def before_fit(self):
        self.batches = self.steps = 0

    def before_backward(self):
        self.batches += 1

    def after_step(self):
        self.steps += 1


def test_gradients_are_added_up_over_batches(quick):
    counted = [Steps(), Steps()]
    settings = "train.bs=2", "train.ema=0.9"
    plain, summed = (quick(f"train.accumulate={n}", *settings, cbs=[c])[0] for n, c in zip((1, 3), counted, strict=True))
    assert counted[0].batches == counted[1].batches == counted[0].steps
    assert counted[1].steps == counted[1].batches // 3
    assert next(c for c in summed.cbs if type(c).__name__ == "GradientAccumulation").n_acc == 6
    assert summed.recorder.values[-1][0] < summed.recorder.values[0][0]  # it learns
    assert len(plain.recorder.losses) == len(summed.recorder.losses)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_leaves_no_trace(quick, tmp_path):
    plain, compiled = (quick(f"train.compile={c}", "train.epochs=1", folder=tmp_path / c)[0] for c in ("false", "true"))
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    assert compiled.model._compiled_call_impl is None
    names = load_file(tmp_path / "true/checkpoints/best.safetensors")
    assert not [n for n in names if "_orig_mod" in n] and set(names) == set(plain.model.state_dict())
    losses = [learn.recorder.losses[0].item() for learn in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
