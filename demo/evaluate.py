"""How many answers are right, through the same engines as run.py, on scenes nobody trained on.

python -m demo.evaluate                            # of what `make demo` made
python -m demo.evaluate --engine_dir demo/out --opt_engine_dir demo/out/opt/fp16
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not with -m

from blip2 import cli

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64
OUT = ROOT / "demo" / "out"


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Print the share of exact answers on unseen demo scenes.")
    add = parser.add_argument
    add("--engine_dir", default=OUT, help="ViT and Q-Former")
    add("--opt_engine_dir", default=OUT / "opt" / "fp16", help="OPT")
    add("--query_tokens", help="saved by onnx_export.py (default: in or beside --engine_dir)")
    add("--scenes", type=cli.positive_int, default=500, help="to ask about")
    add("--num_beams", type=cli.positive_int, default=1, help="beam search if above 1")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help does not wait for torch.
    from blip2.engines import Places
    from blip2.language import GenerationOptions
    from blip2.pipeline import open_pipeline
    from demo import scenes

    pipeline = open_pipeline(Places.of(args.engine_dir, args.opt_engine_dir, args.query_tokens))
    options = GenerationOptions(
        end_id=pipeline.tokenizer.end_id,
        pad_id=pipeline.tokenizer.pad_id,
        max_output_len=40,
        num_beams=args.num_beams,
    )
    examples = scenes.evaluation_set(scenes.EVALUATION_SEED, args.scenes)
    scores = judge(pipeline, examples, options)
    if args.json:
        print(json.dumps(scores))
    else:
        print(f"{args.engine_dir} + {Path(args.opt_engine_dir)}, {args.scenes} unseen scenes")
        for form, (right, asked) in scores.items():
            print(f"{form:<12}{100 * right / asked:>7.2f} %   {right} of {asked}")


def judge(pipeline, examples, options) -> dict[str, tuple[int, int]]:
    """Right answers and questions asked, by question form; last, captions and all answers.

    Every picture is looked at once, whatever the number of questions about it.
    """
    import numpy as np
    import torch

    from blip2.images import resized_pixels
    from blip2.pipeline import Stopwatch
    from demo import scenes

    right: collections.Counter[str] = collections.Counter()
    asked: collections.Counter[str] = collections.Counter()
    by_scene = itertools.groupby(examples, key=lambda example: example.seed)
    pictures = (list(group) for _, group in by_scene)
    while batch := list(itertools.islice(pictures, BATCH)):
        pixels = [resized_pixels(group[0].image, pipeline.vision.preprocessing) for group in batch]
        look = pipeline.look(torch.from_numpy(np.stack(pixels)), Stopwatch())
        owners = [index for index, group in enumerate(batch) for _ in group]
        flat = [example for group in batch for example in group]
        prompts = [scenes.prompt(example.question) for example in flat]
        for start in range(0, len(flat), BATCH):
            part = slice(start, start + BATCH)
            seen = dataclasses.replace(look, query_output=look.query_output[owners[part]])
            answers = pipeline.ask(seen, prompts[part], options)
            for example, beams in zip(flat[part], answers, strict=True):
                asked[example.form] += 1
                right[example.form] += beams[0].text == example.answer
    forms = [form for form in asked if form != "caption"]
    scores = {form: (right[form], asked[form]) for form in sorted(forms)}
    scores["captions"] = (right["caption"], asked["caption"])
    scores["answers"] = (sum(right[f] for f in forms), sum(asked[f] for f in forms))
    return scores


if __name__ == "__main__":
    cli.run(main)
