"""Photographs restored: tasks, their files and settings, folders of pictures, workers, the demo."""
