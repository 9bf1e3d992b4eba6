"""Cores that a process has, passive waiting, and a command line that answers without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from invguide.system import threads
from invguide.system.threads import available_cores, be_passive, shared_among, warn_if_spinning


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "350000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
            },
            2,
        ),
        ({"sys/fs/cgroup/cpu.max": "9900000 100000"}, 8),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_cores_are_those_of_the_affinity_and_the_quota(
    tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    for name, text in files.items():
        write(tmp_path, name, text)
    assert available_cores(tmp_path) == cores


@pytest.mark.usefixtures("eight_cores")
def test_quotas_of_cgroups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "5:memory:/m\n4:cpu,cpuacct:/docker/x\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us", "400000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us", "100000\n")
    assert available_cores(tmp_path) == 4
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us", "-1\n")
    assert available_cores(tmp_path) == 8


@pytest.mark.usefixtures("eight_cores")
def test_passive_waiting_only_where_the_user_says_nothing() -> None:
    environment: dict[str, str] = {}
    be_passive(environment)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "8"  # of a machine with 16
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "100"}, {"KMP_BLOCKTIME": "1"}):
        environment = {**own, "OMP_NUM_THREADS": "3"}
        be_passive(environment)
        assert environment == {**own, "OMP_NUM_THREADS": "3"}


@pytest.mark.usefixtures("eight_cores")
def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_quota", lambda _: float("inf"))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shared_among(2)["OMP_NUM_THREADS"] == "4"
    assert shared_among(2)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert shared_among(100)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # each at most as many as the user allows one
    assert [shared_among(n)["MKL_NUM_THREADS"] for n in (1, 2, 8)] == ["2", "2", "1"]


def test_spinning_is_said_once_and_only_where_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.POLICY:
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(threads, "_warned", False)
        warn_if_spinning(lambda: (2e-4, 1e-4))  # small operations lose a little by themselves
        monkeypatch.setattr(threads, "_warned", False)
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        warn_if_spinning(lambda: (1.0, 1e-4))
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.warns(UserWarning, match="export OMP_WAIT_POLICY=PASSIVE"):
        warn_if_spinning(lambda: (40e-4, 1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_spinning(lambda: (40e-4, 1e-4))


def test_the_trial_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    several, one = threads._trial()
    assert several > 0
    assert one > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "restore --help", "solvers --help", "bench tasks --help"]
)
def test_help_and_version_do_not_wait_for_torch(arguments: str) -> None:
    code = (
        "import sys\n"
        "from invguide.cli.commands import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "import os\n"
        "print('loaded', sorted({'torch', 'numpy'} & set(sys.modules)), os.environ['OMP_WAIT_POLICY'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in threads.POLICY}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.splitlines()[-1] == "loaded [] PASSIVE"


def test_the_package_has_all_of_its_names_when_asked() -> None:
    code = (
        "import sys, invguide\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(invguide.__all__) <= set(dir(invguide))\n"
        "from invguide import *\n"
        "from invguide.api import solve as there\n"
        "assert solve is there and invguide.priors.GaussianMixture and invguide.driver.run\n"
        "assert not hasattr(invguide, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
