"""Exact gradients of whole roll-outs, in constant memory: symplectic adjoints and invertible chains."""

from invguide.adjoint.faults import check_loss
from invguide.adjoint.symplectic import guide_through, rollout, rollout_gradient, rollout_in

__all__ = ["check_loss", "guide_through", "rollout", "rollout_gradient", "rollout_in"]
