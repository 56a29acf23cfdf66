"""Captions a second of many pictures: run.py's stages against Hugging Face transformers.

    python -m bench.captions                           # after make demo, and pip install transformers
    python -m bench.captions --engine_dir demo/out --pictures 320       # with the exported ONNX files

Draws scenes, has the demo checkpoint caption the files both ways, in turns, in one process and with
as many threads as it is given (OMP_NUM_THREADS), and prints the median rate of each and whether the
texts are the same. Both take the same preprocessing, and pictures that are decoded beside them;
Hugging Face has its batches decoded ahead by a DataLoader.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not with -m

import torch

from blip2 import cli, images
from blip2.engines import Places
from blip2.images import Preprocessing
from blip2.many.decoders import Decoders
from blip2.many.local import LocalWorkers
from blip2.many.work import Facts, Question, Start, Work
from blip2.pipeline import Pipeline, open_pipeline
from demo import scenes

DEMO = Path(__file__).resolve().parent.parent / "demo"
CHECKPOINT, OPT = DEMO / "checkpoint", DEMO / "out" / "opt" / "fp16"  # the latter by make demo
MAX_NEW_TOKENS = 40
CAPTION = [Question("", "")]


def main() -> None:
    parser = cli.ArgumentParser("Caption pictures with this suite and with transformers.")
    parser.add_argument("--pictures", type=cli.positive_int, default=200)
    parser.add_argument("--batch_size", type=cli.positive_int, default=16)
    parser.add_argument("--workers", type=cli.positive_int, default=1, help="that decode pictures")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, help="to take the median of")
    parser.add_argument("--engine_dir", type=Path, default=CHECKPOINT, help="ViT and Q-Former")
    parser.add_argument("--opt_engine_dir", default=OPT, help="the demo checkpoint's OPT")
    parser.add_argument("--query_tokens", help="(default: in or beside --engine_dir)")
    args = parser.parse_args()
    pipeline = open_pipeline(
        Places.of(args.engine_dir, args.opt_engine_dir, args.query_tokens, CHECKPOINT)
    )
    with tempfile.TemporaryDirectory() as directory, Decoders(args.workers) as decoders:
        files = draw(Path(directory), args.pictures)
        ways = {
            "this suite": functools.partial(ours, pipeline, decoders),
            "transformers": theirs(pipeline, args.workers),
        }
        texts = {name: way(files[: args.batch_size], args.batch_size) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                texts[name] = way(files, args.batch_size)
                seconds[name].append(time.perf_counter() - started)
    print(
        f"{args.pictures} pictures, batches of {args.batch_size}, {torch.get_num_threads()} threads"
    )
    for name, times in seconds.items():
        spread = f"{len(files) / max(times):.1f} to {len(files) / min(times):.1f}"
        print(f"{name:<14}{len(files) / statistics.median(times):>8.1f} captions/s ({spread})")
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    print(f"{same} of {len(files)} captions are the same")


def draw(directory: Path, count: int) -> list[str]:
    """Files of scenes that the checkpoint was not trained on."""
    files = [str(directory / f"{number:06}.png") for number in range(count)]
    for number, file in enumerate(files):
        scenes.draw(scenes.EVALUATION_SEED + number).image.save(file)
    return files


def ours(
    pipeline: Pipeline, decoders: Decoders, files: Sequence[str], batch_size: int
) -> list[str]:
    """The captions of the files, as run.py --output finds them."""
    facts = Facts.of(pipeline, CAPTION, {"max_output_len": MAX_NEW_TOKENS})
    work = Work(files, Start(), batch_size, facts.preprocessing, CAPTION, facts.options)
    answers = LocalWorkers(pipeline, decoders).answer(work)
    return [lines[0]["answer"] for answered in answers for lines in answered.lines]


class Files(torch.utils.data.Dataset):
    """pixel_values of files, for a DataLoader."""

    def __init__(self, files: Sequence[str], preprocessing: Preprocessing) -> None:
        self._files, self._preprocessing = files, preprocessing

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return images.pixel_values(images.load_image(self._files[index]), self._preprocessing)


def theirs(pipeline: Pipeline, workers: int) -> Callable[[Sequence[str], int], list[str]]:
    """A function that captions files with Blip2ForConditionalGeneration.generate."""
    import transformers

    transformers.logging.set_verbosity_error()
    on_gpu = pipeline.vision.device.type == "cuda"
    dtype = torch.float16 if on_gpu else torch.float32
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype)
    model = model.to(pipeline.vision.device).eval()
    tokenizer = pipeline.tokenizer
    prompt = [model.config.image_token_index] * model.config.num_query_tokens + [tokenizer.bos_id]

    @torch.inference_mode()
    def caption(files: Sequence[str], batch_size: int) -> list[str]:
        loader = torch.utils.data.DataLoader(
            Files(files, pipeline.vision.preprocessing), batch_size, num_workers=workers
        )
        captions = []
        for pixel_values in loader:
            input_ids = torch.tensor([prompt] * len(pixel_values), device=model.device)
            generated = model.generate(
                pixel_values=pixel_values.to(model.device, dtype),
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.end_id,
                pad_token_id=tokenizer.pad_id,
            )
            for ids in generated[:, len(prompt) :].tolist():
                end = ids.index(tokenizer.end_id) if tokenizer.end_id in ids else len(ids)
                captions.append(tokenizer.decode(ids[:end]))
        return captions

    return caption


if __name__ == "__main__":
    cli.run(main)
