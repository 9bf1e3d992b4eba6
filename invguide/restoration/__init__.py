"""Photographs restored: tasks, their files and settings, folders of pictures, workers, the demo."""

from invguide.renamed import old_names

__getattr__ = old_names(__name__)
