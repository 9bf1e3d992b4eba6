"""The benches at toy size: the baseline against another algorithm, rows, resuming, and figures against known laws."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import invguide as ig
from invguide import bench, driver
from invguide.bench import against_deepinv, angles, restoration
from invguide.bench.noise_levels import noisy
from invguide.bench.protocol import TASKS, Cells, Protocol
from invguide.bench.tv import gradient, gradient_adjoint, lengths, objective, restore_tv
from invguide.bench.uncertainty import expected_coverage
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.noise import Poisson
from invguide.numerics.linear import inner
from invguide.operators import GaussianBlur, Identity, Inpainting, SuperResolution
from invguide.solvers import DPS, EKI, EnsembleTwisted, SymplecticAdjoint
from invguide.system.memory import peak_memory

SHAPE = (3, 16, 12)
OPERATORS = {
    "identity": Identity(),
    "blur": GaussianBlur(sigma=1.0),
    "super-resolution": SuperResolution(factor=2),
    "inpainting": Inpainting.random(SHAPE, 0.5),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four smooth pictures with an edge, 32 pixels."""
    generator = np.random.default_rng(0)
    grid = np.linspace(0, 1, 32)
    waves = [np.sin(generator.uniform(2, 8) * grid + c)[:, None] for c in range(12)]
    pictures = np.stack([w * np.cos(5 * grid) for w in waves]).reshape(4, 3, 32, 32)
    pictures = 0.5 + 0.3 * pictures
    pictures[..., 16:, 8:] *= 0.4
    path = tmp_path_factory.mktemp("bench") / "photos.npz"
    np.savez(path, img_32=(255 * pictures.transpose(0, 2, 3, 1)).astype(np.uint8))
    return path


# ---- total variation


def problem(name: str) -> tuple[torch.Tensor, Likelihood]:
    truth = torch.full((2, *SHAPE), 0.2, dtype=torch.float64)
    truth[:, :, 5:, 3:9] = torch.tensor([0.9, 0.5, 0.3]).reshape(3, 1, 1)
    operator = OPERATORS[name]
    clean = operator(truth)
    return truth, Likelihood(operator, clean + 0.05 * torch.randn_like(clean), 0.05)


def condat(
    likelihood: Likelihood, weight: float, coupled: bool, steps: int = 2500
) -> torch.Tensor:
    """Condat 2013: explicit gradient of the data term, dual ascent on the edges; shares no step with ADMM."""
    adjoint, variance = likelihood.operator.adjoint, 0.05**2  # type: ignore[attr-defined]
    sigma = 0.5 / variance / 8  # |gradient|^2 <= 8, |A| <= 1.1
    tau = 0.9 / (0.5 * 1.21 / variance + 8 * sigma)
    x = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    dual = torch.zeros_like(gradient(x))
    for _ in range(steps):
        old = x
        x = x - tau * (gradient_adjoint(dual) - adjoint(likelihood.residual(x)) / variance)
        dual = dual + sigma * gradient(2 * x - old)
        dual = dual / (lengths(dual, coupled) / weight).clamp_min(1)
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "coupled"),
    [("blur", True), ("blur", False), ("super-resolution", False), ("inpainting", True)],
)
def test_tv_reaches_the_optimum_of_another_algorithm(name: str, coupled: bool):
    _, likelihood = problem(name)
    settings = {"coupled": coupled, "max_iterations": 800, "tolerance": 1e-7}
    x = restore_tv(likelihood, 10.0, **settings)
    other = condat(likelihood, 10.0, coupled)
    mine, theirs = (objective(likelihood, z, 10.0, coupled) for z in (x, other))
    assert torch.allclose(mine, theirs, rtol=1e-5)
    assert (x - other).square().mean().sqrt() < 1e-3
    # The comparison sees a weight that is 5 % off, and the wrong coupling.
    wrong = restore_tv(likelihood, 10.5, **settings)
    assert (objective(likelihood, wrong, 10.0, coupled) > 1.00002 * theirs).all()
    wrong = restore_tv(likelihood, 10.0, **{**settings, "coupled": not coupled})
    assert (objective(likelihood, wrong, 10.0, coupled) > 1.00002 * theirs).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_tv_has_converged_at_its_default_tolerance(name: str):
    truth, likelihood = problem(name)
    short = restore_tv(likelihood, 10.0)
    long = restore_tv(likelihood, 10.0, max_iterations=2000, tolerance=1e-8)
    errors = [(x - truth).square().mean() for x in (short, long)]
    assert abs(10 * torch.log10(errors[0] / errors[1]).item()) < 0.02


def test_tv_gradient_and_its_adjoint():
    x, d = torch.randn(2, *SHAPE), torch.randn(2, 2, *SHAPE)
    assert torch.allclose(inner(gradient(x), d), inner(x, gradient_adjoint(d)), rtol=1e-4)
    assert gradient(x)[0, 0, 1, 3, 4] == x[0, 1, 4, 4] - x[0, 1, 3, 4]
    assert gradient(x)[0, 1, 1, 3, 4] == x[0, 1, 3, 5] - x[0, 1, 3, 4]


def test_tv_refuses_what_it_cannot_solve():
    with pytest.raises(InputError, match="Gaussian noise"):
        restore_tv(Likelihood(Identity(), torch.ones(1, *SHAPE), Poisson(0.1)), 1.0)


# ---- protocol


def test_measurements_depend_on_the_photo_alone(data: Path):
    few, many = (Protocol(data, size=32, photos=n) for n in (2, 4))
    for task in TASKS:
        assert torch.equal(few.likelihood(task, 1).y, many.likelihood(task, 1).y)
        likelihoods = [many.likelihood(task, i) for i in (0, 1)]
        noise = [x.residual(many.truth[i, None]) for i, x in enumerate(likelihoods)]
        assert not torch.allclose(*noise)
        for i, likelihood in enumerate(likelihoods):
            assert likelihood.chi2(many.truth[i, None]).item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": 48}, "no photos img_48"),
        ({"size": 32, "photos": 5}, "photos is 5; the data file has 4"),
        ({"data": Path("missing.npz")}, r"missing\.npz cannot be read"),
    ],
)
def test_protocol_refuses(data: Path, settings: dict, match: str):
    with pytest.raises(InputError, match=match):
        _ = Protocol(**{"data": data, **settings}).truth


def test_cells_keep_settings_apart(tmp_path: Path):
    photo = torch.rand(3, 4, 4)
    Cells(tmp_path, "DPS deblur", {"noise": 0.1}).put(photo, {"psnr": [1.0]})
    assert Cells(tmp_path, "DPS deblur", {"noise": 0.1}).get(photo) == {"psnr": [1.0]}
    assert Cells(tmp_path, "DPS deblur", {"noise": 0.2}).get(photo) is None
    assert Cells(tmp_path, "DPS deblur", {"noise": 0.1}).get(photo + 0.1) is None
    assert not list(tmp_path.glob("*.part"))


# ---- the tables


def toy(data: Path, **more: object) -> dict:
    common = {"size": 32, "photos": 2, "prior": "natural-tiny", "samples": 2, "progress": False}
    return {"data": data, **common, **more}


SOLVERS = ("auto", DPS(num_steps=3), "DiffPIR=1")


@pytest.mark.slow
def test_restore_table_and_resuming(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tasks = ("SR x2", "inpaint 70 %")
    table = bench.restore(**toy(data, solvers=SOLVERS, tasks=tasks, out=tmp_path))
    names = [row[0] for row in table.rows]
    auto = names[2].removeprefix("auto: ")
    assert names == [
        "degraded",
        "TV, best weight",
        f"auto: {auto}",
        "DPS",
        "DPS, mean of 2",
        "DiffPIR",
        "auto over TV",
    ]
    assert table.head[:4] == ("method", *tasks, "worse")
    figures = table.figures
    assert figures["DPS"]["SR x2"]["nfe"] == 3
    assert figures["DPS, mean of 2"]["SR x2"]["nfe"] == 6
    assert figures["DPS, mean of 2"]["SR x2"]["psnr"] > figures["DPS"]["SR x2"]["psnr"]
    gain = figures[names[2]]["SR x2"]["psnr"] - figures["TV, best weight"]["SR x2"]["psnr"]
    assert table.rows[-1][1] == f"{gain:+.2f}"
    assert str(table).count("\n| ") == 1 + len(names)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("ran again")

    # The same call, and one for fewer photos, take every figure from the folder.
    monkeypatch.setattr(restoration.driver, "run", refuse)
    monkeypatch.setattr(restoration, "restore_tv", refuse)
    again = bench.restore(**toy(data, solvers=SOLVERS, tasks=tasks, out=tmp_path))
    assert str(again) == str(table)
    with pytest.raises(AssertionError, match="ran again"):
        bench.restore(**toy(data, solvers=SOLVERS, tasks=tasks, out=tmp_path, noise=0.03))


def test_restore_takes_the_best_weight(data: Path, tmp_path: Path):
    protocol = Protocol(data, size=32, photos=2)
    best = restoration.best_tv(protocol, "deblur", tmp_path, progress=False)
    (file,) = tmp_path.glob("TV-deblur-*.json")
    cells = list(json.loads(file.read_text())["photos"].values())
    mean = {k: sum(cell[k]["psnr_mean"] for cell in cells) / 2 for k in cells[0]}
    top = max(mean, key=lambda k: mean[k])
    assert sum(cell["psnr_mean"] for cell in best) / 2 == mean[top]
    kind, exponent = top.split()
    for neighbour in (int(exponent) - 1, int(exponent) + 1):
        assert mean[f"{kind} {neighbour}"] < mean[top]
    assert {k.split()[0] for k in mean} == {"coupled", "channels"}


def test_restore_does_not_take_a_diverged_sample_for_a_good_one(data: Path):
    solver = DPS(num_steps=3, guidance_scale=1e9, weight="likelihood")
    table = bench.restore(**toy(data, photos=1, solvers=[solver], tasks=["SR x2"]))
    assert table.rows[2][1].startswith("nan")


@pytest.mark.parametrize("entry", ["HQS=0", "HQS=x", "HQSS"])
def test_restore_refuses_solvers(data: Path, entry: str):
    with pytest.raises(InputError, match=r"expected NAME or NAME=K|unknown solver"):
        bench.restore(**toy(data, photos=1, solvers=[entry], tasks=["SR x2"]))


def test_worse_than_the_degraded_photo_is_counted(data: Path):
    """A photo, the same with its noise doubled, and a lost answer, against the noisy photo."""
    protocol = Protocol(data, size=32, photos=3)
    before = restoration.degraded(protocol, "denoise")
    y = [protocol.likelihood("denoise", i).y for i in range(3)]
    answers = [protocol.truth[0, None], 2 * y[1] - protocol.truth[1, None], y[2] * torch.nan]
    figures = [protocol.score("denoise", i, x) for i, x in enumerate(answers)]
    assert restoration.count_worse(figures, before) == 2
    assert restoration.count_worse(before, before) == 0


def test_restore_without_total_variation(data: Path):
    table = bench.restore(**toy(data, solvers=["auto"], tasks=["denoise"], tv=False))
    assert [row[0] for row in table.rows] == ["degraded", "auto: PosteriorMean"]
    assert len(table.notes) == 1


def test_restore_refuses_an_unknown_task(data: Path):
    with pytest.raises(InputError, match="did you mean 'deblur'"):
        bench.restore(**toy(data, tasks=["deblurr"]))


def test_calibration_of_an_exact_sampler(data: Path, monkeypatch: pytest.MonkeyPatch):
    """Samples around the truth as far as the truth is from the centre: ratio 1, coverage as expected."""

    def run_solver(protocol: Protocol, task: str, *_: object) -> list[dict]:
        truth = protocol.truth
        centre = truth + 0.05 * torch.randn_like(truth)
        samples = centre + 0.05 * spread[task] * torch.randn(4, *truth.shape)
        return [protocol.score(task, i, samples[:, i]) for i in range(len(truth))]

    spread = {"deblur": 1.0, "SR x2": 0.5}
    monkeypatch.setattr("invguide.bench.uncertainty.run_solver", run_solver)
    table = bench.calibration(**toy(data, samples=4, tasks=tuple(spread)))
    exact = expected_coverage(4)
    assert table.figures["deblur"]["ratio"] == pytest.approx(1, rel=0.05)
    assert table.figures["deblur"]["coverage"] == pytest.approx(exact, abs=0.03)
    assert table.figures["SR x2"]["ratio"] > 1.7
    assert table.figures["SR x2"]["coverage"] < exact - 0.2


def test_calibration_shares_the_folder_of_restore(data: Path, tmp_path: Path, monkeypatch):
    solver = DPS(num_steps=2)
    bench.restore(**toy(data, solvers=[solver], tasks=["SR x2"], out=tmp_path))
    monkeypatch.setattr(restoration.driver, "run", None)
    table = bench.calibration(**toy(data, solver=solver, tasks=["SR x2"], out=tmp_path))
    assert [row[0] for row in table.rows] == ["SR x2"]
    assert str(table).startswith("| task ")
    with pytest.raises(InputError, match="at least 2"):
        bench.calibration(**toy(data, samples=1))


@pytest.mark.parametrize("count", [2, 8])
def test_expected_coverage_by_simulation(count: int):
    samples, truth = torch.randn(count, 200000), torch.randn(200000)
    within = (truth - samples.mean(0)).abs() <= 1.645 * samples.std(0)
    assert expected_coverage(count) == pytest.approx(within.float().mean().item(), abs=0.005)


def test_driver_table():
    table = bench.driver(
        prior="natural-tiny", min_network_ms=0, steps=2, repeats=2, progress=False
    )
    assert len(table.rows) == 1
    assert table.rows[0][0] == "32 x 32"
    assert str(table).startswith("| image ")
    assert all(table.figures[k] > 0 for k in ("network_ms", "bare_ms", "solver_ms", "driver_ms"))


def test_driver_refuses_a_prior_of_one_size():
    with pytest.raises(InputError, match="any size"):
        bench.driver(prior=ig.priors.Gaussian(torch.zeros(4), torch.eye(4)), progress=False)


def test_priors_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda net: net)  # the real one takes minutes
    prior = ig.load_prior("natural-tiny")
    settings = {"size": 32, "batches": (2,), "repeats": 1, "device": "cpu", "progress": False}
    table = bench.priors(prior=prior, compile=True, **settings)
    runs = {run["mode"]: run for run in table.figures["runs"]}
    assert [row[0] for row in table.rows] == list(runs)
    assert all(run["batch"] == 2 and run["vjp"] > 0 for run in runs.values())
    assert runs["low memory"]["memory"] < 0.45 * runs["eager"]["memory"]
    # Half precision rounds by 2^-9; what only stores or orders numbers otherwise rounds as float32.
    for mode, run in runs.items():
        low, high = (1e-4, 2e-2) if "bf16" in mode else (0, 1e-5)
        assert low <= run["error"] <= high, mode
    assert prior.precision == "fp32"
    assert "compiled" not in str(bench.priors(prior=prior, **settings))


def test_priors_table_goes_on_when_memory_is_short(monkeypatch: pytest.MonkeyPatch):
    prior = ig.load_prior("natural-tiny")
    plain = prior.denoise

    def limited(x, sigma):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x, sigma)

    monkeypatch.setattr(prior, "denoise", limited)
    table = bench.priors(prior=prior, size=32, batches=(1, 3), repeats=1, progress=False)
    assert {row[2] == "out of memory" for row in table.rows if row[1] == "3"} == {True}
    assert all(float(row[2]) > 0 for row in table.rows if row[1] == "1")
    with pytest.raises(InputError, match=r"batches=\(0,\)"):
        bench.priors(prior=prior, batches=(0,), progress=False)


def test_blackbox_table():
    table = bench.blackbox(workers=2, milliseconds=5, calls=4, repeats=1, progress=False)
    assert [row[0] for row in table.rows] == ["this process", "1 worker", "2 workers"]
    assert str(table).startswith("| calls run in ")
    figures = table.figures
    assert figures["1 worker"]["speed_up"] == 1
    ratio = figures["2 workers"]["calls_per_second"] / figures["1 worker"]["calls_per_second"]
    assert figures["2 workers"]["speed_up"] == pytest.approx(ratio)
    assert figures["this process"]["calls_per_second"] < 1000 / 5
    assert all(f["overhead_ms"] > 0 for f in figures.values())
    with pytest.raises(InputError, match="workers=0"):
        bench.blackbox(workers=0)


def test_mixtures_table():
    """One solver of ours and its planted opposite, the prior itself, on two problems of one size."""
    solvers = {"twisted": EnsembleTwisted(16), "nothing": EKI(1)}
    table = bench.mixtures(
        problems=2, ensemble=100, sizes=[(8, 4)], solvers=solvers, progress=False
    )
    assert [row[0] for row in table.rows] == ["floor", *solvers, "EnKG of InverseBench, reported"]
    assert table.rows[-1][1] == "0.96"
    mean = {name: sum(cells["d=8 dy=4"]) / 2 for name, cells in table.figures.items()}
    assert mean["(exact)"] < mean["twisted"] < 1 < mean["nothing"]
    with pytest.raises(InputError, match="problems=1"):
        bench.mixtures(problems=1)


def test_memory_is_counted():
    """Five tensors at a time, then ten in a chain that backward needs; views and changes in place are free."""
    x = torch.zeros(1000, requires_grad=True)

    def five() -> None:
        together = [x + 1 for _ in range(5)]
        together.clear()
        y = (x * 2).view(10, 100).t()
        y.add_(1)

    def chain() -> None:
        y = x
        for _ in range(10):
            y = y.sin()
        torch.autograd.grad(y.sum(), x)

    assert peak_memory(five, torch.device("cpu")) == 5 * 4000
    assert 10 * 4000 <= peak_memory(chain, torch.device("cpu")) <= 13 * 4000


@pytest.mark.slow
def test_adjoint_table():
    """Ours and checkpoints stay flat where full back-propagation doubles; only the continuous adjoint is inexact."""
    pytest.importorskip("torchdiffeq")
    table = bench.adjoint(
        width=16, methods=("euler", "rk4"), steps=(2, 4), repeats=1, progress=False
    )
    ways = ["ours", "full back-propagation", "checkpointed"]
    names = [f"euler: {way}" for way in (*ways, "continuous adjoint")]
    names += [f"rk4: {way}" for way in ways]
    assert [row[0] for row in table.rows] == names
    assert str(table).startswith("| method: gradient by ")
    growth = {name: cell["MiB"][1] / cell["MiB"][0] for name, cell in table.figures.items()}
    for method, most in (
        ("euler", 1.1),
        ("rk4", 1.3),
    ):  # rk4 keeps four images a step of a thin network
        assert growth[f"{method}: ours"] < most
        assert growth[f"{method}: full back-propagation"] > 1.7
    for name, cell in table.figures.items():
        assert (cell["error"][1] > 1e-2) == name.endswith("continuous adjoint")
    assert table.figures["rk4: ours"]["error"][1] < 1e-5
    assert all(min(cell["seconds"]) > 0 for cell in table.figures.values())


def test_adjoint_without_torchdiffeq(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torchdiffeq" else real(n, *a)
    )
    table = bench.adjoint(prior="natural-tiny", methods=["euler"], steps=[1], progress=False)
    assert len(table.rows) == 3
    assert "pip install torchdiffeq" in str(table)
    with pytest.raises(InputError, match="did you mean 'heun'"):
        bench.adjoint(methods=["hun"])
    with pytest.raises(InputError, match="repeats=0"):
        bench.adjoint(repeats=0)


def test_guidance_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(angles, "CALLS", 40)
    monkeypatch.setattr(angles, "STEPS", 4)
    table = bench.guidance(instances=1, points=10, samples=20, progress=False)
    assert len(table.rows) == 3 * (2 * 3 + 2)
    assert table.head == ("inner steps n", "1", "2", "4", "8", "16", "exact")
    assert all(0 < angle < 180 for angle in table.figures["class: angle, prior, noise 1"].values())
    with pytest.raises(InputError, match="points=0"):
        bench.guidance(points=0)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_steps_of_equal_calls(n: int):
    """By running them: as many calls as allowed, and one step more would be too many."""
    target = angles.class_target()
    steps = angles.steps_for(60, n)
    spent = [
        driver.run(SymplecticAdjoint(k, n), target.make_problem(), 1, progress=False).nfe
        for k in (steps, steps + 1)
    ]
    assert spent[0] <= 60 < spent[1]


def test_prior_as_deepinv_denoiser():
    """A standard normal in normalised units, data = 0.25 x + 0.5: in data units N(0.5, 0.25^2)."""
    pytest.importorskip("deepinv")
    prior = ig.priors.Gaussian(torch.zeros(3), torch.eye(3), scale=0.25, shift=0.5)
    x = torch.tensor([[0.2, 0.9, 0.5], [0.1, 0.4, 2.0]])
    sigma = torch.tensor([0.3, 0.05])
    shrink = (0.25**2 / (0.25**2 + sigma**2))[:, None]
    found = against_deepinv.as_deepinv_denoiser(prior)(x, sigma)
    assert torch.allclose(found, 0.5 + shrink * (x - 0.5), atol=1e-6)


def test_peers_table(data: Path):
    pytest.importorskip("deepinv", minversion="0.5")  # its samplers before had other arguments
    settings = {"size": 32, "prior": "natural-tiny", "steps": 12, "weights": (30.0, 300.0)}
    table = bench.peers(data, **settings, photos=1, repeats=1, progress=False)
    assert [row[0] for row in table.rows][:2] == ["invguide DPS", "deepinv DPS, weight 1"]
    assert table.rows[2][0].endswith("(best of 3)")
    assert str(table).startswith("| method ")
    assert {row[3] for row in table.rows} == {"12"}  # network calls
    plain, tuned = list(table.figures.values())[1:]
    assert plain["chi2"] > 4 * tuned["chi2"]


def test_peers_without_deepinv(data: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "deepinv" else real(n, *a)
    )
    settings = {"size": 32, "prior": "natural-tiny", "steps": 2, "photos": 1, "repeats": 1}
    table = bench.peers(data, **settings, progress=False)
    assert [row[0] for row in table.rows] == ["invguide DPS"]
    assert "pip install -U deepinv" in str(table)


# ---- noise


def test_noise_table(data: Path, tmp_path: Path):
    picture = np.random.default_rng(0).integers(90, 160, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    kinds = ["PNG", "letterboxed"]
    table = bench.noise(
        data, size=32, photos=1, folder=tmp_path, crop=32, levels=[0.05, 0.1], kinds=kinds
    )
    assert [row[0] for row in table.rows] == kinds
    assert table.head[:3] == ("picture", "invguide", "deepinv")
    assert np.shape(table.figures["PNG"]["invguide"]) == (2, 2)  # photos and middles, levels
    with pytest.raises(InputError, match="unknown kind 'PNGG'; did you mean"):
        bench.noise(data, size=32, photos=1, kinds=["PNGG"])
    with pytest.raises(InputError, match="expected numbers between 0 and 1"):
        bench.noise(data, size=32, photos=1, levels=[0.0])
    with pytest.raises(InputError, match="has no pictures"):
        bench.noise(data, size=32, photos=1, folder=data.parent / "nothing")
    with pytest.raises(InputError, match="expected colour, 64 x 64"):
        bench.noise(data, size=32, photos=1, folder=tmp_path, crop=64)


def test_noise_is_put_into_pictures_as_told():
    """The rounded picture minus the photo has the level that was asked for, within its statistics."""
    y = noisy(torch.full((3, 64, 64), 0.5), 0.05, "PNG")
    assert float((y - 0.5).std()) == pytest.approx(0.05, rel=4 / (2 * 3 * 64 * 64) ** 0.5)
    assert torch.equal((255 * y).round() / 255, y)
    barred = noisy(torch.full((3, 60, 64), 0.5), 0.05, "letterboxed")
    assert barred.shape == (1, 3, 100, 64)
    assert float(barred[:, :, :20].abs().max()) == 0
