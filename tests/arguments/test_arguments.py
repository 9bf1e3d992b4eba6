"""What people type: it works as it is meant, or one clear line says why not, before the first network call."""

from __future__ import annotations

import contextvars
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import invguide as ig
from invguide.api import make_solver
from invguide.arguments import entries
from invguide.arguments.rules import Count, Number
from invguide.bench.bad_methods import method_targets
from invguide.errors import ArgumentError, InputError, ShapeError
from invguide.forward_operator import LinearOperator
from invguide.operators import GaussianBlur, Grayscale, Identity, Inpainting
from invguide.solver import Requires, Solver
from invguide.solvers import DPS, HQS, SCG, EnKG

# The function of the same name hides the module in its package.
misuse = importlib.import_module("invguide.bench.bad_calls")
SHAPE = (3, 8, 8)
PRIOR = ig.priors.GaussianField(SHAPE, scale=0.2, shift=0.5).float()
Y = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
PROBLEM = ig.Problem(PRIOR, ig.Likelihood(Identity(), Y, 0.1))
QUICK = {"progress": False, "sigma_y": 0.1, "solver": DPS(num_steps=2)}


def samples(y: Any, operator: Any = None, prior: Any = PRIOR, **more: Any) -> Tensor:
    operator = Identity() if operator is None else operator
    return ig.solve(y, operator, prior, **{**QUICK, **more}).samples


# ---- arrays: the same numbers give the same samples, whatever holds them


@pytest.mark.parametrize(
    "spelled",
    [
        lambda y: y.astype(">f4"),
        lambda y: y[..., ::-1].copy()[..., ::-1],  # negative strides
        lambda y: np.asfortranarray(y),
        lambda y: np.ma.masked_array(y, mask=False),
        lambda y: y.astype(np.float32).tolist(),
        lambda y: np.broadcast_to(y, y.shape),  # not writeable
        lambda y: y.astype(np.longdouble),
        lambda y: torch.as_tensor(y).requires_grad_(),
    ],
)
def test_arrays_of_any_layout(spelled: Callable[[np.ndarray], Any]):
    torch.testing.assert_close(samples(spelled(Y.numpy())), samples(Y), rtol=0, atol=0)


def test_a_masked_array_is_obeyed():
    known = Y.numpy() <= 0.5
    masked = np.ma.masked_array(np.where(known, Y, 7.0).astype(">f4"), mask=~known)
    assert torch.equal(samples(masked), samples(Y, mask=known))


def test_a_picture_of_pil_is_a_measurement_in_zero_to_one():
    pixels = (255 * Y[0]).byte().movedim(0, -1).numpy()
    wanted = samples(torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255)
    torch.testing.assert_close(samples(Image.fromarray(pixels)), wanted, rtol=0, atol=1e-6)
    grey = Image.fromarray(pixels[..., 0])
    with pytest.raises(ShapeError, match=r"y is grey .* take ig\.priors\.Grey\(prior\)"):
        samples(grey)
    mask = Image.fromarray(255 * np.eye(8, dtype=np.uint8))
    assert torch.equal(Inpainting(mask).mask[0], torch.eye(8).bool())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("y", "text"),
    [
        ((255 * Y).byte(), r"whole numbers up to 25\d, .*images are in \[0, 1\]: pass y / 255"),
        ((65535 * Y).numpy().astype("u2"), r"whole numbers up to 6\d+, .*pass y / 255"),
        (Y[0], r"y lacks its batch axis: pass y\[None\]"),
        (Y.movedim(1, -1), r"channels come first: pass np\.moveaxis\(y, -1, 1\)"),
        (Y[0].movedim(0, -1), r"channels come first, .* pass np\.moveaxis\(y, -1, 0\)\[None\]"),
        (Y[:, :1], r"take ig\.priors\.Grey\(prior\)"),
        ("photo.png", "read the file first, such as numpy.asarray"),
        ("0.05", "a number, without quotes"),
        (np.array(["a"]), "expected numbers, not values of the type <U1"),
        (Y.to_sparse(), "expected a dense tensor"),
        (None, "y is None; expected a tensor or array"),
        (Y.to(torch.complex64), "Identity returns real values, and y is complex"),
    ],
)
def test_arrays_that_are_refused_with_the_fix(y: Any, text: str):
    prior = ig.load_prior("natural-tiny")
    blur = GaussianBlur(1.0) if isinstance(y, Tensor) and not y.is_complex() else Identity()
    y = y.expand(1, 3, 8, 8).repeat(1, 1, 4, 4) if _is_small(y) else y
    with pytest.raises(InputError, match=text):
        samples(y, blur, prior)


def _is_small(y: Any) -> bool:
    plain = isinstance(y, Tensor) and not y.is_sparse
    return plain and y.dtype != torch.uint8 and y.shape == Y.shape


def test_counts_are_whole_numbers():
    counts = torch.full((1, *SHAPE), 3)
    assert ig.Likelihood(Identity(), counts, ig.noise.Poisson(1.0)).y.dtype == torch.float32
    assert ig.Likelihood(Identity(), counts > 0, 0.1).y.unique() == 1


# ---- every argument, before the first network call


class Counted(ig.Prior):
    """Fails when it is asked."""

    shape, sigma_min, sigma_max, sigma_data = SHAPE, 0.01, 10.0, 1.0

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"truth": Y[0]}, r"truth has shape \(3, 8, 8\); expected .* \(1, 3, 8, 8\)"),
        ({"truth": np.ma.masked_greater(Y.numpy(), 0.5)}, r"\d+ of its values are masked"),
        ({"truth": math.nan * Y}, "truth has NaN or infinite values"),
        ({"truth": "x.png"}, "truth is 'x.png'; expected its numbers: read the file"),
        ({"num_samples": "2"}, "solve: num_samples is '2'; expected a whole number of at least 1"),
        ({"num_samples": 10**9}, "expected at most 10,000,000"),
        ({"seed": "1"}, "solve: seed is '1'; expected a whole number"),
        ({"seed": 0.5}, "seed is 0.5; expected a whole number"),
        ({"dtype": "float31"}, "dtype is 'float31'; expected a floating-point type"),
        ({"dtype": torch.int64}, "expected a floating-point type"),
        ({"shape": (3, -8, 8)}, r"shape is \(3, -8, 8\); expected a tuple"),
        ({"batch_size": "automatic"}, "batch_size is 'automatic'; did you mean 'auto'"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; expected a whole number of at least 1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'; choose one of"),
        ({"callbacks": print}, "callbacks is a builtin_function_or_method; expected a tuple"),
        ({"progress": "no"}, "progress is 'no'; expected True or False"),
        ({"solver": 3}, "the solver is 3; expected a solver such as"),
        (
            {"noise": ig.noise.Poisson, "sigma_y": None},
            "the class Poisson; pass an instance, Poisson",
        ),
        ({"device": 3}, "device is 3; expected"),
        ({"condition": {"label": "cat"}}, "condition 'label' is 'cat'; expected numbers"),
        ({"num_sample": 3}, r"solve has no argument 'num_sample'; did you mean 'num_samples'"),
        ({"sigmay": 3}, "solve has no argument 'sigmay'; did you mean 'sigma_y'"),
        ({"sed": 3}, "solve has no argument 'sed'; did you mean 'seed'"),
    ],
)
def test_arguments_of_solve(more: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        samples(Y, prior=Counted(), **more)


def test_what_is_meant_is_taken():
    plain = samples(Y, seed=3, num_samples=2, dtype=torch.float64)
    same = {"seed": np.int64(3), "num_samples": np.float32(2), "dtype": "float64"}
    assert torch.equal(
        samples(Y, **same, sigma_y=np.float32(0.1), progress=np.bool_(False)), plain
    )
    assert torch.equal(samples(Y, seed=torch.tensor(3), num_samples=2, dtype=np.float64), plain)
    assert DPS(num_steps=np.int64(7), guidance_scale=np.float32(2)) == DPS(7, 2.0)  # pyright: ignore[reportArgumentType]
    assert SCG(blocks=[1, 2], window=[0, 1]) == SCG(blocks=(1, 2), window=(0.0, 1.0))  # pyright: ignore[reportArgumentType]
    wanted = ig.solve(Y, Identity(), PRIOR, sigma_y=0.1, solver=HQS(), progress=False)
    by_class = ig.solve(Y, Identity(), PRIOR, sigma_y=0.1, solver=HQS, progress=False)
    assert torch.equal(by_class.samples, wanted.samples)
    assert ig.__version__.count(".") == 2


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, 1.5, "50", None, True, 10**12])
def test_steps_that_cannot_be(bad: Any):
    import invguide.solvers

    for name in invguide.solvers.__all__:
        with pytest.raises(InputError, match=r"num_steps is .*; expected"):
            Solver.registry[name](num_steps=bad)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GaussianBlur(1e9), "sigma is 1000000000.0; expected a number of pixels .* 1000"),
        (lambda: ig.priors.Gaussian([0.0], [[1.0]], scale=0), "scale is 0; .* other than 0"),
        (lambda: ig.priors.GaussianField((3, -8, 8)), r"shape is \(3, -8, 8\); expected"),
        (lambda: ig.as_operator(lambda x: x, adjoint=3), "adjoint is 3; expected a callable"),
        (lambda: DPS(guidence_scale=2), "DPS has no argument 'guidence_scale'; did you mean"),
        (lambda: DPS(schedule=(1.0, 2.0, 0.0)), "strictly decreasing levels that end in 0"),
        (lambda: EnKG(window=(0.5, 0.5)), "0 <= start < end <= 1"),
        (lambda: Grayscale((1, math.nan)), "each a finite number"),
        (
            lambda: ig.Operator(),  # pyright: ignore[reportAbstractUsage]
            "Operator is abstract; expected a subclass that has forward",
        ),
        (lambda: make_solver("dsp"), "unknown solver 'dsp'; did you mean 'DPS'"),
    ],
)
def test_constructors(make: Callable[[], Any], text: str):
    with pytest.raises(InputError, match=text):
        make()


def test_a_wrong_call_is_a_type_error_too():
    with pytest.raises(TypeError, match="missing a required argument: 'sigma'"):
        GaussianBlur()
    with pytest.raises(ArgumentError, match="load_prior: missing a required argument: 'where'"):
        ig.load_prior()


def test_a_complex_operator_needs_complex_numbers():
    class Fourier(LinearOperator):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x)

        def adjoint(self, y: Tensor) -> Tensor:
            return torch.fft.ifft2(y, norm="forward").real

    with pytest.raises(InputError, match="Fourier returns complex values, and y is real"):
        samples(Y, Fourier())


# ---- classes of others


def test_a_solver_of_the_same_name_does_not_replace_ours():
    ours = Solver.registry["DPS"]

    type("DPS", (ours,), {"requires": Requires(), "__module__": "somebody"})
    assert Solver.registry["DPS"] is ours
    assert type(make_solver("dps")) is ours
    for _ in range(2):  # a cell of a notebook that is run again
        mine = type("Mine", (ours,), {"requires": Requires(), "__module__": "somebody"})
        assert Solver.registry.pop("Mine") is mine


def test_only_rules_of_ours_bind_classes_of_others():
    class Plain(ig.Operator):
        def __init__(
            self, size: int, rate: Annotated[float, Number(0, 1)] = 0.5, n: Count = 3
        ) -> None:
            super().__init__()
            self.size, self.rate, self.n = size, rate, n

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert Plain("large").size == "large"
    assert Plain(1, n=np.int64(4)).n == 4
    with pytest.raises(InputError, match="Plain: rate is 2; expected a number from 0 to 1"):
        Plain(1, rate=2)


# ---- generated calls: `invguide bench bad-calls` makes many more


def test_generated_calls_are_refused_in_words_or_make_sense():
    tally = misuse.bad_calls(300, seed=1)
    assert sum(sum(c.values()) for c in tally.counts.values()) == 300
    assert not tally.faults, "\n".join(tally.faults)


@pytest.mark.slow
def test_generated_calls_of_methods_are_refused_in_words_or_make_sense():
    found = method_targets()
    assert {"operators.Blur.adjoint", "priors.Padded.eps", "noise.Rician.log_density"} <= {
        t.name for t in found
    }
    assert {"rewards.Motion.__call__", "Problem.levels", "Likelihood.residual"} <= {
        t.name for t in found
    }
    tally = misuse.bad_calls(900, seed=1, where=found)
    assert not tally.faults, "\n".join(tally.faults)


@pytest.mark.slow
def test_the_generator_sees_faults_of_methods(monkeypatch: pytest.MonkeyPatch):
    """Without the checks, raw errors and numbers that are others than for a tensor come out."""
    monkeypatch.setattr(entries, "_INSIDE", contextvars.ContextVar("always", default=True))
    kinds = {f.split(":")[0] for f in misuse.bad_calls(900, 1, where=method_targets()).faults}
    assert kinds == {"raw", "wrong"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GaussianBlur(1.0).forward("a"), r"GaussianBlur\.forward: x is 'a'"),
        (lambda: PRIOR.denoise(Y, -1.0), r"denoise: sigma is -1; expected numbers >= 0"),
        (lambda: PRIOR.eps(Y, 0.0), r"eps: sigma is 0; expected numbers > 0"),
        (lambda: PRIOR.eps(Y, torch.ones(3)), r"expected a number, or one per row \(1,\)"),
        (lambda: PRIOR.denoise(Y[0], 1.0), r"takes x of shape \(B, 3, 8, 8\), got \(3, 8, 8\)"),
        (lambda: Identity().adjoint((255 * Y).byte()), r"torch\.uint8 values; expected floating"),
        (lambda: Identity().solve(Y, 0), r"solve: ridge is 0; expected numbers > 0"),
        (lambda: ig.noise.Gaussian(0.1).bind(Y).log_density(Y[:, :1], Y), "same kind and shape"),
        (lambda: ig.Likelihood(Identity(), Y, 0.1).residual(Y[:, :1]), "measurement has shape"),
        (lambda: PROBLEM.levels("karras", 5, -1), r"levels: k is -1; expected"),
        (lambda: PROBLEM.levels("karras", 5, 5), r"k is 5; expected a step below num_steps = 5"),
        (
            lambda: PROBLEM.rows(torch.tensor([4])),
            r"Problem\.rows cannot take index = .*IndexError",
        ),
    ],
)
def test_methods(call: Callable[[], Any], text: str):
    with pytest.raises(InputError, match=text):
        call()


def test_methods_convert_what_is_plain():
    wanted = PRIOR.denoise(Y, 1.0)
    assert torch.equal(PRIOR.denoise(Y.numpy().astype(">f4"), np.float64(1.0)), wanted)
    assert torch.equal(PRIOR.denoise(Y, np.array([1.0])), wanted)


def test_errors_of_users_reach_them_through_methods():
    """As they are, also where code of ours lies between; and methods of users are as they wrote them."""

    class Mine(LinearOperator):
        def forward(self, x: Any) -> Any:
            if isinstance(x, str):
                return x
            raise RuntimeError("mine")

        def adjoint(self, y: Any) -> Any:
            raise RuntimeError("mine")

    assert Mine().forward("a") == "a"
    with pytest.raises(RuntimeError, match=r"^mine$") as caught:
        Mine().pinv(Y)
    assert not isinstance(caught.value, InputError)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        ig.operators.Composition(Identity(), Mine())(Y)


@pytest.mark.parametrize("target", misuse.targets(), ids=lambda target: target.name)
def test_every_public_callable_is_known_to_the_generator(target: Any):
    """A good call works, so that what is refused is refused for the wrong argument."""
    if target.name in ("priors.embed_text", "priors.read_weights"):
        pytest.skip("needs files")
    if target.name == "operators.Composition":
        return
    if target.name == "rewards.RAFT":
        pytest.importorskip("torchvision")
    assert not misuse.use(target.call(**target.good))


def test_the_generator_sees_faults(monkeypatch: pytest.MonkeyPatch):
    def careless(x: Any) -> Tensor:
        return torch.zeros(1) * x

    target = misuse.Target("careless", careless, {"x": 1.0})
    monkeypatch.setattr(misuse, "targets", lambda: [target])
    kinds = {fault.split(":")[0] for fault in misuse.bad_calls(60, seed=0).faults}
    assert kinds == {"raw", "wrong"}
    with pytest.raises(misuse.Impatient), misuse.patience(1):
        all(True for _ in itertools.count())
