"""OPT on TensorRT-LLM 0.13 to 1.2.1, from an engine of `trtllm-build`.

Verified against the published API of those releases with a double of it (tests), not run by us.

Two runners, chosen by the engine's config.json: ModelRunnerCpp (the executor, paged KV cache) and
ModelRunner (the Python session, continuous KV cache, `--paged_kv_cache disable`). What is done
here is right on both: every request has the ids vocab_size + 0 … n - 1 for its picture, the prompt
table is requests x n x hidden size, and prompt_tasks "0,1,…" gives each request its own part.
Without prompt_tasks every request would see the first picture.

Neither has rows that requests could take and leave: `generate` takes one batch, no larger than the
engine's, to its end. The executor would batch requests in flight, but ModelRunnerCpp has no call for
that: it refuses larger batches, and its later releases, as we read their source, wait for any
answer: of two threads which call it at the same time one would get the other's.

Where TensorRT-LLM decodes otherwise than the native session (which is Hugging Face's):
- Sampling draws from its own generator, seeded with `seed` for every request alike: equal requests
  get equal answers, and the answers are not those that the native session draws. The executor of
  0.13 and 0.14 may drop the seed: answers differ from run to run there, and one that is asked for
  is refused.
- repetition_penalty acts on the logits, after the temperature; Hugging Face applies it before
  the temperature, and in a beam search to the log probabilities.
- A text of `stop` does not end the work, but cuts the answer at the same token; a beam search, where
  it would change which beams there are, refuses it.
- What greedy search and sampling say of probabilities is not known to be the model's: no scores.
- A float16 engine rounds otherwise than float32: near ties may fall differently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from blip2 import memory
from blip2.errors import Blip2Error, first_line
from blip2.language.session import Beam, Generation, GenerationOptions, LanguageSession, Limits
from blip2.language.trtllm_engine import EngineConfig, check_version
from blip2.language.trtllm_format import DTYPES
from blip2.layout import BUILD_ENGINE

# TensorRT-LLM's own default, 0.9, leaves nothing for what the ViT and the Q-Former allocate when
# they first run.
_MOST_OF_FREE_MEMORY = 0.5
# Room for the cache's division into blocks.
_KV_CACHE_MARGIN = 1.2
# TensorRT-LLM cuts a larger top_k to this one, with no more than a line in its log.
_MAX_TOP_K = 1024
# The first release whose executor, as we read its source, takes a seed.
_FIRST_WITH_SEEDS = (0, 15)


class TensorRTLLMSession(LanguageSession):
    """One TensorRT-LLM engine; with tensor parallelism, this process's part of it.

    Under `mpirun -n N`, ModelRunner runs the same decoding loop in every process, and each looks
    up the pictures' rows in its own copy of the prompt table: every process takes the requests.
    The executor behind ModelRunnerCpp takes them on rank 0 and sends them to the others, table
    included: those need no pictures and wait until rank 0 is done.
    """

    def __init__(self, engine_dir: Path, precision: str | None = None) -> None:
        """Check the engine's description and choose this process's GPU; loads no weights yet.

        Raises:
            Blip2Error: TensorRT-LLM or the engine is missing, damaged, of a version that cannot be
                used or not of each other's, or built for another number of processes.
        """
        if precision is not None:
            raise Blip2Error(
                f"{engine_dir} is an engine, whose precision was chosen when it was built",
                "leave out `precision`",
            )
        config = EngineConfig.read(engine_dir)
        _check_installation(engine_dir, config.version)
        self._tensorrt_llm = _import_tensorrt_llm()
        self._rank, processes = self._tensorrt_llm.mpi_rank(), self._tensorrt_llm.mpi_world_size()
        if processes != config.world_size:
            raise Blip2Error(
                f"{engine_dir} is for {config.world_size} GPU(s), and this runs in {processes}"
                " process(es)",
                f"start it with: mpirun -n {config.world_size} python run.py …",
            )
        if torch.cuda.is_available():
            # Now, as the ViT and the Q-Former go to the GPU that is current when they are opened.
            torch.cuda.set_device(self._rank % torch.cuda.device_count())
        self.device = torch.device("cuda")
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.limits = Limits(
            max_total_len=min(config.max_seq_len, config.max_position_embeddings),
            max_batch_size=config.max_batch_size,
            max_num_beams=config.max_beam_width,
            max_input_len=config.max_input_len,
            max_table_rows=config.rows_per_request,
        )
        self.is_leader = self._rank == 0
        self.is_in_step = processes > 1 and not config.runs_in_executor
        self.takes_requests = self.is_leader or self.is_in_step
        self._engine_dir = engine_dir
        self._config = config
        self._runner: Any = None

    def load(self) -> None:
        """Load this rank's engine; a second call does nothing.

        Raises:
            Blip2Error: TensorRT-LLM cannot load it.
        """
        if self._runner is not None:
            return
        runtime = self._tensorrt_llm.runtime
        try:
            if self._config.runs_in_executor:
                self._runner = runtime.ModelRunnerCpp.from_dir(
                    str(self._engine_dir),
                    rank=self._rank,
                    kv_cache_free_gpu_memory_fraction=self._memory_fraction(),
                )
            else:
                self._runner = runtime.ModelRunner.from_dir(str(self._engine_dir), rank=self._rank)
        except (RuntimeError, AssertionError, ValueError, OSError) as error:
            raise Blip2Error(
                f"TensorRT-LLM cannot load {self._engine_dir} ({first_line(error)})",
                f"see that the GPU has memory for it, or build it again on it with {BUILD_ENGINE}",
            ) from None

    def has_scores(self, options: GenerationOptions) -> bool:
        return options.num_beams > 1

    def close(self) -> None:
        """Let the engine go. On the executor's other ranks this waits for rank 0 to do the same."""
        self._runner = None

    def _memory_fraction(self) -> float:
        """Part of the GPU memory left after the weights that the paged KV cache may take.

        As much as a full batch can fill, and at most half.
        """
        if not torch.cuda.is_available():
            return _MOST_OF_FREE_MEMORY
        weights = (self._engine_dir / f"rank{self._rank}.engine").stat().st_size
        free = max(torch.cuda.mem_get_info()[0] - weights, 1)
        return min(_MOST_OF_FREE_MEMORY, _KV_CACHE_MARGIN * self._config.kv_cache_bytes / free)

    def check(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
    ) -> None:
        super().check(input_ids, prompt_table, options)
        if options.top_k > _MAX_TOP_K:
            raise Blip2Error(
                f"`top_k` is {options.top_k}, TensorRT-LLM takes at most {_MAX_TOP_K}",
                "lower it, or give 0 for the whole vocabulary",
            )
        if options.samples and options.sequences > 1:
            raise Blip2Error(
                "TensorRT-LLM draws the same answer again for a request that is asked again",
                "leave out `num_return_sequences`, and sample with several values of `seed`",
            )
        if options.stop is not None and options.num_beams > 1:
            raise Blip2Error(
                "TensorRT-LLM's beam search knows no texts to end at",
                "leave out `stop`, or `num_beams`",
            )
        if not self._config.runs_in_executor:
            if options.min_output_len:
                raise Blip2Error(
                    "TensorRT-LLM's runner for continuous KV caches takes no fewest tokens",
                    "leave out `min_output_len`, or use an engine with a paged KV cache",
                )
            return
        if options.num_beams > 1 and options.length_penalty < 0:
            raise Blip2Error(
                f"`length_penalty` is {options.length_penalty}, TensorRT-LLM's executor takes none"
                " below 0",
                "raise it, or use an engine with a continuous KV cache",
            )
        if options.samples and options.seed and self._config.release < _FIRST_WITH_SEEDS:
            raise Blip2Error(
                f"`seed` is {options.seed}, and the executor of TensorRT-LLM {self._config.version}"
                " draws without one",
                "leave it out, or use 0.15 to 1.2.1",
            )

    def _generate(
        self,
        input_ids: Sequence[torch.Tensor],
        prompt_table: torch.Tensor,
        options: GenerationOptions,
        first_request: int,  # noqa: ARG002 - seeds do not depend on it here, see the module
    ) -> list[Generation]:
        self.load()
        if prompt_table.is_cuda:
            # The executor's threads read the table on streams of their own.
            torch.cuda.synchronize(prompt_table.device)
        try:
            output = self._runner.generate(
                [ids.to("cpu", torch.int32) for ids in input_ids],
                prompt_table=prompt_table.to(DTYPES[self._config.dtype]),
                prompt_tasks=",".join(str(request) for request in range(len(input_ids))),
                return_dict=True,
                **_decoding_arguments(options),
            )
        except RuntimeError as error:
            kind = memory.OutOfMemory if memory.exhausted(error) else Blip2Error
            raise kind(
                f"TensorRT-LLM failed on a batch of {len(input_ids)} ({first_line(error)}); ask"
                " less at a time, or with fewer beams"
            ) from error
        # Only a beam search has asked for scores.
        scores = output["cum_log_probs"].tolist() if options.num_beams > 1 else None
        return [
            Generation(
                _beams(sequences, len(ids), scores[request] if scores else None, options),
            )
            for request, (ids, sequences) in enumerate(
                zip(input_ids, output["output_ids"].tolist(), strict=True)
            )
        ]


def _decoding_arguments(options: GenerationOptions) -> dict[str, Any]:
    """The options as both runners' generate takes them.

    ModelRunnerCpp has max_new_tokens 1 and no length penalty by default, ModelRunner other
    defaults, and both ignore names that they do not know: so everything that matters is said.
    """
    arguments: dict[str, Any] = {
        "max_new_tokens": options.max_output_len,
        "end_id": options.end_id,
        "pad_id": options.pad_id,
        "num_beams": options.num_beams,
        "repetition_penalty": options.repetition_penalty,
    }
    if options.min_output_len:
        arguments["min_tokens"] = options.min_output_len
    if options.num_beams > 1:
        arguments |= {
            "length_penalty": options.length_penalty,
            "early_stopping": int(options.early_stopping),
            # The executor computes the sums only together with each token's log probability.
            "output_log_probs": True,
            "output_cum_log_probs": True,
        }
    elif options.samples:
        arguments |= {
            "top_k": options.top_k,
            "top_p": options.top_p,
            "temperature": options.temperature,
            "random_seed": options.seed,
        }
    else:
        arguments["top_k"] = 1
    return arguments


def _beams(
    sequences: list[list[int]],
    input_len: int,
    log_probs: list[float] | None,
    options: GenerationOptions,
) -> tuple[Beam, ...]:
    """The answers in one request's output, best first.

    Args:
        sequences: input ids, new ids, then padding with end_id, of a width that differs between
            runners; before 1.0 the executor returns as many as the engine's max_beam_width.
        input_len: length of this request's own input.
        log_probs: sum over each beam's new tokens, not divided by its length.
        options: what was asked for.
    """
    beams = []
    for index, ids in enumerate(sequences[: options.sequences]):
        new = ids[input_len : input_len + options.max_output_len]
        if log_probs is None:
            beams.append(Beam.cut(new, options))
            continue
        beam = Beam.cut(new, options, log_probs[index])
        length = len(beam.token_ids) + beam.finished
        score = log_probs[index] / length**options.length_penalty
        beams.append(dataclasses.replace(beam, score=score))
    return tuple(beams)


def _check_installation(engine_dir: Path, engine_version: str) -> None:
    """TensorRT-LLM must be there, in a usable version, and in the one that built the engine.

    An engine of another release may load and fail later, or not load with a message about TensorRT.
    """
    try:
        installed = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        raise Blip2Error(
            f"{engine_dir} holds a TensorRT-LLM engine, and tensorrt_llm is not installed",
            "install requirements-tensorrt.txt, or let the native session run OPT: give"
            " `opt_engine_dir` the output of opt/convert_checkpoint.py",
        ) from None
    check_version(installed, "installed is")
    if installed != engine_version:
        raise Blip2Error(
            f"{engine_dir} was built by TensorRT-LLM {engine_version}, installed is {installed}",
            f"install that version, or build the engine again with {BUILD_ENGINE}",
        )


def _import_tensorrt_llm() -> ModuleType:
    """Import TensorRT-LLM, keeping its messages out of standard output, which is for answers."""
    os.environ.setdefault("TLLM_LOG_LEVEL", "WARNING")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import tensorrt_llm
            import tensorrt_llm.runtime
    except Exception as error:  # whatever is wrong with it or below it, such as another torchvision
        raise Blip2Error(
            f"tensorrt_llm cannot be imported ({first_line(error)})",
            "it needs an NVIDIA GPU, its driver and the environment of requirements-tensorrt.txt, with"
            " torch and torchvision from the same index, as that file says",
        ) from error
    return tensorrt_llm
