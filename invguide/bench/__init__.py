"""Tables of quality, calibration and speed, against peers where they are installed."""

from invguide.bench.adjoint import adjoint
from invguide.bench.against_deepinv import peers
from invguide.bench.angles import guidance
from invguide.bench.bad_calls import bad_calls
from invguide.bench.calls import blackbox
from invguide.bench.commands import tasks
from invguide.bench.denoising import denoise
from invguide.bench.entry_checks import entry_checks
from invguide.bench.jpeg_files import jpeg
from invguide.bench.mixtures import mixtures
from invguide.bench.noise_levels import noise
from invguide.bench.overhead import driver
from invguide.bench.photon_counts import photons
from invguide.bench.physics import physics
from invguide.bench.restoration import restore
from invguide.bench.speed import priors
from invguide.bench.steps import steps
from invguide.bench.tv import restore_tv
from invguide.bench.uncertainty import calibration

__all__ = [
    "adjoint",
    "bad_calls",
    "blackbox",
    "calibration",
    "denoise",
    "driver",
    "entry_checks",
    "guidance",
    "jpeg",
    "mixtures",
    "noise",
    "peers",
    "photons",
    "physics",
    "priors",
    "restore",
    "restore_tv",
    "steps",
    "tasks",
]
