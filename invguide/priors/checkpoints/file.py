"""Weights files of other people: tensors come out, no code of the file runs, and sizes are checked first."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from invguide.arguments.checks import checked
from invguide.errors import CheckpointError

# Where training programs put the weights, averaged ones first: they are the better denoisers.
ENTRIES = (
    *("ema_state_dict", "model_ema", "ema_model", "params_ema", "ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "unet", "params", "module"),
    *("weights", "generator"),
)
# What wrappers put before every name; keys of a plain network may start so too, hence `versions`.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "diffusion_model.", "net.", "unet.")
DEEPEST = 8  # entries within entries
LARGEST_INDEX = (
    256 * 2**20
)  # bytes of pickled names in a zip; those of real checkpoints are below 1 MB

# Narrower than what torch.load(weights_only=True) lets a file call: torch.Tensor and bytearray,
# which it permits, reserve memory of any size that the file names.
HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|(builtins|__builtin__) (set|complex)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter"
    r"|torch\.storage (Untyped|Typed)Storage"
    r"|torch (Size|device|[A-Za-z0-9]+Storage|b?float\d+|u?int\d+|bool|complex\d+|half|double|long)"
)


@checked
def read_weights(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """Return the named tensors of a checkpoint (.safetensors, .pt, .pth, .ckpt, .bin), on the CPU.

    Nothing but tensors is read, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says. Zip files are memory
    mapped: a tensor takes memory when it is used. Shapes and sizes are checked before that.

    Args:
        path: The file; what it is, its content decides and not its name.
        entry: Which part of it, where it holds several networks ("ema", "model", ...). Default None: the first of the
            usual names that holds tensors, averaged weights before others.

    Raises:
        CheckpointError: Not a file of weights, damaged, unsafe, or larger in memory than it is on disk.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; give the path of a checkpoint")
    with open(path, "rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        content: Any = _read_safetensors(path)
    else:
        _check_pickle(path, zipped=head[:4] == b"PK\x03\x04")
        content = _read_pickle(path, zipped=head[:4] == b"PK\x03\x04")
    return _named_tensors(path, content, entry)


def versions(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the weights as they are, then without each prefix that all names share."""
    yield dict(weights)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in weights)), None):
        weights = {name[len(prefix) :]: value for name, value in weights.items()}
        if not weights:
            return
        yield dict(weights)


def load_strictly(net: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a network, which may be on the meta device, from weights that must fit it entirely.

    Raises:
        CheckpointError: A weight is missing, left over, of another shape or kind, or not finite.
    """
    expected = net.state_dict()
    weights = next((v for v in versions(weights) if v.keys() == expected.keys()), weights)
    complaints = [
        _count("missing", [k for k in expected if k not in weights]),
        _count("not of this network", [k for k in weights if k not in expected]),
        _count(
            "of another shape",
            [
                f"{k}: {tuple(weights[k].shape)} in the file, {tuple(v.shape)} in the network"
                for k, v in expected.items()
                if k in weights and weights[k].shape != v.shape
            ],
        ),
        _count(
            "of another kind",
            [
                f"{k}: {weights[k].dtype} in the file, {v.dtype} in the network"
                for k, v in expected.items()
                if k in weights and weights[k].is_floating_point() != v.is_floating_point()
            ],
        ),
    ]
    if any(complaints):
        raise CheckpointError(
            f"{source} does not fit {type(net).__name__} ({'; '.join(filter(None, complaints))}); "
            "no weight is ever left at random: use the file of this network, or the network of this file"
        )
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{source} holds NaN or infinity in {name}: the training has diverged or the file is "
                "damaged; use another checkpoint"
            )
    if any(value.is_meta for value in expected.values()):
        if derived := [name for name, _ in net.named_buffers() if name not in expected]:
            raise CheckpointError(
                f"{type(net).__name__} computes {derived[0]} when it is built, and that is not in {source}: build "
                "the network yourself and pass it: load_prior(net, weights=file, predicts=..., schedule=...)"
            )
        net.to_empty(device="cpu")
    net.load_state_dict(dict(weights), strict=True)


def _count(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}, such as {names[0]}" if names else ""


# ---- safetensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def metadata(path: Path) -> dict[str, str]:
    """Return the header's notes of a safetensors file; nothing of any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, ValueError):
        return {}


# ---- torch.save


def _check_pickle(path: Path, zipped: bool) -> None:
    """Look at the archive and at the names in its pickle, without unpickling."""
    unsafe: list[str] = []
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                for index in _indices(path, archive.infolist()):
                    with archive.open(index) as file:
                        unsafe += unsafe_names(file)
        else:
            with open(path, "rb") as file:
                for _ in range(4):  # magic number, protocol, system, content
                    unsafe += unsafe_names(file)
    except CheckpointError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        if not unsafe:  # a plain pickle ends early, and what it names is the better message
            raise _damaged(path, error) from error
    if unsafe:
        raise CheckpointError(
            f"{path} holds more than tensors ({', '.join(dict.fromkeys(unsafe))}), and reading that could run "
            "code: refused. If you trust where it comes from, save its weights alone, once: "
            "torch.save(net.state_dict(), 'weights.pt')"
        )


def _indices(path: Path, records: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The pickles of an archive that torch.save could have written, or an error that says why it has not."""
    if any(r.filename.endswith("/constants.pkl") for r in records):
        raise CheckpointError(
            f"{path} is a TorchScript program, not weights: running it is up to you; load it with torch.jit.load "
            "and pass the module"
        )
    if any(r.compress_type != zipfile.ZIP_STORED for r in records):
        raise CheckpointError(
            f"{path} is compressed, which torch.save never does: a small file could fill the memory; unzip it, "
            "or save the weights again"
        )
    indices = [r for r in records if r.filename.endswith("data.pkl")]
    if not indices:
        raise CheckpointError(f"{path} is a zip file without weights; expected one of torch.save")
    size = sum(r.file_size for r in indices)
    if size > LARGEST_INDEX:
        raise CheckpointError(
            f"{path} holds {_readable(size)} besides tensors; expected at most {_readable(LARGEST_INDEX)}: save "
            "the state dict alone"
        )
    return indices


def unsafe_names(file: BinaryIO | Any) -> Iterator[str]:
    """Yield what one pickle would import, apart from what tensors and dictionaries are made of."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST") and not HARMLESS.fullmatch(str(argument)):
            yield str(argument).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield "names that are put together while reading"


class _Declared(NamedTuple):
    """What the file says of one tensor, before any of it is read."""

    bytes: int
    stored: int


def _read_pickle(path: Path, zipped: bool) -> Any:
    """Unpickle twice: without data, to compare what is declared with what is there; then mapped."""
    size = path.stat().st_size
    try:
        declared = list(_declared(_without_data(path, zipped)))
        total = sum(d.bytes for d in declared)
        if (
            any(d.bytes > d.stored for d in declared) or total > 2 * size
        ):  # shared ones count twice
            raise CheckpointError(
                f"{path} declares {_readable(total)} of tensors in a file of {_readable(size)}: it is damaged "
                "or made to fill the memory"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _damaged(path, error) from error


def _without_data(path: Path, zipped: bool) -> Any:
    if zipped:
        return torch.load(path, map_location="meta", weights_only=True)
    # Files of before torch 1.6: only in this mode does torch.load not reserve what they declare. Slow to import.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, map_location="cpu", weights_only=True)


def _readable(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.0f} TB"


def _declared(content: Any, depth: int = 0) -> Iterator[_Declared]:
    if isinstance(content, Tensor):
        dense = content.layout == torch.strided and not content.is_quantized
        size = content.numel() * content.element_size()
        yield _Declared(size, content.untyped_storage().nbytes() if dense else -1)
    elif depth < DEEPEST and isinstance(content, Mapping):
        for value in content.values():
            yield from _declared(value, depth + 1)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return CheckpointError(
        f"{path} cannot be read as weights ({type(error).__name__}: {reason}); it is truncated, or not a "
        "file of torch.save or safetensors: download or save it again"
    )


# ---- the state dict within


def _named_tensors(path: Path, content: Any, entry: str | None) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and entry is not None:
        if entry not in content:
            names = ", ".join(str(k) for k in list(content)[:20])
            raise CheckpointError(f"{path} has no entry {entry!r}; it has: {names}")
        content = content[entry]
    weights = _find(content)
    if not weights:
        raise CheckpointError(
            f"{path} holds no named weights; expected a state dict: torch.save(net.state_dict(), 'weights.pt')"
        )
    averaged = {k: v for k, v in weights.items() if k.startswith("ema_model.")}
    return averaged or weights  # beside "online_model.", the same network before averaging


def _find(content: Any, depth: int = 0) -> dict[str, Tensor]:
    """Return the named tensors of the first usual entry that has some, or those of this level."""
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return {}
    for name in ENTRIES:
        if found := _find(content.get(name), depth + 1):
            return found
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
