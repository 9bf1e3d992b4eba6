"""Which convention a network follows, measured on pictures: `prior.check()` and `invguide doctor`."""

from invguide.renamed import old_names

__getattr__ = old_names(__name__)
