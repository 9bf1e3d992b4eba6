"""Shared by all tests: few threads, fixed seeds, and a CUDA device only where there is one."""

from __future__ import annotations

import os
import random
from typing import Any

# One thread per worker: two workers with two threads each are slower than one, and child processes inherit this.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Where somebody sets more threads after all: none waits by spinning, and no test is told so by a warning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what runs use that name no device, and tests of devices: CUDA where there is one, or one of them only",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is asked for anything
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here; use cpu or auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device`: the CPU, and the CUDA device too where there is one; of `--device` only that."""
    if "device" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--device")
        devices = [] if wanted == "cuda" else [torch.device("cpu")]
        if wanted != "cpu" and torch.cuda.is_available():
            devices.append(pytest.param(torch.device("cuda"), marks=pytest.mark.gpu))  # pyright: ignore[reportArgumentType]
        metafunc.parametrize("device", devices, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Tests may draw from the global generators; the package itself may not."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_decision_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What load_prior checks, and whether `restore` takes half precision, follow from what a call costs here."""
    monkeypatch.setattr("invguide.priors.doctor.examine.QUICK", float("inf"))
    monkeypatch.setattr("invguide.restoration.precision.try_half", lambda *_: None)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights denoise nothing; what load_prior makes of that is in test_doctor.py."""
    monkeypatch.setattr("invguide.priors.doctor.examine.check_loaded", lambda *_: None)


@pytest.fixture(scope="session")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")
