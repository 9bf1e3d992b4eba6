"""Every physics of deepinv that can be built without a download: does it go through `solve`, and to which answer."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.adapters.operators import as_operator
from invguide.api import solve
from invguide.errors import InputError, InvguideError, require, suggest
from invguide.forward_operator import LinearOperator
from invguide.likelihood import Likelihood
from invguide.priors import Gaussian
from invguide.problem.proximal import proximal
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

PLAIN, COLOUR, PAIRS, LARGE = (1, 8, 8), (3, 8, 8), (2, 8, 8), (1, 16, 16)
MEAN, STD, SIGMA_Y = 0.5, 0.2, 0.02
WORKS, REFUSED, ABSENT = "works", "refused", "not built"


class Example(NamedTuple):
    """How to build a physics, and the shape of one of its signals."""

    build: Callable[[], Any]
    shape: tuple[int, ...]


class Outcome(NamedTuple):
    """What became of one class."""

    verdict: str
    why: str = ""
    solver: str = ""
    seconds: float = float("nan")  # of CPU time, in solve
    iterations: float = float("nan")  # of conjugate gradients, in all
    error: float = float("nan")  # of the answer against dense algebra, relative
    step: float = float("nan")  # of a data step against dense algebra, relative
    chi2: float = float("nan")


def physics_classes() -> list[str]:
    """Return the names of all classes of physics in `deepinv.physics`."""
    from deepinv import physics

    found = vars(physics).items()
    return sorted(n for n, c in found if inspect.isclass(c) and issubclass(c, physics.Physics))


# Longer than 60 lines: one entry for each class of deepinv.
def examples() -> dict[str, Example]:
    """Return a small one of each class that is known here, by the name of the class."""
    from deepinv import physics as deepinv_physics
    from deepinv.physics.scattering import circular_sensors
    from deepinv.transform import Shift

    p: Any = deepinv_physics  # whose annotations are narrower than what it takes
    g = torch.Generator().manual_seed(2)
    kernel = torch.rand(1, 1, 3, 3, generator=g)
    kernel = kernel / kernel.sum()
    kernels = torch.rand(1, 1, 9, 3, 3, generator=g) / 9
    lines = (torch.rand(8, 8, generator=g) > 0.4).float()
    frames = (torch.rand(1, 2, 3, 8, 8, generator=g) > 0.5).float()
    coils = torch.randn(1, 3, 8, 8, generator=g, dtype=torch.complex64)
    weights = torch.rand(1, 1, 2, 8, 8, generator=g)
    elements = torch.stack([torch.linspace(-0.01, 0.01, 6), torch.zeros(6)], 1)

    def blur(shape: tuple[int, ...] = PLAIN) -> Any:
        return p.BlurFFT(shape, filter=kernel)

    def square(**options: Any) -> Any:
        return p.Physics(A=lambda x: x**2, **options)

    def scattering() -> Any:
        transmitters, receivers = circular_sensors(4, 1.0)
        return p.Scattering(16, receivers, transmitters, background_wavenumber=5.0)

    def noisy(physics: Any, sigma: float) -> Any:
        physics.set_noise_model(p.GaussianNoise(sigma))
        return physics

    return {
        "Blur": Example(lambda: p.Blur(kernel), PLAIN),
        "BlurFFT": Example(blur, PLAIN),
        "BlurFFTMultiScaler": Example(lambda: p.BlurFFTMultiScaler(blur(LARGE), LARGE), LARGE),
        "BlurMultiScaler": Example(
            lambda: p.BlurMultiScaler(p.Blur(kernel, padding="circular"), LARGE), LARGE
        ),
        "ComposedLinearPhysics": Example(
            lambda: p.ComposedLinearPhysics(blur(), p.Downsampling(PLAIN, filter="bicubic")), PLAIN
        ),
        "ComposedPhysics": Example(lambda: p.ComposedPhysics(blur(), square()), PLAIN),
        "CompressedSensing": Example(lambda: p.CompressedSensing(20, PLAIN, rng=g), PLAIN),
        "CompressiveSpectralImaging": Example(
            lambda: p.CompressiveSpectralImaging(COLOUR, rng=g), COLOUR
        ),
        "Decolorize": Example(p.Decolorize, COLOUR),
        "DecomposablePhysics": Example(
            lambda: p.DecomposablePhysics(mask=weights[:, :, 0], img_size=PLAIN), PLAIN
        ),
        "Demosaicing": Example(lambda: p.Demosaicing(COLOUR), COLOUR),
        "Denoising": Example(p.Denoising, PLAIN),
        "Downsampling": Example(lambda: p.Downsampling(PLAIN, filter="bicubic"), PLAIN),
        "DownsamplingMatlab": Example(lambda: p.DownsamplingMatlab(2), LARGE),
        "DynamicMRI": Example(lambda: p.DynamicMRI(frames, (2, 3, 8, 8)), (2, 3, 8, 8)),
        "Haze": Example(p.Haze, COLOUR),
        "HyperSpectralUnmixing": Example(lambda: p.HyperSpectralUnmixing(E=3, C=6), COLOUR),
        "Inpainting": Example(lambda: p.Inpainting(PLAIN, mask=0.5, rng=g), PLAIN),
        "InpaintingMultiScaler": Example(
            lambda: p.InpaintingMultiScaler(p.Inpainting(LARGE, mask=0.5, rng=g), LARGE), LARGE
        ),
        "LinearPhysics": Example(
            lambda: p.LinearPhysics(A=lambda x: x[..., ::2], img_size=PLAIN), PLAIN
        ),
        "LinearPhysicsMultiScaler": Example(
            lambda: p.LinearPhysicsMultiScaler(blur(LARGE), LARGE), LARGE
        ),
        "MRI": Example(lambda: p.MRI(lines, PAIRS), PAIRS),
        "MultiCoilMRI": Example(lambda: p.MultiCoilMRI(lines, coils, (8, 8)), PAIRS),
        "NonCartesianMRI": Example(lambda: p.NonCartesianMRI((8, 8)), PAIRS),
        "PET": Example(lambda: p.PET((8, 8)), PLAIN),
        "Pansharpen": Example(
            lambda: p.Pansharpen(
                COLOUR,
                factor=2,
                noise_color=p.GaussianNoise(0.02),
                noise_gray=p.GaussianNoise(0.05),
            ),
            COLOUR,
        ),
        "PhaseRetrieval": Example(
            lambda: p.PhaseRetrieval(
                p.CompressedSensing(100, PLAIN, dtype=torch.complex64, rng=g)
            ),
            PLAIN,
        ),
        "Physics": Example(square, PLAIN),
        "PhysicsCropper": Example(lambda: p.PhysicsCropper(blur(), (2, 2)), (1, 10, 10)),
        "PhysicsMultiScaler": Example(lambda: p.PhysicsMultiScaler(square(), LARGE), LARGE),
        "Ptychography": Example(lambda: p.Ptychography(LARGE), LARGE),
        "PtychographyLinearOperator": Example(lambda: p.PtychographyLinearOperator(PLAIN), PLAIN),
        "RadioInterferometry": Example(
            lambda: p.RadioInterferometry((8, 8), 2 * torch.rand(2, 40, generator=g) - 1), PLAIN
        ),
        "RandomPhaseRetrieval": Example(lambda: p.RandomPhaseRetrieval(200, PLAIN, rng=g), PLAIN),
        "Scattering": Example(scattering, LARGE),
        "SequentialMRI": Example(lambda: p.SequentialMRI(frames, PAIRS), PAIRS),
        "SinglePhotonLidar": Example(lambda: p.SinglePhotonLidar(bins=9), (3, 6, 6)),
        "SinglePixelCamera": Example(lambda: p.SinglePixelCamera(20, PLAIN, rng=g), PLAIN),
        "SpaceVaryingBlur": Example(
            lambda: p.SpaceVaryingBlur(kernels[:, :, :2], weights, padding="circular"), PLAIN
        ),
        "SpatialUnwrapping": Example(p.SpatialUnwrapping, PLAIN),
        "StackedLinearPhysics": Example(
            lambda: p.StackedLinearPhysics(
                [noisy(p.Denoising(), 0.1), noisy(p.Downsampling(PLAIN, filter="bicubic"), 0.01)]
            ),
            PLAIN,
        ),
        "StackedPhysics": Example(
            lambda: p.StackedPhysics([noisy(p.Denoising(), 0.1), noisy(square(), 0.02)]), PLAIN
        ),
        "StructuredRandom": Example(lambda: p.StructuredRandom(PLAIN, PLAIN, rng=g), PLAIN),
        "StructuredRandomPhaseRetrieval": Example(
            lambda: p.StructuredRandomPhaseRetrieval(PLAIN, LARGE, n_layers=2), PLAIN
        ),
        "TiledSpaceVaryingBlur": Example(
            lambda: p.TiledSpaceVaryingBlur(kernels, patch_size=8, stride=4), LARGE
        ),
        "Tomography": Example(lambda: p.Tomography(20, 16, normalize=True), LARGE),
        "TomographyWithAstra": Example(lambda: p.TomographyWithAstra((8, 8), 9), PLAIN),
        "UltrasoundPlaneWave": Example(
            lambda: p.UltrasoundPlaneWave((8, 8), [0.0], elements, 32, 1e6), PLAIN
        ),
        "Upsampling": Example(lambda: p.Upsampling(PLAIN, filter="bicubic"), (1, 4, 4)),
        "VirtualLinearPhysics": Example(
            lambda: p.VirtualLinearPhysics(
                physics=blur(),
                transform=Shift(),
                g_params={"x_shift": torch.tensor([2]), "y_shift": torch.tensor([1])},
            ),
            PLAIN,
        ),
    }


def physics(
    *,
    classes: Sequence[str] | None = None,
    solver: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """Send a small physics of each class of deepinv through `solve`, with a white Gaussian prior.

    Args:
        classes: Names, as in `deepinv.physics`; None: all.
        solver: As for `solve`.
        seed: Of signals, noise and solver.
        progress: Show a bar.

    Returns:
        Of each class: whether it works, or why not; the solver, its CPU time and iterations of conjugate gradients
        inside; for linear ones, how far the answer and a data step are off the exact ones, by dense algebra on the
        physics itself; chi2.

    Raises:
        InputError: No such class.
        MissingPackageError: deepinv is not installed.
    """
    require("deepinv", "invguide bench physics")
    names = list(classes or physics_classes())
    known = physics_classes()
    for name in names:
        if name not in known:
            raise InputError(f"deepinv.physics has no class {name!r}; {suggest(name, known)}")
    found: dict[str, Outcome] = {}
    with progress_bar(len(names), "physics of deepinv", progress) as bar:
        for name in names:
            found[name] = try_physics(name, seed, solver)
            bar.update(1)
    rows = tuple((name, *_cells(outcome)) for name, outcome in found.items())
    head = ("class", "", "solver", "CPU s", "inner", "error", "data step", "chi2", "why not")
    note = (
        f"Signals of 8 or 16 pixels a side, N({MEAN}, {STD}^2) each above 0.01, measured with the noise of the physics "
        f"or sigma_y = {SIGMA_Y}. Error: of the answer to the posterior mean, by dense algebra on the matrix of A, "
        f"relative to its distance from the prior's mean; only ExactPosterior claims to give that. Data step: the same "
        f"of one at variance 1."
    )
    return Table(head, rows, (note,), {name: o._asdict() for name, o in found.items()})


def _cells(outcome: Outcome) -> tuple[str, ...]:
    numbers = (outcome.seconds, outcome.iterations, outcome.error, outcome.step, outcome.chi2)
    cells = [
        "" if value != value else form.format(value)
        for form, value in zip(
            ("{:.2f}", "{:.0f}", "{:.1e}", "{:.1e}", "{:.2f}"), numbers, strict=True
        )
    ]
    return (outcome.verdict, outcome.solver, *cells, outcome.why)


def try_physics(name: str, seed: int = 0, solver: str = "auto") -> Outcome:
    """Build the example of one class, measure a signal with it, and solve."""
    example = examples().get(name)
    if example is None:
        return Outcome(ABSENT, "no example is known here")
    torch.manual_seed(seed)  # of classes that draw their masks with the global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = example.build()
        except Exception as error:
            return Outcome(ABSENT, _first_line(error))
        x = MEAN + STD * torch.randn(
            2, *example.shape, generator=torch.Generator().manual_seed(seed)
        )
        x = x.clamp_min(0.01)  # counts of photons need it
        try:
            return _solved(model, x, seed, solver)
        except InvguideError as error:
            return Outcome(REFUSED, _first_line(error))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, InvguideError) else f"{type(error).__name__}: "
    return kind + text[0]


def _measured(model: Any, operator: Any, x: Tensor, seed: int) -> Tensor:
    """A x with the noise of the physics, drawn by it row by row, or Gaussian noise of SIGMA_Y where it has none."""
    if getattr(operator, "noise", None) is not None:
        rows = [model(row[None]) for row in x]
        return torch.cat([y if isinstance(y, Tensor) else operator.join(y) for y in rows])
    y = operator(x)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=y.dtype)
    return y + SIGMA_Y * noise * (
        2**0.5 if y.is_complex() else 1
    )  # torch's complex normals have a variance of 1


def _solved(model: Any, x: Tensor, seed: int, solver: str) -> Outcome:
    operator: Any = as_operator(model)
    operator(x)
    y = _measured(model, operator, x, seed)
    law = getattr(operator, "noise", None) or SIGMA_Y
    sigma = torch.as_tensor(getattr(Likelihood(operator, y, law).noise, "sigma_y", SIGMA_Y))
    d = x[0].numel()
    prior = Gaussian(torch.full(x.shape[1:], MEAN), STD**2 * torch.eye(d))
    law_options: dict[str, Any] = {} if getattr(operator, "noise", None) else {"sigma_y": SIGMA_Y}
    start = time.process_time()
    result = solve(y, operator, prior, solver=solver, seed=seed, progress=False, **law_options)
    seconds = time.process_time() - start
    error = step = float("nan")
    if isinstance(operator, LinearOperator):
        centre = torch.full_like(x, MEAN)
        likelihood = Likelihood(operator, y, law)
        exact = dense_step(model, centre, y, sigma, STD**2)
        error = _relative(result.mean - exact, exact - centre)
        exact = dense_step(model, centre, y, sigma, 1.0)
        step = _relative(proximal(likelihood, centre, 1.0) - exact, exact - centre)
    taken = result.manifest["settings"]["solver"]
    iterations = result.manifest.get("inner_solves", {}).get("iterations", 0)
    return Outcome(WORKS, "", taken, seconds, iterations, error, step, float(result.chi2.mean()))


def _relative(difference: Tensor, size: Tensor) -> float:
    return (difference.norm() / size.norm()).item()


def dense_step(model: Any, centre: Tensor, y: Tensor, sigma: Tensor, variance: float) -> Tensor:
    """Return E[x | y] of x ~ N(centre, variance), by dense algebra on the matrix of `model.A` in double precision."""
    n = centre[0].numel()
    unit = torch.eye(n).reshape(n, *centre.shape[1:])
    matrix = torch.cat([_numbers(model.A(row[None])) for row in unit]).T.double()
    pairs = 2 if y.is_complex() else 1
    std = sigma.expand(y.shape).flatten(1).repeat_interleave(pairs, 1).double()
    answers: list[Tensor] = []
    for row, centre_row, s in zip(
        _numbers(y).double(), centre.flatten(1).double(), std, strict=True
    ):
        a = matrix / s[:, None]
        residual = row / s - a @ centre_row
        gain = torch.linalg.solve(a.T @ a + torch.eye(n) / variance, a.T @ residual)
        answers.append(centre_row + gain)
    return torch.stack(answers).reshape(centre.shape).to(centre)


def _numbers(y: Any) -> Tensor:
    """A measurement, or a list of them, as real numbers (B, m)."""
    if not isinstance(y, Tensor):
        return torch.cat([_numbers(part) for part in y], 1)
    return (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y).flatten(1)
