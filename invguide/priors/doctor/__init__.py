"""Which convention a network follows, measured on pictures: `prior.check()` and `invguide doctor`."""
