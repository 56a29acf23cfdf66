"""What an export consists of: the names of its files, and the commands that make them."""

from __future__ import annotations

# Below onnx/ and plan/, or whatever --engine_dir names.
VIT_ONNX, QFORMER_ONNX = "visual_encoder/visual_encoder.onnx", "Qformer/Qformer.onnx"
VIT_PLAN, QFORMER_PLAN = "visual_encoder/visual_encoder_fp16.plan", "Qformer/Qformer_fp16.plan"
# Beside them.
QUERY_TOKENS, PICTURE, TOKENIZER = "query_tokens.pt", "image.pt", "tokenizer"
# In what --opt_engine_dir names.
OPT_WEIGHTS, OPT_ENGINE = "rank0.safetensors", "rank0.engine"

DOWNLOAD = "hf download Salesforce/blip2-opt-2.7b --local-dir DIRECTORY"
EXPORT = "python onnx_export.py"
BUILD_PLANS = "python build_vit_qformer.py all"
CONVERT = "python opt/convert_checkpoint.py"
BUILD_ENGINE = "the trtllm-build command that opt/convert_checkpoint.py prints"
