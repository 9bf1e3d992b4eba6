"""The machinery of the driver's loop: divergence and faults, checkpoints, the identity of a run."""
