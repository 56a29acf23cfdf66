"""A small BLIP-2 checkpoint, trained on drawn scenes, and what is needed to make and judge it."""

from blip2 import cli

cli.explain_missing_packages()
