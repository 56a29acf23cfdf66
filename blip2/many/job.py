"""One run over many pictures: what is asked of which, by which engines, and where it is written.

job = Job(["photos/"], [Question("", "")], Places.of(), {"max_output_len": 20}, Target.of("out.jsonl"))
summary = job.run()
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2 import artifacts
from blip2.engines import Places
from blip2.errors import Blip2Error
from blip2.many import inputs, journal, report
from blip2.many.decoders import Decoders, default_workers
from blip2.many.journal import Journal, StandardOutput
from blip2.many.local import LocalWorkers
from blip2.many.outputs import Following, Target
from blip2.many.recording import Summary, record, retry_errors
from blip2.many.work import Facts, Question, Work, Workers, describe, find_start
from blip2.pipeline import Pipeline, Stopwatch, open_pipeline
from blip2.prompts import check_length

if TYPE_CHECKING:
    from blip2.many.cluster import Cluster


@dataclasses.dataclass(frozen=True)
class Job:
    """Many pictures, the questions about each, and the file that gets a line for every answer.

    Attributes:
        sources: files, URLs, folders, patterns, lists and shards of pictures.
        questions: each is asked of every picture.
        places: the engines.
        decoding: fields of GenerationOptions.
        output: where the answers go, which a later run goes on with; None is standard output.
        part: (first, end, count) of the input cut in `count` parts, those that this run is for.
        html: a page of the output to make afterwards.
        batch_size: pictures at once; None is what suits the engines.
        workers: processes that decode pictures here; None is half of the processors.
        cluster: whose machines answer; None is this process.
        is_fast: decode large JPEGs at a smaller scale: see `decode_picture`.
        max_txt_len: tokens that a prompt may have.
        retry_errors: ask again about pictures of which the output has an error.
        verify: compare the engines' large files with their hashes.
    """

    sources: Sequence[str]
    questions: Sequence[Question]
    places: Places
    decoding: dict[str, Any]
    output: Target | None
    html: Path | None = None
    batch_size: int | None = None
    workers: int | None = None
    cluster: Cluster | None = None
    is_fast: bool = False
    max_txt_len: int = 32
    retry_errors: bool = False
    verify: bool = True
    part: tuple[int, int, int] | None = None

    def run(self, watch: Stopwatch | None = None) -> Summary:
        """Answer what is not in the output yet.

        Args:
            watch: what was done before; gets the stages before the first answer.

        Raises:
            Blip2Error: something to mend; the output has what was answered.
        """
        watch = watch or Stopwatch()
        begun = time.perf_counter() - sum(watch.seconds.values())
        self._check_places()
        entries = inputs.list_entries(self.sources)
        if self.part:
            entries = inputs.part_of(entries, *self.part)
        if self.output:
            self.output.check_pictures(self.sources, entries)
        with self._workers(watch) as (facts, workers):
            summary = self._answer(entries, facts, workers, begun)
        afterwards = Stopwatch()
        if self.html:
            with Decoders(self._decoding_processes) as decoders, afterwards.time("page"):
                report.write_report(
                    self.html, self.output.journal, entries, decoders, len(self.questions)
                )
        return dataclasses.replace(summary, before=watch.seconds, after=afterwards.seconds)

    @property
    def _decoding_processes(self) -> int:
        return self.workers or default_workers()

    @property
    def _open(self) -> Callable[[], Pipeline]:
        """What opens the engines, on whatever machine."""
        return functools.partial(open_pipeline, self.places, self.verify)

    def _check_places(self) -> None:
        """See that what will be written has places of its own, before anything is opened.

        Raises:
            Blip2Error: names the output, and what is wrong with its place.
        """
        if self.output is None:
            return
        self.output.check()
        outputs = {"`output`": self.output.path, **self.output.files()}
        if self.output.journal != self.output.path:
            outputs["the journal of `output`"] = self.output.journal
        companions = journal.companions(self.output.journal)
        outputs |= {f"`output` with {what}": path for what, path in companions.items()}
        if self.html:
            report.check_place(self.html)
            outputs["`html`"] = self.html
        artifacts.refuse_same(outputs, {"`input_dir`": self.sources})

    @contextlib.contextmanager
    def _workers(self, watch: Stopwatch) -> Iterator[tuple[Facts, Workers]]:
        """Who answers, until the end of the context, and what a run must know of their engines."""
        if self.cluster is not None:
            with watch.time("load engines"):
                facts = self.cluster.open(self._open, self.questions, self.decoding)
            yield facts, self.cluster
            return
        with Decoders(self._decoding_processes) as decoders:
            with watch.time("load engines"):
                pipeline = self._open()
            if pipeline.language.is_in_step:
                raise Blip2Error(
                    "`output` cannot be written by several processes",
                    "leave out mpirun, and use an engine for one GPU",
                )
            facts = Facts.of(pipeline, self.questions, self.decoding)
            yield facts, LocalWorkers(pipeline, decoders)

    def _answer(
        self, entries: Sequence[str], facts: Facts, workers: Workers, begun: float
    ) -> Summary:
        """Have the workers answer, and write it; `begun` is when the run began."""
        if self.output and self.output.rule.min_score is not None and not facts.has_scores:
            raise Blip2Error(
                "this OPT engine says no scores without beams",
                "leave out `min_score`, or give `num_beams`",
            )
        for question, ids in zip(self.questions, facts.prompts, strict=True):
            check_length(question.prompt, ids, self.max_txt_len)
        size = self.batch_size or facts.batch_size
        with self._open_output(facts, size) as lines:
            start = find_start(entries, lines, size * facts.block)
            work = Work(
                entries,
                start,
                size,
                facts.preprocessing,
                self.questions,
                facts.options,
                block=facts.block,
                is_fast=self.is_fast,
            )
            again = None
            if self.retry_errors and lines.failed:
                self.output.forget_shards()
                again = retry_errors(workers, work, lines)
            total = inputs.count_pictures(entries)
            with (
                self._following(lines, entries) as appended,
                contextlib.closing(workers.answer(work)) as answers,
            ):
                summary = record(answers, workers.count, total, appended, begun)
            return summary.following(again) if again else summary

    def _following(
        self, lines: Journal | StandardOutput, entries: Sequence[str]
    ) -> contextlib.AbstractContextManager[Journal | StandardOutput | Following]:
        if self.output is None:
            return contextlib.nullcontext(lines)
        return self.output.following(lines, self.sources, entries, len(self.questions))

    def _open_output(self, facts: Facts, batch_size: int) -> Journal | StandardOutput:
        """The output; what must be the same to go on with it is kept by the programs' flags."""
        if self.output is None:
            return StandardOutput()
        parts = {f"--{name}": value for name, value in self.places.fingerprints().items()}
        made_with = {"--input_dir": self.sources, **parts}
        made_with |= describe(facts, self.questions, batch_size)
        made_with |= self.output.made_with()
        if self.is_fast:
            made_with["--decode"] = "fast"
        if self.part:
            made_with["--shards"] = list(self.part)
        return Journal(self.output.journal, len(self.questions), made_with)
