"""BLIP-2 in stages: checkpoints, images, prompts, decoding, and the sessions that run each part."""
