"""How a result shows itself: one line at a prompt, a panel in a notebook."""

from __future__ import annotations

import io
import re
from base64 import b64decode

import torch
from PIL import Image

import invguide as ig
from invguide.operators import GaussianBlur
from invguide.result import Result


def test_one_line() -> None:
    prior = ig.priors.Gaussian(torch.zeros(2), torch.eye(2))
    result = ig.solve(
        torch.ones(1, 2),
        lambda x: x,
        prior,
        sigma_y=0.5,
        solver="dps",
        num_samples=3,
        progress=False,
    )
    chi2 = f"{float(result.chi2.mean()):.2f}"
    assert repr(result) == f"Result(1 x 3 samples of (2,), DPS, chi2 {chi2}, 100 calls)"
    assert result._repr_html_().startswith("<code>Result(1 x 3 samples")  # no picture
    lost = Result(
        torch.full((1, 2, 4), float("nan")), torch.full((1, 2), float("nan")), torch.zeros(1, 2),
        [["ok", "dropped: <b>"]], 7.0, 1.0, {},
    )  # fmt: skip
    assert (
        repr(lost) == "Result(1 x 2 samples of (4,), unknown solver, 1 of them missing, 7 calls)"
    )


def test_notebooks_see_the_panel() -> None:
    photo = ig.example_photo()
    assert photo.shape == (1, 3, 192, 192)
    assert 0 <= float(photo.min()) < float(photo.max()) <= 1
    operator = GaussianBlur(sigma=1.0)
    y = operator(photo[..., :32, :32])
    result = ig.solve(
        y,
        operator,
        "natural-tiny",
        sigma_y=0.05,
        solver=ig.solvers.HQS(num_steps=2),
        progress=False,
    )
    html = result._repr_html_()
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found
    panel = Image.open(io.BytesIO(b64decode(found.group(1))))
    assert panel.width > 600
    assert "HQS" in html
