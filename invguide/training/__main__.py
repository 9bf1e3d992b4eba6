"""`python -m invguide.training natural --data photos.zip --out runs/natural`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from invguide.priors.checkpoints.embedded import read_unet
from invguide.priors.networks.unet import UNet
from invguide.training.card import model_card
from invguide.training.photos import Crops, centre_crops, load_photos, split_photos, to_unit
from invguide.training.trainer import TrainingConfig, train

WIDTHS = {"natural": (64, 96, 160), "natural-tiny": (32, 48, 80)}
MINUTES = {"natural": 150.0, "natural-tiny": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m invguide.training", description=__doc__)
    parser.add_argument("name", choices=sorted(WIDTHS), help="which embedded prior to train")
    parser.add_argument(
        "--data", required=True, type=Path, help="zip archive or folder of training photos"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the run; an interrupted run there is resumed"
    )
    parser.add_argument("--minutes", type=float, help="time budget, summed over resumed runs")
    parser.add_argument(
        "--evaluate", type=Path, help=".npz with uint8 images img_64 (N, 64, 64, 3), only reported"
    )
    parser.add_argument("--start", type=Path, help="weights file of an earlier run to start from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-compile", action="store_true", help="for machines without a C++ compiler"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    training, held_out = split_photos(load_photos(args.data))
    validation = {"held-out": centre_crops(held_out, 64)}
    if args.evaluate:
        validation["evaluate"] = to_unit(torch.from_numpy(np.load(args.evaluate)["img_64"]))
    out = args.out or Path("runs") / args.name
    record = train(
        read_unet(args.start)[0] if args.start else UNet(channels=WIDTHS[args.name]),
        Crops(training),
        validation,
        TrainingConfig(minutes=args.minutes or MINUTES[args.name], seed=args.seed),
        out,
        device=args.device,
        compile_network=not args.no_compile,
    )
    gpu = args.device.startswith("cuda")
    hardware = (
        torch.cuda.get_device_name()
        if gpu
        else f"{os.cpu_count()} cores of a {platform.machine()} CPU"
    )
    command = " ".join(["python -m invguide.training", *sys.argv[1:]])
    card = model_card(
        args.name, record, out / "weights.safetensors", command=command, hardware=hardware
    )
    (out / "card.md").write_text(card)
    print(json.dumps(record["validation_psnr"], indent=2))


if __name__ == "__main__":
    main()
