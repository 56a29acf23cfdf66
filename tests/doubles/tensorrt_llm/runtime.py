"""ModelRunner and ModelRunnerCpp as far as running OPT behind a prompt table goes."""

import importlib.metadata
import json
from pathlib import Path

import torch
import transformers

from tensorrt_llm.signatures import bind

calls = []  # (method, arguments) of every call, for tests to look at


class _Runner:
    def __init__(self, engine_dir, rank):
        import tensorrt_llm

        engine_dir = Path(engine_dir)
        config = json.loads((engine_dir / "config.json").read_text())
        self.pretrained, self.build = config["pretrained_config"], config["build_config"]
        assert rank == tensorrt_llm.mpi_rank()
        assert self.pretrained["mapping"]["world_size"] == tensorrt_llm.mpi_world_size()
        engine = (engine_dir / f"rank{rank}.engine").read_text()
        if not Path(engine).is_dir():
            raise RuntimeError("Error Code 6: The engine plan file is not compatible\nmore text")
        self.rank = rank
        self.truth = transformers.OPTForCausalLM.from_pretrained(engine, dtype=torch.float32).eval()

    @classmethod
    def from_dir(cls, *positional, **named):
        arguments = _bind(f"{cls.__name__}.from_dir", positional, named)
        return cls(arguments["engine_dir"], arguments["rank"])

    def generate(self, *positional, **named):
        arguments = _bind(f"{type(self).__name__}.generate", positional, named)
        assert arguments["sampling_config"] is None
        requests = arguments["batch_input_ids"]
        assert all(ids.ndim == 1 and ids.device.type == "cpu" for ids in requests)
        return self._generate(requests, arguments)

    def _check(self, requests, arguments):
        longest = max(map(len, requests))
        for value, limit in (
            (len(requests), "max_batch_size"),
            (longest, "max_input_len"),
            (longest + arguments["max_new_tokens"], "max_seq_len"),
            (arguments["num_beams"], "max_beam_width"),
        ):
            if value > self.build[limit]:
                raise RuntimeError(f"{value} exceeds the engine or specified limit {limit}")

    def _embed(self, ids, rows):
        """Ids of the vocabulary from the model; id vocab_size + r is row r, here a row of zeros
        where the engine would read whatever lies there."""
        vocab_size = self.pretrained["vocab_size"]
        table = torch.cat([rows.float(), torch.zeros(1000, self.pretrained["hidden_size"])])
        words = self.truth.get_input_embeddings()(ids.long().clamp(max=vocab_size - 1))
        pictures = table[(ids.long() - vocab_size).clamp(min=0)]
        return torch.where((ids >= vocab_size)[:, None], pictures, words)

    def _answer(self, ids, rows, arguments):
        """New ids of each sequence, end included, and the sum of each one's log probabilities."""
        num_beams, end_id = arguments["num_beams"], arguments["end_id"]
        options = {"num_beams": num_beams, "do_sample": False}
        if num_beams > 1:
            options |= {
                "num_return_sequences": num_beams,
                "length_penalty": arguments["length_penalty"],
                "early_stopping": bool(arguments["early_stopping"]),
            }
        elif arguments["top_k"] != 1:
            if arguments["random_seed"] is None:
                torch.seed()
            else:
                torch.manual_seed(arguments["random_seed"])
            names = ("top_k", "top_p", "temperature")
            options |= {"do_sample": True, **{name: arguments[name] for name in names}}
        embeds = self._embed(ids, rows)[None]
        result = self.truth.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            max_new_tokens=arguments["max_new_tokens"],
            eos_token_id=end_id,
            pad_token_id=arguments["pad_id"],
            min_new_tokens=arguments.get("min_tokens"),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        answers = [_until(new, end_id) for new in result.sequences.tolist()]
        scores = result.sequences_scores.tolist() if num_beams > 1 else [0.0] * len(answers)
        penalty = arguments["length_penalty"] or 0.0
        sums = [score * len(new) ** penalty for score, new in zip(scores, answers, strict=True)]
        return answers, sums


class ModelRunner(_Runner):
    """The Python session: every rank decodes, and the width is that of the batch."""

    def _generate(self, requests, arguments):
        assert arguments["end_id"] is not None
        assert arguments["pad_id"] is not None
        self._check(requests, arguments)
        size, table = self.build["max_prompt_embedding_table_size"], arguments["prompt_table"]
        if size == 0:  # the table is ignored, silently
            table = torch.zeros(1, 1, self.pretrained["hidden_size"])
        rows_per_task = table.shape[-2]
        table = table.reshape(-1, table.shape[-1])
        if len(table) > size > 0:
            raise RuntimeError("prompt_embedding_table is larger than its profile")
        tasks = _tasks(arguments["prompt_tasks"], requests) or [0] * len(requests)
        width = max(map(len, requests)) + arguments["max_new_tokens"]
        output, sums = [], []
        for ids, task in zip(requests, tasks, strict=True):
            answers, log_probs = self._answer(ids, table[task * rows_per_task :], arguments)
            output.append([_padded(ids, new, width, arguments["end_id"]) for new in answers])
            sums.append(log_probs)
        output = torch.tensor(output, dtype=torch.int32)
        if not arguments["return_dict"]:
            return output
        scores = {"cum_log_probs": torch.tensor(sums)} if arguments["output_cum_log_probs"] else {}
        return {"output_ids": output, **scores}


class ModelRunnerCpp(_Runner):
    """The executor: rank 0 decodes, and the width is that of the engine."""

    def __init__(self, engine_dir, rank):
        super().__init__(engine_dir, rank)
        if "paged" not in str(self.build["kv_cache_type"] or "PAGED").lower():
            raise RuntimeError("requires GPT attention plugin with packed input and paged KV cache")

    def _generate(self, requests, arguments):
        if self.rank != 0:
            return []
        self._check(requests, arguments)
        table = arguments["prompt_table"]
        share = self.build["max_prompt_embedding_table_size"] // self.build["max_batch_size"]
        if table.shape[1] > share:
            raise RuntimeError("prompt table exceeds the share of a request")
        tasks = _tasks(arguments["prompt_tasks"], requests) or [0] * len(requests)
        if importlib.metadata.version("tensorrt_llm").startswith(("0.13", "0.14")):
            arguments["random_seed"] = None
        # The executor's own defaults where nothing is said.
        arguments["length_penalty"] = arguments["length_penalty"] or 0.0
        if arguments["length_penalty"] < 0:
            raise RuntimeError(
                "[TensorRT-LLM][ERROR] Assertion failed: lengthPenalty.value() >= 0.f"
            )
        if arguments["early_stopping"] is None:
            arguments["early_stopping"] = 1
        old = importlib.metadata.version("tensorrt_llm").startswith("0.")
        sequences = self.build["max_beam_width"] if old else arguments["num_beams"]
        width, end_id = self.build["max_seq_len"], arguments["end_id"]
        output, sums = [], []
        for ids, task in zip(requests, tasks, strict=True):
            answers, log_probs = self._answer(ids, table[task], arguments)
            filled = [_padded(ids, new, width, end_id) for new in answers]
            output.append(filled + [[end_id] * width] * (sequences - len(filled)))
            sums.append(log_probs)
        output = torch.tensor(output, dtype=torch.int32)
        if not arguments["return_dict"]:
            return output
        result = {"output_ids": output}
        if arguments["output_cum_log_probs"]:
            # Known only where the log probabilities are asked for too.
            missing = torch.tensor([]) if old else torch.zeros(len(requests), sequences)
            known = arguments["output_log_probs"]
            result["cum_log_probs"] = torch.tensor(sums) if known else missing
        return result


def _bind(method, positional, named):
    arguments = bind(importlib.metadata.version("tensorrt_llm"), method, positional, named)
    calls.append((method, dict(named)))
    return arguments


def _tasks(text, requests):
    if text is None:
        return None
    tasks = [int(task) for task in text.split(",")]
    assert len(tasks) == len(requests)
    return tasks


def _until(ids, end_id):
    return ids[: ids.index(end_id) + 1] if end_id in ids else ids


def _padded(ids, new, width, end_id):
    row = ids.tolist() + new
    return row + [end_id] * (width - len(row))
