"""A small BLIP-2 checkpoint, trained on drawn scenes, and what is needed to make and judge it."""
