"""What nobody sees changes nothing: colours under alpha 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invguide.images.reading import Picture, read_picture
from invguide.images.transparency import visible, without_hidden_colours
from invguide.images.writing import encode_png
from invguide.restoration.demo import PHOTO
from tiny import run

QUICK = ("--prior", "natural-tiny", "--steps", "2", "--quiet")


def cutout(hidden: object, channels: int = 4) -> np.ndarray:
    """The cat in a frame of alpha 0 that holds these colours, with a soft rim, (40, 48, channels)."""
    cat = np.asarray(Image.open(PHOTO).convert("RGB").crop((40, 40, 136, 120)).resize((48, 40)))
    alpha = np.zeros((40, 48), np.uint8)
    alpha[6:-6, 8:-8] = 128
    alpha[7:-7, 9:-9] = 255
    array = np.dstack([cat, alpha])
    array[alpha == 0, :3] = np.broadcast_to(hidden, (40, 48, 3))[alpha == 0]
    return array if channels == 4 else array[..., [1, 3]]


NOISE = np.random.default_rng(0).integers(0, 255, (40, 48, 3))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize(
    "task", ["denoise", "deblur", "super-resolution --factor 2", "inpaint --mask MASK"]
)
def test_hidden_colours_change_nothing(tmp_path: Path, task: str, channels: int):
    known = np.ones((40, 48), bool)
    known[15:22, 4:20] = False
    Image.fromarray(known).save(tmp_path / "mask.png")
    words = task.replace("MASK", str(tmp_path / "mask.png")).split()
    for name, hidden in (("black", 0), ("white", 255), ("noise", NOISE)):
        path = tmp_path / f"{name}.png"
        path.write_bytes(encode_png(cutout(hidden, channels)))
        run("restore", path, "--task", *words, *QUICK, "--out", tmp_path / name)
    written = [(tmp_path / n / "restored.png").read_bytes() for n in ("black", "white", "noise")]
    assert written[0] == written[1] == written[2]


def test_nor_do_they_when_a_picture_is_degraded(tmp_path: Path):
    for name, hidden in (("black", 0), ("noise", NOISE)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(cutout(hidden)))
        run(
            "degrade",
            tmp_path / f"{name}.png",
            "--task",
            "deblur",
            "--out",
            tmp_path / f"{name}-y.png",
        )
    assert (tmp_path / "black-y.png").read_bytes() == (tmp_path / "noise-y.png").read_bytes()


def test_what_is_put_there():
    """A plane is continued from its middle: its values stay within those of the rim, and alpha stays."""
    ramp = torch.linspace(0.2, 0.8, 48).expand(1, 3, 40, 48)
    alpha = np.zeros((40, 48), np.uint8)
    alpha[10:30, 12:36] = 7
    shown = torch.from_numpy(alpha > 0)
    broken = torch.where(shown, ramp, 5.0)
    clean = without_hidden_colours(Picture(broken, alpha))
    assert clean.alpha is alpha
    assert torch.equal(clean.values[..., shown], ramp[..., shown])
    assert float(clean.values.min()) > float(ramp[..., 12].min()) - 1e-3
    assert float(clean.values.max()) < float(ramp[..., 35].max()) + 1e-3
    for other in (None, np.full((40, 48), 1, np.uint8), np.zeros((40, 48), np.uint8)):
        picture = Picture(broken, other)
        assert visible(picture) is None
        assert without_hidden_colours(picture) is picture


def test_grey_is_what_is_seen(tmp_path: Path):
    """Colours that are hidden do not make a grey picture colourful."""
    array = cutout((250, 3, 90))
    seen = array[..., 3] > 0
    array[seen, :3] = array[seen, :1]
    (tmp_path / "x.png").write_bytes(encode_png(array))
    picture = read_picture(tmp_path / "x.png")
    assert picture.describe() == "48 x 40 pixels, grey as R = G = B with alpha, 8 bit"
