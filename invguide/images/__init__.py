"""Picture files: reading and writing, what they keep besides pixels, and the level of noise in them."""

from invguide.images.reading import Picture, read_picture
from invguide.images.writing import encode_png, write_picture

__all__ = ["Picture", "encode_png", "read_picture", "write_picture"]
