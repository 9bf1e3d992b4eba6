"""Physics of deepinv: all classes of it, stacks, parameters for each row, wrong adjoints, noise models."""

from __future__ import annotations

import copy
import sys
import warnings
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide.adapters.deepinv_noise import noise_law
from invguide.adapters.operators import as_operator
from invguide.bench.physics import (
    ABSENT,
    REFUSED,
    WORKS,
    dense_step,
    examples,
    physics_classes,
    try_physics,
)
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator
from invguide.likelihood import Likelihood
from invguide.noise import Gaussian
from invguide.problem.problem import Problem
from invguide.problem.proximal import proximal

physics = pytest.importorskip("deepinv.physics", reason="deepinv is not installed")
PRIOR = ig.priors.Gaussian(torch.full((1, 8, 8), 0.5), 0.04 * torch.eye(64))
QUIET: dict[str, Any] = {"progress": False, "seed": 0}


def signals(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- all classes

# What no adapter can mend: an x that is a list of three things.
REFUSALS = {"Haze": "cannot take a tensor"}


def test_every_class_has_an_example():
    here, known = set(physics_classes()), set(examples())
    assert not here - known, "add the new class to bench/physics.py"
    older = tuple(map(int, metadata.version("deepinv").split(".")[:2])) < (0, 5)
    assert older or not known - here


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(examples()) if physics else [])
def test_each_class_is_solved_or_refused(name: str):
    outcome = try_physics(name)
    if outcome.verdict == ABSENT:
        pytest.skip(outcome.why)
    if name in REFUSALS:
        assert outcome.verdict == REFUSED
        assert REFUSALS[name] in outcome.why
        return
    assert outcome.verdict == WORKS, outcome.why
    if outcome.step == outcome.step:  # of linear ones
        # Conjugate gradients end at a residual of 1e-6; the worst system here has a condition of 1e4.
        assert outcome.step < 1e-2
        assert outcome.error < 1e-4
        assert outcome.chi2 < 1.2


def test_a_class_without_example_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch):
    # the function of that name hides the module
    monkeypatch.setattr(sys.modules["invguide.bench.physics"], "examples", dict)
    assert try_physics("Blur").verdict == ABSENT


def test_the_oracle_notices_a_wrong_operator():
    class Louder(physics.Blur):
        def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
            return 1.01 * super().A_adjoint(y, **kwargs)

    model = Louder(signals(1, 1, 3, 3) / 5)
    operator: Any = as_operator(model)
    y = operator(signals(1, 1, 8, 8))
    with pytest.warns(UserWarning, match=r"A_adjoint of Louder is not the adjoint"):
        step = proximal(Likelihood(operator, y, 0.02), torch.zeros(1, 1, 8, 8), 1.0)
    exact = dense_step(model, torch.zeros(1, 1, 8, 8), y, torch.tensor(0.02), 1.0)
    assert (step - exact).norm() < 1e-4 * exact.norm(), "automatic differentiation mends it"


# ---- wrong adjoints


def test_the_wrong_adjoint_of_deepinv_is_replaced():
    operator: Any = as_operator(physics.CompressiveSpectralImaging((3, 8, 8)))
    with pytest.warns(UserWarning, match=r"CompressiveSpectralImaging is not the adjoint of A"):
        back = operator.adjoint(signals(2, 1, 8, 8))
    with torch.enable_grad():
        x = torch.zeros(2, 3, 8, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(operator(x), x, signals(2, 1, 8, 8))
    assert torch.allclose(back, expected, atol=1e-6)
    assert operator.check((3, 8, 8), quiet=True).ok


def test_an_adjoint_without_gradient_is_refused():
    model = physics.LinearPhysics(A=lambda x: x.detach() ** 2, A_adjoint=lambda y: y)
    with pytest.raises(InputError, match=r"A_adjoint of LinearPhysics is not the adjoint"):
        as_operator(model).adjoint(signals(1, 1, 4, 4))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["real", "complex"])
def test_callables_with_wrong_adjoints_are_refused(dtype: torch.dtype, part: str):
    kind = dtype if part == "real" else dtype.to_complex()
    matrix = torch.randn(50, 40, generator=torch.Generator().manual_seed(1), dtype=kind)
    right = lambda y: (y @ matrix.conj()).real  # noqa: E731
    good: Any = as_operator(lambda x: x.to(kind) @ matrix.T, adjoint=right)
    y = good(signals(2, 40).to(dtype))
    assert torch.equal(good.adjoint(y), right(y))
    wrong = {
        "1 %": lambda y: 1.01 * right(y),
        "shifted": lambda y: right(y.roll(1, 1)),
        "sign": lambda y: -right(y),
    }
    if part == "complex":
        wrong["not conjugate"] = lambda y: (y @ matrix).real
    for adjoint in wrong.values():
        operator: Any = as_operator(lambda x: x.to(kind) @ matrix.T, adjoint=adjoint)
        with pytest.raises(InputError, match=r"adjoint= is not the adjoint of"):
            operator.adjoint(y)
    short: Any = as_operator(
        lambda x: x.to(kind) @ matrix.T, adjoint=lambda y: right(y)[:, 1:], shape=(40,)
    )
    with pytest.raises(ShapeError, match=r"maps \(50,\) to \(39,\); expected \(40,\)"):
        short.adjoint(y)


def test_what_is_not_linear_is_noticed():
    operator: Any = as_operator(lambda x: 2 * x + 1, linear=True, shape=(4,))
    with pytest.raises(InputError, match=r"not linear is .*leave linear=True out"):
        operator.adjoint(signals(1, 4))


def test_a_class_of_the_user_with_a_wrong_adjoint_is_refused_before_the_run():
    class Half(LinearOperator):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

        def adjoint(self, y: Tensor) -> Tensor:
            return y

    with pytest.raises(InputError, match=r"Half\.adjoint is not the adjoint of forward"):
        ig.solve(signals(1, 1, 8, 8), Half(), PRIOR, sigma_y=0.1, **QUIET)


# ---- stacks


def stack() -> Any:
    return physics.stack(
        physics.Denoising(physics.GaussianNoise(0.1)),
        physics.Downsampling((1, 8, 8), filter="bicubic", noise_model=physics.GaussianNoise(0.01)),
        physics.MRI(torch.eye(8) + 0.0, (1, 8, 8), noise_model=physics.GaussianNoise(0.05)),
    )


def two() -> Any:
    return physics.stack(*list(stack().physics_list)[:2])


def test_a_stack_takes_its_tensor_list_and_noise():
    model = two()
    torch.manual_seed(0)
    y = model(signals(2, 1, 8, 8))
    result = ig.solve(y, model, PRIOR, solver="HQS", num_samples=1, **QUIET)
    assert result.samples.shape == (2, 1, 1, 8, 8)
    operator: Any = as_operator(model)
    flat = operator.join(y)
    assert flat.shape == (2, 64 + 16)
    likelihood = Likelihood(operator, flat, operator.noise)
    assert isinstance(likelihood.noise, Gaussian)
    sigma = likelihood.noise.sigma_y
    assert torch.allclose(sigma[:, :64], torch.tensor(0.1))
    assert torch.allclose(sigma[:, 64:], torch.tensor(0.01))
    step = proximal(likelihood, torch.zeros(2, 1, 8, 8), 1.0)
    exact = dense_step(model, torch.zeros(2, 1, 8, 8), flat, sigma, 1.0)
    assert (step - exact).norm() < 1e-4 * exact.norm()
    assert operator.check((1, 8, 8), quiet=True).ok
    y = operator(signals(1, 1, 8, 8))
    assert torch.equal(copy.deepcopy(operator)(signals(1, 1, 8, 8)), y)


def test_parts_of_a_stack_that_do_not_fit_are_named():
    operator: Any = as_operator(two())
    with pytest.raises(InputError, match="y has 1 parts for 2 physics"):
        operator.join([signals(1, 1, 8, 8)])
    with pytest.raises(InputError, match="pass y as the TensorList"):
        Likelihood(operator, signals(1, 9), operator.noise)
    mixed: Any = as_operator(
        physics.stack(
            physics.Denoising(physics.GaussianNoise(0.1)),
            physics.Denoising(physics.SaltPepperNoise()),
        )
    )
    with pytest.raises(InputError, match="SaltPepperNoise replaces values"):
        ig.solve(mixed(signals(1, 1, 8, 8)), mixed, PRIOR, **QUIET)
    assert ig.solve(mixed(signals(1, 1, 8, 8)), mixed, PRIOR, sigma_y=0.1, **QUIET)


# ---- one set of parameters for each measurement


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masks", "filters", "half spectra"])
def test_each_measurement_has_its_own_parameters(name: str):
    kernels = signals(3, 1, 3, 3, seed=1) / 4
    make = {
        "masks": lambda i: physics.Inpainting(
            (1, 8, 8), mask=(signals(3, 1, 8, 8, seed=2) > 0.4).float()[i]
        ),
        "filters": lambda i: physics.Blur(kernels[i], padding="circular"),
        "half spectra": lambda i: physics.BlurFFT((1, 8, 8), filter=kernels[i]),
    }[name]
    together, x = make(slice(None)), signals(3, 1, 8, 8)
    y = together.A(x)
    likelihood = Likelihood(
        as_operator(together), y, torch.tensor([0.1, 0.02, 0.05])[:, None, None, None]
    )
    likelihood.operator(x)  # as the check before a run does
    index = torch.tensor([2, 0, 0, 1])
    part = likelihood.rows(index)
    assert torch.allclose(part.residual(x[index]), torch.zeros_like(x[index]), atol=1e-5)
    step = proximal(part, torch.zeros(4, 1, 8, 8), 1.0)
    for row, i in zip(step, index.tolist(), strict=True):
        one = make(slice(i, i + 1))
        sigma = torch.tensor([0.1, 0.02, 0.05])[i]
        exact = dense_step(one, torch.zeros(1, 1, 8, 8), y[i : i + 1], sigma, 1.0)
        assert (row - exact[0]).norm() < 1e-3 * exact.norm()


@pytest.mark.slow
def test_samples_of_several_measurements_keep_to_their_parameters():
    masks = (signals(3, 1, 8, 8, seed=2) > 0.4).float()
    model = physics.Inpainting((1, 8, 8), mask=masks, noise_model=physics.GaussianNoise(0.02))
    y = model.A(signals(3, 1, 8, 8))
    for solver in ("HQS", "DPS", "TweedieMatheron"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # HQS draws one answer twice
            result = ig.solve(y, model, PRIOR, solver=solver, num_samples=2, **QUIET)
        seen = masks[:, None] > 0
        error = ((result.samples - y[:, None]) * seen).abs().amax((2, 3, 4))
        assert (error < 0.12).all(), solver  # six sigma_y; x itself spreads by 0.2


def test_a_physics_that_mixes_rows_is_asked_row_by_row():
    operator = as_operator(physics.SinglePhotonLidar(bins=9))
    assert operator.check((3, 6, 6), quiet=True)["rows independent"].verdict == "ok"


# ---- noise models


def slope_of(law: Any, predicted: Tensor, y: Tensor) -> Tensor:
    predicted = predicted.clone().requires_grad_()
    return torch.autograd.grad(law.log_density(predicted, y).sum(), predicted)[0]


def test_densities_are_those_of_torch_distributions():
    from torch.distributions import Gamma, Poisson

    a, b = 0.2 + signals(2, 1, 4, 4).double(), 0.2 + signals(2, 1, 4, 4, seed=1).double()
    shape, photons, mu = 3.0, 200.0, 0.4
    counts = torch.tensor([180.0, 150.0]).double().reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    y = 0.3 + signals(2, 1, 4, 4, seed=2).double()
    cases = {
        "Gamma": (
            physics.GammaNoise(shape),
            y,
            lambda x: Gamma(shape, shape / x).log_prob(y),
        ),
        "Fisher-Tippett": (
            physics.FisherTippettNoise(shape),
            y,
            # of y = log z, z as above with mean exp(x)
            lambda x: Gamma(shape, shape / x.exp()).log_prob(y.exp()) + y,
        ),
        "log Poisson": (
            physics.LogPoissonNoise(photons, mu),
            -(counts / photons).log() / mu,
            lambda x: Poisson(photons * (-mu * x).exp()).log_prob(counts),
        ),
    }
    for name, (model, measured, density) in cases.items():
        law: Any = noise_law(model)
        law = law.bind(measured)
        ours = law.log_density(a, measured) - law.log_density(b, measured)
        expected = (density(a) - density(b)).flatten(1).sum(1)
        assert torch.allclose(ours, expected, rtol=1e-5), name
        # bounded above, and pointing back, wherever a solver goes
        far = torch.tensor([-50.0, 50.0]).double().reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
        assert (law.log_density(far, measured) < law.log_density(a, measured)).all(), name
        back = slope_of(law, far, measured)
        assert torch.isfinite(back).all(), name
        assert (back[0] > 0).all(), name


NOISES = {
    "Gaussian": lambda: physics.GaussianNoise(0.1),
    "Poisson": lambda: physics.PoissonNoise(0.05),
    "counts": lambda: physics.PoissonNoise(0.05, normalize=False),
    "Poisson-Gaussian": lambda: physics.PoissonGaussianNoise(0.05, 0.1),
    "Laplace": lambda: physics.LaplaceNoise(0.1),
    "uniform": lambda: physics.UniformNoise(0.2),
    "Rician": lambda: physics.RicianNoise(0.1),
    "Gamma": lambda: physics.GammaNoise(50.0),
    "Fisher-Tippett": lambda: physics.FisherTippettNoise(5.0),
    "log Poisson": lambda: physics.LogPoissonNoise(400.0, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISES)
def test_noise_of_deepinv_agrees_with_its_law(name: str):
    torch.manual_seed(0)
    x = 0.2 + signals(1, 1, 64, 64)
    y = NOISES[name]()(x)
    operator: Any = as_operator(physics.Denoising(NOISES[name]()))
    # The mean of 4096 independent squares, whose deviation is 0.022 for normal ones and three times that at most here;
    # log Poisson is one only to first order, 1 / counts.
    assert Likelihood(operator, y, operator.noise).chi2(x).item() == pytest.approx(1, abs=0.1)


def test_one_parameter_for_each_measurement():
    model = physics.GaussianNoise(torch.tensor([0.1, 0.2]))
    compressed: Any = as_operator(physics.CompressedSensing(5, (1, 8, 8), noise_model=model))
    law = compressed.noise.bind(signals(2, 5))
    assert law.sigma_y.flatten().tolist() == pytest.approx([0.1, 0.2])
    with pytest.raises(InputError, match="2 parameters for 3 measurements"):
        compressed.noise.bind(signals(3, 5))
    gamma: Any = noise_law(physics.GammaNoise(torch.tensor([1.0, 9.0])))
    y = signals(2, 1, 4, 4) + 0.1
    counts: Any = noise_law(physics.PoissonNoise(torch.tensor([0.1, 0.4])))
    assert counts.bind(y).gain.flatten().tolist() == pytest.approx([0.1, 0.4])
    sigma = gamma.bind(y).rows(torch.tensor([1, 1])).sigma(torch.ones_like(y), y)
    assert torch.allclose(sigma, torch.tensor(1 / 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: physics.SaltPepperNoise(), "SaltPepperNoise replaces values"),
        (lambda: physics.UniformGaussianNoise(), "UniformGaussianNoise draws a noise level"),
        (lambda: physics.NoiseModel(lambda x: x), "NoiseModel is a function of your own"),
    ],
)
def test_what_cannot_be_evaluated_is_named(model: Any, message: str):
    denoising = physics.Denoising(model())
    y = signals(1, 1, 8, 8)
    with pytest.raises(InputError, match=message):
        ig.solve(y, denoising, PRIOR, **QUIET)
    assert ig.solve(y, denoising, PRIOR, sigma_y=0.1, **QUIET)


def test_all_noise_models_have_a_law_or_a_reason():
    kinds = [
        kind
        for kind in vars(physics).values()
        if isinstance(kind, type) and issubclass(kind, physics.NoiseModel)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        law = noise_law(kind(lambda x: x) if kind is physics.NoiseModel else kind())
        if law is None:
            assert kind is physics.ZeroNoise
        elif type(law).__name__ == "Unknown":
            with pytest.raises(InputError, match=rf"{kind.__name__}.*pass sigma_y"):
                law.bind(signals(1, 4))


def test_a_sensor_model_is_refused():
    model = physics.Physics(A=lambda x: x, sensor_model=lambda y: y.clamp(0, 1))
    with pytest.raises(InputError, match="sensor_model, which acts after the noise"):
        as_operator(model)


# ---- small ones are written down


def test_small_tomography_needs_no_iterations(monkeypatch: pytest.MonkeyPatch):
    def never(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("conjugate gradients")

    model = physics.Tomography(20, 16, normalize=True, noise_model=physics.GaussianNoise(0.02))
    y = model(signals(1, 1, 16, 16))
    monkeypatch.setattr("invguide.numerics.linear.conjugate_gradient", never)
    likelihood = Likelihood(as_operator(model), y, 0.02)
    problem = Problem(
        ig.priors.Gaussian(torch.full((1, 16, 16), 0.5), 0.04 * torch.eye(256)), likelihood
    )
    for level in (10.0, 1.0, 0.01):
        step = problem.prox(torch.full((1, 1, 16, 16), 0.5), level)
        exact = dense_step(model, torch.full((1, 1, 16, 16), 0.5), y, torch.tensor(0.02), level**2)
        # in single precision, with a condition of 1e6 at the highest level
        assert (step - exact).norm() < 1e-2 * (exact - 0.5).norm()
