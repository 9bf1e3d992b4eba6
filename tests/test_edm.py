"""Networks of EDM: weights files against the formulas of the paper, and pickles of which only tensors are read."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invguide.errors import CheckpointError, InputError
from invguide.priors.loading import load
from invguide.priors.nvidia_pickle import read_nvidia_pickle

SIGMAS = (0.02, 0.2, 1.0, 5.0, 50.0)


@pytest.fixture(scope="module")
def models() -> Any:
    return pytest.importorskip("deepinv.models")


def network(models: Any, kind: str, labels: int = 0, **changed: Any) -> Any:
    """A network of EDM by deepinv, which has the same names; weights that are all far from zero."""
    arguments: Any = {
        "img_resolution": 16,
        "in_channels": 1,
        "out_channels": 1,
        "label_dim": labels,
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1,),
        "num_blocks": 1,
        "attn_resolutions": [16],
        "pretrained": None,
    }
    arguments |= changed
    net = models.ADMUNet(**arguments) if kind == "adm" else models.NCSNpp(kind, **arguments)
    for p in net.parameters():
        if p.ndim < 2:
            nn.init.normal_(p, 0.5, 0.1)
        elif p.std() < 1e-3:
            nn.init.normal_(p, 0.0, p[0].numel() ** -0.5)
    return net.eval().requires_grad_(False)


def edm(
    net: Any, x: Tensor, sigma: float, labels: Tensor | None, sigma_data: float = 0.5
) -> Tensor:
    """Equation 7 of Karras et al. with the coefficients of its table 1."""
    s, total = torch.tensor(sigma).to(x), torch.tensor(sigma**2 + sigma_data**2).to(x)
    raw = net.forward_unet(x / total.sqrt(), s.log().expand(len(x)) / 4, class_labels=labels)
    return sigma_data**2 / total * x + s * sigma_data / total.sqrt() * raw


def vp(net: Any, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """The VP column of that table, beta_d = 19.9, beta_min = 0.1, M = 1000."""
    s = torch.tensor(sigma, dtype=torch.float64)
    t = ((0.1**2 + 2 * 19.9 * (1 + s**2).log()).sqrt() - 0.1) / 19.9
    raw = net.forward_unet(x / (1 + s**2).sqrt().to(x), (999 * t).to(x).expand(len(x)), labels)
    return x - s.to(x) * raw


def error(
    prior: Any, formula: Any, net: Any, label: Tensor | None = None, **settings: Any
) -> float:
    worst, rows = 0.0, None if label is None else torch.eye(4, dtype=prior.dtype)[label]
    for sigma in SIGMAS:
        x = torch.randn(2, 1, 16, 16, dtype=prior.dtype) * max(1.0, sigma)
        condition = {} if label is None else {"label": label}
        difference = prior.denoise(x, sigma, **condition) - formula(
            net, x, sigma, rows, **settings
        )
        worst = max(worst, float(difference.abs().max()) / max(1.0, sigma))
    return worst


def save_like_inverse_bench(net: nn.Module, path: Path) -> None:
    torch.save({"ema": {f"model.{k}": v for k, v in net.state_dict().items()}, "net": {}}, path)


@pytest.mark.parametrize(("kind", "labels"), [("adm", 0), ("adm", 4), ("ncsn", 4)])
def test_weights_file(models: Any, tmp_path: Path, kind: str, labels: int):
    deeper = {"channel_mult": (1, 1), "attn_resolutions": [8]} if labels and kind == "adm" else {}
    net = network(models, kind, labels, **deeper)
    path = tmp_path / "fwi-5m.pt"
    save_like_inverse_bench(net, path)
    told = {} if kind == "adm" else {"precondition": "edm"}
    prior = load(path, **told)
    assert (prior.shape, prior.sigma_data) == ((1, 16, 16), 0.5)
    label = torch.tensor([1, 2]) if labels else None
    assert error(prior, edm, net, label) < 1e-5
    if labels:
        assert error(load(path, **told, sigma_data=1.0), edm, net, label) > 1e-2
        assert (
            error(prior, lambda n, x, s, _: edm(n, x, s, torch.eye(4)[[0, 3]]), net, label) > 1e-3
        )
        with pytest.raises(InputError, match="conditional on one of 4 classes"):
            prior.denoise(torch.zeros(1, 1, 16, 16), 1.0)


def test_continuous_vp(models: Any, tmp_path: Path):
    net = network(models, "ddpm", attn_resolutions=[]).double()
    path = tmp_path / "blackhole-50k.pt"
    save_like_inverse_bench(net, path)
    with pytest.raises(InputError, match=r"SongUNet .* pass precondition='edm' .* 'vp'"):
        load(path)
    with pytest.raises(InputError, match="unknown precondition 'vpp'; did you mean 'vp'"):
        load(path, precondition="vpp")
    prior = load(path, precondition="vp").double()
    for name, p in net.named_parameters():  # as the file was read into a network in float32
        p.data.copy_(p.data.float())
        assert p.dtype == torch.float64, name
    # In double precision: what is left is the interpolation of time.
    assert error(prior, vp, net) < 1e-5
    # The discrete steps of DDPM are 0.5 to 3.4 steps off that clock.
    steps = load(path, predicts="eps", schedule="linear-vp").double()
    assert error(steps, vp, net) > 1e-4


def test_what_does_not_fit(models: Any, tmp_path: Path):
    path = tmp_path / "w.pt"
    weights = network(models, "adm").state_dict()
    torch.save({k: v for k, v in weights.items() if k != "out_conv.bias"}, path)
    with pytest.raises(CheckpointError, match=r"1 missing, such as out_conv\.bias"):
        load(path)
    torch.save({k: v for k, v in weights.items() if not k.startswith("enc.")}, path)
    with pytest.raises(CheckpointError, match="not its structure"):
        load(path)
    torch.save(network(models, "adm", model_channels=64).state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r"channels \[64\], expected multiples of 64, 128 up"
    ):
        load(path)


# ---- pickles


class Saved:
    """A module in the layout of NVIDIA's persistence: its attributes, its class by name, and its source."""

    def __init__(self, module: nn.Module, name: str, source: str = "", **attributes: Any) -> None:
        parts = OrderedDict((k, saved(v)) for k, v in module._modules.items())
        self.meta = sys.modules["dnnlib.util"].EasyDict(
            type="class",
            version=6,
            module_src=source,
            class_name=name,
            state={
                "training": False,
                "_parameters": OrderedDict(module._parameters),
                "_buffers": OrderedDict(module._buffers),
                "_non_persistent_buffers_set": set(),
                "_modules": parts,
                **attributes,
            },
        )

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def saved(module: nn.Module | None) -> Any:
    """Containers are pickled as they are; classes of the training code by their source."""
    if isinstance(module, nn.ModuleDict | nn.ModuleList | nn.Sequential):
        copy = type(module)()
        copy._modules = OrderedDict((k, saved(v)) for k, v in module._modules.items())
        return copy
    return None if module is None else Saved(module, type(module).__name__)


@pytest.fixture
def training_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NVIDIA's modules, as far as pickles name them; whatever runs of them or of a file makes the file `ran`."""
    mark = tmp_path / "ran"

    def _reconstruct_persistent_obj(meta: Any) -> None:
        exec(meta.module_src)  # noqa: S102  as theirs does

    class EasyDict(dict):
        __getattr__ = dict.__getitem__

    for name, thing in (
        ("torch_utils.persistence", _reconstruct_persistent_obj),
        ("dnnlib.util", EasyDict),
    ):
        module = ModuleType(name)
        thing.__module__, thing.__qualname__ = name, thing.__name__
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    return mark


def wrap(
    net: nn.Module, mark: Path, kind: str = "EDMPrecond", **attributes: Any
) -> dict[str, Any]:
    whole = nn.Module()
    whole.model = net
    source = f"open({str(mark)!r}, 'w')"
    return {"ema": Saved(whole, kind, source, **attributes), "loss_fn": None, "options": {"lr": 1}}


def dump(content: Any, path: Path) -> Path:
    with open(path, "wb") as file:
        pickle.dump(content, file)
    return path


@pytest.mark.parametrize("kind", ["EDMPrecond", "VPPrecond"])
def test_pickle(models: Any, tmp_path: Path, training_code: Path, kind: str):
    net = network(models, "ddpm")
    attributes = (
        {"sigma_data": 0.7}
        if kind == "EDMPrecond"
        else {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}
    )
    path = dump(wrap(net, training_code, kind, **attributes), tmp_path / "edm.pkl")
    prior = load(path)
    assert not training_code.exists()
    if kind == "EDMPrecond":
        assert error(prior, edm, net, sigma_data=0.7) < 1e-5
    else:  # the clock of up to 999 steps in float32
        assert error(prior, vp, net) < 1e-4
    pickle.loads(path.read_bytes())  # noqa: S301  the file is dangerous: the source in it runs
    assert training_code.exists()


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def legacy_bytes(content: Any, tmp_path: Path) -> bytes:
    torch.save(content, tmp_path / "nested.pt", _use_new_zipfile_serialization=False)
    return (tmp_path / "nested.pt").read_bytes()


def typed_storage(count: int) -> Any:
    untyped = torch.zeros(count).untyped_storage()
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)


def lying_bytes(tmp_path: Path) -> bytes:
    """A storage of three numbers that is said to have 2^40."""
    content = legacy_bytes(typed_storage(3), tmp_path)
    where = content.index(b"K\x03N")
    return content[:where] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + content[where + 2 :]


def test_hostile_pickles(tmp_path: Path, training_code: Path):
    path, mark = tmp_path / "edm.pkl", training_code
    good = wrap(nn.Linear(2, 3), mark)
    assert sorted(read_nvidia_pickle(dump(good, path)).weights) == ["model.bias", "model.weight"]
    load_bytes: Any = torch.storage._load_from_bytes  # pyright: ignore[reportAttributeAccessIssue]
    rebuild: Any = torch._utils._rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue]
    typed = typed_storage(1)
    hostile: list[tuple[Any, str]] = [
        (Calls(Path.touch, mark), "it names .*, which no file of EDM does"),
        (Calls(eval, f"open({str(mark)!r}, 'w')"), r"it names builtins\.eval"),
        (Calls(bytearray, 10**13), r"it names builtins\.bytearray"),
        (
            Calls(load_bytes, legacy_bytes(Calls(Path.touch, mark), tmp_path)),
            "it would import .* to read a tensor",
        ),
        (
            Calls(load_bytes, lying_bytes(tmp_path)),
            r"\d+ bytes is said to have \d{13}",
        ),
        (
            Calls(rebuild, typed, 0, (10**6, 10**6), (0, 0), False, OrderedDict()),
            "is larger than what is stored of it",
        ),
        (Calls(rebuild, typed, 5, (1,), (1,), False, OrderedDict()), "larger than what is stored"),
        (
            Calls(rebuild, typed, -1, (1,), (1,), False, OrderedDict()),
            "larger than what is stored",
        ),
    ]
    for thing, message in hostile:
        dump({**good, "x": thing}, path)
        with pytest.raises(CheckpointError, match=message):
            read_nvidia_pickle(path)
        assert not mark.exists()
    dump(good, path)
    content = path.read_bytes()
    for kept in (0, 10, 200, -30):
        path.write_bytes(content[:kept])
        with pytest.raises(CheckpointError, match="cannot be read as a pickle of EDM"):
            read_nvidia_pickle(path)
    with pytest.raises(CheckpointError, match="no network under 'ema'"):
        read_nvidia_pickle(dump({"G_ema": 1}, path))
    with pytest.raises(CheckpointError, match="cannot be read as a pickle of EDM"):
        load(tmp_path / "none.pkl")


def test_other_networks_in_pickles(tmp_path: Path, training_code: Path):
    path = dump(wrap(nn.Linear(2, 3), training_code, "VEPrecond"), tmp_path / "edm.pkl")
    with pytest.raises(
        CheckpointError, match="holds a VEPrecond; expected EDMPrecond or VPPrecond"
    ):
        load(path)
    dump(wrap(nn.Linear(2, 3), training_code, sigma_data=0.5), path)
    with pytest.raises(CheckpointError, match="no DhariwalUNet or SongUNet"):
        load(path)
    loop = wrap(nn.Linear(2, 3), training_code)
    loop["ema"].meta["state"]["_modules"]["again"] = loop["ema"]
    loop["ema"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]["twice"] = loop[
        "ema"
    ].meta["state"]["_modules"]["model"]
    with pytest.raises((CheckpointError, RecursionError)):
        read_nvidia_pickle(dump(loop, path))
