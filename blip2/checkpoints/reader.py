"""The reader of checkpoints: which tensors there are, and each one's bytes when it is asked for.

Layouts: model.safetensors or pytorch_model.bin, whole or sharded with an index; LAVIS's .pth.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from blip2 import artifacts, memory
from blip2.artifacts.tensor_files import Stored, UnknownType, mapped, read_header
from blip2.checkpoints import hub, lavis, refusals
from blip2.errors import Blip2Error, first_line

# The order is transformers' own: a whole file wins over shards, safetensors over pickles.
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
_SMALL_BYTES, _SAMPLED_ROWS = 1 << 20, 16
_INSIDE_OPT = ("model.decoder.", "decoder.")  # today's names, and those of 2022
_CLOSE_OTHERS = "close other programs, or use a machine with more"


def open_checkpoint(model_dir: str | Path) -> Checkpoint:
    """Open a checkpoint directory or LAVIS .pth, or download the Hugging Face repository of that id.

    Raises:
        Blip2Error: no such directory or repository, no network, no weights, a missing shard, a
            truncated or unreadable file, or a model that is not a plain BLIP-2 with OPT, or OPT:
            another one, quantised, or with an adapter that is not merged.
    """
    directory = Path(model_dir)
    if directory.suffix == ".pth" and not directory.is_dir():
        return _open_pth(directory)
    if not directory.is_dir():
        directory = hub.download(str(model_dir))
    refusals.check_directory(directory)
    config = artifacts.read_json(directory / "config.json", _download_command(directory))
    refusals.check_config(directory / "config.json", config)
    tensors = _catalogue(directory)
    dtypes = {name: stored.dtype for name, stored in tensors.items()}
    refusals.check_tensors(directory, config["model_type"], dtypes)
    return Checkpoint(directory, config, tensors, opt_location=directory)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a checkpoint of Hugging Face's, readable or not."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def lavis_checkpoint(model_type: str) -> Checkpoint:
    """Have LAVIS download and build its BLIP-2 of that type, and take its weights.

    Raises:
        Blip2Error: LAVIS is not installed, has no such model, or cannot load it.
    """
    return _of_lavis(Path(model_type), lavis.load_state_dict(model_type))


def _open_pth(file: Path) -> Checkpoint:
    """A LAVIS .pth, together with the ViT's that lies beside it unless it was trained too."""
    content = _load_pickle(file)
    state = lavis.state_dict(content, file)
    if not lavis.holds_vit(state):
        vit = file.with_name(lavis.VIT_FILE)
        if not vit.exists():
            raise Blip2Error(
                f"{file} leaves out the ViT, which was frozen",
                f"put {lavis.VIT_FILE} beside it, from {lavis.VIT_URL}",
            )
        state |= lavis.vit_state_dict(_load_pickle(vit))
    return _of_lavis(file, state, lavis.trained_image_size(content))


def _of_lavis(path: Path, state: lavis.State, image_size: int | None = None) -> Checkpoint:
    config, opt_location = lavis.hugging_face_config(state, path, image_size)
    return Checkpoint(path, config, lavis.hugging_face_tensors(state), opt_location)


class Checkpoint:
    """A checkpoint's configuration and its tensors by name; may be read from several threads.

    `path` is its directory or LAVIS's .pth. `opt_location` is where its OPT and tokenizer are: the
    same directory, or a hub id for LAVIS's, which lack them, or None if only the user can know.
    `mend` is what to do about a damaged one, for messages.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        tensors: Mapping[str, Stored],
        opt_location: str | Path | None,
        mend: str = "download it again",
    ) -> None:
        self.path = path
        self.opt_location = opt_location
        self.mend = mend
        self.config = config
        self._tensors = tensors

    @property
    def kind(self) -> str:
        """`blip-2` or `opt`."""
        return self.config["model_type"]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names as stored, sorted."""
        return tuple(sorted(self._tensors))

    @property
    def is_of_lavis(self) -> bool:
        """Whether LAVIS made it, so that it has no OPT and no files beside it."""
        return self.opt_location != self.path

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self.stored(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements, without reading it."""
        return self.stored(name).dtype

    def tensor(self, name: str, load: Callable[[Stored], torch.Tensor] = mapped) -> torch.Tensor:
        """Read one tensor, by default as one that is backed by the file: do not write into it.

        Args:
            name: the tensor's.
            load: what brings it to where it is wanted, such as a `tensor_files.Loader`.

        Raises:
            Blip2Error: there is no such tensor, or its file cannot be read.
        """
        stored = self.stored(name)
        try:
            return load(stored)
        except (OSError, ValueError) as error:
            if memory.exhausted(error):
                raise
            raise _unreadable(stored.file, error, self.mend) from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all tensors: names, types, shapes and bytes, of large ones some rows' bytes.

        The same weights have the same fingerprint whatever file format and sharding they are stored
        in; of tied tensors, which some files repeat and others leave out, one counts. Up to 1 MiB a
        tensor counts whole (biases, norms, query tokens); a larger one by rows spread over it and by
        its last ones, where an extended vocabulary has its new words.
        """
        digest = hashlib.sha256()
        for name, stored in sorted(self._without_ties().items()):
            shape, dtype = self.shape(stored), self.dtype(stored)
            digest.update(f"{name} {dtype} {list(shape)}\n".encode())
            digest.update(self._sampled(stored))
        return digest.hexdigest()

    def _without_ties(self) -> dict[str, str]:
        """Every tensor once, by the name that counts: where it is stored."""
        stored = {name: name for name in self.names}
        for head in [name for name in self.names if name.endswith("lm_head.weight")]:
            outside = head.removesuffix("lm_head.weight")
            names = [f"{outside}{inside}embed_tokens.weight" for inside in _INSIDE_OPT]
            embedding = next((name for name in names if name in self), None)
            if embedding is None:
                stored[names[0]] = stored.pop(head)
            elif self._sampled(head) == self._sampled(embedding):
                del stored[head]
        return stored

    def _sampled(self, name: str) -> bytes:
        """SHA-256 of a tensor's bytes, or of some of its rows."""
        values = self.tensor(name)
        axis = next((i for i, size in enumerate(values.shape) if size > 1), None)
        if axis is None or values.nbytes <= _SMALL_BYTES:
            parts = [...]
        else:
            rows = values.shape[axis]
            spread = {i * (rows - 1) // _SAMPLED_ROWS for i in range(_SAMPLED_ROWS)}
            chosen = sorted(spread | set(range(max(0, rows - _SAMPLED_ROWS), rows)))
            parts = [(*[slice(None)] * axis, slice(row, row + 1)) for row in chosen]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(values[part].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    def stored(self, name: str) -> Stored:
        """Where a tensor lies.

        Raises:
            Blip2Error: there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise Blip2Error(
                f"{self.path} has no tensor {name}",
                f"the checkpoint is incomplete or not what its configuration says: {self.mend}",
            ) from None


def _download_command(directory: Path) -> str:
    return f"hf download Salesforce/blip2-opt-2.7b --local-dir {directory}"


def _catalogue(directory: Path) -> dict[str, Stored]:
    """Find where each tensor lies and what it is.

    Raises:
        Blip2Error: no weights, a missing shard, an unreadable file, or an index naming tensors
            that its shards do not hold.
    """
    for whole in _WHOLE_FILES:
        index = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return _entries(directory / whole)
        if index.is_file():
            return _sharded_entries(index)
    raise Blip2Error(
        f"{directory} holds no weights: neither of {', '.join(_WHOLE_FILES)} nor an index of"
        " shards",
        "download the checkpoint again, with its weights",
    )


def _sharded_entries(index: Path) -> dict[str, Stored]:
    weight_map = artifacts.read_json(index, _download_command(index.parent)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Blip2Error(f"{index} has no weight_map", "download the checkpoint again")
    entries: dict[str, Stored] = {}
    if not all(isinstance(s, str) and Path(s).name == s for s in weight_map.values()):
        raise Blip2Error(
            f"{index} names shards that lie elsewhere", "download the checkpoint again"
        )
    for shard in sorted(set(weight_map.values())):
        entries |= _entries(index.parent / shard)
    missing = sorted(set(weight_map) - set(entries))
    if missing:
        raise Blip2Error(
            f"{index} lists {missing[0]} and {len(missing) - 1} more tensors that its shards do not"
            " hold",
            "download the checkpoint again",
        )
    return entries


def _entries(file: Path) -> dict[str, Stored]:
    if file.suffix == ".bin":
        content = _load_pickle(file)
        return {name: value for name, value in content.items() if artifacts.is_plain(value)}
    try:
        return dict(read_header(file))
    except UnknownType as error:
        raise Blip2Error(
            f"{file} stores {error.name} as {error.dtype}",
            "use the checkpoint in float32, float16 or bfloat16",
        ) from None
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None


def _load_pickle(file: Path) -> dict[str, Any]:
    """Map a .bin or .pth file; nothing in it is executed, and pages are read when touched."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 cannot be mapped, only read.
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Blip2Error(
            f"{file} is damaged, or holds more than weights, which is not read as it could run code",
            "download the checkpoint again",
        ) from None
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise _unreadable(file, error) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Blip2Error(f"{file} holds no weights by name", "download the checkpoint again")
    return content


def _unreadable(file: Path, error: Exception, mend: str = "download it again") -> Blip2Error:
    if not file.exists():
        return Blip2Error(f"{file} is missing", f"{mend}")
    if kind := memory.exhausted(error):
        return memory.OutOfMemory(f"not enough {kind} memory to open {file}", f"{_CLOSE_OTHERS}")
    return Blip2Error(
        f"cannot read {file}: {first_line(error)}", f"it is truncated or damaged: {mend}"
    )
