"""Tables of quality, calibration and speed, against peers where they are installed."""

from invguide.bench.restore import restore
from invguide.bench.tv import restore_tv

__all__ = ["restore", "restore_tv"]
