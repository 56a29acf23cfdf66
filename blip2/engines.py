"""The engines, in one table: what a directory holds decides which of them runs it.

open_vision_session(Path("onnx"), Path("query_tokens.pt"))     # the ViT and the Q-Former
open_language_session(Path("opt/2.7B/trt_ckpt/fp16/1-gpu"))    # OPT
Places.of(engine_dir="export").query_tokens                    # what lies around them
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2 import checkpoints, cpu, layout
from blip2.checkpoints import is_checkpoint, locate
from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from blip2.language import LanguageSession
    from blip2.vision.session import VisionSession

_BELOW = ("plan", "onnx")  # an export's directory; the first that holds something is taken
_OPT_DEFAULTS = ("trt_engine/blip-2-opt-2.7b/fp16/1-gpu", "opt/2.7B/trt_ckpt/fp16/1-gpu")

# What a fingerprint is made of: descriptions are smaller than this, weights larger.
_SUFFIXES = {".json", ".plan", ".onnx", ".data", ".safetensors", ".engine", ".pt"}
_READ_WHOLE = 1 << 20  # bytes
_BLOCKS, _BLOCK_BYTES = 256, 4096


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way to run half of BLIP-2. It is imported only when it is chosen.

    Attributes:
        artifact: what a directory has to hold for it, as messages call it.
        opener: "module:name" of what opens its session.
        made_by: the command that makes the artifact.
        files: those it reads that have sidecars.
        is_in: whether a directory holds the artifact.
        is_checkpoint: whether the artifact is a checkpoint, with query tokens and tokenizer in it.
    """

    artifact: str
    opener: str
    made_by: str
    files: tuple[str, ...]
    is_in: Callable[[Path], bool]
    is_checkpoint: bool = False

    def open(self, *arguments: Any) -> Any:
        """The session on these files; its `load` reads the weights.

        Raises:
            Blip2Error: they cannot be used.
        """
        cpu.limit_threads()
        module, _, name = self.opener.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments)

    def described(self, directory: Path) -> dict[Path, str]:
        """The files in `directory` that have sidecars, each with the command that makes it."""
        return {directory / file: self.made_by for file in self.files}


def _has(file: str) -> Callable[[Path], bool]:
    return lambda directory: (directory / file).is_file()


# Where a directory holds several artifacts the first wins.
VISION = (
    Engine(
        layout.VIT_PLAN,
        "blip2.vision.tensorrt_session:TensorRTSession",
        layout.BUILD_PLANS,
        (layout.VIT_PLAN, layout.QFORMER_PLAN),
        _has(layout.VIT_PLAN),
    ),
    Engine(
        layout.VIT_ONNX,
        "blip2.vision.onnx_files:open_onnx_session",
        layout.EXPORT,
        (layout.VIT_ONNX, layout.QFORMER_ONNX),
        _has(layout.VIT_ONNX),
    ),
    Engine(
        "a BLIP-2 checkpoint",
        "blip2.vision.torch_session:open_checkpoint_session",
        layout.DOWNLOAD,
        (),
        _has("config.json"),
        is_checkpoint=True,
    ),
)
LANGUAGE = (
    Engine(
        layout.OPT_ENGINE,
        "blip2.language.tensorrt_llm:TensorRTLLMSession",
        layout.BUILD_ENGINE,
        (),  # TensorRT-LLM gives its engines no sidecars
        _has(layout.OPT_ENGINE),
    ),
    Engine(
        layout.OPT_WEIGHTS,
        "blip2.language.native.session:NativeSession",
        layout.CONVERT,
        (layout.OPT_WEIGHTS,),
        _has(layout.OPT_WEIGHTS),
    ),
    Engine(
        "a BLIP-2 or OPT checkpoint",
        "blip2.language.native.session:NativeSession",
        layout.DOWNLOAD,
        (),
        is_checkpoint,
        is_checkpoint=True,
    ),
)


def engine_for(table: Iterable[Engine], directory: Path) -> Engine | None:
    """The engine of `table`, VISION or LANGUAGE, that runs what `directory` holds."""
    return next((engine for engine in table if engine.is_in(directory)), None)


def open_vision_session(engine_dir: Path, query_tokens: Path) -> VisionSession:
    """Open the session that the artifacts in `engine_dir` call for; `load` reads weights.

    Args:
        engine_dir: the directory that holds visual_encoder/ and Qformer/, or a checkpoint.
        query_tokens: the file query_tokens.pt of the same export; a checkpoint has its own.

    Raises:
        Blip2Error: no artifact there, or one that cannot be used; names the command to run.
    """
    engine = engine_for(VISION, engine_dir)
    if engine is None:
        raise Blip2Error(
            f"{engine_dir} holds no ViT and Q-Former",
            f"make them with: {_commands_for(engine_dir)}",
        )
    return engine.open(engine_dir, query_tokens)


def _commands_for(engine_dir: Path) -> str:
    """What fills `engine_dir`, or a directory below that is found there: the export comes first."""
    output_dir = engine_dir.parent if engine_dir.name in _BELOW else engine_dir
    place = [] if output_dir == Path() else ["--output_dir", str(output_dir)]
    commands = [[*layout.EXPORT.split(), *place]]
    if engine_dir.name == "plan":
        onnx = ["--onnx_dir", str(output_dir / "onnx"), "--plan_dir", str(engine_dir)]
        commands.append([*layout.BUILD_PLANS.split(), *(onnx if place else [])])
    return " && ".join(map(shlex.join, commands))


def open_language_session(directory: Path, precision: str | None = None) -> LanguageSession:
    """Open the OPT in `directory` with the engine that its artifact is for; `load` reads weights.

    Args:
        directory: of an engine or a checkpoint.
        precision: "float16", "int8" or "int4", to which a checkpoint of Hugging Face's is brought;
            None is what the artifact has, float16 of such a checkpoint.

    Raises:
        Blip2Error: no such directory, no artifact in it, or one that its engine cannot take.
    """
    engine = engine_for(LANGUAGE, directory)
    if engine is None:
        what = "holds no OPT" if directory.is_dir() else "does not exist"
        # What is there already is something else, which a checkpoint does not belong into.
        filled = directory.is_dir() and any(directory.iterdir())
        place = [] if filled else ["--output_dir", str(directory)]
        artifacts = " or ".join(engine.artifact for engine in LANGUAGE)
        command = shlex.join([*layout.CONVERT.split(), *place])
        raise Blip2Error(f"{directory} {what} ({artifacts})", f"make one with: {command}")
    return engine.open(directory, precision)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the parts of BLIP-2 lie; what is a hub id is fetched where it is opened.

    Attributes:
        engine_dir: of the ViT and the Q-Former; or a BLIP-2's hub id.
        opt_engine_dir: of OPT; or a BLIP-2's or OPT's hub id.
        query_tokens: the file query_tokens.pt of the export; None is the one by `engine_dir`.
        tokenizer: directory or hub id; None is `own_tokenizer`.
    """

    engine_dir: str
    opt_engine_dir: str
    query_tokens: str | None = None
    tokenizer: str | None = None

    @classmethod
    def of(
        cls,
        engine_dir: str | Path | None = None,
        opt_engine_dir: str | Path | None = None,
        query_tokens: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> Places:
        """As given, with the places where the scripts put what is None: the first that holds it.

        An `engine_dir` may have plan/ or onnx/ in it.
        """
        vision = (
            _engines_in(Path(engine_dir)) if engine_dir else _first_with(VISION, map(Path, _BELOW))
        )
        opt = opt_engine_dir or _first_with(LANGUAGE, map(Path, _OPT_DEFAULTS))
        given = (None if place is None else str(place) for place in (query_tokens, tokenizer))
        return cls(str(vision), str(opt), *given)

    def fetched(self) -> Places:
        """The same on this disk: what is a hub id is downloaded, once.

        Raises:
            Blip2Error: no such repository, or no network.
        """
        engine_dir = _engines_in(locate(self.engine_dir))
        query_tokens = self.query_tokens or _find_beside(engine_dir, layout.QUERY_TOKENS)
        opt = locate(self.opt_engine_dir)
        return Places(str(engine_dir), str(opt), str(query_tokens), self.tokenizer)

    @property
    def picture(self) -> str:
        """image.pt of the export that the ViT and the Q-Former are from."""
        return str(_find_beside(Path(self.engine_dir), layout.PICTURE))

    @property
    def own_tokenizer(self) -> Path:
        """The tokenizer that came with the ViT and the Q-Former. Of places that are `fetched`."""
        engine_dir = Path(self.engine_dir)
        engine = engine_for(VISION, engine_dir)
        if engine is not None and engine.is_checkpoint:
            return engine_dir
        return Path(self.query_tokens).parent / layout.TOKENIZER

    def described(self) -> dict[Path, str]:
        """The files behind the engines that have sidecars, each with the command that makes it.

        Of places that are `fetched`.
        """
        engine_dir, opt = Path(self.engine_dir), Path(self.opt_engine_dir)
        vision, language = engine_for(VISION, engine_dir), engine_for(LANGUAGE, opt)
        files = language.described(opt) if language else {}
        if vision and not vision.is_checkpoint:
            files |= vision.described(engine_dir) | {Path(self.query_tokens): layout.EXPORT}
        return files

    def fingerprints(self) -> dict[str, str]:
        """What changes with one of the parts, by its name here.

        Raises:
            Blip2Error: a checkpoint cannot be read.
        """
        here = self.fetched()
        names = ("engine_dir", "opt_engine_dir", "query_tokens")
        return {name: fingerprint(Path(getattr(here, name))) for name in names}


def _engines_in(directory: Path) -> Path:
    """The directory if it holds a ViT and a Q-Former, else the one below it that does, else itself."""
    choices = [directory, *(directory / name for name in _BELOW)]
    return next((path for path in choices if engine_for(VISION, path)), directory)


def _first_with(table: Iterable[Engine], directories: Iterable[Path]) -> Path:
    """The first of some directories that holds something to run, else the last of them."""
    *_, last = directories = list(directories)
    return next((path for path in directories if engine_for(table, path)), last)


def _find_beside(engine_dir: Path, name: str) -> Path:
    """A file of the export: with the engines, beside their directory, or in the current one.

    Where there is none, the place where the export would have put it.
    """
    around = [engine_dir / name, engine_dir.parent / name, Path(name)]
    expected = around[1] if engine_dir.is_dir() else around[2]
    return next((path for path in around if path.exists()), expected)


def fingerprint(place: Path) -> str:
    """SHA-256 that changes with the engine in a directory, or with the one file given.

    Descriptions are read whole, and hold the hashes of what they describe; of large files, of which
    not all have one, blocks spread over the file are read, and of a checkpoint's weights blocks of
    every tensor: all of their gigabytes would take minutes.

    Raises:
        Blip2Error: a checkpoint there cannot be read.
    """
    found = place.rglob("*") if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in _SUFFIXES and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place)} {size}\n".encode(errors="replace"))
        with path.open("rb") as file:
            for start, count in _blocks(size):
                file.seek(start)
                digest.update(file.read(count))
    if is_checkpoint(place):
        digest.update(checkpoints.open_checkpoint(place).fingerprint.encode())
    return digest.hexdigest()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Where to read a file of that size, and how much: all of it, or blocks from begin to end."""
    if size <= _READ_WHOLE:
        return [(0, size)]
    return [(i * (size - _BLOCK_BYTES) // (_BLOCKS - 1), _BLOCK_BYTES) for i in range(_BLOCKS)]
