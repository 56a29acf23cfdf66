"""What the scripts leave on disk: written whole or not at all, described by a sidecar, checked.

    with artifacts.staging(output_dir) as stage:         # nothing is in output_dir yet
        torch.save(tensor, stage / "image.pt")
        artifacts.write_sidecar(stage / "image.pt", source=...)
                                                         # now everything is

The sidecar of `a/b.onnx` is `a/b.json`. It names the file, its size and SHA-256, and whatever its
producer says of it; a consumer calls `read_sidecar`, which also checks the size, before it opens
the file itself. What no sidecar names is somebody else's, and not replaced.
"""

from blip2.artifacts.locks import locked
from blip2.artifacts.places import is_foreign, refuse_foreign, refuse_same
from blip2.artifacts.sidecars import (
    check_size,
    data_path,
    describe_file,
    is_described,
    read_json,
    read_sidecar,
    reading_sidecar,
    same_source,
    sha256,
    sidecar_path,
    write_sidecar,
)
from blip2.artifacts.stage import staging
from blip2.artifacts.tensors import is_plain, load_tensor, save_tensor
from blip2.artifacts.verification import Verification

__all__ = [
    "Verification",
    "check_size",
    "data_path",
    "describe_file",
    "is_described",
    "is_foreign",
    "is_plain",
    "load_tensor",
    "locked",
    "read_json",
    "read_sidecar",
    "reading_sidecar",
    "refuse_foreign",
    "refuse_same",
    "same_source",
    "save_tensor",
    "sha256",
    "sidecar_path",
    "staging",
    "write_sidecar",
]
