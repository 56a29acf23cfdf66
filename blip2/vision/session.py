"""One interface for every engine that runs the ViT and the Q-Former."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable

import torch

from blip2.errors import Blip2Error
from blip2.images import Preprocessing


class VisionSession(abc.ABC):
    """ViT and Q-Former, whatever runs them. Engines implement `_vit` and `_qformer`.

    The two stay separate so that each can be timed. Batches above `max_batch_size` are split. A
    stage's result may lie in the engine's own memory: the next call of that stage overwrites it.
    """

    device: torch.device
    dtype: torch.dtype
    max_batch_size: int | None = None
    preprocessing: Preprocessing
    num_query_tokens: int
    output_size: int  # H_lm, the hidden size of the OPT that the Q-Former is for
    _is_short_of_memory: bool = False

    @abc.abstractmethod
    def load(self) -> None:
        """Load what opening the session left on disk; the stages do so too. Again: does nothing.

        Opening reads descriptions, so that what does not fit together is refused before weights are
        read.

        Raises:
            Blip2Error: the weights are damaged, or cannot be read.
        """

    def prepare(self, batch_size: int) -> None:  # noqa: B027 - most engines have nothing to prepare
        """Have what batches of that size need compiled; the stages wait for it, or do so themselves."""

    def halve_batch(self, size: int) -> int:
        """From now on work with half of what was too much of a batch of `size`; return how many.

        What larger ones needed is let go.
        """
        self.max_batch_size = max(1, min(size, self.max_batch_size or size) // 2)
        self._is_short_of_memory = True
        return self.max_batch_size

    def vit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values B x 3 x S x S → image_embeds B x T x H_v in the session's dtype.

        As for `pixel_values`, bytes are pixels still to be normalised.

        Raises:
            Blip2Error: the pictures have another size than the checkpoint takes.
        """
        size = (3, self.preprocessing.height, self.preprocessing.width)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != size:
            raise Blip2Error(
                f"the pictures have shape {tuple(pixel_values.shape)}, this ViT takes"
                f" B x {' x '.join(map(str, size))}",
                "make image.pt with the same checkpoint, or give the picture itself",
            )
        self.load()
        return self._split(lambda part: self._vit(self.pixel_values(part)), pixel_values)

    def pixel_values(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures as the ViT takes them, on its device and in its dtype: [B x] 3 x S x S.

        Args:
            pictures: uint8 pixels, as `images.resized_pixels` makes them, which are rescaled and
                normalised now; or floats, for which that was done.
        """
        if pictures.dtype != torch.uint8:
            return pictures.to(self.device, self.dtype, non_blocking=True)
        # The bytes are copied, not what they become: that is two or four times as much.
        rows = pictures.to(self.device, non_blocking=True).int() + self._table_rows
        return self._table.index_select(0, rows.flatten()).view(pictures.shape)

    @functools.cached_property
    def _table(self) -> torch.Tensor:
        """`Preprocessing.table` on the device, channel by channel: 768."""
        table = torch.from_numpy(self.preprocessing.table())
        return table.flatten().to(self.dtype).to(self.device)

    @functools.cached_property
    def _table_rows(self) -> torch.Tensor:
        """Where each channel begins in `_table`: 3 x 1 x 1."""
        return torch.arange(0, 768, 256, dtype=torch.int32, device=self.device)[:, None, None]

    def qformer(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """image_embeds B x T x H_v → query_output B x n x H_lm, projected to OPT's hidden size."""
        self.load()
        return self._split(self._qformer, image_embeds)

    @abc.abstractmethod
    def _vit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `vit`, for a batch of at most `max_batch_size`."""

    @abc.abstractmethod
    def _qformer(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """As `qformer`, for a batch of at most `max_batch_size`."""

    def _split(
        self, stage: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        size = self.max_batch_size or len(batch)
        if len(batch) <= size:
            return stage(batch)
        first = stage(batch[:size])
        if self._is_short_of_memory and first.is_cuda:
            # The result would be cut out of a block that the next part needs whole.
            torch.cuda.empty_cache()
        result = first.new_empty(len(batch), *first.shape[1:])
        # Copied part by part: a stage may return a buffer that its next call overwrites.
        result[:size] = first
        for start in range(size, len(batch), size):
            result[start : start + size] = stage(batch[start : start + size])
        return result
