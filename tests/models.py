"""Small random checkpoints in Hugging Face's format, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

from blip2.artifacts.safetensors_writer import SafetensorsWriter


def tiny_blip2(
    directory: Path,
    *,
    vision: dict | None = None,
    qformer: dict | None = None,
    text: dict | None = None,
    num_query_tokens: int = 4,
    seed: int = 0,
) -> transformers.Blip2ForConditionalGeneration:
    """Write a BLIP-2 with random weights, its tokenizer and its image processor; return the model.

    Initialised wider than training would, so that answers depend on the picture and the prompt.
    """
    torch.manual_seed(seed)
    wide = {"initializer_range": 0.2}
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            **wide,
            **(vision or {}),
        },
        qformer_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "encoder_hidden_size": (vision or {}).get("hidden_size", 48),
            "vocab_size": 10,
            **wide,
            **(qformer or {}),
        },
        text_config={
            "model_type": "opt",
            "vocab_size": 320,
            "hidden_size": 64,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "word_embed_proj_dim": 64,
            "init_std": 0.2,
            "eos_token_id": 202,  # the newline, as in Salesforce's
            **(text or {}),
        },
        num_query_tokens=num_query_tokens,
        image_token_index=300,
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # biases and norms too: all zeros and ones hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.query_tokens.data.normal_()
    model.save_pretrained(directory)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    return model


def full_size_blip2(directory: Path, *, language: bool = False, seed: int = 0) -> None:
    """Write a BLIP-2 of the real size with random weights in float16, one tensor at a time.

    ViT-g, the Q-Former and the projection to OPT-2.7B (2.2 GB); with `language` OPT-2.7B itself
    too (5.3 GB more). Weights are normal with standard deviation 0.02, around 1 for norms.
    """
    text = transformers.OPTConfig(
        vocab_size=50304,
        hidden_size=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        word_embed_proj_dim=2560,
    )
    config = transformers.Blip2Config(text_config=text.to_dict(), image_token_index=50265)
    with torch.device("meta"):
        model = transformers.Blip2ForConditionalGeneration(config)
    state = model.state_dict()
    state.pop("language_model.lm_head.weight")  # tied to the embedding
    tensors = {
        name: (torch.float16, tuple(tensor.shape))
        for name, tensor in state.items()
        if language or not name.startswith("language_model.")
    }
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(directory / "model.safetensors", tensors) as writer:
        for name, (_, shape) in tensors.items():
            values = torch.empty(shape).normal_(0, 0.02, generator=generator)
            if values.ndim == 1 and name.endswith("weight"):
                values += 1
            writer.write(name, [values])


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """OPT's kind of tokenizer with no merges: its four special tokens, then one token a byte."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return backend


def with_random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Norms near 1, everything else of a size that lets every weight and bias count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            values = 1 + 0.3 * values
        elif parameter.ndim == 2:
            values *= parameter.shape[1] ** -0.5
        parameter.data = values
    return module.eval().requires_grad_(False)
