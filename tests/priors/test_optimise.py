"""Networks made faster or smaller: the denoiser and its gradient stay what they are."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn

import invguide as ig
from invguide.errors import InputError
from invguide.operators import GaussianBlur
from invguide.prior import Prior
from invguide.priors import NetworkPrior, from_network
from invguide.priors.networks import recompute
from invguide.priors.networks.recompute import find_blocks
from invguide.solvers import DPS
from invguide.system.memory import peak_memory


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()
        )
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return x + self.last(self.layers(x if shift is None else x + shift))


class Net(nn.Module):
    """A user's network: blocks as attributes, in lists, in a Sequential, and inside another module."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.style = style
        if style == "attributes":
            self.down, self.middle, self.up = Block(), Block(), Block()
        elif style == "lists":
            self.levels = nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([Block()] * 1)])
            self.up = Block()
        elif style == "sequential":
            self.body = nn.Sequential(Block(), nn.Sequential(Block(), Block()))
        else:
            self.body = Net("attributes")

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.stem(x)
        shift = torch.sin(time)[:, None, None, None]
        if self.style == "attributes":
            x = self.up(self.middle(self.down(x, shift=shift)), shift)
        elif self.style == "lists":
            for level in self.levels:
                for block in level:  # pyright: ignore[reportGeneralTypeIssues]
                    x = block(x, shift)
            x = self.up(x)
        elif self.style == "sequential":
            x = self.body(x)
        else:
            x = x + self.body(x[:, :1], time)
        return self.head(x)


BLOCKS = {
    "attributes": ["down", "middle", "up"],
    "lists": ["levels.0.0", "levels.1.0", "up"],
    "sequential": ["body.0", "body.1.0", "body.1.1"],
    "wrapped": ["body.down", "body.middle", "body.up"],
}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return 0 * self.layer(x)


def prior_of(net: nn.Module) -> NetworkPrior:
    return from_network(net, predicts="x0", schedule="ve", shape=(1, None, None))


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vjp(prior: Prior, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    denoised = prior.denoise(x, torch.tensor(0.5))
    return denoised.detach(), torch.autograd.grad(denoised, x, image(*x.shape, seed=1))[0]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    # Sums in another order: float32 rounding over some 25 layers.
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, other, strict=True))


# ---- memory="low"


@pytest.mark.parametrize("style", BLOCKS)
def test_blocks_are_found_and_computed_again(style: str) -> None:
    net = Net(style)
    assert find_blocks(net) == BLOCKS[style]
    calls: list[int] = []
    for name in BLOCKS[style]:
        net.get_submodule(name).get_submodule("layers.0").register_forward_hook(
            lambda *_: calls.append(1)
        )
    prior, x = prior_of(net), image(2, 1, 16, 24)
    expected, count = vjp(prior, x), len(calls)
    calls.clear()
    assert prior.optimise("fp32", channels_last=False, memory="low") is prior
    assert same(vjp(prior, x), expected)
    assert len(calls) == 2 * count
    calls.clear()
    with torch.no_grad():
        prior.denoise(x, 0.5)
    assert len(calls) == count  # nothing to compute again without gradients
    prior.optimise("fp32", channels_last=False)
    calls.clear()
    assert same(vjp(prior, x), expected)
    assert len(calls) == count


def test_memory_is_less_than_half() -> None:
    """Of a network of many blocks, such as large U-Nets: at most 45 %."""

    def peak(prior: Prior) -> int:
        return peak_memory(lambda: vjp(prior, torch.zeros(1, 3, 64, 64)), torch.device("cpu"))

    prior = ig.load_prior("natural-tiny")
    eager = peak(prior)
    low = peak(prior.optimise("fp32", memory="low"))
    assert low < 0.45 * eager
    # Blocks that are too large keep all of their activations at once while they are computed again.
    halves = peak(prior.optimise("fp32", memory="low", blocks=("encoder", "decoder.0")[1:]))
    assert halves > 0.6 * eager


def test_a_wrong_gradient_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, x = ig.load_prior("natural-tiny"), image(1, 3, 32, 32)
    expected = vjp(prior, x)
    assert same(vjp(prior.optimise("fp32", memory="low"), x), expected)
    right = recompute.checkpoint

    def cut(function, first, *rest, **kwargs):
        return right(function, first.detach().requires_grad_(), *rest, **kwargs)

    monkeypatch.setattr(recompute, "checkpoint", cut)
    assert not same(vjp(prior, x), expected)


def test_copies_are_networks_of_their_own() -> None:
    prior, x = prior_of(Net("attributes")).optimise("fp32", memory="low"), image(1, 1, 16, 16)
    expected = vjp(prior, x)
    for twin in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):  # noqa: S301
        assert set(twin.state_dict()) == set(prior.state_dict())
        assert same(vjp(twin, x), expected)
        for weight in twin.parameters():
            weight.mul_(1.5)
        assert not same(vjp(twin, x), expected)
        assert same(vjp(prior, x), expected)


@pytest.mark.parametrize(
    ("net", "settings", "match"),
    [
        (Net("attributes"), {"memory": "lo"}, "unknown memory 'lo'; did you mean 'low'"),
        (nn.Conv2d(1, 1, 3), {"memory": "low"}, "Conv2d has no parts of several layers"),
        (Net("attributes"), {"memory": "low", "blocks": ("upp",)}, "no module 'upp'"),
        (
            Net("attributes"),
            {"memory": "low", "blocks": ("up", "up.layers")},
            "block 'up.layers' is inside block 'up'",
        ),
    ],
)
def test_errors(net: nn.Module, settings: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        prior_of(net).optimise("fp32", **settings)


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_gradients_go_through_the_compiler(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time, but not turned into machine code, which takes minutes."""
    torch.compiler.reset()
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    prior, x = prior_of(Net("attributes")), image(2, 1, 16, 24)
    expected = vjp(prior, x)
    monkeypatch.setattr(torch, "compile", compiler)
    prior.optimise("fp32", compile=True, memory=memory)
    assert same(vjp(prior, x), expected)


# ---- precision


def test_a_prior_within_a_network_is_made_faster_too() -> None:
    """A guided denoiser asks a prior of its own; bf16 has 8 bits, so its error is about 2^-9 of the output."""
    inner = ig.load_prior("natural-tiny")

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prior = inner

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return 0.5 * self.prior.denoise(x, sigma)

    prior = from_network(Halved(), "x0", "ve", (3, None, None))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = prior.denoise(x, 0.5)
    difference = (prior.optimise("bf16").denoise(x, 0.5) - exact).norm() / exact.norm()
    assert 1e-4 < difference < 3e-2
    assert torch.equal(prior.optimise("fp32", channels_last=False).denoise(x, 0.5), exact)


def test_the_state_of_a_solver_is_float32_or_better() -> None:
    operator, y = GaussianBlur(sigma=1.0), image(1, 1, 16, 16)
    for kind, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        prior = prior_of(Plain().to(kind))
        result = ig.solve(
            y, operator, prior, sigma_y=1.0, solver=DPS(num_steps=2), device="cpu", progress=False
        )
        assert result.samples.dtype == expected
