"""Network architectures, and what stands between one and a prior."""
