"""Rewards that ship, one per file: r(x) of clean signals in data units, higher is better.

Any function of a batch is a reward too, `as_reward(function)`. So is a program that scores one sample and writes one
number, with timeout, retries and workers:

    as_reward(BlackBox(Command("score --in {input} --out {output}", format="json")))

To add one here: a frozen dataclass in a file of its own. What cannot be differentiated and looks at one sample at a
time in numpy is a `PerSample`; what can be is a `Reward`, its `__call__` in torch operations with independent rows, or
a `NetworkReward` where it asks a user's network. A distance enters with a minus sign.
Weigh and add rewards as numbers: `0.5 * FileSize() + 2 * ConnectedComponents(target=3)`.
"""

from invguide.adapters.rewards import FunctionReward
from invguide.feature_reward import FeatureReward
from invguide.reward import Weighted, as_reward
from invguide.rewards.class_log_prob import ClassLogProb
from invguide.rewards.colour_histogram import ColourHistogram
from invguide.rewards.colourfulness import Colourfulness
from invguide.rewards.connected_components import ConnectedComponents
from invguide.rewards.feature_distance import FeatureDistance
from invguide.rewards.file_size import FileSize
from invguide.rewards.motion import Motion
from invguide.rewards.network_reward import NetworkReward
from invguide.rewards.palette import Palette
from invguide.rewards.per_sample import PerSample
from invguide.rewards.perceptual import Perceptual
from invguide.rewards.preprocess import Preprocess
from invguide.rewards.raft import RAFT
from invguide.rewards.segmentation_agreement import SegmentationAgreement
from invguide.rewards.soft_palette import SoftPalette
from invguide.rewards.softened import softened
from invguide.rewards.style import Style
from invguide.rewards.total_variation import TotalVariation

__all__ = [
    "RAFT",
    "ClassLogProb",
    "ColourHistogram",
    "Colourfulness",
    "ConnectedComponents",
    "FeatureDistance",
    "FeatureReward",
    "FileSize",
    "FunctionReward",
    "Motion",
    "NetworkReward",
    "Palette",
    "PerSample",
    "Perceptual",
    "Preprocess",
    "SegmentationAgreement",
    "SoftPalette",
    "Style",
    "TotalVariation",
    "Weighted",
    "as_reward",
    "softened",
]
