"""The demo model in transformers' own classes: made, trained, saved, judged."""

import copy
import json
import math
import random
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2Config, Blip2ForConditionalGeneration

from demo.examples import (
    BOS,
    IGNORED,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PAD,
    TEXT_LENGTH,
    TEXTS_PER_IMAGE,
    Batch,
    EvaluationBatch,
)
from demo.scenes import LEARNED

QUERY_TOKENS = 16
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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


# The model ----------------------------------------------------------------------------------------


def build_config(tokenizer: Tokenizer) -> Blip2Config:
    """Three hidden sizes on purpose: a stage that mixes two of them up fails at once."""
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[0]
    return Blip2Config(
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        qformer_config={
            "vocab_size": 8,  # of a text embedding that BLIP-2 with OPT does not have
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "cross_attention_frequency": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "vocab_size": 8 * math.ceil(tokenizer.get_vocab_size() / 8),
            "hidden_size": 256,
            "word_embed_proj_dim": 256,
            "ffn_dim": 1024,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "do_layer_norm_before": True,
            "dropout": 0.0,
            "init_std": 0.02,
            "bos_token_id": BOS,
            "eos_token_id": newline,
            "pad_token_id": PAD,
        },
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.token_to_id(IMAGE_TOKEN),
    )


@torch.no_grad()
def build_model(config: Blip2Config) -> Blip2ForConditionalGeneration:
    """A model that has learned nothing.

    transformers makes models to be loaded into: query tokens of zero, which would stay equal to
    each other for ever, and weights too small for a narrow network to pass a picture through.
    """
    model = Blip2ForConditionalGeneration(config).float()
    for name, module in model.named_modules():
        if name == "language_model.lm_head":
            continue  # tied to the token embedding
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if name.endswith(("self_attn.projection", "mlp.fc2", "out_proj", "layers.fc2")):
                module.weight *= 0.5  # these add to a residual stream several layers deep
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def open_model(checkpoint: Path) -> Blip2ForConditionalGeneration:
    """A saved model in fp32, to go on training."""
    return Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


def normalise(pixels: Tensor) -> Tensor:
    """B x S x S x 3 uint8 -> B x 3 x S x S float32, with CLIP's mean and deviation."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device)
    std = torch.tensor(CLIP_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def image_features(model: Blip2ForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """B x 3 x S x S -> B x QUERY_TOKENS x OPT's hidden size."""
    embeds = model.vision_model(pixel_values=pixel_values).last_hidden_state
    queries = model.query_tokens.expand(len(embeds), -1, -1)
    output = model.qformer(query_embeds=queries, encoder_hidden_states=embeds).last_hidden_state
    return model.language_projection(output.to(embeds.dtype))


def text_logits(language_model: nn.Module, features: Tensor, ids: Tensor) -> Tensor:
    """What follows each of `ids` (N x L), given its picture's `features` -> N x L x vocabulary.

    No attention mask: padding is on the right, where causal attention never looks.
    """
    embeds = language_model.get_input_embeddings()(ids)
    inputs = torch.cat([features.to(embeds.dtype), embeds], dim=1)
    return language_model(inputs_embeds=inputs, use_cache=False, logits_to_keep=ids.shape[1]).logits


def exact(logits: Tensor, targets: Tensor) -> Tensor:
    """Which texts greedy decoding gets exactly right, newline included.

    Greedy decoding writes the target if and only if, at each place, the target so far makes the
    next right token the likeliest one; so one forward pass over the target decides it.
    """
    guesses = logits[:, :-1].argmax(-1)
    return ((guesses == targets[:, 1:]) | (targets[:, 1:] == IGNORED)).all(-1)


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
        texts = (TEXTS_PER_IMAGE, TEXT_LENGTH)
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
            features = features.repeat_interleave(TEXTS_PER_IMAGE, 0)
            logits = gated_logits(reader, features, ids, gate)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
        right = exact(logits.detach(), targets).view(-1, TEXTS_PER_IMAGE).float().mean(0)
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
    chance = random.Random(0)
    start = last = None
    steps = steps_before = 0
    while (now := time.monotonic()) < schedule.deadline:
        done = (now - start) / (schedule.deadline - start) if start else 0.0
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(done)
        int4 = done >= schedule.int4_from and chance.random() < schedule.int4_share
        batch = pictures.sample(schedule.images_per_step)
        loss, right = step_forward(*batch, torch.tensor(float(int4), device=device))
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
                "captions": right[0].item(),
                "answers": right[1:].mean().item(),
            }
            last, steps_before = time.monotonic(), steps
            if pictures.failure:
                raise pictures.failure


# Saving -------------------------------------------------------------------------------------------


def save(model: Blip2ForConditionalGeneration, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a Hugging Face checkpoint: weights in fp16, tokenizer, image preprocessing."""
    stage = directory.with_name(directory.name + ".stage")
    shutil.rmtree(stage, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(stage)
    tokenizer.save(str(stage / "tokenizer.json"))
    newline = model.config.text_config.eos_token_id
    described = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 128,
            "bos_token": "</s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": ["<s>", IMAGE_TOKEN],
            "clean_up_tokenization_spaces": False,
            "processor_class": "Blip2Processor",
        },
        "preprocessor_config.json": {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "Blip2Processor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        "processor_config.json": {
            "processor_class": "Blip2Processor",
            "num_query_tokens": QUERY_TOKENS,
        },
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": newline,
            "pad_token_id": PAD,
        },
    }
    for name, content in described.items():
        (stage / name).write_text(json.dumps(content, indent=2) + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    for file in stage.iterdir():
        file.replace(directory / file.name)
    stage.rmdir()


# Judging ------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    checkpoint: Path, batches: list[EvaluationBatch], device: torch.device
) -> dict[str, dict[str, float]]:
    """form -> {"count", "fp16", "int8", "int4"}: percent exact, from the saved fp16 weights.

    The row "questions" sums the LEARNED forms. On a GPU everything but the Q-Former, which
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
        right["questions"] = [hit for form in LEARNED for hit in right.get(form, ())]
        for form, hits in right.items():
            row = table.setdefault(form, {"count": len(hits)})
            row[precision] = round(100 * sum(hits) / max(1, len(hits)), 2)
    return table
