"""Weights files: what is read, what is refused, and that no refused file ran code or took memory."""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from invguide.errors import CheckpointError
from invguide.priors import read_weights
from invguide.priors.checkpoints.file import load_strictly, versions

GIB = 2**30


def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def write_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = [write_zip, write_legacy, save_file]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w.bin", "w"])
def test_formats_are_known_by_content(tmp_path: Path, write: Callable[..., None], name: str):
    write(state(), tmp_path / name)
    same(read_weights(tmp_path / name), state())


def test_parameters_tied_weights_and_optimizers(tmp_path: Path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    content = {
        "model": OrderedDict(net.named_parameters(remove_duplicate=False)),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "seen": {1, 2},
        "name": b"bytes",
        "dtype": torch.float16,
        "size": torch.Size([3]),
    }
    torch.save(content, tmp_path / "w.pt")
    same(read_weights(tmp_path / "w.pt"), net.state_dict())


OTHER = {"a.weight": torch.zeros(1)}
NESTED: list[tuple[Any, str | None]] = [
    ({"state_dict": state(), "epoch": 3}, None),
    ({"model": OTHER, "ema": state(), "step": 5}, None),
    ({"model": state(), "ema": OTHER}, "model"),
    ({"ema": {"decay": 0.999, "shadow_params": [torch.zeros(1)]}, "model": state()}, None),
    ({"optimizer": {"state": {0: OTHER}}, "net": {"state_dict": state()}}, None),
    ({"best": state(), "epoch": 3}, "best"),
]


@pytest.mark.parametrize(("content", "entry"), NESTED)
def test_nestings(tmp_path: Path, content: Any, entry: str | None):
    torch.save(content, tmp_path / "w.pt")
    same(read_weights(tmp_path / "w.pt", entry), state())


def test_averaged_weights_beside_the_others(tmp_path: Path):
    flat = {"step": torch.tensor(3)}
    flat |= {f"online_model.{k}": torch.zeros(1) for k in state()}
    flat |= {f"ema_model.{k}": v for k, v in state().items()}
    torch.save({"ema": flat}, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    same(list(versions(found))[-1], state())


def test_prefixes():
    wrapped = {f"module._orig_mod.{k}": v for k, v in state().items()}
    assert [len(v) for v in versions(wrapped)] == [3, 3, 3]
    same(list(versions(wrapped))[-1], state())
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert len(list(versions(mixed))) == 1


def test_missing_entry_and_file(tmp_path: Path):
    torch.save({"model": state()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="has no entry 'ema'; it has: model"):
        read_weights(tmp_path / "w.pt", "ema")
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.pt"):
        read_weights(tmp_path / "none.pt")
    for content in (torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="holds no named weights"):
            read_weights(tmp_path / "w.pt")


# ---- hostile files


class Runs:
    """Creates the file `ran` when it is unpickled, if anything lets it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def pickle_named_safetensors(content: Any, path: Path) -> None:
    plain_pickle(content, path.with_suffix(".safetensors"))


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("write", [write_zip, write_legacy, plain_pickle])
def test_no_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], forced: bool
):
    mark, path = tmp_path / "ran", tmp_path / "w.pt"
    write({**state(), "x": Runs(mark)}, path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"more than tensors .*could run code: refused"):
        read_weights(path)
    assert not mark.exists()
    if (
        forced and write is not plain_pickle
    ):  # the file is hostile, and the variable does open the door
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own words about it
            torch.load(path)
        assert mark.exists()


def test_the_environment_does_not_matter_to_good_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(state(), tmp_path / "w.pt")
    same(read_weights(tmp_path / "w.pt"), state())


def test_pickle_that_is_named_safetensors(tmp_path: Path):
    plain_pickle({"x": Runs(tmp_path / "ran")}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (argparse.Namespace(lr=1), r"argparse\.Namespace"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        # Both are on torch's own list of what a file may call, and take as much memory as it says.
        (Calls(bytearray, 10**13), "bytearray"),
        (Calls(torch.Tensor, 10**6, 10**6), r"torch\.Tensor"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_objects_are_named(tmp_path: Path, write: Callable[..., None], thing: Any, named: str):
    write({"state_dict": state(), "x": thing}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=rf"\(.*{named}.*\), and reading that could run code"
    ):
        read_weights(tmp_path / "w.pt")


def expanded(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)


def expanded_legacy(path: Path) -> None:
    write_legacy({"w": torch.zeros(1).expand(10**6, 10**6)}, path)


def shared(path: Path) -> None:
    big = torch.zeros(1000)
    torch.save({f"w{k}": big for k in range(1000)}, path)


def deflated(path: Path) -> None:
    torch.save({"w": torch.zeros(5 * 10**6)}, path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED)


def lying_storage(path: Path) -> None:
    """The pickle of a legacy file says that its storage has 2^40 numbers."""
    write_legacy({"w": torch.zeros(3)}, path)
    content = path.read_bytes()
    where = content.rindex(b"K\x03N", 0, content.index(b"_rebuild_tensor_v2") + 200)
    path.write_bytes(
        content[:where] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + content[where + 2 :]
    )


def not_torch(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def lying_header(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(100))


BOMBS = [
    (expanded, "declares 4 TB of tensors in a file of 1 KB"),
    (expanded_legacy, "declares 4 TB"),
    (shared, r"declares 4 MB of tensors in a file of \d+ KB"),
    (deflated, "is compressed, which torch.save never does"),
    (lying_storage, r"cannot be read|declares"),
    (not_torch, "is a zip file without weights"),
    (script, r"TorchScript program, not weights"),
    (lying_header, "cannot be read as weights"),
    (huge_header, "cannot be read as weights"),
]


@pytest.mark.parametrize(("make", "message"), BOMBS)
def test_bombs(tmp_path: Path, make: Callable[[Path], None], message: str):
    """With 2 GiB more than now to use, none of them may even ask for memory."""
    make(tmp_path / "w.pt")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIB, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / "w.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kept", [0, 5, 60, 500, 3000, -20])
def test_files_that_are_cut_off(tmp_path: Path, write: Callable[..., None], kept: int):
    path = tmp_path / "w.pt"
    write({"w": torch.ones(1000), "v": torch.ones(5)}, path)
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as weights|declares"):
        read_weights(path)


@pytest.mark.parametrize("write", WRITERS)
def test_no_changed_byte_does_anything_but_an_error(tmp_path: Path, write: Callable[..., None]):
    """Read at random places of the file, garbage is tensors or a CheckpointError."""
    path = tmp_path / "w.pt"
    write(state(), path)
    content, outcomes = path.read_bytes(), {"read": 0, "refused": 0}
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        where = int(torch.randint(len(content), (), generator=generator))
        changed = bytearray(content)
        changed[where] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(changed)
        try:
            assert isinstance(read_weights(path), dict)
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


# ---- into a network


def test_half_precision_weights_become_those_of_the_network():
    net = nn.Linear(2, 2)
    load_strictly(net, {k: v.half() for k, v in net.state_dict().items()}, "w.pt")
    assert net.weight.dtype == torch.float32


def test_a_network_whose_own_names_have_a_prefix():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    source, net = Wrapper(), Wrapper()
    load_strictly(net, {f"module.{k}": v for k, v in source.state_dict().items()}, "w.pt")
    assert torch.equal(net.model.weight, source.model.weight)
    load_strictly(net.model, source.state_dict(), "w.pt")
    with pytest.raises(CheckpointError, match="1 missing, such as weight"):
        load_strictly(nn.Linear(2, 2), {"bias": torch.zeros(2)}, "w.pt")
