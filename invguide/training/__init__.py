"""A small trainer for the embedded priors: `python -m invguide.training natural --data photos.zip`."""
