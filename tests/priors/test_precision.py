"""Half precision is taken where a trial finds it faster and as good, and an interrupted run goes on in its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from invguide.engine.checkpoint import saved_identity
from invguide.errors import InputError, RunError
from invguide.prior import Prior
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.precision import LOSS, try_half
from invguide.restoration import precision as trying
from invguide.restoration.manifest import CHECKPOINT, MANIFEST
from invguide.restoration.restore import restore_picture
from invguide.restoration.settings import Job, Settings


class Timed(nn.Module):
    """A denoiser whose calls take as long as they are told, by precision, on a clock of its own."""

    def __init__(self, single: float, half: float, error: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.single, self.halved, self.error = single, half, error
        self.now, self.calls = 0.0, 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        in_half = torch.is_autocast_enabled("cpu")
        self.now += self.halved if in_half else self.single
        self.calls += 1
        smooth = nn.functional.avg_pool2d(x, 3, 1, 1)
        return smooth + self.error * torch.sign(x) if in_half else smooth


def prior_of(net: nn.Module) -> NetworkPrior:
    return from_network(net, predicts="x0", schedule="ve")


@pytest.mark.parametrize(
    ("single", "half", "error", "dtype"),
    [
        (1.0, 0.5, 0.0, "bf16"),
        (1.0, 0.5, 0.1, "fp32"),  # another picture
        (1.0, 0.5, float("nan"), "fp32"),
        (1.0, 0.9, 0.0, "fp32"),  # too little to be sure
        (1.0, 8.0, 0.0, "fp32"),
    ],
)
def test_what_is_faster_and_as_good_is_taken(
    single: float, half: float, error: float, dtype: str
) -> None:
    net = Timed(single, half, error)
    prior = prior_of(net)
    trial = try_half(prior, clock=lambda: net.now)
    assert trial is not None
    assert trial.dtype == dtype
    assert trial.speed_up == pytest.approx(single / half)
    assert (trial.loss <= LOSS) == (error == 0)
    assert prior.precision == "fp32"  # as it was
    calls = net.calls
    assert try_half(prior, clock=lambda: net.now) is trial
    assert net.calls == calls  # once per process
    assert prior.optimise("auto").precision == dtype
    if half > single:
        assert calls <= 4  # hopeless after a pair


def test_the_loss_is_that_of_denoised_photographs() -> None:
    """An error of e beside a residual r changes the PSNR by 10 log10(1 + e^2 / r^2)."""
    net = Timed(1.0, 0.5, 0.02)
    prior = prior_of(net)
    trial = try_half(prior, clock=lambda: net.now)
    assert trial is not None
    from invguide.priors.known_images import known_images

    clean = prior.to_normalised(known_images(prior.shape)[:1])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    x = clean + 0.05 / prior.scale * noise  # where the residual is least
    residual = float((nn.functional.avg_pool2d(x, 3, 1, 1) - clean).square().mean())
    assert trial.loss == pytest.approx(10 * np.log10(1 + 0.02**2 / residual), rel=1e-3)


def test_what_cannot_be_tried_stays_in_single_precision() -> None:
    function = from_network(lambda x, t: x, predicts="x0", schedule="ve")
    assert try_half(function) is None
    points = from_network(Timed(1, 0.5), predicts="x0", schedule="ve", shape=(2,))
    assert try_half(points) is None
    assert points.optimise("auto").precision == "fp32"


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="unknown --precision 'half'"):
        Job.prepare(Settings("denoise", precision="half"), print)


def test_runs_record_their_precision_and_go_on_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    settings = Settings(
        "deblur",
        sigma_y=0.1,
        prior="natural-tiny",
        solver="HQS",
        solver_settings={"num_steps": 12},
    )
    monkeypatch.setattr(trying, "TRIAL_WORK", 1)

    def job(fastest: str) -> Job:
        return Job.prepare(settings, lambda _: None, False, fastest=fastest)

    def interrupt(self: Prior, *args: object, **kwargs: object) -> Tensor:
        interrupt.calls += 1  # pyright: ignore[reportFunctionMemberAccess]
        if interrupt.calls > 11:  # pyright: ignore[reportFunctionMemberAccess]
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    interrupt.calls = 0  # pyright: ignore[reportFunctionMemberAccess]
    real = NetworkPrior.denoise
    with monkeypatch.context() as patch:
        patch.setattr(NetworkPrior, "denoise", interrupt)
        with pytest.raises(RunError, match="interrupted"):
            restore_picture(job("bf16"), tmp_path / "a.png", tmp_path / "out", resume=False)
    assert saved_identity(tmp_path / "out" / CHECKPOINT)["precision"] == "bf16"
    # Today's trial says otherwise: the run goes on as it began.
    resumed = restore_picture(job("fp32"), tmp_path / "a.png", tmp_path / "out", resume=True)
    whole = restore_picture(job("bf16"), tmp_path / "a.png", tmp_path / "whole", resume=False)
    assert resumed is not None
    assert whole is not None
    assert torch.equal(resumed.samples, whole.samples)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["precision"] == "bf16"
    assert manifest["restore"]["precision"] == "auto"
    fresh = restore_picture(job("fp32"), tmp_path / "a.png", tmp_path / "fresh", resume=False)
    assert fresh is not None
    assert not torch.equal(fresh.samples, whole.samples)


def test_short_runs_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(trying, "try_half", lambda *_: pytest.fail("tried"))
    settings = Settings(
        "deblur", sigma_y=0.1, prior="natural-tiny", solver="HQS", solver_settings={"num_steps": 2}
    )
    job = Job.prepare(settings, lambda _: None, False)
    restore_picture(job, tmp_path / "a.png", tmp_path / "out", resume=False)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["precision"] == "fp32"
