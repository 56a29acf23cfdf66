"""The ViT and the Q-Former: one file per engine behind one interface, `VisionSession`."""
