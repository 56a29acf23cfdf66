"""The TensorRT-LLM session against a double of TensorRT-LLM, and what it refuses beforehand.

What is right is what transformers says of each request alone: its picture's rows, then the
embeddings of its text. The double reads ids, tasks and table as the real runners do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys

import opt_models
import pytest
import torch
import transformers
from trtllm_engines import (
    VERSIONS,
    calls,
    forget_double,
    install_double,
    install_metadata,
    write_engine,
)

from blip2.engines import LANGUAGE, engine_for, open_language_session
from blip2.errors import Blip2Error
from blip2.language import GenerationOptions
from blip2.language.stopping import StopTexts
from blip2.language.tensorrt_llm import TensorRTLLMSession

QUERY_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 4, 96, 64
RUNNERS = {"ModelRunnerCpp": "PAGED", "ModelRunner": "CONTINUOUS"}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A Hugging Face OPT: its directory and the model."""
    directory = tmp_path_factory.mktemp("truth")
    opt_models.opt(seed=3).save_pretrained(directory)
    return directory, transformers.OPTForCausalLM.from_pretrained(directory).eval()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install the double as TensorRT-LLM of a version, in a process of a rank."""
    yield functools.partial(install_double, monkeypatch, tmp_path / "site")
    forget_double()


@pytest.fixture(scope="module")
def requests():
    """Texts of different lengths, each with its own picture."""
    torch.manual_seed(1)
    picture_ids = torch.arange(VOCAB_SIZE, VOCAB_SIZE + QUERY_TOKENS)
    texts = [torch.tensor([2, *torch.randint(4, 90, (n,)).tolist()]) for n in (3, 0, 7, 5)]
    table = torch.randn(len(texts), QUERY_TOKENS, HIDDEN_SIZE)
    return texts, [torch.cat([picture_ids, text]) for text in texts], table


def options(**named) -> GenerationOptions:
    return GenerationOptions(**{"end_id": END_ID, "max_output_len": 12, **named})


# A token that ends some answers early and others not at all.
END_ID = 34


def transformers_answers(truth, requests, opts: GenerationOptions):
    """What transformers generates for each request alone: ids of each beam, and their scores."""
    model, (texts, _, table) = truth[1], requests
    answers = []
    for text, picture in zip(texts, table, strict=True):
        embeds = torch.cat([picture, model.get_input_embeddings()(text)])[None]
        sampling = {"do_sample": opts.samples}
        if opts.samples:
            torch.manual_seed(opts.seed)
            sampling |= {n: getattr(opts, n) for n in ("top_k", "top_p", "temperature")}
        if opts.num_beams > 1:
            sampling |= {n: getattr(opts, n) for n in ("length_penalty", "early_stopping")}
        result = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            max_new_tokens=opts.max_output_len,
            num_beams=opts.num_beams,
            num_return_sequences=opts.num_beams,
            eos_token_id=opts.end_id,
            pad_token_id=opts.pad_id,
            min_new_tokens=opts.min_output_len or None,
            return_dict_in_generate=True,
            output_scores=True,
            **sampling,
        )
        scores = result.sequences_scores.tolist() if opts.num_beams > 1 else [None]
        ids = [new[: new.index(END_ID)] if END_ID in new else new for new in _lists(result)]
        answers.append((ids, scores, [END_ID in new for new in _lists(result)]))
    return answers


def _lists(result) -> list[list[int]]:
    return result.sequences.tolist()


def check_answers(generations, expected) -> None:
    assert len(generations) == len(expected)
    for generation, (ids, scores, ended) in zip(generations, expected, strict=True):
        assert [beam.finished for beam in generation.beams] == ended
        assert [beam.token_ids for beam in generation.beams] == ids
        found = [beam.score for beam in generation.beams]
        assert found == (scores if scores == [None] else pytest.approx(scores, rel=1e-4))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"num_beams": 5, "length_penalty": 0.5},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
        {"top_k": 0, "top_p": 0.9, "temperature": 1.3, "seed": 5},
        {"top_k": 7, "seed": 11},
        {"max_output_len": 1},
        {"min_output_len": 10},
        {"num_beams": 3, "min_output_len": 9},
    ],
    ids=str,
)
def test_every_request_gets_the_answer_it_gets_alone(
    install, tmp_path, truth, requests, version, runner, named
):
    if "seed" in named and (version, runner) == ("0.13.0", "ModelRunnerCpp"):
        pytest.skip("it drops the seed, and is not asked")
    if "min_output_len" in named and runner == "ModelRunner":
        pytest.skip("it is refused")
    install(version)
    kv_cache_type = RUNNERS[runner] if version < "1.2" else RUNNERS[runner].lower()
    engine = write_engine(
        tmp_path / "engine", truth[0], version=version, kv_cache_type=kv_cache_type
    )
    session = open_language_session(engine)
    opts = options(**named)
    generations = session.generate(requests[1], requests[2], opts)
    check_answers(generations, transformers_answers(truth, requests, opts))
    assert len(calls(f"{runner}.generate")) == 1


def test_the_answers_compared_are_worth_comparing(truth, requests):
    """Some end early, some do not, and all differ: else the tests above could not fail."""
    greedy = [ids for [ids], _, _ in transformers_answers(truth, requests, options())]
    assert len({tuple(ids) for ids in greedy}) == len(greedy)
    assert {len(ids) == 12 for ids in greedy} == {True, False}
    short = transformers_answers(truth, requests, options(num_beams=5, length_penalty=0.0))
    long = transformers_answers(truth, requests, options(num_beams=5, length_penalty=3.0))
    assert [ids for ids, *_ in short] != [ids for ids, *_ in long]
    beams = {"num_beams": 3, "length_penalty": 2.0}
    patient = transformers_answers(truth, requests, options(**beams))
    hasty = transformers_answers(truth, requests, options(**beams, early_stopping=True))
    assert [ids for ids, *_ in patient] != [ids for ids, *_ in hasty]


@pytest.mark.parametrize("kv_cache_type", RUNNERS.values())
def test_a_text_cuts_answers_and_beams_can_be_fewer(
    install, tmp_path, truth, requests, kv_cache_type
):
    """At the token that completes it, as transformers ends there; an answer without it stays."""
    install()
    session = open_language_session(
        write_engine(tmp_path / "engine", truth[0], kv_cache_type=kv_cache_type)
    )
    whole = [g.beams[0] for g in session.generate(requests[1], requests[2], options())]
    other = next(b.token_ids[4] for b in whole if len(b.token_ids) > 6)
    stop = StopTexts(["x"], [b"x" if token == other else b"y" for token in range(VOCAB_SIZE)])
    cut = [g.beams[0] for g in session.generate(requests[1], requests[2], options(stop=stop))]
    for beam, before in zip(cut, whole, strict=True):
        has_it = other in before.token_ids
        length = before.token_ids.index(other) + 1 if has_it else len(before.token_ids)
        assert beam.token_ids == before.token_ids[:length]
        assert beam.finished == (has_it or before.finished)
        assert beam.log_prob is None
    assert [beam.token_ids for beam in cut] != [beam.token_ids for beam in whole]
    assert not session.has_scores(options())
    assert session.has_scores(options(num_beams=3))
    three = session.generate(requests[1], requests[2], options(num_beams=3))
    two = session.generate(requests[1], requests[2], options(num_beams=3, num_return_sequences=2))
    assert [g.beams for g in two] == [g.beams[:2] for g in three]
    for beam in (beam for g in three for beam in g.beams):
        assert beam.log_prob == pytest.approx(beam.score, rel=1e-5)  # of a length penalty of 1


@pytest.mark.parametrize(
    "kv_cache_type, named, message",
    [
        ("PAGED", {"top_k": 0, "num_return_sequences": 2}, "leave out `num_return_sequences`"),
        ("PAGED", {"num_beams": 2, "stop": StopTexts(["x"], [b"x"])}, "leave out `stop`, or"),
        ("CONTINUOUS", {"min_output_len": 2}, "leave out `min_output_len`"),
    ],
)
def test_what_the_runners_cannot_is_refused_beforehand(
    install, tmp_path, truth, requests, kv_cache_type, named, message
):
    install()
    session = open_language_session(
        write_engine(tmp_path / "engine", truth[0], kv_cache_type=kv_cache_type)
    )
    with pytest.raises(Blip2Error, match=message):
        session.generate(requests[1], requests[2], options(**named))
    assert not calls("ModelRunnerCpp.generate") + calls("ModelRunner.generate")


@pytest.mark.parametrize("kv_cache_type", RUNNERS.values())
def test_larger_batches_than_the_engine_takes_are_split(
    install, tmp_path, truth, requests, kv_cache_type
):
    install()
    session = open_language_session(
        write_engine(tmp_path / "engine", truth[0], kv_cache_type=kv_cache_type, max_batch_size=3)
    )
    generations = session.generate(requests[1], requests[2], options())
    check_answers(generations, transformers_answers(truth, requests, options()))


def test_repetition_penalty_and_the_engines_dtype_reach_the_runner(
    install, tmp_path, truth, requests
):
    install()
    engine = write_engine(tmp_path / "engine", truth[0], dtype="float16")
    session = open_language_session(engine)
    session.generate(requests[1], requests[2], options(repetition_penalty=1.5))
    [arguments] = calls("ModelRunnerCpp.generate")
    assert arguments["repetition_penalty"] == 1.5
    assert arguments["prompt_table"].dtype == torch.float16


def test_the_engine_is_loaded_once_and_only_when_asked(install, tmp_path, truth, requests):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    assert not calls("ModelRunnerCpp.from_dir")
    session.load()
    session.generate(requests[1], requests[2], options())
    assert len(calls("ModelRunnerCpp.from_dir")) == 1


@pytest.mark.parametrize(
    "free_bytes, fraction",
    [(1 << 40, pytest.approx(0.0, abs=1e-4)), (1 << 20, 0.5), (10, 0.5)],
)
def test_the_cache_takes_what_it_can_use_and_half_at_most(
    install, tmp_path, truth, monkeypatch, free_bytes, fraction
):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, free_bytes))
    session.load()
    [arguments] = calls("ModelRunnerCpp.from_dir")
    assert arguments["kv_cache_free_gpu_memory_fraction"] == fraction
    assert arguments["kv_cache_free_gpu_memory_fraction"] > 0


def test_the_cache_holds_a_full_batch_of_the_longest_requests(
    install, tmp_path, truth, monkeypatch
):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    session.load()
    [arguments] = calls("ModelRunnerCpp.from_dir")
    # 4 requests x 5 beams x 60 tokens x keys and values x 2 layers x 64 wide x float32
    needed = 4 * 5 * 60 * 2 * 2 * 64 * 4
    assert needed < arguments["kv_cache_free_gpu_memory_fraction"] * (1 << 30) < 1.5 * needed


@pytest.mark.parametrize("kv_cache_type", RUNNERS.values())
def test_of_two_processes_rank_0_answers(install, tmp_path, truth, requests, kv_cache_type):
    engine = write_engine(tmp_path / "engine", truth[0], kv_cache_type=kv_cache_type, world_size=2)
    install(size=2)
    leader = open_language_session(engine)
    assert leader.is_leader
    assert leader.takes_requests
    generations = leader.generate(requests[1], requests[2], options())
    check_answers(generations, transformers_answers(truth, requests, options()))


def test_the_executors_other_ranks_take_no_requests(install, tmp_path, truth):
    install(rank=1, size=2)
    engine = write_engine(tmp_path / "engine", truth[0], world_size=2)
    session = open_language_session(engine)
    assert not session.is_leader
    assert not session.takes_requests
    session.load()
    assert [arguments["rank"] for arguments in calls("ModelRunnerCpp.from_dir")] == [1]
    session.close()


def test_the_python_sessions_other_ranks_decode_too(install, tmp_path, truth, requests):
    install(rank=1, size=2)
    engine = write_engine(tmp_path / "engine", truth[0], world_size=2, kv_cache_type="CONTINUOUS")
    session = open_language_session(engine)
    assert not session.is_leader
    assert session.takes_requests
    generations = session.generate(requests[1], requests[2], options())
    check_answers(generations, transformers_answers(truth, requests, options()))


def test_an_engine_that_names_no_cache_has_a_paged_one(install, tmp_path, truth, requests):
    install()
    engine = write_engine(tmp_path / "engine", truth[0], kv_cache_type=None)
    session = open_language_session(engine)
    generations = session.generate(requests[1], requests[2], options())
    check_answers(generations, transformers_answers(truth, requests, options()))
    assert len(calls("ModelRunnerCpp.generate")) == 1


def test_an_engine_wins_over_the_checkpoint_beside_it(install, tmp_path, truth):
    install()
    engine = write_engine(tmp_path / "engine", truth[0])
    (engine / "rank0.safetensors").write_bytes(b"")
    assert engine_for(LANGUAGE, engine)
    assert isinstance(open_language_session(engine), TensorRTLLMSession)


def test_nothing_is_printed_to_standard_output(install, tmp_path, truth, capfd):
    install()
    open_language_session(write_engine(tmp_path / "engine", truth[0]))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "TensorRT-LLM version" in printed.err


@pytest.mark.parametrize(
    "installed, built, message",
    [
        ("1.3.0", "1.2.1", "no longer runs TensorRT engines .* native session"),
        ("1.3.0rc4", "1.3.0rc4", "no longer runs TensorRT engines .* native session"),
        ("2.0", "1.2.1", "no longer runs TensorRT engines"),
        ("0.12.0", "0.12.0", "0.13 to 1.2.1 can be used"),
        ("0.9.0", "1.2.1", "0.13 to 1.2.1 can be used"),
        ("1.2.1", "0.11.0", "0.13 to 1.2.1 can be used"),
        ("1.2.1", "1.0.0", "built by TensorRT-LLM 1.0.0, installed is 1.2.1"),
    ],
)
def test_versions_that_cannot_run_the_engine_are_refused(
    install, tmp_path, truth, installed, built, message
):
    install(installed)
    engine = write_engine(tmp_path / "engine", truth[0], version=built)
    with pytest.raises(Blip2Error, match=message) as error:
        open_language_session(engine)
    assert "\n" not in str(error.value)
    assert "tensorrt_llm" not in sys.modules


def test_without_tensorrt_llm_the_native_session_is_named(tmp_path, truth):
    engine = write_engine(tmp_path / "engine", truth[0])
    with pytest.raises(Blip2Error, match=r"tensorrt_llm is not installed; .* native session"):
        open_language_session(engine)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("ImportError('libcuda.so.1: cannot open\\nmore')", r"libcuda\.so\.1: cannot open"),
        ("OSError('libnvinfer.so.10: no such file')", r"libnvinfer\.so\.10: no such file"),
        (
            "RuntimeError('operator torchvision::nms does not exist')",
            "operator torchvision::nms .*",
        ),
        ("AttributeError", "AttributeError"),
    ],
)
def test_an_installation_that_cannot_be_imported_is_one_line(
    tmp_path, truth, monkeypatch, fault, said
):
    site = install_metadata(tmp_path / "site", "1.2.1")
    (site / "tensorrt_llm.py").write_text(f"raise {fault}")
    monkeypatch.syspath_prepend(str(site))
    forget_double()
    match = rf"cannot be imported \({said}\); .* torch and torchvision from the same index"
    with pytest.raises(Blip2Error, match=match) as error:
        open_language_session(write_engine(tmp_path / "engine", truth[0]))
    assert "\n" not in str(error.value)


NEGATIVE = {"num_beams": 2, "length_penalty": -0.5}


def test_a_negative_length_penalty_is_for_the_python_session_alone(
    install, tmp_path, truth, requests
):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    with pytest.raises(Blip2Error, match=r"length_penalty` is -0\.5, .* none below 0"):
        session.generate(requests[1], requests[2], options(**NEGATIVE))
    assert not calls("ModelRunnerCpp.from_dir")
    session.check(requests[1], requests[2], options(length_penalty=-0.5))  # not used without beams
    engine = write_engine(tmp_path / "other", truth[0], kv_cache_type="CONTINUOUS")
    generations = open_language_session(engine).generate(
        requests[1], requests[2], options(**NEGATIVE)
    )
    check_answers(generations, transformers_answers(truth, requests, options(**NEGATIVE)))


@pytest.mark.parametrize(
    "version, kv_cache_type, taken",
    [
        ("0.13.0", "PAGED", False),
        ("0.14.0", "PAGED", False),
        ("0.13.0", "CONTINUOUS", True),
        ("0.15.0", "PAGED", True),
        ("1.2.1", "PAGED", True),
    ],
)
def test_a_seed_is_refused_where_it_would_be_dropped(
    install, tmp_path, truth, requests, version, kv_cache_type, taken
):
    install(version)
    engine = write_engine(
        tmp_path / "engine", truth[0], version=version, kv_cache_type=kv_cache_type
    )
    session = open_language_session(engine)
    session.check(requests[1], requests[2], options(seed=5))
    session.check(requests[1], requests[2], options(top_k=7))
    with (
        contextlib.nullcontext()
        if taken
        else pytest.raises(
            Blip2Error,
            match=rf"`seed` is 5, .* {version} draws without one; leave it out, or use 0\.15",
        )
    ):
        session.check(requests[1], requests[2], options(top_k=7, seed=5))


@pytest.mark.parametrize(
    "processes, message", [(1, r"mpirun -n 2 python run.py"), (3, r"mpirun -n 2 python run.py")]
)
def test_another_number_of_processes_is_refused(install, tmp_path, truth, processes, message):
    install(size=processes)
    with pytest.raises(Blip2Error, match=message):
        open_language_session(write_engine(tmp_path / "engine", truth[0], world_size=2))


def _edit(engine, section, **values):
    config = json.loads((engine / "config.json").read_text())
    (config[section] if section else config).update(values)
    (engine / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda e: (e / "config.json").unlink(), "config.json does not exist"),
        (lambda e: (e / "config.json").write_text("{"), "cannot read"),
        (lambda e: (e / "config.json").write_text("{}"), "'pretrained_config' is missing"),
        (lambda e: _edit(e, "", build_config=None), "is missing or malformed"),
        (lambda e: _edit(e, "build_config", max_seq_len="60"), "max_seq_len is '60'"),
        (lambda e: _edit(e, "build_config", max_beam_width=0), "max_beam_width is 0"),
        (lambda e: _edit(e, "pretrained_config", architecture="GPTForCausalLM"), "not OPT"),
        (
            lambda e: _edit(e, "build_config", max_prompt_embedding_table_size=0),
            "it must be query tokens x max_batch_size",
        ),
        (
            lambda e: _edit(e, "build_config", max_batch_size=2048),
            "it must be query tokens x max_batch_size",
        ),
        (lambda e: (e / "rank1.engine").unlink(), "rank1.engine of 2 is missing"),
    ],
)
def test_damaged_engines_are_refused_before_loading(install, tmp_path, truth, damage, message):
    install(size=2)
    engine = write_engine(tmp_path / "engine", truth[0], world_size=2)
    damage(engine)
    with pytest.raises(Blip2Error, match=message) as error:
        open_language_session(engine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "named, message",
    [
        ({"num_beams": 6}, "num_beams` is 6, this OPT engine takes at most 5"),
        ({"max_output_len": 55}, "this OPT engine takes at most 60"),
        ({"top_k": 1025}, "TensorRT-LLM takes at most 1024"),
    ],
)
def test_limits_hold_before_the_runner_is_called(
    install, tmp_path, truth, requests, named, message
):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    with pytest.raises(Blip2Error, match=message):
        session.generate(requests[1], requests[2], options(**named))
    assert not calls("ModelRunnerCpp.from_dir")


def test_more_query_tokens_than_a_request_may_have_are_refused(install, tmp_path, truth, requests):
    install()
    engine = write_engine(tmp_path / "engine", truth[0], num_query_tokens=QUERY_TOKENS - 1)
    with pytest.raises(Blip2Error, match=r"query tokens an image is 4, .* at most 3"):
        open_language_session(engine).generate(requests[1], requests[2], options())


def test_another_hidden_size_than_the_q_formers_is_refused(install, tmp_path, truth, requests):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    with pytest.raises(Blip2Error, match="hidden size 32, this OPT has 64"):
        session.generate(requests[1], requests[2][:, :, :32], options())


def test_an_engine_that_does_not_load_is_one_line(install, tmp_path, truth):
    install()
    engine = write_engine(tmp_path / "engine", truth[0])
    (engine / "rank0.engine").write_text("from another GPU")
    with pytest.raises(
        Blip2Error, match=r"cannot load .* not compatible\); .* trtllm-build"
    ) as error:
        open_language_session(engine).load()
    assert "\n" not in str(error.value)


def test_a_failure_while_decoding_is_one_line(install, tmp_path, truth, requests, monkeypatch):
    install()
    session = open_language_session(write_engine(tmp_path / "engine", truth[0]))
    session.load()

    def out_of_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(
        sys.modules["tensorrt_llm.runtime"].ModelRunnerCpp, "generate", out_of_memory
    )
    with pytest.raises(Blip2Error, match=r"batch of 4 \(CUDA out of memory\.\); ask less"):
        session.generate(requests[1], requests[2], options())
