"""Training throughput of the fastai learner beside a bare PyTorch loop: same network, losses, damage and pictures, in one run.

    python tools/bench_training.py [OUT.json] [rounds=5] [steps=20]

The two take turns, so that a noisy machine is noisy for both; each round gives one ratio, and the median is reported.
Whole trainings of two epochs, validation included, with all that a run writes (TensorBoard, its pictures after each epoch, the
training report's pictures, checkpoints), take turns with the same that write nothing.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from zipper_ad.callbacks import AutocastCallback, DamageAUPRC, RestorationLoss, pick_precision
from zipper_ad.config import make_config
from zipper_ad.core import set_seed
from zipper_ad.corrupt import Corruption
from zipper_ad.data import Augment
from zipper_ad.learner import ae_learner, decay_groups, make_dls
from zipper_ad.models.head import Restorer
from zipper_ad.synth import render_dataset

options = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
out = next((a for a in sys.argv[1:] if "=" not in a), None)
rounds, steps = int(options.get("rounds", 5)), int(options.get("steps", 20))


class Done(Exception):
    "Enough steps."


def main():
    root = render_dataset(Path(tempfile.mkdtemp()) / "zippers", n_train=240, n_test=1, seed=0, progress=False)
    config = make_config([f"data={root}", "train.minutes=0"])
    dataset, split, dls = make_dls(config)
    bf16 = pick_precision("auto", torch.device("cpu")) == "bf16"
    set_seed(0)
    learn = ae_learner(dls, config)
    learn.remove_cbs([c for c in learn.cbs if c.name in ("early_stopping", "progress")])
    learn.create_opt()

    bare, criterion = Restorer(config.model).to(memory_format=torch.channels_last), RestorationLoss(
        {k: getattr(config.loss, k) for k in ("mse", "l1", "ssim", "msgms")}, config.loss.focal)
    groups = decay_groups(bare)
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], 2e-3)
    pictures, corruption, augment = dataset.batch(split.train), Corruption(), Augment()

    def bare_round(damage_time):
        bare.train()
        start = time.perf_counter()
        for _ in range(steps):
            clean = augment(pictures[torch.randint(len(pictures), (config.train.bs,))])
            before = time.perf_counter()
            damaged = corruption(clean)
            damage_time.append(time.perf_counter() - before)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                restored = bare(damaged.image)
            loss = criterion(type(restored)(restored.image.float(), restored.logit.float()), clean, damaged.mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()
        return steps * config.train.bs / (time.perf_counter() - start)

    def learner_round():
        images = 0
        start = time.perf_counter()
        learn.epoch, learn.n_epoch, learn.training = 0, 1, True
        learn.model.train()
        learn.dl = learn.dls.train
        learn("before_train")
        while images < steps * config.train.bs:
            for i, b in enumerate(learn.dls.train):
                learn.one_batch(i, b)
                images += config.train.bs
                if images >= steps * config.train.bs:
                    break
        return images / (time.perf_counter() - start)

    def fit_seconds(watched):
        c = make_config([f"data={root}", "train.minutes=0", "train.epochs=2"])
        folder = Path(tempfile.mkdtemp()) if watched else None
        short = ae_learner(dls, c, folder)
        with short.no_bar(), short.no_logging():
            start = time.perf_counter()
            short.fit_run(c)
        return time.perf_counter() - start

    assert any(isinstance(c, AutocastCallback) for c in learn.cbs) == bf16
    assert isinstance(learn.metrics[0].func if hasattr(learn.metrics[0], "func") else learn.metrics[0], DamageAUPRC)
    learn.n_epoch, learn.n_iter, learn.epoch, learn.iter = 1, len(dls.train), 0, 0
    learn.opt.set_hyper("wd", [0.01, 0.0])
    learn("before_fit")
    rates, damage_time = [], []
    bare_round([]), learner_round()  # warm-up
    for _ in range(rounds):
        rates.append((learner_round(), bare_round(damage_time)))
    fit_seconds(True)  # warm-up
    watched = [fit_seconds(False) / fit_seconds(True) for _ in range(rounds)]
    bare_rate = statistics.median(b for _, b in rates)
    facts = {
        "command": "python tools/bench_training.py",
        "data": "rendered zippers, 256 x 256, batch 8, preset quick, " + ("bf16" if bf16 else "fp32"),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": rounds, "steps_a_round": steps,
        "learner_images_per_s": round(statistics.median(a for a, _ in rates), 2), "bare_images_per_s": round(bare_rate, 2),
        "ratio_median": round(statistics.median(a / b for a, b in rates), 3), "ratios": [round(a / b, 3) for a, b in rates],
        "with_tensorboard_ratio_median": round(statistics.median(watched), 3), "with_tensorboard_ratios": [round(w, 3) for w in watched],
        "damage_share_of_bare_step": round(statistics.median(damage_time) * bare_rate / config.train.bs, 3),
    }
    print(json.dumps(facts, indent=1))
    if out:
        Path(out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
