"""Which maps, alone and fused, find the faults of labelled pictures: the figures behind `score.map=auto`.

    python tools/compare_maps.py RUN LABELLED [OUT.json]

RUN is a trained run; LABELLED a folder in MVTec's layout that is used for this choice and for nothing else. The default was
chosen on rendered zippers of a seed that no test set has:

    zipper_ad data render out=design n_train=2 n_test=20 n_good=60 seed=1000
    zipper_ad demo
    python tools/compare_maps.py runs/demo design results/maps-rendered-design.json
"""

import sys
from pathlib import Path

from results import refit
from zipper_ad.cli import write_json

CHOICES = ["damage", "l1", "l2", "ssim", "msgms", "damage+ssim", "damage+msgms", "damage+ssim+msgms", "ssim+msgms"]


def main(run, labelled, out=None):
    rows = {}
    for maps in CHOICES:
        for sigma in (2.0, 4.0):
            for pool in ("max",):
                detector = refit(Path(run), {"map": maps, "sigma": sigma, "pool": pool})
                metrics, *_ = detector.evaluate(labelled, n_bootstrap=0)
                name, image, pixel = f"{maps} sigma={sigma:g} pool={pool}", metrics["image"], metrics["pixel"]
                row = {"image_auroc": image["auroc"], "pixel_auroc": pixel["auroc"], "aupro": pixel["aupro"]}
                rows[name] = {k: round(v, 4) for k, v in row.items()}
                print(f"{name:40s}", rows[name], flush=True)
    if out:
        facts = {"made_by": "python tools/compare_maps.py RUN LABELLED", "n": metrics["n"], "data_fingerprint": metrics["data_fingerprint"]}
        write_json(facts | {"rows": rows}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
