"""ClassLogProb: what a classifier thinks of a class."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invguide.arguments.rules import NonNegative, Positive
from invguide.errors import InputError
from invguide.rewards.network_reward import Function, NetworkReward, read_logits


@dataclass(frozen=True, repr=False, eq=False)
class ClassLogProb(NetworkReward):
    """log p(label | x) of a classifier with logits f, natural logarithm:

        r(x) = log sum_{k in labels} exp(f_k(x) / T) - log sum_k exp(m f_k(x) / T)

    T = m = 1 is the classifier as it was trained. T calibrates it. m below 1 flattens the probability that the other
    classes take away, down to the logit itself at m = 0: the joint and marginal temperatures of EluCD (Ma et al. 2024)
    are 1 / T and m / T, theirs 1 and 0.5 in 250 steps of DDPM.

    A reward sees rows, not which sample each is, so that all samples share the label: run once per class.

    Args:
        classifier: Images -> logits (N, K), or a dict that has them as "logits" or "out".
        label: Class index from 0, or several of which any will do.
        temperature: T, above 0, no unit. Default 1.0; higher for a classifier that is surer than it is right.
        marginal: m, 0 or more, no unit. Default 1.0; lower to raise the logit itself and not only its lead over the
            others, 0.5 in EluCD.
        transform: Images in [0, 1] -> what the classifier expects. Default None: as they are; such as
            `Preprocess.imagenet()`.

    Raises:
        InputError: A label that the classifier does not have, a temperature that cannot be, something else than logits.
        ShapeError: Logits of another shape.
    """

    classifier: Function
    label: int | tuple[int, ...] | Any
    temperature: Positive = 1.0
    marginal: NonNegative = 1.0
    transform: Function | None = None

    def __post_init__(self) -> None:
        labels = _labels(self.label)
        object.__setattr__(self, "label", labels[0] if len(labels) == 1 else labels)
        self.connect(self.classifier, self.transform)

    def __call__(self, x: Tensor) -> Tensor:
        logits = read_logits(self, self.network(x), len(x), ndim=2) / self.temperature
        labels = list(_labels(self.label))
        classes = logits.shape[1]
        if labels[-1] >= classes:
            raise InputError(
                f"label is {labels[-1]}; expected 0 to {classes - 1}, the classifier has {classes} classes"
            )
        wanted = torch.logsumexp(logits[:, labels], 1, keepdim=True)
        # The difference comes first, so that a class that is nearly certain keeps its digits.
        return -torch.logsumexp(self.marginal * logits - wanted, 1).to(x)


def _labels(value: Any) -> tuple[int, ...]:
    """Return the class indices in order, each once."""
    several = isinstance(value, (tuple, list))
    try:
        labels = sorted({operator.index(k) for k in (value if several else (value,))})
    except TypeError as error:
        raise InputError(
            f"label is {value!r}; expected a class index, or a tuple of classes of which any will do. One label per "
            f"sample cannot be given, a reward does not know which sample a row is: run once per class"
        ) from error
    if not labels or labels[0] < 0:
        raise InputError(f"label is {value!r}; expected class indices, 0 or more")
    return tuple(labels)
