"""Exact gradients of whole roll-outs, in constant memory: symplectic adjoints and invertible chains."""

from invguide.adjoint.symplectic import (
    check_loss,
    guide_through,
    rollout,
    rollout_gradient,
    rollout_in,
)

__all__ = ["check_loss", "guide_through", "rollout", "rollout_gradient", "rollout_in"]
