"""BLIP-2 OPT-2.7B on an NVIDIA GPU: this suite against transformers, in one run.

    python -m bench.gpu                        # random weights of the real shapes: no download
    python -m bench.gpu --chart docs/gpu.png   # and a chart (needs matplotlib)

Needs 60 GB of GPU memory and 30 GB in --directory. First it says how right the answers are: against
transformers in float32 on the same weights. Then it times each stage and the whole, with the rate at
which weights are read or products computed, its share of what a plain copy or product of large
matrices reaches in the same run, and the ratio to transformers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import Blip2ForConditionalGeneration

from bench.gpu_chart import draw
from bench.gpu_report import Report, median_ms, median_wall_ms
from bench.random_blip2 import (
    DEVICE,
    FLOAT8,
    cache_bytes,
    float_weights,
    in_float8,
    open_sessions,
    parameters,
    random_model,
    weight_bytes,
)
from blip2 import artifacts, cli, memory
from blip2.errors import Blip2Error
from blip2.language.native.model import OPTModel
from blip2.language.native.session import NativeSession
from blip2.language.session import GenerationOptions
from blip2.many import answering
from blip2.pipeline import Pipeline, Stopwatch
from blip2.vision.export import TOLERANCE
from blip2.vision.torch_session import TorchSession

COMPARED_TOKENS = 20  # of each answer, with transformers' in float32
EQUAL_IDS = 0.9  # of those, at least, before rounding has let the first tie fall otherwise
TEXT_TOKENS = 13  # of a question; the picture's are 32 more
BATCHES = (1, 8, 64)
STEP_ROWS = (1, 5, 8, 40, 64, 128, 256)
CHOSEN_ROWS = (1, 64)
CHOICES = {
    "the likeliest": {},
    "a sample": {"top_k": 0, "temperature": 0.7},
    "a sample of 50": {"top_k": 50},
    "a sample of 0.9": {"top_k": 0, "top_p": 0.9},
    "a sample of 0.9 of 50": {"top_k": 50, "top_p": 0.9},
}
CHART_BATCHES = [2, 4, 8, 16, 32, 64, 128, 256]
# Pictures, new tokens, beams; those of batches that are not BATCHES for the chart.
WHOLES = [(1, 1, 1), (1, 30, 1), (1, 30, 5), *((n, 20, 1) for n in CHART_BATCHES)]
# Of logits, where inputs are rounded too: errors grow over 32 layers.
FLOAT8_TOLERANCE = TOLERANCE[torch.float8_e4m3fn]
MANY_WINDOWS = 32
VIT_FLOPS, QFORMER_FLOPS = 520.7e9, 12.9e9  # a picture
BEGIN_ID, END_ID = 2, 50118


def main() -> None:
    parser = cli.ArgumentParser("Time BLIP-2 on a GPU beside transformers.")
    parser.add_argument("--directory", help="for checkpoints, erased at the end (default: /tmp)")
    parser.add_argument("--chart", type=Path, help="write a chart to this PNG")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--compile", action="store_true", help="time transformers' static cache and compilation too"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise Blip2Error(
            "torch sees no NVIDIA GPU, which is what is measured",
            "of a CPU measure: python -m bench.cpu demo",
        )
    if args.chart and args.json:
        artifacts.refuse_same({"--chart": args.chart, "--json": args.json})
    torch.manual_seed(0)
    report = Report()
    print(report.figures["device"], end=", ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    report.limits()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, torch.inference_mode():
        model = random_model(Path(directory))
        vision, languages = open_sessions(Path(directory))
        in_8_bits = in_float8(vision, Path(directory))
        bench = Bench(report, model, vision, languages, in_8_bits)
        bench.correctness()
        bench.stages()
        bench.whole()
        save(args, report)
        bench.many()
        save(args, report)
        if args.compile:
            bench.compiled()
            save(args, report)


def save(args, report: Report) -> None:
    if args.json:
        args.json.write_text(json.dumps(report.figures, indent=1))
    if args.chart:
        draw(report.figures, CHART_BATCHES, args.chart)


class Bench:
    """The same weights in transformers and in this suite's sessions."""

    def __init__(
        self,
        report: Report,
        model: Blip2ForConditionalGeneration,
        vision: TorchSession,
        languages: dict[str, NativeSession],
        float8_vision: TorchSession | None,
    ) -> None:
        """`float8_vision` is `vision` with its ViT in FP8, None where the GPU has none."""
        self.report, self.model, self.vision, self.languages = report, model, vision, languages
        self.float8_vision = float8_vision
        config = model.config
        self.image_id = config.image_token_index
        self.num_query_tokens = config.num_query_tokens
        self.vocab_size = config.text_config.vocab_size
        self.image_size = config.vision_config.image_size

    def pictures(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, 3, self.image_size, self.image_size, device=DEVICE)

    def text_ids(self, batch: int) -> torch.Tensor:
        """On the host, where tokenizers leave them."""
        ids = torch.randint(4, self.image_id, (batch, TEXT_TOKENS))
        ids[:, 0] = BEGIN_ID
        return ids

    def ours(
        self,
        precision: str,
        pictures: torch.Tensor,
        text_ids: torch.Tensor,
        tokens: int,
        num_beams: int = 1,
        vision: TorchSession | None = None,
    ) -> list[list[int]]:
        """Token ids of each picture's best answer; `vision` is the float16 one by default."""
        vision = vision or self.vision
        table = vision.qformer(vision.vit(pictures))
        rows = torch.arange(self.num_query_tokens) + self.vocab_size
        input_ids = [torch.cat([rows, ids]) for ids in text_ids]
        options = GenerationOptions(end_id=END_ID, max_output_len=tokens, num_beams=num_beams)
        generations = self.languages[precision].generate(input_ids, table, options)
        return [generation.beams[0].token_ids for generation in generations]

    def theirs(
        self, model, pictures: torch.Tensor, text_ids: torch.Tensor, tokens: int, **options
    ) -> torch.Tensor:
        """New token ids, B x tokens."""
        image_ids = text_ids.new_full((len(text_ids), self.num_query_tokens), self.image_id)
        input_ids = torch.cat([image_ids, text_ids], 1).to(DEVICE)
        return model.generate(
            pixel_values=pictures.to(_dtype(model)),
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=END_ID,
            **options,
        )[:, -tokens:]

    def correctness(self) -> None:
        """Errors and equal ids, against transformers in float32 on the same weights."""
        exact = copy.deepcopy(self.model).float()
        pictures, text_ids = self.pictures(4), self.text_ids(4)

        embeds = exact.vision_model(pictures).last_hidden_state
        features = self.their_qformer(exact, embeds)
        half = self.model.vision_model(pictures.half()).last_hidden_state
        ours = self.vision.vit(pictures)
        self.error("ViT", ours, embeds, half)
        if self.float8_vision:
            ours8 = self.float8_vision.vit(pictures)
            self.error("ViT in FP8", ours8, embeds, half, FLOAT8_TOLERANCE)
        half = self.their_qformer(self.model, half)
        features_ours = self.vision.qformer(ours)
        self.error("ViT and Q-Former", features_ours, features, half)

        tokens = COMPARED_TOKENS
        wanted = self.theirs(exact, pictures, text_ids, tokens)
        self.ids(
            "transformers float16", self.theirs(self.model, pictures, text_ids, tokens), wanted
        )
        wanted_beams = self.theirs(exact, pictures, text_ids, tokens, num_beams=5)
        self.ids(
            "transformers float16, 5 beams",
            self.theirs(self.model, pictures, text_ids, tokens, num_beams=5),
            wanted_beams,
        )
        del exact
        for precision, session in self.languages.items():
            self.logits(precision, session, features_ours, text_ids)
        for poison in (False, True):
            name = "float16" + (", buffers poisoned" if poison else "")
            for cache in (p.cache for p in self.prepared("float16") if poison):
                cache.keys.fill_(math.nan)
                cache.values.fill_(math.nan)
            self.ids(name, self.ours("float16", pictures, text_ids, tokens), wanted)
            got = self.ours("float16", pictures, text_ids, tokens, num_beams=5)
            self.ids(name + ", 5 beams", got, wanted_beams)

    def prepared(self, precision: str) -> list:
        return list(self.languages[precision]._model._prepared.values())

    def error(
        self,
        name: str,
        ours: torch.Tensor,
        exact: torch.Tensor,
        half: torch.Tensor | None = None,
        bound: float = 0.02,
    ) -> None:
        def relative(x: torch.Tensor) -> float:
            return ((x.float() - exact).norm() / exact.norm()).item()

        found = relative(ours)
        if not found < bound:  # NaN too
            raise SystemExit(f"{name}: relative error {found:.1e}")
        self.report.figures[f"{name}, error"] = found
        usual = "" if half is None else f", transformers' in float16 {relative(half):.1e}"
        print(f"{name:<34} error {found:.1e}{usual}", flush=True)

    def ids(self, name: str, got, wanted: torch.Tensor) -> None:
        """Share of ids before the first that differs: what follows it answers something else."""
        same = total = 0
        for mine, theirs in zip(got, wanted.tolist(), strict=True):
            differ = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
            same += differ[0] if differ else len(theirs)
            total += len(theirs)
        self.report.figures[f"{name}, equal ids"] = same / total
        print(f"{name:<34} {same} of {total} ids equal until the first other one", flush=True)
        if not name.startswith("transformers") and same < EQUAL_IDS * total:
            raise SystemExit(f"{name}: {same} of {total} ids")

    def logits(
        self, precision: str, session: NativeSession, features: torch.Tensor, text_ids: torch.Tensor
    ) -> None:
        """Logits after the prompt and after a step, against float32 on the dequantized weights."""
        model = session._model
        exact = OPTModel(model.config, float_weights(model.weights))
        text_ids = text_ids.to(DEVICE)
        rows = torch.arange(self.num_query_tokens, device=DEVICE) + self.vocab_size
        for batch in (1, len(text_ids)):
            prompt = torch.cat([rows.expand(batch, -1), text_ids[:batch]], 1)
            lengths = torch.full((batch,), prompt.shape[1], device=DEVICE)
            token = text_ids[:batch, -1].contiguous()
            outputs = []
            for each in (model, exact):
                cache = each.new_cache(lengths, 1, 2)
                first = each.prefill(prompt, lengths, features[:batch].float(), cache).clone()
                outputs.append(torch.cat([first, each.step(token, cache)]).float())
            bound = FLOAT8_TOLERANCE if precision == FLOAT8 else 0.02
            self.error(f"OPT {precision}, {batch} rows", *outputs, bound=bound)

    def stages(self) -> None:
        """Each stage alone, ours and transformers'."""
        model, vision, report = self.model, self.vision, self.report
        for batch in BATCHES:
            pictures = self.pictures(batch).half()
            theirs, ms = median_ms(model.vision_model, pictures), median_ms(vision.vit, pictures)
            report.add(f"ViT, batch {batch}", ms, theirs, flops=VIT_FLOPS * batch)
            if self.float8_vision:
                ms = median_ms(self.float8_vision.vit, pictures)
                report.add(f"ViT in FP8, batch {batch}", ms, theirs, flops=VIT_FLOPS * batch)
        for batch in BATCHES:
            embeds = vision.vit(self.pictures(batch)).clone()
            theirs, ms = (
                median_ms(self.their_qformer, model, embeds),
                median_ms(vision.qformer, embeds),
            )
            report.add(f"Q-Former, batch {batch}", ms, theirs, flops=QFORMER_FLOPS * batch)
        decoder = model.language_model
        for batch in BATCHES:
            length = self.num_query_tokens + TEXT_TOKENS
            ids = torch.randint(4, self.image_id, (batch, length), device=DEVICE)
            lengths = torch.full((batch,), length, device=DEVICE)
            table = torch.zeros((batch, 0, model.config.text_config.hidden_size), device=DEVICE)
            theirs = median_ms(decoder, input_ids=ids, use_cache=True, logits_to_keep=1)
            for precision, session in self.languages.items():
                opt = session._model
                cache = opt.new_cache(lengths, 1, 30)
                ms = median_ms(opt.prefill, ids, lengths, table, cache)
                flops = 2 * parameters(opt) * batch * length
                report.add(f"prompt, {precision}, batch {batch}", ms, theirs, flops=flops)
                let_go(session)
        for rows in STEP_ROWS:
            lengths = torch.full((rows,), 45, device=DEVICE)
            token = torch.randint(4, self.image_id, (rows,), device=DEVICE)
            theirs = self.their_step(token[:, None].expand(-1, 45))
            for precision, session in self.languages.items():
                opt = session._model
                cache = opt.new_cache(lengths, 1, 80)
                ms = median_ms(opt.step, token, cache, inner=4)
                read = weight_bytes(opt) + rows * cache_bytes(opt, 60)
                report.add(f"step, {precision}, rows {rows}", ms, theirs, read=read)
                let_go(session)
        self.choices()

    def choices(self) -> None:
        """Steps with the choice of their tokens: the likeliest, or one drawn at random."""
        for precision, session in self.languages.items():
            opt = session._model
            for rows in CHOSEN_ROWS:
                lengths = torch.full((rows,), 45, device=DEVICE)
                tokens = torch.randint(4, self.image_id, (rows,), device=DEVICE)
                prompts = [torch.tensor([BEGIN_ID])] * rows
                for name, how in CHOICES.items():
                    options = GenerationOptions(end_id=-1, max_output_len=80, **how)
                    strategy = opt.new_strategy(options, prompts, 0, DEVICE)
                    cache = opt.new_cache(lengths, 1, 80)

                    def choose(strategy=strategy, opt=opt, tokens=tokens, cache=cache) -> None:
                        strategy.advance(opt.step(tokens, cache))

                    ms = median_ms(choose, inner=4)
                    self.report.add(f"step to {name}, {precision}, rows {rows}", ms)
            let_go(session)

    def their_step(self, prompts: torch.Tensor) -> float:
        """Milliseconds that `generate` takes for one more token of each prompt."""

        def generate_ms(tokens: int) -> float:
            return median_wall_ms(
                self.model.language_model.generate,
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=END_ID,
                repeats=3,
            )

        return (generate_ms(11) - generate_ms(1)) / 10

    def their_qformer(self, model, embeds: torch.Tensor) -> torch.Tensor:
        """Language features of image embeddings, as transformers' model makes them."""
        queries = model.query_tokens.expand(len(embeds), -1, -1)
        output = model.qformer(query_embeds=queries, encoder_hidden_states=embeds.to(queries.dtype))
        return model.language_projection(output.last_hidden_state.to(_dtype(model)))

    def whole(self) -> None:
        """Pictures to tokens, host included."""
        for batch, tokens, num_beams in WHOLES:
            pictures, text_ids = self.pictures(batch), self.text_ids(batch)
            asked = (pictures, text_ids, tokens)
            options = {"num_beams": num_beams, "min_new_tokens": tokens}
            theirs = median_wall_ms(self.theirs, self.model, *asked, repeats=2, **options)
            name = (
                f"{batch} pictures to {tokens} tokens"
                if batch > 1
                else f"picture to {tokens} tokens"
            )
            name += f", {num_beams} beams" if num_beams > 1 else ""
            for precision in self.languages if batch in BATCHES else self.drawn():
                vision = self.vision_for(precision, batch)
                with at_once(self.languages[precision], batch):
                    ms = median_wall_ms(self.ours, precision, *asked, num_beams, vision)
                also = "" if vision is self.vision else ", ViT too"
                self.captions(f"{name}, {precision}{also}", ms, batch, theirs)

    def drawn(self) -> list[str]:
        """The precisions of the chart."""
        return [precision for precision in ("float16", FLOAT8) if precision in self.languages]

    def vision_for(self, precision: str, batch: int) -> TorchSession:
        """With OPT in FP8 the ViT too, where that is faster: for more than one picture."""
        return self.float8_vision if precision == FLOAT8 and batch > 1 else self.vision

    def captions(self, name: str, ms: float, batch: int, theirs: float | None = None) -> None:
        """A line, and of several pictures how many a second that is."""
        self.report.add(name, ms, theirs)
        if batch > 1:
            print(f"{'':<34} {batch / ms * 1e3:>8.0f} captions/s", flush=True)

    def many(self) -> None:
        """Windows of decoded pictures, one after another, as `run.py --output` answers them."""
        size = BATCHES[-1]
        values = self.pictures(size).half().cpu().pin_memory()
        for precision, language in self.languages.items():
            vision = self.vision_for(precision, size)
            pipeline = Pipeline(vision, language, NoTokenizer(self.text_ids(1)[0].tolist()))
            options = pipeline.options({"max_output_len": 20})
            windows = (answering.Window(n * size, size, values) for n in range(MANY_WINDOWS))
            watch, done = Stopwatch(), []
            arguments = (windows, ["what is asked"], options, size, watch)
            for _ in answering.answer_in_rows(pipeline, *arguments):
                done.append(time.perf_counter())
            first = answering.block_of(pipeline, options) - 1  # all is captured and running
            ms = (done[-1] - done[first]) / (len(done) - 1 - first) * 1e3
            self.captions(f"windows of {size}, one after another, {precision}", ms, size)
            let_go(language)

    def compiled(self) -> None:
        """transformers with a static cache and compilation."""
        asked = (self.model, self.pictures(1), self.text_ids(1), 30)
        options = {"min_new_tokens": 30, "cache_implementation": "static"}
        ms = median_wall_ms(self.theirs, *asked, repeats=3, **options)
        self.report.add("picture to 30 tokens, transformers compiled", ms)


@contextlib.contextmanager
def at_once(session: NativeSession, batch: int) -> Iterator[None]:
    """Have so many requests answered in one batch, and what is kept for it let go afterwards."""
    limits = session.limits
    session.limits = dataclasses.replace(limits, max_batch_size=max(batch, limits.max_batch_size))
    try:
        yield
    finally:
        session.limits = limits
        let_go(session)


def let_go(session: NativeSession) -> None:
    """Forget a session's caches: those of 256 rows take 11 GB, and all precisions share the GPU."""
    session._model.release()
    memory.release()


class NoTokenizer:
    """Stands in for a question's token ids and for an answer's text."""

    vocab_size, end_id, pad_id = 50265, END_ID, 1

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def encode(self, _text: str) -> list[int]:
        return self._ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def _dtype(model: Blip2ForConditionalGeneration) -> torch.dtype:
    # model.dtype is that of its first parameter, and transformers keeps the Q-Former in float32
    return model.language_projection.weight.dtype


if __name__ == "__main__":
    cli.run(main)
