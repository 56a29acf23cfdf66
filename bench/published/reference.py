"""transformers' answers about the pictures, on the same weights: the truth that others are held to.

    python -m bench.published.reference CHECKPOINT PICTURES OUT.json --features FEATURES.pt

Image processor, model and `generate` are transformers'; so is the tokenizer that prompts' ids are
compared with.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from bench.published import pictures
from bench.published.asking import DECODINGS, MAX_OUTPUT_LEN, Timed, digest, now
from bench.published.pictures import Item
from blip2 import cli
from blip2.prompts import load_tokenizer


def main() -> None:
    parser = cli.ArgumentParser("Have transformers answer questions about pictures.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("pictures", type=Path, help="directory with items.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--features", type=Path, help="where to save what ViT and Q-Former see")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    begun = time.perf_counter()
    reference = Reference(args.checkpoint, getattr(torch, args.dtype), torch.device(args.device))
    loaded = time.perf_counter() - begun
    items = pictures.read(args.pictures)
    if args.device == "cuda":
        reference.answer(items[0], "greedy")  # the first call compiles and allocates
        reference.seconds.clear()
    answers = []
    for item in items:
        for decoding in DECODINGS:
            answers.append(reference.answer(item, decoding))
            print(f"{item.name}, {decoding}: {answers[-1]['text']!r}", flush=True)
    if args.features:
        torch.save(reference.features, args.features)
    content = {
        "dtype": args.dtype,
        "device": args.device,
        "load_seconds": loaded,
        "answers": answers,
        "seconds": reference.seconds,
        "pixels": reference.pixels,
        "prompts": reference.prompts([item.prompt for item in items]),
    }
    args.out.write_text(json.dumps(content) + "\n")


class Reference:
    """The model, and what it was seen to do.

    Attributes:
        features: by picture, image_embeds T x H_v and query_output n x H_lm, float32 on the CPU.
        pixels: by picture, the SHA-256 of its pixel_values in float32.
        seconds: of each stage, a value for each picture or answer.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        load = transformers.Blip2ForConditionalGeneration.from_pretrained
        self._model = load(checkpoint, dtype=dtype).to(device).eval()
        self._tokenizer = load_tokenizer(checkpoint)
        side = self._model.config.vision_config.image_size
        self._processor = transformers.BlipImageProcessor(size={"height": side, "width": side})
        if any((checkpoint / f"{n}processor_config.json").is_file() for n in ("", "pre")):
            self._processor = transformers.BlipImageProcessor.from_pretrained(checkpoint)
        self.features: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pixels: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self._seen: dict[str, torch.Tensor] = {}
        self._watch(self._model.vision_model, "ViT")
        self._watch(self._model.qformer, "Q-Former")
        self._watch(self._model.language_projection, "projection")

    def _watch(self, module: torch.nn.Module, stage: str) -> None:
        """Time a part of the model in every forward, and keep what it makes of each picture."""
        begun: list[float] = []
        module.register_forward_pre_hook(lambda *_: begun.append(now()))

        def ended(_: torch.nn.Module, __: object, output: Any) -> None:
            self.seconds.setdefault(stage, []).append(now() - begun.pop())
            tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state
            self._seen[stage] = tensor[0].float().cpu()

        module.register_forward_hook(ended)

    @torch.inference_mode()
    def answer(self, item: Item, decoding: str) -> dict[str, Any]:
        """What `generate` answers: ids without the end, log probability, and how sure it was.

        `gaps` are, for each step of a greedy search, the difference of the logits of the two
        likeliest tokens: where it is tiny, rounding decides.
        """
        values = self._pixel_values(item.file)
        self.pixels[item.file] = digest(values[0])
        values = values.to(self._device, self._model.dtype)
        config = self._model.config
        image_ids = [config.image_token_index] * config.num_query_tokens
        prompt = torch.tensor([image_ids + self._tokenizer.encode(item.prompt)])
        prompt = prompt.to(self._device)
        with Timed(self.seconds.setdefault(f"picture to answer, {decoding}", [])):
            found = self._model.generate(
                pixel_values=values,
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=MAX_OUTPUT_LEN,
                do_sample=False,
                eos_token_id=self._tokenizer.end_id,
                pad_token_id=self._tokenizer.pad_id,
                output_scores=True,
                return_dict_in_generate=True,
                **DECODINGS[decoding],
            )
        self.features[item.file] = (self._seen["ViT"], self._seen["projection"])
        ids = found.sequences[0, prompt.shape[1] :].tolist()
        end = ids.index(self._tokenizer.end_id) if self._tokenizer.end_id in ids else len(ids)
        answer = {
            "file": item.file,
            "prompt": item.prompt,
            "decoding": decoding,
            "ids": ids[:end],
            "text": self._tokenizer.decode(ids[:end]),
        }
        if decoding == "greedy":
            scores = torch.cat(found.scores).float()
            tops = scores.topk(2).values
            answer["gaps"] = (tops[:, 0] - tops[:, 1]).tolist()
            chosen = torch.tensor(ids, device=scores.device)[: end + 1, None]
            taken = scores.log_softmax(-1)[: len(chosen)].gather(1, chosen)
            answer["log_prob"] = taken.mean().item()
        else:
            answer["log_prob"] = found.sequences_scores[0].item()
        return answer

    def prompts(self, texts: list[str]) -> dict[str, list[int]] | None:
        """Each text's ids by transformers' own tokenizer; None where the checkpoint has none."""
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._checkpoint)
            return {text: tokenizer(text).input_ids for text in texts}
        except Exception:  # whatever its files lack
            return None

    def _pixel_values(self, file: str) -> torch.Tensor:
        image = Image.open(file).convert("RGB")
        return self._processor(image, return_tensors="pt").pixel_values


if __name__ == "__main__":
    cli.run(main)
