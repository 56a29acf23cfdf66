"""Open a BLIP-2 or OPT checkpoint and read it tensor by tensor, by Hugging Face's names.

    checkpoint = open_checkpoint("Salesforce/blip2-opt-2.7b")       # or a local directory
    checkpoint.kind                                                 # "blip-2"
    QFormerConfig.of(checkpoint).num_hidden_layers                  # 12
    checkpoint.tensor("query_tokens")                               # 1 x 32 x 768

Layouts: model.safetensors or pytorch_model.bin, whole or sharded with an index; LAVIS's .pth. Opening
reads descriptions only; a tensor's bytes are read when it is asked for, and let go with the tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blip2 import artifacts, lavis, memory
from blip2.artifacts import UserError, first_line
from blip2.images import MAX_SIDE

# The order is transformers' own: a whole file wins over shards, safetensors over pickles.
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
_SMALL_BYTES = 1 << 20
_CLOSE_OTHERS = "close other programs, or use a machine with more"
# Far above every model there is: what a damaged file says must not decide how long we compute.
_LARGEST = {"num_hidden_layers": 1000, "image_size": MAX_SIDE}
_LARGEST_SIZE = 1 << 24
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_checkpoint(model_dir: str | Path) -> Checkpoint:
    """Open a checkpoint directory or LAVIS .pth, or download the Hugging Face repository of that id.

    Raises:
        UserError: no such directory or repository, no network, no weights, a missing shard, a
            truncated or unreadable file, or a model that is neither BLIP-2 nor OPT.
    """
    directory = Path(model_dir)
    if directory.suffix == ".pth" and not directory.is_dir():
        return _open_pth(directory)
    if not directory.is_dir():
        directory = _download(str(model_dir))
    config = artifacts.read_json(directory / "config.json", _download_command(directory))
    kind = config.get("model_type")
    if kind not in ("blip-2", "opt"):
        raise UserError(
            f"{directory / 'config.json'} describes a model of type {kind!r}; give a checkpoint of"
            " BLIP-2 (blip-2) or of OPT (opt)"
        )
    return Checkpoint(directory, config, _catalogue(directory), opt_location=directory)


def lavis_checkpoint(model_type: str) -> Checkpoint:
    """Have LAVIS download and build its BLIP-2 of that type, and take its weights.

    Raises:
        UserError: LAVIS is not installed, has no such model, or cannot load it.
    """
    return _of_lavis(Path(model_type), lavis.load_state_dict(model_type))


def _open_pth(file: Path) -> Checkpoint:
    """A LAVIS .pth, together with the ViT's that lies beside it unless it was trained too."""
    content = _load_pickle(file)
    state = lavis.state_dict(content, file)
    if not lavis.holds_vit(state):
        vit = file.with_name(lavis.VIT_FILE)
        if not vit.exists():
            raise UserError(
                f"{file} leaves out the ViT, which was frozen; put {lavis.VIT_FILE} beside it, from"
                f" {lavis.VIT_URL}"
            )
        state |= lavis.vit_state_dict(_load_pickle(vit))
    return _of_lavis(file, state, lavis.trained_image_size(content))


def _of_lavis(path: Path, state: lavis.State, image_size: int | None = None) -> Checkpoint:
    config, opt_location = lavis.hugging_face_config(state, path, image_size)
    tensors = lavis.hugging_face_tensors(state)
    entries = {n: _Entry(path, tuple(t.shape), t.dtype, t) for n, t in tensors.items()}
    return Checkpoint(path, config, entries, opt_location)


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    mapped: torch.Tensor | None = None


class Checkpoint:
    """A checkpoint's configuration and its tensors by name; may be read from several threads.

    `path` is its directory or LAVIS's .pth. `opt_location` is where its OPT and tokenizer are: the
    same directory, or a hub id for LAVIS's, which lack them, or None if only the user can know.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        entries: Mapping[str, _Entry],
        opt_location: str | Path | None,
    ) -> None:
        self.path = path
        self.opt_location = opt_location
        self.config = config
        self._entries = entries

    @property
    def kind(self) -> str:
        """`blip-2` or `opt`."""
        return self.config["model_type"]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names as stored, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements, without reading it."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; it is backed by the file, so do not write into it."""
        entry = self._entry(name)
        if entry.mapped is not None:
            return entry.mapped
        # Opened anew for each tensor: an open file would keep every page read so far in memory.
        with _open_safetensors(entry.file) as file:
            return file.get_tensor(name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, types and shapes of all tensors and the bytes of the small ones.

        Small is up to 1 MiB: biases, norms, query tokens. The same weights have the same
        fingerprint whatever file format and sharding they are stored in; a tied lm_head, which
        some files repeat and others leave out, does not count.
        """
        digest = hashlib.sha256()
        for name in self.names:
            if name.endswith("lm_head.weight"):
                continue
            shape, dtype = self.shape(name), self.dtype(name)
            digest.update(f"{name} {dtype} {list(shape)}\n".encode())
            if math.prod(shape) * dtype.itemsize <= _SMALL_BYTES:
                flat = self.tensor(name).contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise UserError(
                f"{self.path} has no tensor {name}; the checkpoint is incomplete or not what its"
                " configuration says: download it again"
            ) from None


def _download(model_id: str) -> Path:
    """Fetch configuration, tokenizer and weights of a Hugging Face repository; return the folder.

    The .bin weights are fetched only where the repository has no safetensors.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model_id):
        raise UserError(
            f"{model_id} is no directory; give a checkpoint directory or a Hugging Face id such as"
            " Salesforce/blip2-opt-2.7b"
        )
    small = ["*.json", "*.txt", "*.model"]
    try:
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(model_id, allow_patterns=[*small, "*.safetensors"]))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(model_id, allow_patterns=[*small, "pytorch_model*.bin"])
    except Exception as error:  # Which HTTP library's errors come out depends on the hub's version.
        raise UserError(
            f"{model_id} is no directory, and cannot be downloaded ({first_line(error)}); without"
            " a network, copy the checkpoint here and give its directory"
        ) from None
    return directory


def _download_command(directory: Path) -> str:
    return f"hf download Salesforce/blip2-opt-2.7b --local-dir {directory}"


def _catalogue(directory: Path) -> dict[str, _Entry]:
    """Find where each tensor lies and what it is.

    Raises:
        UserError: no weights, a missing shard, an unreadable file, or an index naming tensors
            that its shards do not hold.
    """
    for whole in _WHOLE_FILES:
        index = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return _entries(directory / whole)
        if index.is_file():
            return _sharded_entries(index)
    raise UserError(
        f"{directory} holds no weights: neither of {', '.join(_WHOLE_FILES)} nor an index of"
        " shards; download the checkpoint again, with its weights"
    )


def _sharded_entries(index: Path) -> dict[str, _Entry]:
    weight_map = artifacts.read_json(index, _download_command(index.parent)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; download the checkpoint again")
    entries: dict[str, _Entry] = {}
    if not all(isinstance(s, str) and Path(s).name == s for s in weight_map.values()):
        raise UserError(f"{index} names shards that lie elsewhere; download the checkpoint again")
    for shard in sorted(set(weight_map.values())):
        entries |= _entries(index.parent / shard)
    missing = sorted(set(weight_map) - set(entries))
    if missing:
        raise UserError(
            f"{index} lists {missing[0]} and {len(missing) - 1} more tensors that its shards do not"
            " hold; download the checkpoint again"
        )
    return entries


def _entries(file: Path) -> dict[str, _Entry]:
    if file.suffix == ".bin":
        return {
            name: _Entry(file, tuple(tensor.shape), tensor.dtype, tensor)
            for name, tensor in _load_pickle(file).items()
            if artifacts.is_plain(tensor)
        }
    entries = {}
    with _open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping, it only has keys()
            view = opened.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{file} stores {name} as {view.get_dtype()}; use the checkpoint in float32,"
                    " float16 or bfloat16"
                )
            entries[name] = _Entry(file, tuple(view.get_shape()), dtype)
    return entries


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
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
        raise UserError(
            f"{file} is damaged, or holds more than weights, which is not read as it could run code;"
            " download the checkpoint again"
        ) from None
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise _unreadable(file, error) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{file} holds no weights by name; download the checkpoint again")
    return content


def _unreadable(file: Path, error: Exception) -> UserError:
    if not file.exists():
        return UserError(f"{file} is missing; download the checkpoint again")
    if kind := memory.exhausted(error):
        return memory.OutOfMemory(f"not enough {kind} memory to open {file}; {_CLOSE_OTHERS}")
    return UserError(
        f"cannot read {file}: {first_line(error)}; it is truncated or damaged: download it again"
    )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """BLIP-2's ViT. The defaults are those of transformers, whose files may leave them out."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    post_layernorm_eps: float = 0.0  # 0 means layer_norm_eps; LAVIS's differ
    qkv_bias: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> VisionConfig:
        """Read it from a BLIP-2 checkpoint's config.json."""
        fields = dict(_sub_config(checkpoint, "vision_config"))
        for name in ("image_size", "patch_size"):
            if isinstance(fields.get(name), list):
                fields[name] = _square(checkpoint, name, fields[name])
        if not fields.get("post_layernorm_eps"):
            fields["post_layernorm_eps"] = fields.get("layer_norm_eps", cls.layer_norm_eps)
        return _read_config(cls, fields, checkpoint)

    @property
    def num_tokens(self) -> int:
        """Rows of image_embeds: the patches and one class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """BLIP-2's Q-Former, with the number of its query tokens."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    num_query_tokens: int = 32

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> QFormerConfig:
        """Read it from a BLIP-2 checkpoint's config.json.

        `encoder_hidden_size` is the ViT's width: transformers sets it so, whatever is stored.
        """
        fields = dict(_sub_config(checkpoint, "qformer_config"))
        fields["encoder_hidden_size"] = VisionConfig.of(checkpoint).hidden_size
        fields["num_query_tokens"] = checkpoint.config.get("num_query_tokens", 32)
        return _read_config(cls, fields, checkpoint)


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """OPT, alone or as BLIP-2's language model. `word_embed_proj_dim` 0 means hidden_size."""

    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int = 0
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> OPTConfig:
        """Read it from config.json of an OPT or of a BLIP-2 with an OPT."""
        if checkpoint.opt_location != checkpoint.path:
            raise UserError(
                f"{checkpoint.path} is of LAVIS, which leaves OPT out; give the OPT that it was"
                f" trained with: {checkpoint.opt_location or 'its directory'}"
            )
        if checkpoint.kind == "opt":
            fields = dict(checkpoint.config)
        else:
            fields = dict(_sub_config(checkpoint, "text_config"))
            language = fields.get("model_type", "opt")
            if language != "opt":
                raise UserError(
                    f"the language model in {checkpoint.path} is {language}, not OPT; use a"
                    " BLIP-2 with OPT, such as Salesforce/blip2-opt-2.7b"
                )
        if not fields.get("word_embed_proj_dim"):
            fields["word_embed_proj_dim"] = fields.get("hidden_size", cls.hidden_size)
        return _read_config(cls, fields, checkpoint)

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a LayerNorm stands between the last layer and the head."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm


def image_token_index(checkpoint: Checkpoint) -> int | None:
    """Id of `<image>` in a BLIP-2's tokenizer; None in checkpoints older than that token."""
    config = checkpoint.config
    return config.get("image_token_index", config.get("image_token_id"))


def _sub_config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if checkpoint.kind != "blip-2":
        raise UserError(
            f"{checkpoint.path} is an OPT checkpoint, which has no {name}; give a BLIP-2"
            " checkpoint, such as Salesforce/blip2-opt-2.7b"
        )
    fields = checkpoint.config.get(name)
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise _bad_config(checkpoint, f"{name} is {fields!r}")
    return fields


def _square(checkpoint: Checkpoint, name: str, sides: list[Any]) -> Any:
    if len(set(sides)) != 1:
        raise _bad_config(checkpoint, f"{name} is {sides}, not square")
    return sides[0]


def _read_config(cls: Any, fields: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    """Build a config dataclass from the fields it knows, checking each one's type."""
    values = {}
    for field in dataclasses.fields(cls):
        value = fields.get(field.name, field.default)
        kind = type(field.default)
        if kind is float and type(value) is int:
            value = float(value)
        largest = _LARGEST.get(field.name, _LARGEST_SIZE)
        if type(value) is not kind or (kind is int and not 1 <= value <= largest):
            raise _bad_config(checkpoint, f"{field.name} is {value!r}")
        values[field.name] = value
    if values["hidden_size"] % values["num_attention_heads"]:
        raise _bad_config(
            checkpoint,
            f"hidden_size {values['hidden_size']} is no multiple of num_attention_heads"
            f" {values['num_attention_heads']}",
        )
    return cls(**values)


def _bad_config(checkpoint: Checkpoint, what: str) -> UserError:
    return UserError(f"in {checkpoint.path / 'config.json'}, {what}; download the checkpoint again")
