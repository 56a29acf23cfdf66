"""When the machine gives out: memory, disk, signals, other processes, the network, and numbers."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import models
import pytest
import torch
from bad_inputs import assert_one_line, bad_pictures, flip, odd_pictures, run_here
from conftest import ROOT, start_program
from PIL import Image

from blip2 import artifacts, downloads, memory
from blip2.artifacts import verification
from blip2.engines import Places, open_language_session, open_vision_session
from blip2.errors import Blip2Error
from blip2.language import GenerationOptions
from blip2.pipeline import Pipeline, Stopwatch, open_pipeline
from blip2.prompts import load_tokenizer
from blip2.vision import export

TEXTS = ["what?", "", "a photo of", "how?"]


@pytest.fixture
def pipeline(tiny_export, tiny_opt) -> Pipeline:
    return open_pipeline(Places.of(tiny_export.output, tiny_opt))


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def options(pipeline: Pipeline, **how: float) -> GenerationOptions:
    tokenizer = pipeline.tokenizer
    return GenerationOptions(tokenizer.end_id, tokenizer.pad_id, max_output_len=8, **how)


# --- memory ------------------------------------------------------------------------------------


def limit_batches(monkeypatch, session, method: str, largest: int) -> list[int]:
    """Let a session run out of GPU memory above that many rows; return the sizes it was asked for."""
    sizes, run = [], getattr(session, method)

    def limited(batch, *rest):
        sizes.append(len(batch))
        if len(batch) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        return run(batch, *rest)

    monkeypatch.setattr(session, method, limited)
    return sizes


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"top_k": 0, "temperature": 3.0}], ids=str)
def test_a_batch_that_memory_does_not_hold_is_halved_once(
    pipeline, pictures, monkeypatch, capsys, how
):
    expected = pipeline.answer(pictures, TEXTS, options(pipeline, **how))
    looks = limit_batches(monkeypatch, pipeline.vision, "_vit", 2)
    asks = limit_batches(monkeypatch, pipeline.language, "_generate", 2)
    for _ in range(2):
        for found, right in zip(
            pipeline.answer(pictures, TEXTS, options(pipeline, **how)), expected, strict=True
        ):
            assert [beam.text for beam in found] == [beam.text for beam in right]
            for beam, other in zip(found, right, strict=True):
                assert beam.score is other.score or beam.score == pytest.approx(other.score)
    assert looks == asks == [4, 2, 2, 2, 2]  # the next batch begins with the smaller size
    assert capsys.readouterr().err.splitlines() == [
        "note: not enough GPU memory for the ViT and Q-Former on a batch of 4; going on with"
        " batches of 2",
        "note: not enough GPU memory for the OPT on a batch of 4; going on with batches of 2",
    ]


@pytest.mark.parametrize("part, method", [("vision", "_qformer"), ("language", "_generate")])
def test_a_batch_whose_half_is_too_much_is_one_line(pipeline, pictures, monkeypatch, part, method):
    sizes = limit_batches(monkeypatch, getattr(pipeline, part), method, 1)
    with pytest.raises(
        Blip2Error, match=r"not enough GPU memory for the .* on a batch of 2; lower"
    ) as e:
        pipeline.answer(pictures, TEXTS, options(pipeline))
    assert "`batch_size`, `num_beams` or `max_output_len`" in str(e.value)
    assert sizes == [4, 2]


def test_loading_what_memory_does_not_hold(tiny_export, tiny_opt, monkeypatch):
    def enormous(*_args, **_kwargs):
        torch.empty(1 << 50)  # a real failure of torch's allocator, not our idea of one

    places = Places.of(tiny_export.output, tiny_opt)
    with monkeypatch.context() as patch:
        patch.setattr("blip2.language.native.checkpoint._build", enormous)
        with pytest.raises(Blip2Error, match=r"not enough host memory to load .*--use_weight_only"):
            open_pipeline(places)
    monkeypatch.setattr("onnxruntime.InferenceSession", enormous)
    with pytest.raises(Blip2Error, match=r"not enough host memory to open .*visual_encoder\.onnx;"):
        open_pipeline(places)


@pytest.mark.parametrize(
    "error, kind",
    [
        (MemoryError(), "host"),
        (OSError(12, "Cannot allocate memory"), "host"),
        (RuntimeError("std::bad_alloc"), "host"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "GPU"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "GPU"),
        (torch.OutOfMemoryError("CUDA out of memory."), "GPU"),
        (RuntimeError("CUDA error: an illegal memory access"), None),
        (ValueError("no"), None),
    ],
)
def test_which_memory_ran_out(error, kind):
    assert memory.exhausted(error) == kind


# In a process of its own: one that ran other tests holds memory that a limit no longer keeps from it.
LIMITED = """
import resource, sys
from pathlib import Path
from blip2 import images
from blip2.errors import Blip2Error

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    images.load_image(sys.argv[1])
except Blip2Error as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_picture_under_a_limit_of_memory(tmp_path):
    Image.new("L", (9400, 9400)).save(tmp_path / "large.png")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "large.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert re.search(r"not enough host memory for .*large\.png; scale it", done.stdout), done


# --- disk --------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A file system of 100 kB; where none may be mounted, files of at most 20 kB."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(directory)]
    if shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        try:
            yield
        finally:
            subprocess.run(["umount", str(directory)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("script", ["onnx_export.py", "build_vit_qformer.py", "convert"])
def test_full_disks_name_the_file_and_leave_nothing(
    tiny_checkpoint, tiny_plans, tmp_path, monkeypatch, capsys, script
):
    full = tmp_path / "full"
    command, file = {
        "onnx_export.py": (
            f"onnx_export.py --model_dir {tiny_checkpoint.checkpoint} --image"
            f" {tiny_checkpoint.picture} --output_dir {full}",
            "onnx/visual_encoder/visual_encoder.onnx.data",
        ),
        "build_vit_qformer.py": (
            f"build_vit_qformer.py 0 --onnx_dir {tiny_plans.onnx} --plan_dir {full}"
            " --compute_capability 8.9",
            "visual_encoder/visual_encoder_fp16.plan",
        ),
        "convert": (
            f"opt/convert_checkpoint.py --model_dir {tiny_checkpoint.checkpoint} --output_dir {full}",
            "rank0.safetensors",
        ),
    }[script]
    with small_disk(full):
        done = run_here(command, monkeypatch, capsys)
        assert_one_line(done)
        assert f"cannot write {full}/{file}: " in done.err
        assert "free space there or choose another" in done.err
        assert not list(full.iterdir())


def test_small_files_on_full_disks(tmp_path):
    """What torch and tokenizers write with their own code does not hide why it failed."""
    with small_disk(tmp_path / "full"):
        with (
            pytest.raises(Blip2Error, match=r"cannot write .*full/big\.pt: "),
            artifacts.staging(tmp_path / "full") as stage,
        ):
            artifacts.save_tensor(torch.zeros(100_000), stage / "big.pt")
        assert not list((tmp_path / "full").iterdir())


def test_older_files_that_a_new_result_lacks_are_removed(tmp_path):
    for names in (["rank0.bin", "rank1.bin", "config.json"], ["rank0.bin", "config.json"]):
        with artifacts.staging(tmp_path, ["rank*.bin"], is_ours=lambda _: True) as stage:
            for name in names:
                (stage / name).write_text(name)
        assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_what_an_older_run_wrote_is_replaced(tiny_export, tmp_path, monkeypatch, capsys):
    """By another checkpoint and number of ranks, though damaged meanwhile; nothing else is."""
    shutil.copytree(tiny_export.output, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    few = {"vision": {"num_hidden_layers": 1}, "qformer": {"num_hidden_layers": 2}}
    models.tiny_blip2(Path("other"), seed=1, **few)
    convert = "opt/convert_checkpoint.py --output_dir . --model_dir"
    for command in (
        f"{convert} {tiny_export.checkpoint} --tp_size 2",
        f"onnx_export.py --model_dir other --image {tiny_export.picture}",
        f"{convert} other",
    ):
        for name in ("image.pt", "query_tokens.pt", "tokenizer/tokenizer.json"):
            Path(name).write_text("damaged")
        Path("notes.json").write_text("{}")
        done = run_here(command, monkeypatch, capsys)
        assert done.code == 0, done.err
        if command.startswith("onnx"):
            open_vision_session(Path("onnx"), Path("query_tokens.pt"))
            load_tokenizer(Path("tokenizer"))
    open_language_session(Path())
    assert sorted(path.name for path in Path().glob("rank*")) == ["rank0.json", "rank0.safetensors"]
    assert Path("notes.json").read_text() == "{}"


# --- other processes, and signals --------------------------------------------------------------

STAGE_OFTEN = """
import sys
from pathlib import Path
from blip2 import artifacts
target, me = Path(sys.argv[1]), sys.argv[2]
for turn in range(60):
    with artifacts.staging(target / "deep" / "er", ["only-*"], lambda _: True) as stage:
        (stage / "sub").mkdir()
        for name in ("a.bin", "sub/b.bin", f"only-{me}", "c.json"):
            (stage / name).write_text(me)
    if turn % 7 == 0:
        try:
            with artifacts.staging(target / "deep" / "er", is_ours=lambda _: True) as stage:
                (stage / "a.bin").write_text("broken")
                raise KeyError
        except KeyError:
            pass
"""


def start(*command: object, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True, **how
    )


def test_stages_of_two_processes_end_as_one_of_them(tmp_path):
    runs = [start("-c", STAGE_OFTEN, tmp_path, me) for me in "AB"]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    files = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    [winner] = set(files.values())
    assert set(files) == {"a.bin", "b.bin", "c.json", f"only-{winner}"}
    assert os.listdir(tmp_path / "deep" / "er").count("sub") == 1


def test_a_lock_is_held_by_one_whatever_becomes_of_its_file(tmp_path):
    """Its file goes when it is released, under those that wait for it; a killed holder leaves one."""
    path, inside, most = tmp_path / "lock", [], []

    def hold(times: int) -> None:
        for _ in range(times):
            with artifacts.locked(path):
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    path.touch()
    threads = [threading.Thread(target=hold, args=(50,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200
    with artifacts.locked(path), pytest.raises(BlockingIOError), artifacts.locked(path, wait=False):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("script", ["export", "build", "convert"])
def test_two_programs_at_once_leave_one_whole_result(tiny_plans, tiny_checkpoint, tmp_path, script):
    out = tmp_path / "out"
    model, picture = tiny_plans.checkpoint, tiny_checkpoint.picture
    common, ways, made = {
        "export": (
            ("onnx_export.py", "--model_dir", model, "--image", picture, "--output_dir", out),
            [("--dtype", "float32"), ()],
            ["onnx/visual_encoder/visual_encoder.onnx", "onnx/Qformer/Qformer.onnx"],
        ),
        "build": (
            ("build_vit_qformer.py", "all", "--onnx_dir", tiny_plans.onnx, "--plan_dir", out),
            [("--compute_capability", "8.9"), ("--compute_capability", "12.0")],
            ["visual_encoder/visual_encoder_fp16.plan", "Qformer/Qformer_fp16.plan"],
        ),
        "convert": (
            ("opt/convert_checkpoint.py", "--model_dir", model, "--output_dir", out),
            [("--tp_size", "2"), ("--dtype", "float32")],
            ["rank0.safetensors"],
        ),
    }[script]
    runs = [start_program(*common, *way) for way in ways]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    artifacts.Verification({out / file: "test" for file in made}).finish()
    facts = [json.loads((out / file).with_suffix(".json").read_text()) for file in made]
    assert len({str((f["dtype"], f.get("gpu"))) for f in facts}) == 1
    if script == "convert":
        ranks = json.loads((out / "config.json").read_text())["mapping"]["tp_size"]
        assert len(list(out.glob("rank*.safetensors"))) == ranks
        assert facts[0]["dtype"] == ("float16" if ranks == 2 else "float32")
    assert not list(out.glob(".*"))


def test_signals_leave_nothing_or_what_the_next_run_removes(tiny_checkpoint, tmp_path):
    ends = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -9}
    runs = {}
    for sent in ends:
        out = tmp_path / sent.name
        out.mkdir()
        (out / "image.pt").write_text("of before")
        artifacts.write_sidecar(out / "image.pt")
        runs[sent] = start_program(
            *("onnx_export.py", "--model_dir", tiny_checkpoint.checkpoint),
            *("--image", tiny_checkpoint.picture, "--output_dir", out),
        )
    for sent, run in runs.items():
        out = tmp_path / sent.name
        while run.poll() is None and not list(out.glob(".stage-*")):
            time.sleep(0.01)
        run.send_signal(sent)
    for sent, run in runs.items():
        _, err = run.communicate(timeout=60)
        assert run.returncode == ends[sent], err
        if sent != signal.SIGKILL:
            assert err == "interrupted\n"
            assert sorted(os.listdir(tmp_path / sent.name)) == ["image.json", "image.pt"]
        assert (tmp_path / sent.name / "image.pt").read_text() == "of before"
    left = tmp_path / signal.SIGKILL.name
    assert len(set(os.listdir(left)) - {".stage.lock"}) == 3
    with artifacts.staging(left):
        pass
    assert sorted(os.listdir(left)) == ["image.json", "image.pt"]


def test_ctrl_c_the_moment_a_stage_is_made_leaves_none(tmp_path, monkeypatch):
    make = Path.mkdir

    def interrupted(path: Path, *arguments: object, **how: object) -> None:
        make(path, *arguments, **how)
        if path.name.startswith(".stage-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), artifacts.staging(tmp_path):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("script", ["run", "many", "export"])
def test_ctrl_c_waits_for_no_download(tiny_export, tiny_opt, tmp_path, script):
    """The server says nothing; the limit behind which that ends a download is not in reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        ask = (
            *("run.py", "--engine_dir", tiny_export.output / "onnx", "--opt_engine_dir", tiny_opt),
            *("--query_tokens", tiny_export.output / "query_tokens.pt", "--input_dir", url),
        )
        run = start_program(
            *{
                "run": ask,
                "many": (*ask, url, "--workers", 1, "--output", tmp_path / "out.jsonl"),
                "export": (
                    *("onnx_export.py", "--model_dir", tiny_export.checkpoint),
                    *("--image", url, "--output_dir", tmp_path / "out"),
                ),
            }[script],
            no_proxy="*",
        )
        server.settimeout(60)
        with server.accept()[0]:
            time.sleep(0.2)  # it has asked, and waits
            run.send_signal(signal.SIGINT)
            _, err = run.communicate(timeout=downloads.SILENCE_S - 5)
    assert run.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted")


def test_standard_streams_that_take_nothing_or_little(tiny_export, tiny_opt, tmp_path):
    """Closed, full, of a reader that goes, and of an encoding that lacks the question's letters.

    A picture a line goes elsewhere, and is written whatever becomes of standard output and errors.
    """
    out = tiny_export.output
    ask = (
        *(sys.executable, "run.py", "--engine_dir", out / "onnx", "--opt_engine_dir", tiny_opt),
        *("--query_tokens", out / "query_tokens.pt", "--input_dir", tiny_export.picture),
        *("--input_text", "猫?"),
    )
    line = " ".join(map(str, ask))
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1", "LANG": "C"}
    many = f"{line} --workers 1 --output {tmp_path}"
    shell = {
        f"{line} >&-": (0, ""),
        f"{line} 2>&-": (0, ""),
        f"{many}/closed.jsonl <&- >&- 2>&-": (0, ""),
        f"{many}/silent.jsonl 2>&-": (0, ""),
        f"{line} >/dev/full": (2, "error: cannot write standard output: No space left on device"),
        f"set -o pipefail; {line} | true": (0, ""),
        f"{line} | grep -q 'u732b'": (0, ""),
    }
    runs = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=latin, stderr=subprocess.PIPE, text=True
        )
        for command in shell
    ]
    for run, (code, says) in zip(runs, shell.values(), strict=True):
        _, err = run.communicate(timeout=120)
        assert (run.returncode, err.partition(";")[0].strip()) == (code, says), run.args
    for name in ("closed", "silent"):
        [answer] = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert "answer" in json.loads(answer)


def test_only_a_broken_standard_output_is_quiet():
    """Another pipe that breaks is a fault, though standard output be a pipe without a reader too."""
    script = (
        "import os; from blip2 import cli; ends = os.pipe(); os.close(ends[0]);"
        "cli.run(lambda: os.write(ends[1], b'x'))"
    )
    run = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "{script}" | true'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "BrokenPipeError" in run.stderr


# --- many pictures -----------------------------------------------------------------------------


def test_bad_pictures_among_many_are_lines_of_their_own(
    tiny_export, tiny_opt, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "zoo"
    folder.mkdir()
    bad = {name: content for name, (content, _) in bad_pictures().items()}
    for name, content in {**bad, **odd_pictures()}.items():
        (folder / name).write_bytes(content)
    seen = {name for name in bad if name.endswith((".jpg", ".png"))}  # others look like no picture
    done = run_here(
        f"run.py --engine_dir {tiny_export.checkpoint} --opt_engine_dir {tiny_opt} --workers 1"
        f" --input_dir {folder} --output {tmp_path / 'out.jsonl'} --max_output_len 3",
        monkeypatch,
        capsys,
    )
    assert done.code == 1, done.err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    failed = {Path(line["path"]).name for line in lines if "error" in line}
    answered = {Path(line["path"]).name for line in lines if "answer" in line}
    assert failed == seen
    assert answered == set(odd_pictures())


# --- hashes ------------------------------------------------------------------------------------


def test_no_verify_leaves_large_files_unread(tiny_export, tiny_opt, tmp_path, monkeypatch):
    opt = Path(shutil.copytree(tiny_opt, tmp_path / "opt"))
    flip(opt / "rank0.safetensors")()
    places = Places.of(tiny_export.output, opt)
    monkeypatch.setattr(verification, "_SMALL_BYTES", 1 << 16)
    open_pipeline(places, verify=False).verification.finish()
    with pytest.raises(Blip2Error, match=r"rank0\.safetensors is not the file that"):
        open_pipeline(places).verification.finish()


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, method", [("ViT", "_vit"), ("Q-Former", "_qformer")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_name_their_stage(
    pipeline, pictures, monkeypatch, stage, method, value
):
    run = getattr(pipeline.vision, method)

    def spoiled(batch):
        return run(batch).index_fill(0, torch.tensor([len(batch) - 1]), value)

    monkeypatch.setattr(pipeline.vision, method, spoiled)
    for how in ({}, {"num_beams": 2}, {"top_k": 0, "temperature": 2.0}):
        with pytest.raises(Blip2Error, match=f"the {stage} yields NaN or Inf, in float32 too"):
            pipeline.answer(pictures, TEXTS, options(pipeline, **how))
    look = pipeline.look(pictures, Stopwatch())
    pipeline.vision.dtype = torch.float16
    with pytest.raises(
        Blip2Error, match=r"float16 has overflowed.*onnx_export\.py --dtype float32"
    ):
        pipeline.ask(look, TEXTS, options(pipeline))


def test_numbers_that_are_none_in_opt(pipeline, pictures, monkeypatch):
    model = pipeline.language._model
    step, steps = model.step, []

    def spoiled(tokens, cache):
        steps.append(tokens)
        return step(tokens, cache) * (torch.nan if len(steps) == 3 else 1)

    monkeypatch.setattr(model, "step", spoiled)
    with pytest.raises(Blip2Error, match="the OPT yields NaN or Inf; make its checkpoint again"):
        pipeline.answer(pictures, TEXTS, options(pipeline))
    monkeypatch.setattr(model, "prefill", lambda *_: torch.full((4, 320), torch.inf))
    with pytest.raises(Blip2Error, match="the OPT yields NaN or Inf"):
        pipeline.answer(pictures, TEXTS, options(pipeline, top_k=0, temperature=2.0))


class Loud(torch.nn.Module):
    """Yields in float32 what float16 does not hold."""

    def __init__(self, weight: float = 6e4) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_an_export_that_overflows_float16_says_so(tmp_path):
    module, case = Loud(), {"input": torch.full((2, 4), 3.0)}
    expected = export.references(module, [case])
    assert torch.isfinite(expected[0]).all()
    narrow = {"input": case["input"].half()}
    path = tmp_path / "loud.onnx"
    export.narrow(module, torch.float16)
    export.write_graph(module, narrow, "output", path)
    with pytest.raises(Blip2Error, match=r"loud\.onnx overflows float16: .* --dtype float32"):
        export.check_graph(path, [narrow], expected, 1e-2)
    with pytest.raises(Blip2Error, match="weight has weights too large for float16; export with"):
        export.narrow(Loud(weight=1e5), torch.float16)


# --- the network -------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers that a picture's address can give."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        port = self.server.server_address[1]
        target = {"/inside": f"http://127.0.0.1:{port}/ok", "/file": "file:///etc/passwd"}
        target["/quoted"] = f"http://127%2E0%2E0%2E1:{port}/ok"
        target |= {"/ftp": "ftp://127.0.0.1/x", "/loop": "/loop"}
        if self.path in target:
            self.send_response(302)
            self.send_header("Location", target[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        if self.path == "/short":
            self.send_header("Content-Length", "999")
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/drip":
                while True:
                    self.wfile.write(b".")
                    time.sleep(0.05)
            self.wfile.write(b"x" * (3000 if self.path == "/large" else 9))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        serving.daemon_threads = True
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


@pytest.mark.parametrize(
    "path, says",
    [
        ("/none", "Not Found; check the address"),
        ("/large", "it is larger than 0 MiB"),
        ("/drip", "it takes longer than 1 s"),
        ("/short", "IncompleteRead"),
        ("/inside", "a redirect leads to 127.0.0.1, which is no public address"),
        ("/quoted", "a redirect leads to 127.0.0.1, which is no public address"),
        ("/loop", "a redirect leads to 127.0.0.1"),
        ("/file", "is not allowed"),
        ("/ftp", "Found; check"),
    ],
)
def test_downloads_are_limited(server, monkeypatch, path, says):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "MAX_BYTES", 2000)
    monkeypatch.setattr(downloads, "TIMEOUT_S", 1)
    with pytest.raises(Blip2Error) as error:
        downloads.download(server + path)
    assert f"cannot download {server}{path}: " in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url, asked",
    [
        ("/сцена.png", "/%D1%81%D1%86%D0%B5%D0%BD%D0%B0.png"),
        ("/%D1%81%D1%86.png", "/%D1%81%D1%86.png"),
        ("/a scene.png?of=a b&c=ü#part", "/a%20scene.png?of=a%20b&c=%C3%BC"),
        ("/100% c\u00f6tton.png", "/100%%20c%C3%B6tton.png"),
        ("/a\tb\n.png", "/ab.png"),
        ("/un\udcffcode.png", "/un%FFcode.png"),
    ],
)
def test_addresses_as_people_copy_them(server, monkeypatch, url, asked):
    """What a browser asks the server for: the URL standard's percent-encoding."""
    monkeypatch.setenv("no_proxy", "*")
    assert downloads.download(server + url) == b"x" * 9
    assert Server.asked[-1] == asked


@pytest.mark.parametrize(
    "url, ascii_url",
    [
        ("http://пример.рф:8080/я", "http://xn--e1afmkfd.xn--p1ai:8080/%D1%8F"),
        ("https://straße.de/", "https://xn--strae-oqa.de/"),  # not strasse.de, which is another's
        ("http://Bücher.example", "http://xn--bcher-kva.example"),
        ("http://[::1]:8/a b", "http://[::1]:8/a%20b"),
        (" http://u:p@例え.jp/ ", "http://u:p@xn--r8jz45g.jp/"),
    ],
)
def test_hosts_beyond_ascii(url, ascii_url):
    assert downloads.as_ascii(url) == ascii_url


def test_hosts_that_no_name_may_have_are_one_line():
    with pytest.raises(Blip2Error, match=r"cannot download http://☃\.-\./x: "):
        downloads.download("http://☃.-./x")


class Proxy(http.server.BaseHTTPRequestHandler):
    """A proxy at a private address, as most are: answers everything itself, with a redirect once."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(302 if self.path.endswith("/start") else 200)
        self.send_header("Location", self.server.leads_to)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        self.send_error(504, "as far as it goes without certificates")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "leads_to, says",
    [
        ("http://example.org/a.png", None),
        ("http://93.184.215.14/a.png", None),
        ("https://example.org/a.png", "504 as far as it goes"),
        *(
            (f"{scheme}://{host}/a.png", "which is no public address")
            for scheme in ("http", "https")
            for host in ("127.0.0.1", "10.0.0.1:81", "127.1", "0x7f000001", "127%2e0.0.1", "[::1]")
        ),
        ("http://u@LocalHost./a.png", "which is no public address"),
        ("https://a.localhost/a.png", "which is no public address"),
    ],
)
def test_behind_a_proxy_it_is_the_target_that_must_be_public(monkeypatch, leads_to, says):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.asked, proxy.leads_to = [], leads_to
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        monkeypatch.setenv("no_proxy", "")
        try:
            if says is None:
                assert downloads.download("http://example.org/start") == b"done"
            else:
                with pytest.raises(Blip2Error, match=says):
                    downloads.download("http://example.org/start")
        finally:
            proxy.shutdown()
    reached = says is None or "504" in says
    assert len(proxy.asked) == 1 + reached


def test_what_the_user_asks_for_himself_may_be_private(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert downloads.download(server + "/ok") == b"x" * 9
