"""Single tensors in files of `torch.save`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from blip2.errors import Blip2Error


def save_tensor(tensor: torch.Tensor, path: Path) -> None:
    """`torch.save` of something small, whose failures are the file's: torch's own writer hides them."""
    import torch

    content = io.BytesIO()
    torch.save(tensor, content)
    path.write_bytes(content.getvalue())


def load_tensor(path: Path, made_by: str) -> torch.Tensor:
    """Load a tensor that `torch.save` wrote, running no code from the file.

    Raises:
        Blip2Error: missing, damaged, or anything but one plain tensor of finite numbers.
    """
    import torch

    if not path.is_file():
        raise Blip2Error(f"{path} does not exist", f"make it with: {made_by}")
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise Blip2Error(f"cannot read {path}: {error.strerror}", "check its permissions") from None
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception:  # anything; its message advises to run what the file holds
        raise Blip2Error(
            f"cannot read {path}: it is damaged, or no tensor that torch.save wrote (a picture needs"
            " its own suffix)",
            f"make it again with: {made_by}",
        ) from None
    if not is_plain(content) or not content.is_floating_point():
        raise Blip2Error(f"{path} holds no plain tensor", f"make it again with: {made_by}")
    if not torch.isfinite(content).all():
        raise Blip2Error(f"{path} holds NaN or Inf", f"make it again with: {made_by}")
    return content


def is_plain(content: Any) -> bool:
    """Whether what was unpickled is a tensor whose numbers are all in the file, and nothing more."""
    import torch

    return (
        isinstance(content, torch.Tensor)
        and content.layout == torch.strided
        and content.device.type == "cpu"
        and not content.is_quantized
        # A file of some bytes can describe a tensor of any size, whose rows are all the same.
        and content.untyped_storage().nbytes() >= content.numel() * content.itemsize
    )
