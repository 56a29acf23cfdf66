"""The demo model trained, and judged."""

import copy
import math
import random
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration

from demo.examples import IMAGE_SIZE, KINDS, TEXT_LENGTH, Batch, EvaluationBatch
from demo.model import exact, image_features, normalise, text_logits
from demo.scenes import FORMS

QUANTIZED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PRECISIONS = {"fp16": None, "int8": 8, "int4": 4}
LOG_SECONDS = 8.0
SAVE_SECONDS = 100.0


@dataclass(frozen=True)
class Schedule:
    """Until when, how fast, in what batches. Fractions are of the time from first step to end."""

    deadline: float  # on time.monotonic's clock
    first_pictures: int  # that have to be ready before the second step
    images_per_step: int
    learning_rate: float
    warmup: float = 0.04
    int4_from: float = 0.5  # from here on, a share of the steps sees OPT's weights in INT4
    int4_share: float = 0.6
    weight_decay: float = 0.05

    def rate(self, done: float) -> float:
        """The learning rate at fraction `done`: linear warm-up, then a half cosine down to 0."""
        if done < self.warmup:
            return self.learning_rate * max(done, 0.001) / self.warmup
        rest = min(1.0, (done - self.warmup) / (1 - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * rest))


# Weight-only quantization -------------------------------------------------------------------------


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """`weight` (out x in) after symmetric per-output-channel quantization and back."""
    levels = 2 ** (bits - 1)
    scale = weight.abs().amax(dim=1, keepdim=True) / levels
    steps = weight / scale
    rounded = torch.sign(steps) * torch.floor(steps.abs() + 0.5)  # half away from zero
    return rounded.clamp(-levels, levels - 1) * scale


def quantized_names(language_model: nn.Module) -> list[str]:
    """The weights that weight-only quantization changes."""
    return [
        f"{name}.weight"
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(QUANTIZED)
    ]


class Reader(nn.Module):
    """`text_logits` as a module, which is what `functional_call` takes."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """As `text_logits`."""
        return text_logits(self.language_model, features, ids)


def gated_logits(reader: Reader, features: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
    """As `text_logits`, with OPT's weights seen through INT4 where `gate` is 1, as they are at 0.

    The gradient passes the rounding as if it were not there (straight-through estimator). `gate`
    is a tensor so that one compiled program serves both.
    """
    weights = {}
    for name in quantized_names(reader):
        weight = reader.get_parameter(name)
        weights[name] = weight + gate * (fake_quantize(weight, 4) - weight).detach()
    return torch.func.functional_call(reader, weights, (features, ids))


# Training -----------------------------------------------------------------------------------------


class Pictures:
    """Training examples on the training device, growing while the rendering processes deliver."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        size = (IMAGE_SIZE, IMAGE_SIZE, 3)
        texts = (len(KINDS), TEXT_LENGTH)
        self.pixels = torch.empty((capacity, *size), dtype=torch.uint8, device=device)
        self.ids = torch.empty((capacity, *texts), dtype=torch.int16, device=device)
        self.targets = torch.empty((capacity, *texts), dtype=torch.int16, device=device)
        self.ready = 0
        self.failure: Exception | None = None

    def fill_from(self, batches: Iterable[Batch]) -> None:
        """Start a thread that takes in `batches` as they come."""
        threading.Thread(target=self._fill, args=(batches,), daemon=True).start()

    def _fill(self, batches: Iterable[Batch]) -> None:
        try:
            for batch in batches:
                where = slice(self.ready, self.ready + len(batch.pixels))
                for store, part in zip((self.pixels, self.ids, self.targets), batch, strict=True):
                    store[where].copy_(torch.from_numpy(part))
                self.ready = where.stop  # only now may a step draw from it
        except Exception as failure:
            self.failure = failure

    def wait_for(self, count: int, deadline: float = math.inf) -> None:
        """Return when `count` pictures are ready, or at the deadline, on time.monotonic's clock.

        Raises what stopped the rendering, if any.
        """
        while self.ready < count and not self.failure and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.failure:
            raise self.failure

    def sample(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`count` pictures at random: pixel_values, and ids and targets of all their texts."""
        chosen = torch.randint(self.ready, (count,), device=self.pixels.device)
        return (
            normalise(self.pixels[chosen]),
            self.ids[chosen].flatten(0, 1).long(),
            self.targets[chosen].flatten(0, 1).long(),
        )


def means_by_kind(right: list[float]) -> dict[str, float]:
    """The mean over each of KINDS of one number a text."""
    return {
        kind: statistics.fmean(n for n, other in zip(right, KINDS, strict=True) if other == kind)
        for kind in dict.fromkeys(KINDS)
    }


def train(
    model: Blip2ForConditionalGeneration, pictures: Pictures, schedule: Schedule, compiled: bool
) -> Iterator[dict[str, float]]:
    """Train until the deadline, yielding a line for the log every few seconds.

    The first step, and the compilation with it, goes on while the first pictures are drawn.
    """
    device = pictures.pixels.device
    reader = Reader(model.language_model)

    def forward(pixel_values: Tensor, ids: Tensor, targets: Tensor, gate: Tensor) -> tuple:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = image_features(model, pixel_values)
            features = features.repeat_interleave(len(KINDS), 0)
            logits = gated_logits(reader, features, ids, gate)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
        right = exact(logits.detach(), targets).view(-1, len(KINDS)).float().mean(0)
        return loss, right

    step_forward = torch.compile(forward, dynamic=False) if compiled else forward
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not model.query_tokens]
    others = [p for p in model.parameters() if p.ndim < 2 or p is model.query_tokens]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": schedule.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    model.eval()  # nothing is dropped out, and OPT's layer drop would break the compiled graph
    gates = torch.tensor([0.0, 1.0], device=device)
    chance = random.Random(0)
    start = last = None
    steps = steps_before = 0
    while (now := time.monotonic()) < schedule.deadline:
        done = (now - start) / (schedule.deadline - start) if start else 0.0
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(done)
        int4 = done >= schedule.int4_from and chance.random() < schedule.int4_share
        batch = pictures.sample(schedule.images_per_step)
        loss, right = step_forward(*batch, gates[int(int4)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if start is None:
            loss.item()
            pictures.wait_for(schedule.first_pictures, schedule.deadline)
            start = last = time.monotonic()
            steps_before = steps
        elif now - last >= LOG_SECONDS:
            value = loss.item()  # waits for the device, so the rate below is the real one
            spent = time.monotonic() - last
            yield {
                "seconds": now - start,
                "step": steps,
                "images/s": (steps - steps_before) * schedule.images_per_step / spent,
                "pictures": pictures.ready,
                "rate": schedule.rate(done),
                "loss": value,
                **means_by_kind(right.tolist()),
            }
            last, steps_before = time.monotonic(), steps
            if pictures.failure:
                raise pictures.failure


# Judging ------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    checkpoint: Path, batches: list[EvaluationBatch], device: torch.device
) -> dict[str, dict[str, float]]:
    """form -> {"count", "fp16", "int8", "int4"}: percent exact, from the saved fp16 weights.

    The row "questions" sums all forms. On a GPU everything but the Q-Former, which
    transformers keeps in fp32, computes in fp16; on a CPU everything computes in fp32.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    model = model.to(device).eval()
    features = [
        image_features(model, normalise(torch.from_numpy(batch.pixels).to(device)).to(dtype))
        for batch in batches
    ]
    table: dict[str, dict[str, float]] = {}
    for precision, bits in PRECISIONS.items():
        language_model = copy.deepcopy(model.language_model)
        for name in quantized_names(language_model) if bits else ():
            weight = language_model.get_parameter(name)
            weight.copy_(fake_quantize(weight.float(), bits))
        right: dict[str, list[bool]] = {}
        for batch, seen in zip(batches, features, strict=True):
            owner, ids, targets = (
                torch.from_numpy(part).to(device).long()
                for part in (batch.owner, batch.ids, batch.targets)
            )
            hits = exact(text_logits(language_model, seen[owner], ids), targets).tolist()
            for form, hit in zip(batch.forms, hits, strict=True):
                right.setdefault(form, []).append(hit)
        right["questions"] = [hit for form in FORMS for hit in right.get(form, ())]
        for form, hits in right.items():
            row = table.setdefault(form, {"count": len(hits)})
            row[precision] = round(100 * sum(hits) / max(1, len(hits)), 2)
    return table
