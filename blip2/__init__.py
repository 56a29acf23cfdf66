"""BLIP-2 in stages: checkpoints, images, prompts, decoding, and the sessions that run each part."""

import os

# Nothing is sent anywhere: each library reads its switch when it is imported, which is after this.
for _switch, _off in {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime from 1.32 on: an id under the home directory, a host
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_switch, _off)
