"""Adapters: a network trained in any of the usual conventions becomes a denoiser, once, here."""

# Longer than 350 lines: one class and its constructor, whose docstrings explain every convention.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invguide.arguments.checks import checked
from invguide.arguments.rules import Count, FreeShape, Positive, Scale
from invguide.errors import InputError, ShapeError, suggest
from invguide.numerics.linear import per_sample
from invguide.numerics.padding import extend, round_up
from invguide.prior import Prior
from invguide.priors.networks.clocks import LARGEST_USEFUL_SIGMA, SCHEDULES, VP, Clock
from invguide.priors.networks.conditions import conditions_of
from invguide.priors.networks.preconditioning import edm_coefficients
from invguide.priors.networks.recompute import keep_all, recompute
from invguide.priors.precision import try_half
from invguide.renamed import old_names

if TYPE_CHECKING:
    from invguide.priors.doctor.examine import Report


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY = ("normal", "low")
PREDICTS = ("eps", "v", "x0", "score", "flow", "edm")


class NetworkPrior(Prior):
    """A frozen network as a denoiser; made by `from_network`, which documents the arguments.

    Args:
        net: A module or any callable; frozen.
        predicts: One of "eps", "v", "x0", "score", "flow", "edm".
        schedule: How the network was shown its noisy inputs, an object: `from_network` makes it of a name.
        shape: One sample, channels first; None where the network takes any size.
        scale: Data units of one normalised unit: data = scale * normalised + shift.
        shift: Of normalised 0, data units.
        multiple: Axes of free size (None) are reflected to a multiple of this, pixels.
        sigma_data: Standard deviation of clean data, normalised units.
        sigma_min: Lowest noise level, normalised units.
        sigma_max: Highest noise level, normalised units.
        time_scale: Multiplies the time argument of the network.
        reverse_time: Whether the network's clock runs from noise to data.
    """

    sigma_data: float

    def __init__(
        self,
        net: Callable[..., Any],
        predicts: str,
        schedule: Clock,
        shape: tuple[int | None, ...],
        *,
        scale: float,
        shift: float,
        multiple: int,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        time_scale: float,
        reverse_time: bool,
    ) -> None:
        super().__init__()
        if isinstance(net, nn.Module):
            net.requires_grad_(False)
        self.net = net
        self._conditions = conditions_of(net)
        self.predicts, self.schedule = predicts, schedule
        self.shape, self.scale, self.shift = shape, scale, shift
        self.multiple, self.time_scale, self.reverse_time = multiple, time_scale, reverse_time
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.layout = torch.contiguous_format
        self._compiled: list[
            Callable[..., Any]
        ] = []  # in a list: not a second copy of the weights
        self.eval()

    def train(self, mode: bool = True) -> NetworkPrior:
        """Stay in evaluation mode: dropout would make the denoiser a random function."""
        return super().train(False)

    def optimise(
        self,
        dtype: str = "bf16",
        *,
        compile: bool = False,
        channels_last: bool = True,
        memory: str = "normal",
        blocks: Sequence[str] | None = None,
    ) -> NetworkPrior:
        """Make the network faster or smaller, in place; states, noise levels and the conversion to D stay as they are.

        Args:
            dtype: "fp32", or "bf16" or "fp16": matrix products and convolutions in half precision (autocast). The
                error of D, relative to sigma, is that of the format: about 4e-3 in bf16. Or "auto": bf16 with its
                channels last where a trial of a few calls on this machine, once per process, finds that faster and
                as good (`priors.precision`), else fp32. `precision` tells; a checkpoint goes on in the same only.
            compile: Compile the network; the first call of every shape then takes tens of seconds.
            channels_last: Store images with their channels last, which convolutions like.
            memory: "normal", or "low": vector-Jacobian products keep the inputs of the network's blocks only and
                compute the rest again, block by block, for about a third more time.
            blocks: Dotted names of those blocks, where they are not found by themselves (`priors.recompute`).

        Returns:
            The prior itself.

        Raises:
            InputError: Unknown dtype, memory or block; something else than a type for a network that is no module.
        """
        if dtype not in (*PRECISIONS, "auto"):
            raise InputError(f"unknown dtype {dtype!r}; {suggest(dtype, [*PRECISIONS, 'auto'])}")
        if memory not in MEMORY:
            raise InputError(f"unknown memory {memory!r}; {suggest(memory, MEMORY)}")
        low = memory == "low"
        if not isinstance(self.net, nn.Module) and (compile or channels_last or low):
            raise InputError(
                "the network is a plain function; use channels_last=False, compile=False and memory='normal'"
            )
        if isinstance(self.net, nn.Module):
            keep_all(self.net)
            if low:
                recompute(self.net, blocks)
        self._compiled = []
        if dtype == "auto":
            trial = try_half(self)
            dtype = "fp32" if trial is None else trial.dtype
            channels_last = channels_last and dtype != "fp32"
        self.set_precision(
            dtype, torch.channels_last if channels_last else torch.contiguous_format
        )
        self._compiled = [torch.compile(self.net)] if compile else []
        return self

    def set_precision(self, dtype: str, layout: torch.memory_format) -> None:
        """Calls from now on are in this precision and layout; what else `optimise` does stays."""
        if isinstance(self.net, nn.Module):
            for part in self.net.modules():
                if isinstance(part, NetworkPrior):  # its calls would go back to single precision
                    part.precision = dtype
            self.net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        self.precision, self.layout = dtype, layout

    def check(self, images: Tensor | None = None, **condition: Tensor) -> Report:
        """Denoise known images under every convention that could apply, and tell which one is right.

        Args:
            images: Clean signals like those of the training, (N, *shape), data units; by default a photograph.
            condition: Of a conditional network, one row per image.

        Returns:
            A report that prints as a table and a verdict; `fits` is True where all is well.
        """
        from invguide.priors.doctor.examine import examine

        return examine(self, images, condition=condition)

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        """Return E[x0 | x0 + sigma n = x].

        Below sigma_min the network is called at sigma_min and its output is converted with the
        true sigma, so that D(x; 0) = x for every prediction that is relative to x.

        Raises:
            ShapeError: If x or the network's output has the wrong shape.
            InputError: If sigma is above sigma_max.
        """
        sizes = [size or got for size, got in zip(self.shape, x.shape[1:], strict=False)]
        if x.ndim != 1 + len(self.shape) or list(x.shape[1:]) != sizes:
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise ShapeError(f"This prior takes x of shape (B, {wanted}), got {tuple(x.shape)}.")
        # Half precision cannot tell neighbouring steps apart: levels are float32 or better.
        exact = torch.promote_types(x.dtype, torch.float32)
        sigma = torch.as_tensor(sigma, dtype=exact, device=x.device).expand(len(x))
        if bool((sigma > self.sigma_max * (1 + 1e-5)).any()):
            raise InputError(
                f"sigma = {float(sigma.max()):.6g} is above the range of this prior, "
                f"[{self.sigma_min:.4g}, {self.sigma_max:.4g}] in normalised units: the network "
                "was never trained there."
            )
        return self.convert(x, sigma, self.output(x, sigma, **condition))

    def output(self, x: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        """Return what the network makes of x at levels sigma (B,), in its own convention, shape of x."""
        time = self.schedule.time(sigma.clamp(self.sigma_min, self.sigma_max))
        if self.reverse_time:
            assert self.schedule.end is not None
            time = self.schedule.end - time
        return self._call(per_sample(self.schedule.factor(sigma), x) * x, time, condition)

    def convert(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """Return the denoised images that an output of the network for x and sigma (B,) stands for."""
        s = self.schedule.factor(sigma)

        def scaled(value: Tensor) -> Tensor:
            return per_sample(value, x)

        match self.predicts:
            case "eps":
                return x - scaled(sigma) * output
            case "x0":
                return output
            case "v":  # v = sqrt(abar) n - sqrt(1 - abar) x0, sqrt(abar) = s
                return scaled(s * s) * x - scaled(s * sigma) * output
            case "score":  # of the network's own input s x: grad log p(x) = s * output
                return x + scaled(sigma**2 * s) * output
            case "flow":  # velocity in the network's own time, at input s x
                velocity = -output if self.reverse_time else output
                return scaled(s) * x - scaled(s * sigma) * velocity
        skip, out, _, _ = edm_coefficients(sigma, self.sigma_data)
        return scaled(skip) * x + scaled(out) * output

    def _call(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Call the network in its own type, on a padded image; return what belongs to the image."""
        known = any(t.is_floating_point() for t in (*self.parameters(), *self.buffers()))
        dtype = self.dtype if known else x.dtype
        padded = self._pad(x)
        # Half precision would round step 501.3 to 502: time stays at least float32, and networks
        # cast its embedding.
        time = (self.time_scale * time).to(torch.promote_types(dtype, torch.float32))
        padded = padded.to(dtype)
        if padded.ndim == 4:
            padded = padded.contiguous(memory_format=self.layout)
        net = self._compiled[0] if self._compiled else self.net
        self._check_names(condition)
        half = PRECISIONS[self.precision]
        with torch.autocast(x.device.type, half, enabled=half is not None):
            output = net(padded, time, **condition)
        if not isinstance(output, Tensor):  # diffusers' output classes, or a tuple
            output = output.sample if hasattr(output, "sample") else output[0]
        channels = x.shape[1]
        if output.shape[1] == 2 * channels and output.shape[2:] == padded.shape[2:]:
            output = output[:, :channels]  # the second half is a learned variance
        if output.shape != padded.shape:
            raise ShapeError(
                f"The network was given {tuple(padded.shape)} and returned {tuple(output.shape)}; "
                "expected the same shape, or twice the channels (learned variance)."
            )
        crop = (..., *(slice(size) for size in x.shape[2:]))
        return output[crop].to(x.dtype, memory_format=torch.contiguous_format)

    def _check_names(self, condition: dict[str, Tensor]) -> None:
        needed, known = self._conditions
        if needed <= condition.keys() and (known is None or condition.keys() <= known):
            return
        takes = "any" if known is None else ", ".join(sorted(known)) or "none"
        also = f", of which it needs {', '.join(sorted(needed))}" if needed else ""
        fix = (
            "pass condition={name: one row per measurement}"
            if known != set()
            else "leave them out"
        )
        raise InputError(
            f"this prior is given {', '.join(condition) or 'no conditions'}; of conditions, its network "
            f"{type(self.net).__name__} takes {takes}{also}: {fix}"
        )

    def _pad(self, x: Tensor) -> Tensor:
        """Extend image axes of free size at their ends to a multiple of `multiple`."""
        pairs = zip(x.shape[2:], self.shape[1:], strict=True)
        return extend(x, [fixed or round_up(got, self.multiple) for got, fixed in pairs])


@checked
def from_network(
    net: Callable[..., Any],
    predicts: str = "eps",
    schedule: str | Tensor = "linear-vp",
    shape: FreeShape = (3, None, None),
    *,
    data_range: tuple[float, float] = (-1.0, 1.0),
    multiple: Count = 8,
    sigma_data: Positive = 0.5,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    time_scale: Scale = 1.0,
    reverse_time: bool = False,
) -> NetworkPrior:
    """Turn a pretrained network into a Prior.

    The network is called as `net(input, time, **condition)`, in evaluation mode, with frozen
    parameters. `input` is factor * x with x = x0 + sigma n, in the network's own floating-point
    type; time is at least float32:

    | schedule | factor | time (B,) |
    | --- | --- | --- |
    | "linear-vp": DDPM, beta 1e-4 ... 0.02 | 1 / sqrt(1 + sigma^2) | step in [0, 999], fractional |
    | "scaled-linear-vp": Stable Diffusion | 1 / sqrt(1 + sigma^2) | step in [0, 999], fractional |
    | "cosine-vp": Nichol and Dhariwal | 1 / sqrt(1 + sigma^2) | step in [0, 999], fractional |
    | tensor (T,): its own abar, decreasing | 1 / sqrt(1 + sigma^2) | step in [0, T-1], fractional |
    | "ve" | 1 | sigma |
    | "edm" | 1 / sqrt(sigma^2 + sigma_data^2) | ln(sigma) / 4 |
    | "flow" | 1 / (1 + sigma) | t = sigma / (1 + sigma), 1 is noise |

    and its output F becomes the denoised D, with s the factor:

    | predicts | F | D |
    | --- | --- | --- |
    | "eps" | n | x - sigma F |
    | "x0" | x0 | F |
    | "v" (VP only) | s n - s sigma x0 | s^2 x - s sigma F |
    | "score" (not EDM) | grad log p of the network's input | x + sigma^2 s F |
    | "flow" (flow only) | n - x0 (x0 - n if time is reversed) | s x - s sigma F |
    | "edm" (EDM only) | raw output of an EDM network | c_skip x + c_out F |

    A network that is itself a denoiser D(x, sigma), such as EDM's released ones, is predicts="x0",
    schedule="ve". If it returns twice the channels, the second half (a learned variance) is dropped.

    Args:
        net: A module or any callable; its output is a tensor, or has one as `.sample` or `[0]`.
        predicts: One of "eps", "v", "x0", "score", "flow", "edm". Default "eps"; what the network was trained for.
        schedule: A name of the table, or the cumulative products abar (T,) of a VP network. Default "linear-vp"; what
            the network was trained with.
        shape: One sample, channels first; None where the network takes any size. Default (3, None, None), colour
            pictures.
        data_range: What 0 and 1 of the data were mapped to when the network was trained. Default (-1.0, 1.0); (0.0,
            1.0) for one that was shown data as they are.
        multiple: Axes of free size (None) are reflected to a multiple of this, pixels, and cropped again; axes of fixed
            size are taken as they are. Default 8; 2^n for a network that halves images n times.
        sigma_data: Standard deviation of clean data, normalised units, above 0; used by "edm". Default 0.5, that of
            released ones.
        sigma_min: Lowest noise level, normalised units. Default None: that of the schedule ("ve" and "edm": 0.002);
            another to narrow or widen the range.
        sigma_max: Highest noise level, normalised units. Default None: that of the schedule, at most 200 ("ve" and
            "edm": 80); another to narrow or widen the range.
        time_scale: Multiplies the time argument, not 0. Default 1.0; 1000 for flow networks of diffusers.
        reverse_time: Whether the network's clock runs from noise to data: its time is T - 1 - step, or 1 - t of a flow,
            whose velocity is then x0 - n. Default False; True where `prior.check` finds it so.

    Raises:
        InputError: If an argument is unknown, or predicts and schedule do not go together.

    Example:
        >>> net = lambda x, t: torch.zeros_like(x)
        >>> prior = from_network(net, predicts="x0", schedule="ve", shape=(2,))
        >>> prior.denoise(torch.ones(1, 2), 0.5), prior.to_data(torch.tensor(-1.0))
        (tensor([[0., 0.]]), tensor(0.))
    """
    if predicts not in PREDICTS:
        raise InputError(f"Unknown predicts={predicts!r}: {suggest(str(predicts), PREDICTS)}")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise InputError(f"Unknown schedule={schedule!r}: {suggest(schedule, SCHEDULES)}")
        levels = SCHEDULES[schedule](sigma_data)
    else:
        levels = VP(schedule)
    if predicts not in levels.predicts:
        name = schedule if isinstance(schedule, str) else "alphas_bar"
        hint = " A velocity n - x0 is predicts='flow'." if name == "flow" else ""
        raise InputError(
            f"predicts={predicts!r} has no meaning with schedule {name!r}; "
            f"choose one of: {', '.join(levels.predicts)}.{hint}"
        )
    if reverse_time and levels.end is None:
        raise InputError(
            f"reverse_time has no meaning with schedule {schedule!r}, whose time is a function of sigma alone"
        )
    low, high = data_range
    if not low < high:
        raise InputError(f"data_range must be (low, high) with low < high, got {data_range}.")
    smallest = levels.sigma_min if sigma_min is None else float(sigma_min)
    largest = (
        min(levels.sigma_max, LARGEST_USEFUL_SIGMA) if sigma_max is None else float(sigma_max)
    )
    if not 0 < smallest < largest < math.inf:
        raise InputError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, "
            f"got {smallest:.4g} and {largest:.4g}."
        )
    return NetworkPrior(
        net,
        predicts,
        levels,
        tuple(shape),
        scale=1 / (high - low),
        shift=-low / (high - low),
        multiple=multiple,
        sigma_data=sigma_data,
        sigma_min=smallest,
        sigma_max=largest,
        time_scale=time_scale,
        reverse_time=reverse_time,
    )


__getattr__ = old_names(__name__)
