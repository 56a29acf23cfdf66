"""ViT and Q-Former sessions: one file per engine, one interface; the artifacts decide."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.artifacts import UserError

if TYPE_CHECKING:
    from blip2.vision.session import VisionSession


@dataclasses.dataclass(frozen=True)
class Engine:
    """What opens an artifact, the command that makes it, and the files with a sidecar."""

    module: str
    opener: str
    made_by: str
    files: tuple[str, ...] = ()


# By the artifact that calls for it; where a directory holds several, the first wins.
ENGINES = {
    "visual_encoder/visual_encoder_fp16.plan": Engine(
        "blip2.vision.tensorrt_session",
        "TensorRTSession",
        "python build_vit_qformer.py all",
        ("visual_encoder/visual_encoder_fp16.plan", "Qformer/Qformer_fp16.plan"),
    ),
    "visual_encoder/visual_encoder.onnx": Engine(
        "blip2.vision.onnx_files",
        "open_onnx_session",
        "python onnx_export.py",
        ("visual_encoder/visual_encoder.onnx", "Qformer/Qformer.onnx"),
    ),
    "config.json": Engine(
        "blip2.vision.torch_session",
        "open_checkpoint_session",
        "hf download Salesforce/blip2-opt-2.7b --local-dir DIRECTORY",
    ),
}


def _engine_of(engine_dir: Path) -> Engine | None:
    return next((e for file, e in ENGINES.items() if (engine_dir / file).is_file()), None)


def holds_engine(engine_dir: Path) -> bool:
    """Whether some engine here can run what `engine_dir` holds."""
    return _engine_of(engine_dir) is not None


def artifacts_of(engine_dir: Path, query_tokens: Path) -> dict[Path, str]:
    """The files that a session reads and that have sidecars, each with the command that makes it."""
    engine = _engine_of(engine_dir)
    if engine is None or not engine.files:
        return {}
    files = {engine_dir / file: engine.made_by for file in engine.files}
    return {**files, query_tokens: "python onnx_export.py"}


def _commands_for(engine_dir: Path) -> str:
    """What fills `engine_dir`, or a directory below that is found there: the export comes first."""
    output_dir = engine_dir.parent if engine_dir.name in ("onnx", "plan") else engine_dir
    place = [] if output_dir == Path() else ["--output_dir", str(output_dir)]
    commands = [["python", "onnx_export.py", *place]]
    if engine_dir.name == "plan":
        onnx = ["--onnx_dir", str(output_dir / "onnx"), "--plan_dir", str(engine_dir)]
        commands.append(["python", "build_vit_qformer.py", "all", *(onnx if place else [])])
    return " && ".join(map(shlex.join, commands))


def open_vision_session(engine_dir: Path, query_tokens: Path) -> VisionSession:
    """Open the session that the artifacts in `engine_dir` call for; weights are read by its `load`.

    Args:
        engine_dir: the directory that holds visual_encoder/ and Qformer/, or a checkpoint.
        query_tokens: the file query_tokens.pt of the same export; a checkpoint has its own.

    Raises:
        UserError: no artifact there, or one that cannot be used; names the command to run.
    """
    engine = _engine_of(engine_dir)
    if engine is None:
        raise UserError(
            f"{engine_dir} holds no ViT and Q-Former; make them with: {_commands_for(engine_dir)}"
        )
    open_session = getattr(importlib.import_module(engine.module), engine.opener)
    return open_session(engine_dir, query_tokens)
