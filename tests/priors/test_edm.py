"""Networks of EDM: weights files against the formulas of the paper, and pickles of which only tensors are read."""

from __future__ import annotations

import math
import pickle
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from invguide.errors import CheckpointError, InputError
from invguide.priors.checkpoints.edm import iddpm_levels
from invguide.priors.checkpoints.loading import load
from invguide.priors.checkpoints.nvidia_pickle import read_nvidia_pickle
from invguide.priors.networks.edm2 import EDM2, Architecture, Balance
from invguide.priors.networks.edm2 import Block as BlockOfEDM2
from invguide.priors.wrappers.latent import LatentPrior
from tiny import randomised

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
    return randomised(net)


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


def ve(net: Any, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """The VE column."""
    s = torch.tensor(sigma).to(x)
    return x + s * net.forward_unet(x, (s / 2).log().expand(len(x)), class_labels=labels)


@cache
def levels_by_hand(c_1: float = 0.001, c_2: float = 0.008, steps: int = 1000) -> list[float]:
    """Of the iDDPM column, u_0 ... u_M, by its recursion from u_M = 0."""

    def bar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (steps * (c_2 + 1))) ** 2

    u = [0.0]
    for j in range(steps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(bar(j - 1) / bar(j), c_1) - 1))
    return u[::-1]


def iddpm(
    net: Any, x: Tensor, sigma: float, labels: Tensor | None, u: list[float] | None = None
) -> Tensor:
    """That column: the step of the nearest level, and the first half of the channels."""
    u = u or levels_by_hand()
    step = len(u) - 2 - min(range(len(u)), key=lambda j: abs(sigma - u[j]))
    time = torch.full((len(x),), float(step), dtype=x.dtype)
    raw = net.forward_unet(x / (1 + sigma**2) ** 0.5, time, class_labels=labels)
    return x - sigma * raw[:, : x.shape[1]]


FORMULAS = {"EDM": edm, "VP": vp, "VE": ve, "iDDPM": iddpm}


def error(
    prior: Any,
    formula: Any,
    net: Any,
    label: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    sigmas: tuple[float, ...] = SIGMAS,
    **settings: Any,
) -> float:
    """Of the prior told `label`, against the formula told `labels`: the same, unless they are given."""
    worst, labels = 0.0, label if labels is None else labels
    rows = None if labels is None else torch.eye(4, dtype=prior.dtype)[labels]
    for sigma in sigmas:
        x = torch.randn(2, *prior.shape, dtype=prior.dtype) * max(1.0, sigma)
        condition = {} if label is None else {"label": label}
        difference = prior.denoise(x, sigma, **condition) - formula(
            net, x, sigma, rows, **settings
        )
        worst = max(worst, float(difference.abs().max()) / max(1.0, sigma))
    return worst


def save_like_inverse_bench(net: nn.Module, path: Path) -> None:
    torch.save({"ema": {f"model.{k}": v for k, v in net.state_dict().items()}, "net": {}}, path)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precondition"), [("ncsn", "VE"), ("adm", "iDDPM")])
def test_other_columns(models: Any, tmp_path: Path, kind: str, precondition: str):
    twice = 2 if precondition == "iDDPM" else 1
    net = network(models, kind, 4, out_channels=twice)
    path, formula = tmp_path / "w.pt", FORMULAS[precondition]
    weights = {f"model.{k}": v for k, v in net.state_dict().items()}
    torch.save(weights, path)
    prior, label = load(path, precondition=precondition.lower()), torch.tensor([1, 2])
    assert error(prior, formula, net, label) < 1e-5
    assert error(prior, formula, net, label.flip(0), labels=label, sigmas=(1.0,)) > 1e-3
    if precondition == "VE":  # each column is another denoiser of the same network
        for other in ("EDM", "VP", "iDDPM"):
            assert error(prior, FORMULAS[other], net, label, sigmas=(1.0,)) > 1e-3
        assert (prior.sigma_min, prior.sigma_max) == (0.02, 100.0)
        return
    # What tells it: twice the channels, or the table of levels, which counts.
    assert error(load(path), formula, net, label, sigmas=(1.0,)) < 1e-5
    u = levels_by_hand(c_2=0.1, steps=700)
    torch.save({**weights, "u": torch.tensor(u)}, path)
    found = load(path)
    assert error(found, lambda *a: iddpm(*a, u=u), net, label) < 1e-5
    assert error(found, iddpm, net, label, sigmas=(1.0,)) > 1e-3
    for bad in (torch.tensor(u).flip(0), torch.tensor([math.nan, 1.0, 0.0]), torch.zeros(3, 3)):
        torch.save({**weights, "u": bad}, path)
        with pytest.raises(CheckpointError, match=r"table of noise levels \(u\) that does not"):
            load(path)


def test_levels_of_iddpm():
    np.testing.assert_allclose(iddpm_levels(), levels_by_hand(), rtol=1e-9)
    other = levels_by_hand(c_1=0.01, c_2=0.05, steps=20)
    np.testing.assert_allclose(iddpm_levels(0.01, 0.05, 20), other, rtol=1e-9)


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
    """An object in the layout of NVIDIA's persistence: its attributes, its class by name, and its source."""

    def __init__(self, name: str, source: str = "", **state: Any) -> None:
        kept = {"type": "class", "version": 6, "module_src": source, "class_name": name}
        self.meta = sys.modules["dnnlib.util"].EasyDict(**kept, state=state)

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def saved(module: nn.Module | None, name: str = "", source: str = "", **attributes: Any) -> Any:
    """Containers are pickled as they are; classes of the training code by their source."""
    if module is None:
        return None
    parts = OrderedDict((k, saved(v)) for k, v in module._modules.items())
    if isinstance(module, nn.ModuleDict | nn.ModuleList | nn.Sequential):
        copy = type(module)()
        copy._modules = parts
        return copy
    if isinstance(module, BlockOfEDM2):
        attributes = attributes_of_block(module)
    return Saved(
        name or type(module).__name__,
        source,
        training=False,
        _parameters=OrderedDict(module._parameters),
        _buffers=OrderedDict(module._buffers),
        _non_persistent_buffers_set=set(),
        _modules=parts,
        **attributes,
    )


@pytest.fixture
def training_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """NVIDIA's modules, as far as pickles name them; whatever runs of them or of a file makes the file `ran`."""
    mark = tmp_path / "ran"

    def _reconstruct_persistent_obj(meta: Any) -> None:
        exec(meta.module_src)  # noqa: S102  as theirs does

    class EasyDict(dict):
        def __getattr__(self, name: str) -> Any:
            try:
                return self[name]
            except KeyError:  # Python 3.10 asks for __getstate__
                raise AttributeError(name) from None

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
    if kind == "iDDPMPrecond":
        whole.register_buffer("u", torch.tensor(levels_by_hand()))
    source = f"open({str(mark)!r}, 'w')"
    network = saved(whole, kind, source, **attributes)
    return {"ema": network, "loss_fn": None, "options": {"lr": 1}}


def dump(content: Any, path: Path) -> Path:
    with open(path, "wb") as file:
        pickle.dump(content, file)
    return path


CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "EDM": ("ddpm", {"sigma_data": 0.7}),
    "VP": ("ddpm", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}),
    "VE": ("ncsn", {"sigma_min": 0.02, "sigma_max": 100}),
    "iDDPM": ("adm", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_pickle(models: Any, tmp_path: Path, training_code: Path, kind: str):
    of, attributes = CLASSES[kind]
    net = network(models, of, 4, out_channels=2 if kind == "iDDPM" else 1)
    path = dump(wrap(net, training_code, f"{kind}Precond", **attributes), tmp_path / "edm.pkl")
    prior = load(path)
    assert not training_code.exists()
    settings = {"sigma_data": 0.7} if kind == "EDM" else {}
    worst = error(prior, FORMULAS[kind], net, torch.tensor([3, 0]), **settings)
    # The clock of VP has up to 999 steps, in float32.
    assert worst < (1e-4 if kind == "VP" else 1e-5)
    pickle.loads(path.read_bytes())  # noqa: S301  the file is dangerous: the source in it runs
    assert training_code.exists()


# ---- pickles of EDM2

OF_BLOCKS = {"res_balance": 0.2, "attn_balance": 0.4, "clip_act": 3.0, "resample_filter": [1, 1]}


def attributes_of_block(block: BlockOfEDM2) -> dict[str, Any]:
    heads = block.heads if hasattr(block, "attn_qkv") else 0
    return {"num_heads": heads, "out_channels": len(block.conv_res1.weight), **OF_BLOCKS}


def edm2(channels: int) -> EDM2:
    """Half precision, as NVIDIA keeps them."""
    a = Architecture(8, channels, (32, 32), (False, True), 1, 16, 32, num_classes=4)
    net = EDM2(a, Balance(16, 0.2, 0.4, 0.6, 0.3, limit=3.0))
    for p in net.parameters():
        nn.init.normal_(p, float(p.ndim == 0))
    return net.half().float().eval().requires_grad_(False)


def wrap_edm2(net: EDM2, mark: Path, encoder: Any) -> dict[str, Any]:
    whole = nn.Module()
    half = EDM2(net.architecture, net.balance).half()
    half.load_state_dict(net.state_dict())
    unet = saved(half, "UNet", label_balance=0.6, concat_balance=0.3)
    network = saved(whole, "Precond", f"open({str(mark)!r}, 'w')", sigma_data=0.4)
    network.meta["state"]["_modules"]["unet"] = unet
    return {"encoder": encoder, "loss_fn": None, "ema": network}


class RawPixels(nn.Module):
    """An autoencoder that does nothing."""

    config = {"block_out_channels": [1]}

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("kept", nn.Parameter(torch.zeros(())))

    def encode(self, x: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=z)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["StandardRGBEncoder", "StabilityVAEEncoder", None])
def test_pickle_of_edm2(tmp_path: Path, training_code: Path, encoder: str | None):
    """The file tells all that the weights do not: none of it is as in the released networks."""
    scale = np.array([0.1, 0.2, 0.5], np.float32)
    bias = np.array([1, 2, -3], np.float32)
    net = edm2(3)
    state = {"scale": scale, "bias": bias} if encoder == "StabilityVAEEncoder" else {}
    content = wrap_edm2(net, training_code, encoder and Saved(encoder, **state))
    path = dump(content, tmp_path / "edm2.pkl")
    prior = load(path)
    assert not training_code.exists()
    assert prior.scale == (1.0 if state else 0.5)

    told = SimpleNamespace(forward_unet=net)
    label = torch.tensor([1, 2])
    assert error(prior, edm, told, label, sigma_data=0.4) < 1e-5
    assert error(prior, edm, told, label, sigma_data=0.5) > 1e-3
    if not state:
        return
    whole = load(path, autoencoder=RawPixels())
    assert isinstance(whole, LatentPrior)
    picture = torch.rand(1, 3, 8, 8)
    latents = picture * torch.tensor(scale)[:, None, None] + torch.tensor(bias)[:, None, None]
    torch.testing.assert_close(whole.to_normalised(picture), latents)
    torch.testing.assert_close(whole.to_data(latents), picture, atol=1e-5, rtol=0)
    short = Saved(encoder or "", scale=scale[:2], bias=bias)
    with pytest.raises(InputError, match="3 channels, and standard= has 2 scales and 3 biases"):
        load(dump({**content, "encoder": short}, path), autoencoder=RawPixels())


def test_arrays_in_pickles(tmp_path: Path, training_code: Path):
    """Those of single precision with few numbers are read, others take no memory."""
    arrays = {
        "short": np.array([1, 2.5], np.float32),
        "long": np.zeros(2000, np.float32),
        "double": np.zeros(3),
        "number": np.float32(1),
    }
    content = wrap(nn.Linear(2, 3), training_code)
    dump({**content, "encoder": Saved("MyEncoder", **arrays)}, tmp_path / "edm.pkl")
    encoder = read_nvidia_pickle(tmp_path / "edm.pkl").encoder
    assert encoder is not None
    assert encoder.attributes["short"].values == (1.0, 2.5)
    assert encoder.attributes["long"].values == encoder.attributes["double"].values == ()
    arrays["short"] = np.array([Path()])  # an object
    dump({**content, "encoder": Saved("MyEncoder", **arrays)}, tmp_path / "edm.pkl")
    with pytest.raises(CheckpointError, match=r"it names pathlib\.PosixPath"):
        read_nvidia_pickle(tmp_path / "edm.pkl")


def test_pickles_of_edm2_that_are_refused(
    tmp_path: Path, training_code: Path, monkeypatch: pytest.MonkeyPatch
):
    path, net = tmp_path / "edm2.pkl", edm2(3)
    for encoder, message in (
        (Saved("MyEncoder"), "an unknown encoder MyEncoder"),
        (Saved("StabilityVAEEncoder", scale=[1.0]), "has no attribute 'values'|'list'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(dump(wrap_edm2(net, training_code, encoder), path))
    monkeypatch.setitem(OF_BLOCKS, "resample_filter", [1, 3, 3, 1])
    with pytest.raises(CheckpointError, match=r"a filter other than \[1, 1\]"):
        load(dump(wrap_edm2(net, training_code, None), path))
    monkeypatch.delitem(OF_BLOCKS, "clip_act")
    monkeypatch.setitem(OF_BLOCKS, "resample_filter", [1, 1])
    with pytest.raises(CheckpointError, match="lacks what its class has \\('clip_act'\\)"):
        load(dump(wrap_edm2(net, training_code, None), path))
    assert not training_code.exists()


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
    path = dump(wrap(nn.Linear(2, 3), training_code, "MyPrecond"), tmp_path / "edm.pkl")
    with pytest.raises(
        CheckpointError,
        match=r"holds a MyPrecond; expected one of EDMPrecond, .* of EDM, or Precond of EDM2",
    ):
        load(path)
    dump(wrap(nn.Linear(2, 3), training_code, sigma_data=0.5), path)
    with pytest.raises(CheckpointError, match="no DhariwalUNet or SongUNet"):
        load(path)
    dump(wrap(nn.Linear(2, 3), training_code, "Precond"), path)
    with pytest.raises(CheckpointError, match="holds no U-Net of EDM2"):
        load(path)
    loop = wrap(nn.Linear(2, 3), training_code)
    parts = loop["ema"].meta["state"]["_modules"]
    parts["again"] = loop["ema"]
    parts["model"].meta["state"]["_modules"]["twice"] = parts["model"]
    with pytest.raises((CheckpointError, RecursionError)):
        read_nvidia_pickle(dump(loop, path))


def test_pickles_that_lack_what_their_class_has(models: Any, tmp_path: Path, training_code: Path):
    net, path = network(models, "adm"), tmp_path / "edm.pkl"
    for kind, attributes, lacks in (
        ("EDMPrecond", {}, "sigma_data"),
        ("VPPrecond", {"beta_d": 19.9, "beta_min": 0.1}, "M"),
        ("VEPrecond", {"sigma_min": 0.02, "sigma_max": "much"}, "much"),
    ):
        dump(wrap(net, training_code, kind, **attributes), path)
        with pytest.raises(CheckpointError, match=f"a {kind} that lacks .*{lacks}"):
            load(path)
    content = wrap(net, training_code, "iDDPMPrecond")
    del content["ema"].meta["state"]["_buffers"]["u"]
    with pytest.raises(CheckpointError, match=r"a iDDPMPrecond that lacks .*\('u'\)"):
        load(dump(content, path))
