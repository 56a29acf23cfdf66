"""The demo model in transformers' own classes: made, opened, run, saved."""

import copy
import functools
import json
import math
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from demo.examples import BOS, IGNORED, IMAGE_SIZE, IMAGE_TOKEN, PAD

QUERY_TOKENS = 16
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
    mean, std = clip_statistics(pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@functools.cache  # a copy to a GPU waits until the GPU has nothing else to do
def clip_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's mean and deviation of each colour."""
    return torch.tensor(CLIP_MEAN, device=device), torch.tensor(CLIP_STD, device=device)


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


def save(model: Blip2ForConditionalGeneration, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a Hugging Face checkpoint: weights in fp16, tokenizer, image preprocessing."""
    stage = directory.with_name(directory.name + ".stage")
    shutil.rmtree(stage, ignore_errors=True)
    halved = copy.deepcopy(model).half()
    for part in halved.config.sub_configs:  # which transformers leaves as they were opened
        getattr(halved.config, part).dtype = None
    halved.save_pretrained(stage)
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
