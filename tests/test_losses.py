"""Losses and what steers training: values as by the book, gradients where they belong, files of weights that do no harm."""

import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from zipper_ad.callbacks import AdversarialCallback, CorruptionCallback, EMACallback, RestorationLoss, eased
from zipper_ad.config import make_config
from zipper_ad.core import InputError, import_torchvision
from zipper_ad.corrupt import Corruption
from zipper_ad.learner import check_losses, train_autoencoder
from zipper_ad.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    ReconstructionLoss,
    gms_map,
    hinge_discriminator_loss,
    mse_loss,
    msgms_loss,
    ssim_loss,
    ssim_map,
)
from zipper_ad.models.base import Restored

import_torchvision()
from fastai.callback.core import Callback, CancelFitException  # noqa: E402
from fastai.callback.tracker import TrackerCallback  # noqa: E402


@pytest.fixture(scope="module")
def quick(trained):
    "Train two epochs with these settings, unless they say otherwise: the learner."

    def run(*settings, folder=None, cbs=()):
        small = ["data.size=32", "model.widths=[4,8,8]", "model.latent=8", "model.head_widths=[4,8]", "train.precision=fp32"]
        config = make_config([f"data={trained.data}", *small, "train.epochs=2", "train.minutes=0", "train.device=cpu", *settings])
        return train_autoencoder(config, folder, terminal=True, cbs=cbs)[0]

    return run


def weights(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def pictures(n, channels, h, w, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = F.avg_pool2d(torch.rand(n, channels, h + 4, w + 4, generator=g), 5, 1)
    return (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1), x


# ---------------------------------------------------------------- values and gradients
def ssim_by_map(x_hat, x):
    return (1 - ssim_map(x_hat, x, stride=2).mean()) / 2


def msgms_by_map(x_hat, x):
    total = 0
    for i in range(4):
        if i:
            x_hat, x = F.avg_pool2d(x_hat, 2), F.avg_pool2d(x, 2)
        total = total + 1 - gms_map(x_hat, x).mean()
    return total / 4


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (1, 3, 40, 97), (3, 1, 33, 47), (1, 1, 256, 16), (2, 1, 130, 8)])
@pytest.mark.parametrize("loss, by_map", [(ssim_loss, ssim_by_map), (msgms_loss, msgms_by_map)])
def test_cheap_losses_equal_their_maps(loss, by_map, shape):
    a, b = pictures(*shape)
    results = []
    for f in (loss, by_map):
        x_hat = a.clone().requires_grad_()
        value = 3 * f(x_hat, b)
        value.backward()
        results.append((value.item(), x_hat.grad))
    assert results[0][0] == pytest.approx(results[1][0], abs=3e-6)
    assert (results[0][1] - results[1][1]).abs().max() < 1e-3 * results[1][1].abs().max()


@pytest.mark.parametrize("loss", [ssim_loss, msgms_loss])
def test_gradients_stay_finite_where_nothing_differs(loss):
    for target in (torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32), pictures(1, 1, 32, 32)[0]):
        x_hat = target.clone().requires_grad_()
        value = loss(x_hat, target)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6) and x_hat.grad.isfinite().all() and x_hat.grad.abs().max() < 1e-3


def test_half_precision_is_computed_in_full():
    a, b = (v.bfloat16() for v in pictures(1, 1, 32, 32))
    for loss in (ssim_loss, msgms_loss, mse_loss):
        x_hat = a.clone().requires_grad_()
        value = loss(x_hat, b)
        value.backward()
        assert value.dtype == torch.float32 and value.item() == loss(a.float(), b.float()).item() and x_hat.grad.dtype == torch.bfloat16


def test_weighted_squared_error():
    a, b = pictures(3, 1, 16, 16)
    weight = torch.tensor([0.0, 1.0, 5.0]).view(3, 1, 1, 1)
    each = (a - b).square().mean((1, 2, 3))
    assert mse_loss(a, b, weight).item() == pytest.approx(((each[1] + 5 * each[2]) / 3).item(), rel=1e-5)
    assert mse_loss(a, b) == F.mse_loss(a, b)
    criterion = RestorationLoss({"mse": 2, "l1": 1}, focal=0)
    plain, weighted = criterion(Restored(a), b).item(), criterion(Restored(a, weight=weight), b).item()
    assert plain == pytest.approx((2 * F.mse_loss(a, b) + F.l1_loss(a, b)).item(), rel=1e-6)
    assert weighted - plain == pytest.approx(2 * (mse_loss(a, b, weight) - mse_loss(a, b)).item(), rel=1e-3)  # l1 is left alone


# ---------------------------------------------------------------- the perceptual loss and its file of weights
@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    "Random weights of VGG16's first seven convolutions, as torchvision names them."
    models = import_torchvision().models
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in models.vgg16().state_dict().items() if k.startswith("features.") and int(k.split(".")[1]) < 16}
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(s, generator=g) * (2 / max(s[1:].numel(), 1)) ** 0.5 * (len(s) > 1) for k, s in shapes.items()}
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, file)
    save_file(state, file.with_suffix(".safetensors"))
    return file


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("channels", [1, 3])
def test_perceptual_loss(suffix, channels, vgg_file):
    loss = PerceptualLoss(vgg_file.with_suffix(suffix))
    a, b = pictures(2, channels, 32, 40)
    assert loss(a, a).item() == 0
    a.requires_grad_()
    b.requires_grad_()
    value = loss(a, b)
    value.backward()
    assert value.item() > 0 and a.grad.abs().max() > 0 and b.grad is None
    assert not loss.training and not any(p.requires_grad for p in loss.parameters())
    assert loss.features(torch.full((1, 1, 8, 8), 0.485))[0].shape == (1, 64, 8, 8)


def one_line(error):
    return str(error.value).count("\n") == 0


@pytest.mark.parametrize("content", [None, b"", b"garbage", pickle.dumps({"a": 1}), "empty", "other", "nested"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(suffix, content, tmp_path):
    file = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save({"empty": {}, "other": {"features.0.weight": torch.zeros(3)}, "nested": {"state": {"a": torch.zeros(1)}}}[content], file)
    settings = ["loss.perceptual=0.1", f"loss.perceptual_weights={file}"]
    with pytest.raises(InputError, match="loss.perceptual_weights=.*weights.*Give") as error:
        check_losses(make_config(settings))
    assert one_line(error) and str(file) in str(error.value)


class Planted:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda o, f: f.write_bytes(pickle.dumps(o))])
def test_planted_code_does_not_run(write, tmp_path):
    file, target = tmp_path / "vgg16.pth", tmp_path / "hacked"
    write({"features.0.weight": Planted(str(target))}, file)
    with pytest.raises(InputError, match="not a file of weights"):
        PerceptualLoss(file)
    assert not target.exists()


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.setattr("torch.hub.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(InputError, match="could not be downloaded. Fetch https://.*perceptual_weights=FILE") as error:
        check_losses(make_config(["loss.perceptual=0.1"]))
    assert one_line(error)


def test_training_with_the_perceptual_loss(quick, vgg_file):
    learn = quick("loss.perceptual=0.1", f"loss.perceptual_weights={vgg_file}", "train.epochs=1")
    assert learn.loss_func.terms["perceptual"] > 0 and all(v.isfinite().all() for v in weights(learn).values())
    control = quick("loss.perceptual=0.1", "loss.perceptual_weights=nowhere", "model.head=image", "train.epochs=1")
    assert control.loss_func.reconstruction.weights == {}  # no reconstruction to judge


def test_something_must_be_learnt():
    none = ["loss.mse=0", "loss.l1=0", "loss.ssim=0", "loss.msgms=0"]
    for settings in (["model.head=none", *none], ["model.head=image", "loss.focal=0"], [*none, "loss.focal=0"]):
        with pytest.raises(InputError, match="nothing to learn") as error:
            check_losses(make_config(settings))
        assert one_line(error)
    for settings in ([], none, ["model.head=image", *none], ["model.head=none", *none, "loss.adversarial=1"]):
        check_losses(make_config(settings))


# ---------------------------------------------------------------- the running mean of the weights
class Record(Callback):
    "Keeps the raw weights after every step, and what validation and the end of the epoch see."

    order = 99

    def before_fit(self):
        self.steps, self.validated, self.began = [weights(self)], [], []

    def before_train(self):
        self.began.append(weights(self))

    def after_step(self):
        self.steps.append(weights(self))

    def after_epoch(self):
        self.validated.append(weights(self))


def test_running_mean_by_hand(quick):
    record = Record()
    learn = quick("train.ema=0.6", "train.epochs=3", cbs=[record])
    names = {n for n, _ in learn.model.named_parameters()}
    mean, n, seen = record.steps[0], 0, []
    per_epoch = (len(record.steps) - 1) // 3
    for step, raw in enumerate(record.steps[1:]):
        decay = min(0.6, (1 + n) / (10 + n))
        mean = {k: decay * mean[k] + (1 - decay) * raw[k] if k in names else raw[k] for k in raw}
        n += 1
        if (step + 1) % per_epoch == 0:
            seen.append(mean)
    for a, b in zip(seen, record.validated, strict=True):
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)
    assert equal(record.began[1], record.steps[per_epoch])  # training went on with the raw weights
    assert equal(weights(learn), record.validated[-1])  # and ends with the mean


def test_the_mean_leaves_training_alone(quick):
    a, b = Record(), Record()
    quick(cbs=[a])
    quick("train.ema=0.9", cbs=[b])
    assert all(equal(x, y) for x, y in zip(a.steps, b.steps, strict=True))
    assert not equal(a.validated[-1], b.validated[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_best_mean_is_written_and_kept(precision, quick, tmp_path):
    record = Record()
    learn = quick("train.ema=0.7", "train.epochs=5", "train.lr=0.02", f"train.precision={precision}", folder=tmp_path, cbs=[record])
    scores = [v[-1] for v in learn.recorder.values]
    best = load_file(tmp_path / "checkpoints/best.safetensors")
    assert equal(best, record.validated[scores.index(max(scores))]) and equal(weights(learn), best)
    assert equal(load_file(tmp_path / "checkpoints/last.safetensors"), record.validated[-1])
    with learn.removed_cbs([c for c in learn.cbs if isinstance(c, TrackerCallback)]), learn.no_bar():
        validated = learn.validate()  # after training nothing is exchanged any more
    assert equal(weights(learn), best) and validated[1] == pytest.approx(max(scores), abs=1e-6 if precision == "fp32" else 0.05)


def test_a_mean_cut_short_within_an_epoch(quick):
    class Cut(Callback):
        def after_batch(self):
            if self.training and self.learn.train_iter == 3:
                raise CancelFitException()

    record = Record()
    learn = quick("train.ema=0.9", cbs=[record, Cut()])
    assert not record.validated and not equal(weights(learn), record.steps[-1])


# ---------------------------------------------------------------- damage, ramp and discriminator
@pytest.mark.parametrize("seed", range(4))
def test_something_is_damaged_in_validation(seed, quick):
    learn = quick("damage.whole=0.8", f"seed={seed}")
    assert all(math.isfinite(v) for row in learn.recorder.values for v in row)  # the score needs a damaged pixel


def test_ramp():
    corruption = Corruption(strength=(0.2, 0.8))
    assert [eased(corruption, p, 0.5).strength[0] for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
    assert eased(corruption, 0, 0) is corruption and corruption.strength == (0.2, 0.8)


class Strengths(Corruption):
    seen = []

    def __call__(self, x, generator=None):
        self.seen.append((generator is None, self.strength[0]))  # validation brings its own generator
        return super().__call__(x, generator)


def test_ramp_in_training(quick):
    class Swap(Callback):
        order = -50

        def before_fit(self):
            callback = next(c for c in self.learn.cbs if isinstance(c, CorruptionCallback))
            callback.corruption = Strengths(strength=callback.corruption.strength)

    Strengths.seen = []
    quick("damage.ramp=0.5", "damage.strength=[0.2,0.9]", "train.epochs=4", cbs=[Swap()])
    training = [s for t, s in Strengths.seen if t]
    assert training[0] == pytest.approx(0.9) and training == sorted(training, reverse=True)
    assert training[len(training) // 2 :] == [0.2] * len(training[len(training) // 2 :]) and training[1] > 0.2
    assert {s for t, s in Strengths.seen if not t} == {0.2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_discriminator_in_training(precision, quick):
    class First(Callback):
        def after_batch(self):
            if not hasattr(self, "before"):
                self.before = [p.detach().clone() for p in self.learn.adversarial.discriminator.parameters()]

    settings = ["loss.adversarial=0.1", f"train.precision={precision}", "data.size=64", "train.epochs=3"]
    learn = quick(*settings, cbs=[First()])
    callback = learn.adversarial
    after = list(callback.discriminator.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(learn.first.before, after, strict=True))
    assert all(p.isfinite().all() for p in after) and all(map(math.isfinite, callback.losses))
    assert len(callback.losses) == 3 * len(learn.dls.train)  # in training only
    assert all(v.isfinite().all() for v in weights(learn).values())
    tuned = {id(p) for group in learn.opt.param_lists for p in group}
    assert tuned == {id(p) for p in learn.model.parameters()}
    assert not equal(weights(learn), weights(quick(*settings[1:])))  # it had a say


def test_discriminator_meets_the_same_damage(quick):
    class Seen(Callback):
        order = 50

        def before_fit(self):
            self.batches = []

        def after_pred(self):
            self.batches.append(self.xb[0].clone())

    a, b = Seen(), Seen()
    quick("loss.adversarial=0.1", cbs=[a])
    quick(cbs=[b])
    assert all(torch.equal(x, y) for x, y in zip(a.batches, b.batches, strict=True))


def test_discriminator_learns():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    optimizer = torch.optim.AdamW(discriminator.parameters(), 2e-3, betas=(0.5, 0.999))
    real, fake = torch.rand(2, 1, 48, 48), torch.full((2, 1, 48, 48), 0.5)
    for _ in range(60):
        loss = hinge_discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5 and discriminator(real).mean() > discriminator(fake).mean()


def test_nothing_of_it_unless_asked_for(quick):
    learn = quick("train.epochs=1")
    assert not [c for c in learn.cbs if isinstance(c, EMACallback | AdversarialCallback)]
    assert learn.loss_func.reconstruction.perceptual is None
    off = ["train.ema=0", "damage.ramp=0", "loss.perceptual=0", "loss.adversarial=0"]
    assert equal(weights(learn), weights(quick("train.epochs=1", *off)))


def test_unknown_losses_are_named():
    with pytest.raises(ValueError, match="choose from .*perceptual"):
        ReconstructionLoss({"perceptive": 1})
