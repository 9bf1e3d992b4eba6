"""EditReward: the base of rewards on edits of a given picture, of which a part must stay as it is."""

from __future__ import annotations

from torch import Tensor

from invguide.reward import Reward


class EditReward(Reward):
    """A reward that knows the picture that is edited.

    Attributes:
        source: The picture (*shape), data units.
        edit_mask: Where it may change, 1, and where it must not, 0; in between, by how much. Broadcasts to the picture.
    """

    source: Tensor
    edit_mask: Tensor
