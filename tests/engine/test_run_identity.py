"""Checkpoints: of another problem refused, of the same one resumed in a new process, damaged ones refused."""

from __future__ import annotations

import hashlib
import importlib
import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import invguide as ig
from invguide import driver
from invguide.engine import checkpoint as checkpoints
from invguide.engine.checkpoint import load_checkpoint, packed
from invguide.engine.run_identity import Identity, run_identity
from invguide.errors import CheckpointError, InputError
from invguide.operators import Identity as Same
from invguide.problem.problem import Problem
from invguide.solvers import DPS, HQS
from invguide.system.content_hash import changed_parts, content_of


class Case(NamedTuple):
    """Code with a {v}, which defines what differs from COMMON; two values of it, and the part that then differs."""

    part: str
    code: str
    one: str
    other: str


COMMON = """
import functools
import numpy as np, torch
import invguide as ig
from invguide.adapters.operators import as_operator
from invguide.likelihood import Likelihood
from invguide.noise import LogDensity, NoiseModel, Poisson
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.reward import Reward
from invguide.solvers import DPS, SCG
y = torch.linspace(0.1, 1, 4).reshape(1, 4).double()
prior = ig.priors.Gaussian(torch.zeros(4).double(), torch.eye(4).double())
solver, operator, noise, reward, shape, condition = DPS(num_steps=4), lambda x: x, 0.5, None, (4,), None
"""
LINEAR = "class Model:\n    gain = 1.0\n    def __init__(self, k): self.k = k\n"
CASES = {
    "a factor in a lambda": Case("operator", "operator = lambda x: {v} * x", "1", "4"),
    "another slice": Case(
        "operator", "operator = lambda x: x[:, {v}]", "[0, 1, 2, 3]", "[0, 2, 1, 3]"
    ),
    "a function": Case("operator", "def operator(x):\n    return x * {v}", "2.0", "2.5"),
    "an operation": Case("operator", "operator = lambda x: x {v} 0.25", "+", "-"),
    "a default": Case("operator", "operator = lambda x, k={v}: k * x", "2.0", "3.0"),
    "a keyword default": Case("operator", "def operator(x, *, k={v}): return k * x", "2.0", "3.0"),
    "a closure": Case(
        "operator", "def make(k): return lambda x: k * x\noperator = make({v})", "2.0", "3.0"
    ),
    "a tensor in a closure": Case(
        "operator",
        "def make(k): return lambda x: k * x\noperator = make(torch.tensor([1, 2, 3, {v}]).double())",
        "4.0",
        "4.001",
    ),
    "a global": Case("operator", "K = {v}\noperator = lambda x: K * x", "2.0", "3.0"),
    "a helper": Case(
        "operator", "def helper(x): return x {v} 2\noperator = lambda x: helper(x)", "*", "/"
    ),
    "a partial": Case(
        "operator", "operator = functools.partial(lambda x, k: k * x, k={v})", "2.0", "3.0"
    ),
    "a callable's attribute": Case(
        "operator",
        LINEAR + "    def __call__(self, x): return self.k * x\noperator = Model({v})",
        "1.0",
        "2.0",
    ),
    "a callable's method": Case(
        "operator",
        LINEAR + "    def __call__(self, x): return self.k {v} x\noperator = Model(2.0)",
        "*",
        "+",
    ),
    "a class attribute": Case(
        "operator",
        LINEAR
        + "    def __call__(self, x): return self.gain * x\nModel.gain = {v}\noperator = Model(2.0)",
        "2.0",
        "3.0",
    ),
    "a bound method": Case(
        "operator",
        LINEAR + "    def apply(self, x): return self.k * x\noperator = Model({v}).apply",
        "1.0",
        "2.0",
    ),
    "an attribute of a module": Case(
        "operator",
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.k = {v}\n"
        "    def forward(self, x): return self.k * x\noperator = Net()",
        "1.0",
        "2.0",
    ),
    "a buffer that is not saved": Case(
        "operator",
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('k', torch.tensor({v}).double(), persistent=False)\n"
        "    def forward(self, x): return self.k * x\noperator = Net()",
        "1.0",
        "2.0",
    ),
    "a hook of a module": Case(
        "operator",
        "operator = torch.nn.Linear(4, 4).double()\ntorch.nn.init.eye_(operator.weight)\n"
        "torch.nn.init.zeros_(operator.bias)\noperator.register_forward_hook(lambda m, a, y: {v} * y)",
        "2",
        "3",
    ),
    "an attribute of an operator": Case(
        "operator",
        "class Gain(ig.Operator):\n    def __init__(self, k):\n        super().__init__()\n        self.k = k\n"
        "    def forward(self, x): return self.k * x\noperator = Gain({v})",
        "1.0",
        "2.0",
    ),
    "linear or not": Case(
        "operator",
        "operator = as_operator(lambda x: 2 * x, shape=(4,), linear={v})",
        "True",
        "False",
    ),
    "an adjoint": Case(
        "operator",
        "operator = as_operator(lambda x: 2 * x, adjoint=lambda y: {v} * y, shape=(4,))",
        "2",
        "3",
    ),
    "Poisson's gain": Case("noise", "noise = Poisson({v})", "0.1", "0.2"),
    "a log density": Case(
        "noise", "noise = lambda p, y: -(p - y).abs().sum(1) * {v}", "1.0", "3.0"
    ),
    "a law of one's own": Case(
        "noise",
        "class Law(NoiseModel):\n    def __init__(self, s): self.s = s\n    def bind(self, y): return self\n"
        "    def log_density(self, p, y): return -(p - y).square().sum(1) / self.s\n"
        "    def sigma(self, p, y): return None\nnoise = Law({v})",
        "1.0",
        "3.0",
    ),
    "sigma_y": Case("noise", "noise = torch.tensor([0.5, 0.5, 0.5, {v}])", "0.5", "0.50001"),
    "the last of many values": Case(
        "y",
        "prior = ig.priors.GaussianField((64, 64))\nshape = (64, 64)\n"
        "y = torch.full((40, 64, 64), 0.1)\ny[-1, -1, -2] = {v}",
        "0.1",
        "0.11",
    ),
    "scale of a prior": Case("prior", "prior.scale = {v}", "1.0", "2.0"),
    "shift of a prior": Case("prior", "prior.shift = {v}", "0.0", "0.5"),
    "a prior of one's own": Case(
        "prior",
        "class White(Prior):\n    shape, sigma_min, sigma_max, sigma_data = (4,), 0.01, 50.0, 1.0\n"
        "    def denoise(self, x, sigma, **condition):\n"
        "        return x / (1 + {v} * torch.as_tensor(sigma).reshape(-1, 1) ** 2)\nprior = White()",
        "1",
        "2",
    ),
    "a network of a function": Case(
        "prior",
        "prior = ig.priors.from_network(lambda x, t: {v} * x, predicts='x0', schedule='ve', shape=(4,))",
        "0.5",
        "0.4",
    ),
    "a reward": Case(
        "reward", "reward = ig.as_reward(lambda x: -{v} * x.square().sum(1))", "1.0", "3.0"
    ),
    "the weight of a reward": Case(
        "reward", "reward = {v} * ig.as_reward(lambda x: -x.square().sum(1))", "1.0", "3.0"
    ),
    "a reward of one's own": Case(
        "reward",
        "class Near(Reward):\n    def __init__(self, to): self.to = to\n"
        "    def __call__(self, x): return -(x - self.to).square().sum(1)\nreward = Near({v})",
        "1.0",
        "0.5",
    ),
    "a closure of a black box": Case(
        "operator",
        "def make(k): return lambda x: k * x\noperator = ig.BlackBox(make({v}))\n"
        "solver = SCG(num_steps=4, num_candidates=3)",
        "1.0",
        "2.0",
    ),
    "a command of a black box": Case(
        "operator",
        "operator = ig.BlackBox(ig.Command({v}))\nsolver = SCG(num_steps=4, num_candidates=2)",
        "'cp {input} {output}'",
        "'cp -p {input} {output}'",
    ),
    "a solver of one's own": Case(
        "solver",
        "class Mine(DPS):\n    def estimate(self, state): return {v} * super().estimate(state)\n"
        "solver = Mine(num_steps=4)",
        "1.0",
        "0.5",
    ),
    "a setting of a solver": Case(
        "solver", "solver = DPS(num_steps=4, guidance_scale={v})", "1.0", "0.9"
    ),
}


def made(case: Case, value: str) -> tuple[Any, Problem]:
    """Everything defined anew, as in a script that is run again."""
    space: dict[str, Any] = {"__name__": "__main__"}
    code = COMMON + case.code.replace("{v}", value)
    exec(compile(code, "script", "exec"), space)  # noqa: S102
    from invguide.adapters.operators import as_operator
    from invguide.likelihood import Likelihood

    likelihood = Likelihood(as_operator(space["operator"]), space["y"], space["noise"])
    reward = None if space["reward"] is None else ig.as_reward(space["reward"])
    problem = Problem(space["prior"], likelihood, reward, shape=space["shape"])
    return space["solver"], problem


def run(case: Case, value: str, path: Path | None, **options: Any) -> torch.Tensor:
    solver, problem = made(case, value)
    settings = {"progress": False, "checkpoint": path, "checkpoint_every": 1, "batch_size": 1}
    result = driver.run(solver, problem, 1, **{**settings, **options})
    return result.samples


def interrupt(report: driver.StepReport) -> None:
    if report.step == 2:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each case, stopped in the middle of its first sample."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for i, case in enumerate(CASES.values()):
        run(case, case.one, folder / f"{i}.pt", callbacks=[interrupt])
    return folder


@pytest.mark.parametrize("name", CASES)
def test_another_problem_is_refused(name: str, interrupted: Path) -> None:
    case, path = CASES[name], interrupted / f"{list(CASES).index(name)}.pt"
    before = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"belongs to another run \({case.part}: .* there, "
    ) as error:
        run(case, case.other, path)
    assert path.read_bytes() == before
    assert f"trust=['{case.part}']" in str(error.value)


AGAIN = """
import sys, torch, test_run_identity as t
from pathlib import Path
folder = Path(sys.argv[1])
for i, case in enumerate(t.CASES.values()):
    torch.save(t.run(case, case.one, folder / f"{i}.pt"), folder / f"{i}.samples")
"""


@pytest.mark.slow
def test_the_same_problems_defined_again_in_a_new_process_go_on(interrupted: Path) -> None:
    """To the last bit of a run that nothing interrupted."""
    here = Path(__file__).parent
    before = {path.name: path.read_bytes() for path in interrupted.glob("*.pt")}
    code = textwrap.dedent(AGAIN)
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(here)!r})\n{code}",
        str(interrupted),
    ]
    subprocess.run(command, check=True)
    for i, (name, case) in enumerate(CASES.items()):
        resumed = torch.load(interrupted / f"{i}.samples", weights_only=True)
        assert torch.equal(resumed, run(case, case.one, None)), name
        (interrupted / f"{i}.pt").write_bytes(before[f"{i}.pt"])
    assert not list(interrupted.glob("*.lock"))
    assert not list(interrupted.glob("*.tmp"))


def test_a_change_is_named(tmp_path: Path) -> None:
    case = CASES["a closure"]
    run(case, case.one, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"operator: .*\(changed: function\.closure k\)"):
        run(case, case.other, tmp_path / "c.pt")


# ---- what cannot be read


def generated(x: torch.Tensor, numbers: Any = (i for i in range(3))) -> torch.Tensor:
    return x


def unreadable() -> Problem:
    prior = ig.priors.Gaussian(torch.zeros(4).double(), torch.eye(4).double())
    y = torch.ones(1, 4).double()
    return Problem(prior, ig.Likelihood(ig.as_operator(generated), y, 0.5), shape=(4,))


def test_what_cannot_be_told_apart_is_named_and_takes_a_word(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    options = {"progress": False, "checkpoint": path}
    with pytest.warns(
        UserWarning, match=r"operator: function\.defaults\[0\]: generator.*trust=\['operator'\]"
    ):
        first = driver.run(DPS(num_steps=4), unreadable(), **options)
    assert first.manifest["cannot_be_told_apart"] == {
        "operator": ["function.defaults[0]: generator"]
    }
    with pytest.raises(CheckpointError, match=r"operator: nobody can tell .*trust=\['operator'\]"):
        driver.run(DPS(num_steps=4), unreadable(), **options)
    again = driver.run(DPS(num_steps=4), unreadable(), trust=["operator"], **options)
    assert torch.equal(again.samples, first.samples)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        driver.run(DPS(num_steps=4), unreadable(), seed=1, trust=["operator"], **options)
    with pytest.raises(InputError, match="trust names 'operater'; did you mean 'operator'"):
        driver.run(DPS(num_steps=4), unreadable(), trust=["operater"], **options)


def test_trust_is_for_a_part_that_differs_too(tmp_path: Path) -> None:
    case, path = CASES["a helper"], tmp_path / "c.pt"
    first = run(case, case.one, path)
    assert torch.equal(run(case, case.other, path, trust="operator"), first)


# ---- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Identity]:
    """A checkpoint in the middle of a sample; the next one has not begun."""
    path = tmp_path_factory.mktemp("damage") / "c.pt"
    run(CASES["a function"], "2.0", path, callbacks=[interrupt])
    solver, problem = made(CASES["a function"], "2.0")
    return path, run_identity(solver, problem, 1, 0, torch.float64)


def damages(data: bytes, count: int) -> list[bytes]:
    """A bit changed, a byte changed, or the end cut off, all over the file; the first and the last byte too."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(data), count)
    places[:2] = 0, len(data) - 1
    found = []
    for i, place in enumerate(places):
        changed = bytearray(data)
        if i % 4 == 3:
            changed = changed[:place]
        elif i % 2:
            changed[place] ^= 1 << int(rng.integers(8))
        else:
            changed[place] = (changed[place] + int(rng.integers(1, 256))) % 256
        found.append(bytes(changed))
    return found


def test_400_damaged_checkpoints_are_refused(sound: tuple[Path, Identity], tmp_path: Path) -> None:
    path, identity = sound
    data, broken = path.read_bytes(), tmp_path / "broken.pt"
    assert load_checkpoint(path, identity)["format"] == checkpoints.FORMAT
    refused = 0
    for content in damages(data, 400):
        assert content != data
        broken.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"cannot be read .*damaged, truncated or not a checkpoint"
        ):
            load_checkpoint(broken, identity)
        refused += 1
    assert refused == 400


def test_without_the_digest_damage_would_pass(
    sound: tuple[Path, Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted mistake: torch alone reads many damaged files without a word."""

    class Blind:
        def digest(self) -> bytes:
            return data[len(checkpoints.MAGIC) :][: checkpoints.DIGEST]

    path, identity = sound
    data, broken = path.read_bytes(), tmp_path / "broken.pt"
    monkeypatch.setattr(checkpoints.hashlib, "sha256", lambda body: Blind())
    passed = 0
    for content in damages(data, 200):
        broken.write_bytes(content)
        try:
            load_checkpoint(broken, identity)
            passed += 1
        except CheckpointError:
            pass
    assert passed > 10


def forge(change: dict[str, Any], sound: tuple[Path, Identity], path: Path) -> None:
    """A file with a right digest and a wrong content."""
    content = load_checkpoint(*sound)
    saved = {k: v for k, v in content.items() if k not in ("format", "identity")}
    data = packed(sound[1], {**saved, **{k: v for k, v in change.items() if v is not KeyError}})
    if KeyError in change.values():
        data = packed(sound[1], {k: v for k, v in saved.items() if k not in change})
    path.write_bytes(data)


NUMBERS = torch.zeros(1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"samples": torch.zeros(1, 1, 5, dtype=torch.float64)},
        {"samples": torch.zeros(1, 1, 4, dtype=torch.float32)},
        {"samples": [1.0]},
        {"samples": KeyError},
        {"chi2": torch.zeros(2, 1, dtype=torch.float64)},
        {"status": [[0, 7, "ok"]]},
        {"status": [[0, 0, "ok"]]},
        {"status": 3},
        {"seconds": "long"},
        {"counters": [1, 2]},
        {"counters": [1, 2, -3]},
        {"chunks": [{"rows": [[0, 0]], "step": 2}]},
        {"chunks": [{"rows": [[0, 0]], "step": 99, "state": {"x": NUMBERS}}]},
        {"chunks": [{"rows": [[0, 0]], "step": -1, "state": {"x": NUMBERS, "denoised": NUMBERS}}]},
        {"chunks": [{"rows": [[0, 0]], "step": 1, "state": {"z": NUMBERS}}]},
        {"chunks": KeyError},
        {"identity": KeyError},
    ],
    ids=str,
)
def test_forged_checkpoints_are_refused(
    change: dict[str, Any], sound: tuple[Path, Identity], tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    if set(change) <= {"format", "identity"}:
        body = {
            "format": 2,
            "identity": {},
            **{k: v for k, v in change.items() if v is not KeyError},
        }
        buffer = io.BytesIO()
        torch.save({k: v for k, v in body.items() if change.get(k) is not KeyError}, buffer)
        digest = hashlib.sha256(buffer.getvalue()).digest()
        path.write_bytes(checkpoints.MAGIC + digest + buffer.getvalue())
    else:
        forge(change, sound, path)
    with pytest.raises(CheckpointError, match=r"cannot be read|has format 3"):
        run(CASES["a function"], "2.0", path)


def test_an_earlier_format_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"format": 1, "identity": {"seed": "0"}}, path)
    with pytest.raises(
        CheckpointError,
        match=r"written by an earlier version of invguide.*delete it to start over",
    ):
        run(CASES["a function"], "2.0", path)


# ---- the hash itself


def test_use_does_not_change_an_identity(tmp_path: Path) -> None:
    """What the first call finds out, counters of a black box, and the mode of a network decide nothing."""
    x = torch.rand(2, 4)
    function, box = ig.as_operator(lambda x: 2 * x), ig.BlackBox(lambda x: 2 * x)
    reward, net = ig.as_reward(lambda x: x.sum(1)), torch.nn.Linear(4, 4)
    for thing in (function, box, reward, net):
        before = content_of(thing).digest
        thing(x)
        if isinstance(thing, torch.nn.Module):
            thing.eval()
        assert content_of(thing).digest == before
    assert content_of(ig.BlackBox(abs, retries=3)).digest == content_of(ig.BlackBox(abs)).digest


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        (
            "import own_helpers\noperator = lambda x: own_helpers.blur(x)",
            "global own_helpers['blur'].code.constants[1]",
        ),
        ("from own_helpers import blur as operator", "code.constants[1]"),
        (
            "def operator(x):\n    from own_helpers import blur\n    return blur(x)",
            "import own_helpers",
        ),
    ],
)
def test_a_module_of_the_user_is_followed(
    code: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a function says nothing about it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for gain in (1, 22):
        (tmp_path / "own_helpers.py").write_text(f"def blur(x):\n    return {gain} * x\n")
        sys.modules.pop("own_helpers", None)
        importlib.invalidate_caches()
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(code, space)  # noqa: S102
        found.append(content_of(space["operator"]))
    sys.modules.pop("own_helpers", None)
    assert found[0].digest != found[1].digest
    assert changed_parts(found[0].parts, found[1].parts) == [changed]


def test_point_estimate_solvers_have_identities_too(tmp_path: Path) -> None:
    prior = ig.priors.Gaussian(torch.zeros(4).double(), torch.eye(4).double())
    problem = Problem(prior, ig.Likelihood(Same(), torch.ones(1, 4).double(), 0.5))
    first = run_identity(HQS(num_steps=3), problem, 1, 0, torch.float64)
    assert first == run_identity(HQS(num_steps=3), problem, 1, 0, torch.float64)


def test_names_of_attributes_are_not_taken_for_globals() -> None:
    """`x.gain` beside a global that happens to be called gain."""
    found = []
    for value in (1, 2):
        space: dict[str, Any] = {"__name__": "__main__", "gain": value}
        exec("operator = lambda x: x.gain", space)  # noqa: S102
        found.append(content_of(space["operator"]).digest)
    assert found[0] == found[1]


def test_generators_count_by_their_seed() -> None:
    """Their state changes with every use."""
    for make, use in (
        (lambda s: torch.Generator().manual_seed(s), lambda g: torch.rand(1, generator=g)),
        (np.random.default_rng, lambda g: g.random()),
    ):
        generator = make(3)
        before = content_of(generator).digest
        use(generator)
        assert content_of(generator).digest == before == content_of(make(3)).digest
        assert content_of(make(4)).digest != before
