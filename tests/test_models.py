"""The contract that every family of autoencoder keeps, over the whole registry, with every head and in each family's variants."""
import dataclasses

import pytest
import torch

from zipper_ad.config import HEADS, MODEL_CONFIGS, PRESETS, make_config
from zipper_ad.core import InputError, set_seed
from zipper_ad.losses import focal_loss
from zipper_ad.models.base import BaseAutoencoder, Latent, create_model
from zipper_ad.models.head import Restorer

SMALL_VIT = {"patch": 8, "width": 32, "heads": 2, "blocks": 1, "decoder_width": 16, "decoder_blocks": 1}
SMALL_DIFFUSION = {"widths": [8, 16, 16], "convolutions": 1, "steps": 50, "passes": 2}
SMALL = {  # small versions of each family and of each choice in it
    "cnn": ("cnn", {"widths": [8, 16, 16], "latent": 16, "fold": 2}),
    "cnn, no skips": ("cnn", {"widths": [8, 16], "latent": 16, "skip": "none"}),
    "resnet": ("resnet", {"depth": 10, "width": 8, "latent": 16, "fold": 2}),
    "resnet 34, add": ("resnet", {"depth": 34, "width": 8, "latent": 16, "skip": "add"}),
    "resnet, no skips": ("resnet", {"depth": 18, "width": 8, "latent": 16, "skip": "none"}),
    "vit": ("vit", SMALL_VIT),
    "vit, cnn decoder": ("vit", SMALL_VIT | {"decoder": "cnn"}),
    "vit, masked passes": ("vit", SMALL_VIT | {"passes": 3, "hide": 0.5}),
    "vit, conv stem": ("vit", SMALL_VIT | {"stem": "conv", "decoder": "cnn", "skip": "add"}),
    "vit, conv stem, concat": ("vit", SMALL_VIT | {"stem": "conv", "decoder": "cnn", "skip": "concat", "patch": 16}),
    "diffusion": ("diffusion", SMALL_DIFFUSION),
    "diffusion, one step, conditioned": ("diffusion", SMALL_DIFFUSION | {"passes": 1, "condition": True, "fold": 2}),
    "diffusion, ddpm, cosine, perlin": ("diffusion", SMALL_DIFFUSION | {"sampler": "ddpm", "schedule": "cosine", "noise": "perlin"}),
}
assert {family for family, _ in SMALL.values()} == set(MODEL_CONFIGS), "each family needs a small version here"


def small(which, **changes):
    family, settings = SMALL[which]
    return MODEL_CONFIGS[family](**{**settings, **changes})


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)


every_model = pytest.mark.parametrize("which", SMALL)
every_head = pytest.mark.parametrize("head", HEADS)


@every_model
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (2, 1, 45, 70), (2, 3, 48, 48), (3, 1, 16, 16)])
def test_shapes_and_ranges(which, shape):
    model = create_model(small(which, channels=shape[1])).eval()
    x = torch.rand(shape)
    with torch.inference_mode():
        restored = model.restore(x)
    assert restored.image.shape == x.shape and restored.image.dtype == torch.float32
    assert restored.image.min() >= 0 and restored.image.max() <= 1
    assert restored.logit.shape == (shape[0], 1, *shape[2:])
    assert torch.isfinite(restored.logit).all()


@every_model
def test_encode_and_decode_are_the_two_halves(which):
    model = create_model(small(which, **({"passes": 1} if "vit" in which else {}))).eval()
    x = torch.rand(2, 1, 40, 48)
    with torch.inference_mode():
        z = model.encode(x)
        assert isinstance(z, Latent) and z.size == (40, 48)
        torch.testing.assert_close(model.decode(z), model(x))


@every_model
@every_head
def test_gradients_reach_every_parameter(which, head):
    if "no skips" in which and head == "image":
        pytest.skip("the control has no autoencoder")
    restorer = Restorer(small(which, head=head, dropout=0.0)).train()
    damaged, clean = torch.rand(4, 1, 64, 64), torch.rand(4, 1, 64, 64)
    mask = (torch.rand(4, 1, 64, 64) < 0.3).float()
    for _ in range(3):  # a network that starts at zero somewhere needs a step before its gradient reaches everything
        restorer.zero_grad()
        restored = restorer(damaged)
        loss = (restored.image - clean).square().mean()
        if restored.logit is not None:
            loss = loss + focal_loss(restored.logit, mask)
        loss.backward()
        with torch.no_grad():
            for p in restorer.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad + 1e-3 * torch.randn_like(p)
    if head == "image":
        assert restorer.autoencoder is None
    unreached = [n for n, p in restorer.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not unreached
    assert all(torch.isfinite(p.grad).all() for p in restorer.parameters())


@every_model
def test_evaluation_is_deterministic_and_independent_of_the_batch(which):
    model = create_model(small(which)).eval()
    x = torch.rand(3, 1, 64, 64)
    together = model.reconstruct(x)
    assert torch.equal(together, model.reconstruct(x))
    alone = torch.cat([model.reconstruct(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@every_model
def test_evaluation_leaves_chance_and_mode_alone(which):
    model = create_model(small(which)).train()
    torch.manual_seed(5)
    model.reconstruct(torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)) and model.training


@every_model
def test_save_and_load_are_bit_equal(which, tmp_path):
    model = create_model(small(which)).eval()
    model.save(tmp_path / "model.safetensors")
    again = BaseAutoencoder.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    x = torch.rand(1, 1, 64, 64)
    assert torch.equal(model.reconstruct(x), again.reconstruct(x))


@every_model
def test_bfloat16(which):
    model = create_model(small(which))
    x = torch.rand(2, 1, 64, 64)
    for mode in (True, False):
        model.train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            restored = model.restore(x)
        restored.image.sum().backward()
        assert torch.isfinite(restored.image).all() and torch.isfinite(restored.logit).all()


def mean_loss(model, x, clean, draws=8):
    "In training mode, where some families draw timesteps or hide patches: the mean over the same draws each time."
    set_seed(7)
    with torch.no_grad():
        return sum((model(x) - clean).square().mean().item() for _ in range(draws)) / draws


@every_model
@pytest.mark.parametrize("damage", [0.0, 0.3])
def test_plain_and_restoring_training_lower_the_loss(which, damage):
    model = create_model(small(which, dropout=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = torch.linspace(0, 12, 64)
    clean = (rows.sin()[None, None, :, None] * rows.cos() / 2 + 0.5).expand(8, 1, 64, 64).contiguous()
    x = clean + damage * torch.randn_like(clean)
    before = mean_loss(model, x, clean)
    for _ in range(30):
        loss = (model(x) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean_loss(model, x, clean) < 0.7 * before


@pytest.mark.parametrize("family, preset", PRESETS)
def test_every_preset_builds_on_paper(family, preset):
    config = make_config([f"model={family}", f"preset={preset}"])
    with torch.device("meta"):
        model = create_model(config.model)
    assert sum(p.numel() for p in model.parameters()) > 1e5
    assert config.preset == preset and dataclasses.asdict(config.model)["name"] == family


def test_an_unknown_family_is_told():
    class Unknown:
        name = "gan"

    with pytest.raises(InputError, match="no such family"):
        create_model(Unknown())
