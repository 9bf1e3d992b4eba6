"""Rewards that ship, one per file: r(x) of clean signals in data units, higher is better.

Any function of a batch is a reward too, `as_reward(function)`. So is a program that scores one sample and writes one
number, with timeout, retries and workers:

    as_reward(BlackBox(Command("score --in {input} --out {output}", format="json")))

To add one here: a frozen dataclass in a file of its own. What cannot be differentiated and looks at one sample at a
time in numpy is a `PerSample`; what can be is a `Reward`, its `__call__` in torch operations with independent rows.
Weigh and add rewards as numbers: `0.5 * FileSize() + 2 * ConnectedComponents(target=3)`.
"""

from invguide.reward import FunctionReward, Weighted, as_reward
from invguide.rewards.connected_components import ConnectedComponents
from invguide.rewards.file_size import FileSize
from invguide.rewards.palette import Palette
from invguide.rewards.per_sample import PerSample

__all__ = [
    "ConnectedComponents",
    "FileSize",
    "FunctionReward",
    "Palette",
    "PerSample",
    "Weighted",
    "as_reward",
]
