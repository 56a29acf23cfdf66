"""What `bench.startup` compares with: transformers asked one question about one picture, twice.

    python -m bench.startup_transformers CHECKPOINT PICTURE

Prints seconds to the end of its imports, of loading, and of the first and the second answer.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, BlipImageProcessor

from bench.startup import QUESTION, TOKENS
from blip2 import cli
from blip2.prompts import load_tokenizer


def main() -> None:
    checkpoint, picture = sys.argv[1:]
    seconds = [cli.seconds_since_start()]

    begun = time.perf_counter()
    model = Blip2ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float16, device_map="cuda"
    ).eval()
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begun)

    size = model.config.vision_config.image_size
    processor = BlipImageProcessor(size={"height": size, "width": size})
    tokenizer = load_tokenizer(checkpoint)
    for _ in range(2):
        begun = time.perf_counter()
        values = processor(Image.open(picture).convert("RGB"), return_tensors="pt").pixel_values
        image_ids = [model.config.image_token_index] * model.config.num_query_tokens
        ids = torch.tensor([image_ids + tokenizer.encode(QUESTION)], device="cuda")
        model.generate(
            pixel_values=values.to("cuda", torch.float16),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
