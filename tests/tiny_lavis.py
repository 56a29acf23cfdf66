"""Tiny BLIP-2s of LAVIS's own classes, to be run by the Python of .venv-lavis.

    python tests/tiny_lavis.py make                     # checkpoints, and what LAVIS says of them
    python tests/tiny_lavis.py export ARGUMENTS …       # onnx_export.py in the same circumstances

Everything lies where LAVIS looks first, so that it runs as it is and downloads nothing: its files in
PyTorch's cache (TORCH_HOME), facebook/opt-2.7b and bert-base-uncased below the working directory.
Only the width and depth of its ViT-g, which are in its code, are changed.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from lavis.models import eva_vit, load_model_and_preprocess
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from omegaconf import OmegaConf
from PIL import Image

PTH_FILES = {
    "pretrain_opt2.7b": "blip2_pretrained_opt2.7b.pth",
    "caption_coco_opt2.7b": "blip2_caption_opt2.7b.pth",
}
PROMPTS = ["", "a photo of", "Question: what is it? Answer:"]
# By the number of beams. LAVIS's transformers counts the prompt into a beam's length, today's does
# not: without a length penalty both rank alike.
DECODINGS = {
    1: {"length_penalty": 1.0, "max_length": 12},
    3: {"length_penalty": 0.0, "max_length": 12},
}

_VisionTransformer = eva_vit.VisionTransformer
eva_vit.VisionTransformer = lambda **options: _VisionTransformer(
    **{**options, "embed_dim": 176, "depth": 2, "num_heads": 2}
)


def make() -> None:
    directory = Path.cwd()
    torch.manual_seed(0)
    make_opt(directory / "facebook" / "opt-2.7b")
    make_bert(directory / "bert-base-uncased")
    cache = Path(torch.hub.get_dir(), "checkpoints")
    cache.mkdir(parents=True)
    make_vit(cache / "eva_vit_g.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((500, 333)).save("picture.png")
    for model_type, pth_file in PTH_FILES.items():
        make_pth(model_type, cache / pth_file)
        describe(model_type, directory / f"{model_type}.pt")


def make_opt(directory: Path) -> None:
    """A random OPT in float16, as facebook's is, and a tokenizer with some merges."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    by_byte = transformers.models.gpt2.tokenization_gpt2.bytes_to_unicode()
    letters = [by_byte[byte] for byte in b"\n" + bytes(range(32, 127))]  # all answers are readable
    merges = [("h", "o"), ("t", "o"), ("Ġ", "a"), ("s", "w"), ("sw", "e"), ("Q", "u"), ("o", "f")]
    words = [*special, *letters, *map("".join, merges)]
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, **tokens}))
    config = transformers.OPTConfig(
        vocab_size=len(words),
        hidden_size=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=64,
    )
    model = transformers.OPTForCausalLM(config)
    randomise(model, linears=0.2)
    # The newline often enough among the first choices for answers to end, and at various lengths.
    model.model.decoder.embed_tokens.weight.data[words.index("Ċ")] *= 0.7
    model.half().save_pretrained(directory)


def make_bert(directory: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        initializer_range=0.1,
    )
    transformers.BertModel(config).save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (directory / "vocab.txt").write_text("\n".join(words))


def make_vit(file: Path) -> None:
    """eva_vit_g.pth, in float16 as it is published, for pictures of 224 x 224."""
    model = eva_vit.VisionTransformer(img_size=224, patch_size=14, mlp_ratio=4.3637, qkv_bias=True)
    randomise(model)
    torch.save(model.half().state_dict(), file)


def make_pth(model_type: str, file: Path) -> None:
    """What LAVIS saves of a model that it trained: the parameters that were not frozen."""
    config = OmegaConf.load(Blip2OPT.default_config_path(model_type)).model
    options = ("image_size", "vit_precision", "freeze_vit", "num_query_token", "opt_model")
    image_size, vit_precision, freeze_vit, num_query_token, opt_model = map(config.get, options)
    model = Blip2OPT(
        img_size=image_size,
        vit_precision=vit_precision,
        freeze_vit=freeze_vit,
        num_query_token=num_query_token,
        opt_model=opt_model,
    )
    randomise(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: x for name, x in model.state_dict().items() if name not in frozen}
    torch.save({"model": state, "config": {"model": OmegaConf.to_container(config)}}, file)


def randomise(model: torch.nn.Module, linears: float = 0.08) -> None:
    """Redraw what is not frozen. Fresh biases are 0 and norms 1: mistakes would not show."""
    spread = {1: 0.1, 2: linears, 3: 1.0, 4: 0.05}  # by rank; 3: embeddings, 4: convolution
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * spread[parameter.ndim]
                parameter.copy_(noise + (parameter.ndim == 1 and name.endswith("weight")))


@torch.no_grad()
def describe(model_type: str, file: Path) -> None:
    """Save LAVIS's own pixel values, outputs of each stage, ids of prompts, and answers."""
    model, processors, _ = load_model_and_preprocess("blip2_opt", model_type, is_eval=True)
    picture = Image.open("picture.png").convert("RGB")
    pixel_values = processors["eval"](picture)[None]
    image_embeds = model.ln_vision(model.visual_encoder(pixel_values))
    query_output = model.Qformer.bert(
        query_embeds=model.query_tokens,
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.long),
        return_dict=True,
    ).last_hidden_state
    answers = {
        (num_beams, prompt): model.generate(
            {"image": pixel_values, "prompt": prompt},
            num_beams=num_beams,
            num_captions=num_beams,
            **options,
        )
        for num_beams, options in DECODINGS.items()
        for prompt in PROMPTS
    }
    torch.save(
        {
            "pixel_values": pixel_values,
            "image_embeds": image_embeds,
            "query_output": model.opt_proj(query_output),
            "query_tokens": model.query_tokens.data,
            "prompt_ids": {text: model.opt_tokenizer(text).input_ids for text in PROMPTS},
            "decodings": DECODINGS,
            "answers": answers,
            "epsilons": {
                "ln_vision": model.ln_vision.eps,
                "ViT": model.visual_encoder.blocks[0].norm1.eps,
                "Q-Former": model.Qformer.bert.embeddings.LayerNorm.eps,
            },
        },
        file,
    )


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make()
    else:
        script = Path(__file__).parent.parent / "onnx_export.py"
        sys.path.insert(0, str(script.parent))
        sys.argv = [str(script), *sys.argv[2:]]
        runpy.run_path(str(script), run_name="__main__")
