"""The certificate must flag each planted bug, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invguide.adapters.operators import as_operator
from invguide.errors import InputError
from invguide.forward_operator import LinearOperator, Operator
from invguide.operators import GaussianBlur, Identity

SHAPE = (1, 9, 12)


class Planted(Operator):
    """A nonlinear operator that is fine, for bugs to be planted in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + x**2


class WrongAdjoint(GaussianBlur):
    def adjoint(self, y: Tensor) -> Tensor:
        return 1.001 * super().adjoint(y)


class OtherShape(GaussianBlur):
    def adjoint(self, y: Tensor) -> Tensor:
        return super().adjoint(y)[..., 1:]


class Coupled(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return x**2 / x.abs().max()


class Random(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return x**2 + 1e-3 * torch.randn_like(x)


class Detached(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class InPlace(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().mul_(0.5) ** 2 + 0 * x


class NotFinite(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 0.5)


class InfiniteSlope(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x - x.detach()) + x**2


class Batchless(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


class OneByOne(Planted):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(SHAPE)[None] ** 2


class Affine(LinearOperator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def adjoint(self, y: Tensor) -> Tensor:
        return y


class Broken(Planted):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("no luck")


def failures(operator: Operator) -> set[str]:
    certificate = operator.check(SHAPE, quiet=True)
    failed = {row.name for row in certificate.rows if row.verdict == "FAILS"}
    assert certificate.ok == (not failed)
    assert ("NOT fit" in str(certificate)) == bool(failed)
    return failed


@pytest.mark.parametrize("operator", [Planted(), Identity(), GaussianBlur(1)])
def test_good_operators_pass(operator: Operator):
    assert failures(operator) == set()


@pytest.mark.parametrize(
    ("operator", "row"),
    [
        (WrongAdjoint(1), "adjoint"),
        (OtherShape(1), "adjoint"),
        (Coupled(), "rows independent"),
        (OneByOne(), "rows independent"),
        (Random(), "deterministic"),
        (Detached(), "differentiable"),
        (InfiniteSlope(), "differentiable"),
        (InPlace(), "input unchanged"),
        (NotFinite(), "finite"),
        (Batchless(), "runs"),
        (Affine(), "linear"),
        (Broken(), "runs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Operator) else value,
)
def test_planted_bug_is_flagged(operator: Operator, row: str):
    assert row in failures(operator)


def test_scale_does_not_hide_a_wrong_adjoint():
    matrix = 1e-6 * torch.randn(40, 30, dtype=torch.float64)
    right = as_operator(lambda x: x @ matrix.T.to(x), adjoint=lambda y: y @ matrix.to(y))
    wrong = as_operator(lambda x: x @ matrix.T.to(x), adjoint=lambda y: -y @ matrix.to(y))
    assert right.check((30,), quiet=True)["adjoint"].verdict == "ok"
    assert wrong.check((30,), quiet=True)["adjoint"].verdict == "FAILS"


def test_complex_linear_operator():
    fourier = as_operator(
        lambda x: torch.fft.fft2(x, norm="ortho"),
        adjoint=lambda y: torch.fft.ifft2(y, norm="ortho").real,
    )
    certificate = fourier.check(SHAPE, quiet=True)
    assert certificate.ok, str(certificate)


def test_notes_are_not_failures():
    single = as_operator(lambda x: torch.tanh(x.float()).to(x))
    certificate = single.check(SHAPE, quiet=True)
    assert certificate.ok
    assert certificate["precision"].verdict == "note"
    assert "not declared" in as_operator(lambda x: 2 * x).check(SHAPE, quiet=True)["linear"].value
    box = as_operator(lambda x: np.sort(x, -1)).check(SHAPE, quiet=True)
    assert box.ok
    assert "does not reach x" in box["differentiable"].value


def test_check_prints_and_takes_signals(capsys: pytest.CaptureFixture[str]):
    certificate = GaussianBlur(1).check(x=torch.rand(1, *SHAPE))
    assert capsys.readouterr().out.strip() == str(certificate)
    assert "fit for use" in str(certificate)
    with pytest.raises(InputError, match="either shape"):
        GaussianBlur(1).check()
    with pytest.raises(KeyError, match="adjoint"):
        certificate["adjiont"]


def test_check_leaves_the_operator_and_generators_alone():
    torch.manual_seed(4)
    expected = torch.rand(())
    torch.manual_seed(4)
    first: Any = Planted().check(SHAPE, quiet=True)
    assert torch.rand(()) == expected
    assert [r[:2] for r in first.rows[:-1]] == [
        r[:2] for r in Planted().check(SHAPE, quiet=True).rows[:-1]
    ]


# ---- rows that depend on others, and time


class Sloppy(LinearOperator):
    """Scales by 2; its adjoint by `back`, and every call advances the clock by `seconds`."""

    def __init__(self, back: float, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.back, self.clock, self.seconds = back, clock, seconds
        self.weights = torch.logspace(0, -6, 64, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds
        return 2 * x * self.weights.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.back * y * self.weights.to(y)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("invguide.diagnostics.operator.time.perf_counter", lambda: now[0])
    return now


def test_rows_that_depend_on_a_failed_one_are_not_examined(clock: list[float]):
    certificate = Sloppy(1.0, clock, 0.0).check((64,), quiet=True)
    assert not certificate.ok
    assert certificate["adjoint"].verdict == "FAILS"
    for name in ("svd", "solve", "pinv"):
        assert certificate[name].verdict == "note"
        assert certificate[name].value == "not examined: 'adjoint' fails"
    good = Sloppy(2.0, clock, 0.0).check((64,), quiet=True)
    assert "not examined" not in str(good)


@pytest.mark.parametrize(
    ("seconds", "left_out", "why"),
    [
        (0.1, {"pinv"}, r"a check takes at most 10 s, and \d+ iterations of conjugate gradients"),
        (3.0, {"linear", "solve", "pinv"}, r"at most 10 s, and a call takes 3 s"),
    ],
)
def test_a_check_takes_ten_seconds_or_says_what_it_left_out(
    clock: list[float], seconds: float, left_out: set[str], why: str
):
    certificate = Sloppy(2.0, clock, seconds).check((64,), quiet=True)
    assert certificate.ok
    late = {row.name for row in certificate.rows if "not examined" in row.value}
    assert left_out <= late
    assert all(re.search(why, certificate[name].value) for name in left_out)
    assert clock[0] < 10 + 2 * seconds
