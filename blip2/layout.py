"""What an export consists of: the names of its files, and the commands that make them."""

from __future__ import annotations

from pathlib import Path

_IS_REPOSITORY = Path(__file__).resolve().parent.parent.joinpath("pyproject.toml").is_file()


def command(script: str) -> str:
    """How a program is started: as a script of the repository, or as pip installed it."""
    if _IS_REPOSITORY:
        return f"python {script}"
    return "blip2-" + Path(script).stem.replace("_", "-")


def install(extra: str = "") -> str:
    """How what the package needs is installed, or what an extra of it needs: "gpu", "ray", "data"."""
    if _IS_REPOSITORY:
        return f"pip install -r requirements{extra and f'-{extra}'}.txt"
    return f"pip install 'blip2-suite{extra and f'[{extra}]'}'"


# Below onnx/ and plan/, or whatever --engine_dir names.
VIT_ONNX, QFORMER_ONNX = "visual_encoder/visual_encoder.onnx", "Qformer/Qformer.onnx"
VIT_PLAN, QFORMER_PLAN = "visual_encoder/visual_encoder_fp16.plan", "Qformer/Qformer_fp16.plan"
# Beside them.
QUERY_TOKENS, PICTURE, TOKENIZER = "query_tokens.pt", "image.pt", "tokenizer"
# In what --opt_engine_dir names.
OPT_WEIGHTS, OPT_ENGINE = "rank0.safetensors", "rank0.engine"

DOWNLOAD = "hf download Salesforce/blip2-opt-2.7b --local-dir DIRECTORY"
EXPORT = command("onnx_export.py")
BUILD_PLANS = command("build_vit_qformer.py") + " all"
CONVERT = command("opt/convert_checkpoint.py")
RUN = command("run.py")
BUILD_ENGINE = f"the trtllm-build command that {CONVERT} prints"
