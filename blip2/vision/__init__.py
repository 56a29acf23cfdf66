"""ViT and Q-Former sessions: one file per engine, one interface; the artifacts decide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2.artifacts import UserError

if TYPE_CHECKING:
    from blip2.vision.session import VisionSession

# What a directory holds → the command that makes it.
ARTIFACTS = {
    "visual_encoder/visual_encoder.onnx": "python onnx_export.py",
}


def holds_engine(engine_dir: Path) -> bool:
    """Whether some engine here can run what `engine_dir` holds."""
    return any((engine_dir / artifact).is_file() for artifact in ARTIFACTS)


def open_vision_session(engine_dir: Path, query_tokens: Path) -> VisionSession:
    """Open the session that the artifacts in `engine_dir` call for.

    Args:
        engine_dir: the directory that holds visual_encoder/ and Qformer/.
        query_tokens: the file query_tokens.pt of the same export.

    Raises:
        UserError: no artifact there, or one that cannot be used; names the command to run.
    """
    if (engine_dir / "visual_encoder/visual_encoder.onnx").is_file():
        from blip2.vision.onnx_runtime import OnnxRuntimeSession

        return OnnxRuntimeSession(engine_dir, query_tokens)
    raise UserError(
        f"{engine_dir} holds no ViT and Q-Former; make onnx/ with: python onnx_export.py"
    )
