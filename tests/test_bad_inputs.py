"""Nothing a user does breaks a program: a table of what goes wrong, and of what is then said.

Each row spoils a copy of whole artifacts, runs the command there, and expects its exit code and its
one line; the disk is then as it was before. Rows with code 0 are what looks wrong and must work.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import opt_models
import pytest
import torch
from bad_inputs import (
    OPT,
    QFORMER,
    VIT,
    VIT_DATA,
    WEIGHTS,
    Payload,
    assert_one_line,
    bad_pictures,
    both,
    edit,
    flip,
    odd_pictures,
    permissions_matter,
    pickled,
    remove,
    run_here,
    snapshot,
    swap,
    tensors,
    truncate,
    write,
)

from blip2.checkpoints import open_checkpoint
from blip2.language import conversion

GUIDE = "Question: which city is this? Answer:"
SAY = "run.py --engine_dir onnx --opt_engine_dir opt --input_dir picture.png --input_text"
ASK = f"{SAY} what?"
MANY = "run.py --engine_dir onnx --opt_engine_dir opt --input_dir picture.png --output new.jsonl"
PLAN = "run.py --engine_dir plan --opt_engine_dir opt --query_tokens plan/query_tokens.pt"
STRAIGHT = "run.py --engine_dir checkpoint --opt_engine_dir opt --input_dir picture.png"
EXPORT = "onnx_export.py --model_dir checkpoint --image picture.png --output_dir new"
BUILD = "build_vit_qformer.py all --onnx_dir half/onnx --plan_dir new --compute_capability 8.9"
CONVERT = "opt/convert_checkpoint.py --model_dir checkpoint --output_dir new"
PLAN_FILE = Path("plan/visual_encoder/visual_encoder_fp16.plan")
HALF_VIT = Path("half") / VIT
HALF_DATA = Path("half") / VIT_DATA


def nothing() -> None:
    pass


def link(path: str, to: str) -> Callable[[], None]:
    return lambda: os.symlink(to, path)


def nan_in(name: str) -> Callable[[dict], None]:
    return lambda content: content[name].view(-1)[:1].fill_(torch.nan)


def drop(name: str) -> Callable[[dict], None]:
    return lambda content: content.pop(name)


def add(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda content: content.update({name: torch.zeros(shape)})


def row(what: str, command: str, says: str, before: Callable[[], None] = nothing, code: int = 2):
    """One line of the table; `says` is a pattern in what is printed."""
    return pytest.param(command, says, before, code, id=what)


LN_F = "transformer.ln_f.bias"
CONFIG = "checkpoint/config.json"
INDEX = "checkpoint/model.safetensors.index.json"
VIT_NORM = "vision_model.post_layernorm.bias"
OPT_NORM = "language_model.model.decoder.final_layer_norm.bias"
OPT_LAYER = "language_model.model.decoder.layers.0"
QFORMER_NORM = "qformer.layernorm.bias"
PLAN_SIDECAR = PLAN_FILE.with_suffix(".json")
PLAN_SIDECARS = (PLAN_SIDECAR, "plan/Qformer/Qformer_fp16.json")
OPTIONS = [
    row("no beams", f"{ASK} --num_beams 0", "--num_beams: '0' is not a whole number of at least"),
    row("negative beams", f"{ASK} --num_beams -3", "--num_beams: '-3' is not a whole number"),
    row("too many beams", f"{ASK} --num_beams 161", "num_beams is 161, this OPT engine .* 160"),
    row("top_p of 0", f"{ASK} --top_p 0", "--top_p: '0' is not a number above 0 and at most 1"),
    row("top_p above 1", f"{ASK} --top_p 1.5", "--top_p: '1.5' is not a number above 0 and"),
    row("temperature 0", f"{ASK} --temperature 0", "--temperature: '0' is not a number above 0"),
    row("temperature below 0", f"{ASK} --temperature -1", "--temperature: '-1' is not a number"),
    row("temperature NaN", f"{ASK} --temperature nan", "--temperature: 'nan' is not a number"),
    row("beams and sampling", f"{ASK} --num_beams 2 --top_k 5", "exclude each other"),
    row("no answer", f"{ASK} --max_output_len 0", "--max_output_len: '0' is not a whole"),
    row("endless answer", f"{ASK} --max_output_len 9999999999999999999", "takes at most 96; lower"),
    row("the same, many", f"{MANY} --max_output_len 95", "max_output_len 95 is .* at most 96"),
    row("no batch", f"{MANY} --batch_size 0", "--batch_size: '0' is not a whole number from 1 to"),
    row("endless batch", f"{MANY} --batch_size 99999999999999999999", "is not a whole number from"),
    row("a process a pixel", f"{MANY} --workers 1000000", "'1000000' is not a whole number from"),
    row("no seed", f"{ASK} --seed 99999999999999999999999", "--seed: '9+' is not a whole number"),
    row("abbreviated flag", f"{ASK} --num_beam 3", "unrecognized arguments: --num_beam 3"),
    row("mistyped flag", f"{ASK} --num-beams 3", "unrecognized arguments: --num-beams 3"),
    row("several of one", f"{ASK} --input_dir a.png b.png", "several pictures need --output"),
    row("a folder of one", f"{ASK} --input_dir onnx", "onnx stands for several pictures; add"),
    row("unknown precision", f"{EXPORT} --dtype bf16", "--dtype: invalid choice: 'bf16'"),
    row("unknown opset", f"{EXPORT} --opset 17", "--opset: invalid choice: 17"),
    row("abbreviated, export", f"{EXPORT} --model x", "unrecognized arguments: --model x"),
    row("unknown network", BUILD.replace("all", "2"), "network: invalid choice: '2'"),
    row("no network", "build_vit_qformer.py", "required: network"),
    row("unknown device", f"{BUILD} 9.0", "cannot build for compute capability 9.0, only for 7.5"),
    row("no device", f"{BUILD} sm89", "'sm89' is not a compute capability such as 8.9"),
    row("no smallest batch", f"{BUILD} --min_batch_size 0", "'0' is not a whole number from 1"),
    row("huge batch", f"{BUILD} --max_batch_size 9999999999", "is not a whole number from 1 to"),
    row("batches that shrink", f"{BUILD} --max_batch_size 3", "--opt_batch_size 4 and --max_batch"),
    row("no workspace", f"{BUILD} --workspace_gb nan", "--workspace_gb: 'nan' is not a number"),
    row("workspace of a star", f"{BUILD} --workspace_gb 1e99", "--workspace_gb: '1e99' is not a"),
    row("abbreviated, build", f"{BUILD} --max_batch 3", "unrecognized arguments: --max_batch 3"),
    row(
        "unknown OPT precision", f"{CONVERT} --dtype float64", "--dtype: invalid choice: 'float64'"
    ),
    row("no ranks", f"{CONVERT} --tp_size 0", "--tp_size: '0' is not a whole number of at least"),
    row("ranks of a star", f"{CONVERT} --tp_size 99999999", "--tp_size 99999999 does not divide"),
    row("abbreviated, convert", f"{CONVERT} --tp 2", "unrecognized arguments: --tp 2"),
    row("future TensorRT-LLM", f"{CONVERT} --trtllm_version 2.0", "no trtllm-build .* 2.0; name a"),
]
PROMPTS = [
    row("caption", f"{SAY} ''", r"\[Q\] \(caption\)\n\[A\]", code=0),
    row("only spaces", f"{SAY} '   '", r"\[Q\] \(caption\)\n\[A\]", code=0),
    row("a question", f"{SAY} ' why? '", r"\[Q\] Question: why\? Answer:\n\[A\]", code=0),
    row(
        "the guide's form",
        f"{SAY} '{GUIDE}' --max_txt_len 99",
        rf"\[Q\] {re.escape(GUIDE)}",
        code=0,
    ),
    row("as it is", f"{SAY} 'a cat' --prompt_template {{}}", r"\[Q\] a cat\n\[A\]", code=0),
    row("special tokens are text", f"{SAY} '</s><image>'", r"\[A\]", code=0),
    row("emoji", f"{SAY} '🐈?'", r"\[Q\] Question: 🐈\? Answer:\n\[A\]", code=0),
    row("newline", f"{SAY} 'a\nb'", r"\[A\]", code=0),
    row("no UTF-8", f"{SAY} 'a\udcffb'", r"the text 'Question: a\\udcffb Answer:' is not UTF-8"),
    row(
        "long prompt",
        f"{ASK} --max_txt_len 3",
        "the prompt .Question: what. Answer:. has 24 tokens, --max_txt_len allows 3",
    ),
    row(
        "beyond the model",
        f"{SAY} {'x' * 80} --max_txt_len 105",
        r"input length 103 \+ --max_output_len 30 is 133, this OPT engine takes at most 96",
    ),
    row("template without a place", f"{ASK} --prompt_template Q", "--prompt_template: 'Q' has not"),
]
PICTURES = [
    *(
        row(f"{name} {script}", command, f"{name} {says}", write(name, content))
        for name, (content, says) in bad_pictures().items()
        for script, command in (
            ("asked", ASK.replace("picture.png", name)),
            ("exported", EXPORT.replace("picture.png", name)),
        )
    ),
    *(
        row(
            f"{name!a} is taken",
            f"{ASK} --input_dir '{name}'",
            r"\[A\]",
            write(name, content),
            0,
        )
        for name, content in odd_pictures().items()
    ),
    row("no such picture", f"{ASK} --input_dir no.png", "picture no.png does not exist; check"),
    row("no such, export", f"{EXPORT} --image no.png", "picture no.png does not exist; check"),
    row("a folder", f"{EXPORT} --image onnx", "onnx is a directory; give one picture"),
    row("a device", f"{ASK} --input_dir /dev/zero", "/dev/zero is a pipe or a device, not a file"),
    row("a pipe", f"{ASK} --input_dir pipe", "pipe is a pipe or a dev", lambda: os.mkfifo("pipe")),
    row("a link to nothing", f"{ASK} --input_dir l", "l does not exist", link("l", "none")),
    row("a link to itself", f"{ASK} --input_dir l", "l: Too many levels of sym", link("l", "l")),
    row("a long name", f"{ASK} --input_dir {'n' * 300}", "File name too long; check"),
    row("newline in a name", f"{ASK} --input_dir 'a\nb.png'", r"picture a\\nb.png does not exist"),
    row("ftp", f"{ASK} --input_dir ftp://x/y.png", "ftp://x/y.png is neither http nor https"),
    row("file URL", f"{EXPORT} --image file:///etc/passwd", "passwd is neither http nor https"),
    row("no host", f"{ASK} --input_dir http://", "cannot download http://: no host given"),
    row("odd host", f"{ASK} --input_dir 'http://a b/\n'", "cannot download http://a b/"),
    row(
        "nobody there", f"{ASK} --input_dir http://127.0.0.1:9/x", "http://127.0.0.1:9/x: .*refused"
    ),
    row(
        "no permission",
        ASK,
        "cannot read picture.png: Permission denied; check its permissions",
        lambda: os.chmod("picture.png", 0),
    ),
]
ARTIFACTS = [
    row(
        "no engines",
        f"{ASK} --engine_dir no",
        "no holds no ViT and Q-Former; make them with: python onnx_export.py --output_dir no$",
    ),
    row("no OPT", f"{ASK} --opt_engine_dir no", "no does not exist .* python opt/convert_check"),
    row(
        "another's OPT folder",
        f"{ASK} --opt_engine_dir onnx",
        r"onnx holds no OPT .*make one with: python opt/convert_checkpoint.py$",
    ),
    row(
        "OPT folder of a blank",
        f"{ASK} --opt_engine_dir 'my opt'",
        r"make one with: python opt/convert_checkpoint.py --output_dir 'my opt'$",
    ),
    row("no query tokens", ASK, "query_tokens.pt does not exist; make", remove("query_tokens.pt")),
    row("no sidecar", ASK, "visual_encoder.json does not exist", remove(VIT.with_suffix(".json"))),
    row("no data file", ASK, "encoder.onnx.data does not exist; make it with", remove(VIT_DATA)),
    row("no Q-Former", ASK, "Qformer.onnx does not exist; make it with: python", remove(QFORMER)),
    row("no tokenizer", ASK, "tokenizer: not a dir.*--hf_model_location", remove("tokenizer")),
    row(
        "hub tokenizer", f"{ASK} --hf_model_location no/one", "no tokenizer at no/one.*the hub says"
    ),
    row(
        "empty tokenizer",
        ASK,
        "tokenizer: .*; make it again",
        write("tokenizer/tokenizer.json", ""),
    ),
    row("empty graph", ASK, "visual_encoder.onnx has 0 bytes, its desc", write(VIT, b"")),
    row("truncated data", ASK, r"onnx\.data has \d+ bytes, its description", truncate(VIT_DATA)),
    row("truncated OPT", ASK, r"rank0\.safetensors has \d+ bytes, its descr", truncate(OPT)),
    row("flipped bit in data", ASK, "onnx.data is not the file that its descr", flip(VIT_DATA)),
    row("flipped bit in a graph", ASK, "(cannot open|visual_encoder.onnx is not)", flip(VIT)),
    row("flipped bit in OPT", ASK, "rank0.safetensors is not the file that its", flip(OPT)),
    row("the same, not verified", f"{ASK} --no_verify", "rank0.safetensors is not the", flip(OPT)),
    row(
        "flipped query tokens",
        ASK,
        "query_tokens.pt (is not|holds|: )",
        flip("query_tokens.pt", 700),
    ),
    row("flipped picture", f"{ASK} --input_dir image.pt", "image.pt is not", flip("image.pt", 900)),
    row("another's data", ASK, "onnx.data has .* bytes, its", swap(VIT_DATA, f"{QFORMER}.data")),
    row("another's graph", ASK, "visual_encoder.onnx has .* bytes", swap(VIT, QFORMER)),
    row(
        "Q-Former as ViT",
        ASK,
        "do not fit|has Q|of other types|KeyError|does not describe",
        both(
            lambda: shutil.copy(QFORMER, VIT),
            lambda: shutil.copy(f"{QFORMER}.data", VIT_DATA),
            lambda: shutil.copy(QFORMER.with_suffix(".json"), VIT.with_suffix(".json")),
        ),
    ),
    row(
        "another checkpoint's Q-Former",
        ASK,
        "visual_encoder.onnx and onnx/Qformer/Qformer.onnx come from different checkpoints; make",
        lambda: shutil.copytree("half/onnx/Qformer", "onnx/Qformer", dirs_exist_ok=True),
    ),
    row(
        "another checkpoint's query tokens",
        f"{ASK} --query_tokens plan/query_tokens.pt",
        "visual_encoder.onnx and plan/query_tokens.pt come from different checkpoints; make",
    ),
    row(
        "a sidecar of no checkpoint",
        ASK,
        "visual_encoder.json does not describe visual_encoder.onnx",
        edit(VIT.with_suffix(".json"), "source", to=None),
    ),
    row("OPT too narrow", f"{ASK} --opt_engine_dir narrow", "hidden size 64, this OPT has 32; use"),
    row(
        "small vocabulary",
        f"{ASK} --opt_engine_dir few",
        "tokenizer has 260 tokens, this OPT only 96",
    ),
    row(
        "a list as image.pt",
        f"{ASK} --input_dir x.pt",
        "holds no plain tensor",
        pickled("x.pt", [1]),
    ),
    row(
        "code as image.pt",
        f"{ASK} --input_dir x.pt",
        "cannot read x.pt",
        pickled("x.pt", Payload()),
    ),
    row(
        "a picture called image.pt",
        f"{ASK} --input_dir x.pt",
        r"cannot read x.pt: it is damaged, or no tensor .*a picture needs its own suffix\); make it",
        lambda: shutil.copy("picture.png", "x.pt"),
    ),
    row("text as image.pt", f"{ASK} --input_dir x.pt", "cannot read x.pt", write("x.pt", "hello")),
    row("no image.pt", f"{ASK} --input_dir x.pt", "x.pt does not exist; make it with: python onnx"),
    row(
        "other pictures' image.pt",
        f"{ASK} --input_dir x.pt",
        r"the pictures have shape \(1, 3, 9, 9\), this ViT takes B x 3 x 28 x 28; make image.pt",
        pickled("x.pt", torch.zeros(1, 3, 9, 9)),
    ),
    row(
        "an image.pt of terabytes",
        f"{ASK} --input_dir x.pt",
        "x.pt holds no plain tensor",
        pickled("x.pt", torch.zeros(1).expand(1 << 20, 1 << 20)),
    ),
    row(
        "integers as image.pt",
        f"{ASK} --input_dir x.pt",
        "x.pt holds no plain tensor",
        pickled("x.pt", torch.zeros(1, 3, 28, 28, dtype=torch.int64)),
    ),
    row(
        "NaN in image.pt",
        f"{ASK} --input_dir x.pt",
        "x.pt holds NaN or Inf",
        pickled("x.pt", torch.full((1, 3, 28, 28), torch.nan)),
    ),
    row(
        "query tokens that run code",
        ASK,
        "cannot read query_tokens.pt",
        pickled("query_tokens.pt", Payload()),
    ),
    row(
        "query tokens of another size",
        ASK,
        r"query_tokens.pt has shape \(1, 3, 32\), onnx/Qformer/Qformer.onnx takes \(1, 4, 32\)",
        pickled("query_tokens.pt", torch.zeros(1, 3, 32)),
    ),
    row("OPT without a tensor", ASK, f"has nothing as {LN_F}", tensors(OPT, drop(LN_F))),
    row("OPT with one more", ASK, r"has shape \[2\] as more", tensors(OPT, add("more", 2))),
    row("OPT of wrong shape", ASK, rf"has shape \[3\] as {LN_F}", tensors(OPT, add(LN_F, 3))),
    row(
        "NaN in OPT",
        ASK,
        f"opt/rank0.safetensors has NaN or Inf in {LN_F}",
        tensors(OPT, nan_in(LN_F)),
    ),
    row("OPT config lost", ASK, "opt/config.json does not exist", remove("opt/config.json")),
    row(
        "OPT config of 10^9 layers",
        ASK,
        "num_hidden_layers is 1000000000",
        edit("opt/config.json", "num_hidden_layers", to=10**9),
    ),
    row("OPT config in pieces", ASK, "mapping is 3", edit("opt/config.json", "mapping", to=3)),
    row("deep JSON", ASK, "cannot read opt/config.json", write("opt/config.json", "[" * 100_000)),
    # The checkpoint itself, by each program that reads one.
    *(
        row(f"{what}, {script}", command, says, before)
        for script, command in (("export", EXPORT), ("convert", CONVERT), ("run", STRAIGHT))
        for what, says, before in (
            (
                "no checkpoint",
                "checkpoint(/config.json does not exist| is no dir| holds no)",
                remove("checkpoint"),
            ),
            ("no weights", "checkpoint holds no weights", remove(WEIGHTS)),
            (
                "truncated weights",
                "cannot read checkpoint/model.safetensors",
                truncate(WEIGHTS, 99),
            ),
            ("empty weights", "cannot read checkpoint/model.safetensors", write(WEIGHTS, b"")),
            (
                "HTML as weights",
                "cannot read checkpoint/model.safetensors",
                write(WEIGHTS, "<html>"),
            ),
            ("no JSON", "cannot read checkpoint/config.json", write(CONFIG, "{")),
            (
                "another model",
                "describes a model of type 't5'",
                edit(CONFIG, "model_type", to="t5"),
            ),
            (
                "an adapter beside the weights",
                r"checkpoint has an adapter \(adapter_config.json\) .*; merge it with PEFT",
                write("checkpoint/adapter_config.json", "{}"),
            ),
            (
                "weights of bitsandbytes",
                r"checkpoint is quantised \(it has .*q_proj.SCB\); give the checkpoint it was made",
                tensors(WEIGHTS, add(f"{OPT_LAYER}.self_attn.q_proj.SCB", 64)),
            ),
        )
    ),
    *(
        row(f"several ends, {script}", command, "ends answers by 2 tokens", before)
        for script, command in (("export", EXPORT), ("run", STRAIGHT))
        for before in [edit(CONFIG, "text_config", "eos_token_id", to=[202, 2])]
    ),
    row(
        "a picture cut out of its middle",
        EXPORT,
        "describes no preprocessing that BLIP-2 uses: it asks for a step more, do_center_crop",
        write("checkpoint/preprocessor_config.json", '{"do_center_crop": true}'),
    ),
    row(
        "NaN in the ViT",
        EXPORT,
        "vision_model.post_layernorm.bias holds NaN",
        tensors(WEIGHTS, nan_in(VIT_NORM)),
    ),
    row(
        "NaN in the ViT, run",
        STRAIGHT,
        "vision_model.post_layernorm.bias holds NaN",
        tensors(WEIGHTS, nan_in(VIT_NORM)),
    ),
    row(
        "NaN in the OPT",
        CONVERT,
        "ln_f.bias has values that are NaN",
        tensors(WEIGHTS, nan_in(OPT_NORM)),
    ),
    row(
        "a tensor less",
        EXPORT,
        "has no tensor qformer.layernorm.bias",
        tensors(WEIGHTS, drop(QFORMER_NORM)),
    ),
    row(
        "a wrong shape",
        EXPORT,
        r"qformer.layernorm.bias has shape \(3,\)",
        tensors(WEIGHTS, add(QFORMER_NORM, 3)),
    ),
    row(
        "a shard less",
        CONVERT,
        "b.safetensors is missing",
        both(remove(WEIGHTS), write(INDEX, '{"weight_map": {"a": "b.safetensors"}}')),
    ),
    row(
        "a shard elsewhere",
        CONVERT,
        "names shards that lie elsewhere",
        both(remove(WEIGHTS), write(INDEX, '{"weight_map": {"a": "../b"}}')),
    ),
    row(
        "a pickle that runs code",
        EXPORT,
        "checkpoint/pytorch_model.bin is damaged, or holds more than",
        both(remove(WEIGHTS), pickled("checkpoint/pytorch_model.bin", {"a": Payload()})),
    ),
    row(
        "pictures of a mile",
        EXPORT,
        "image_size is 1000000",
        edit(CONFIG, "vision_config", "image_size", to=10**6),
    ),
    row(
        "hub id without network",
        EXPORT.replace("checkpoint", "no/one"),
        "no/one is no directory, and cannot be downloaded .* give its directory",
    ),
    row("no hub id", EXPORT.replace("checkpoint", "../no-one"), "../no-one is no directory; give"),
    row(
        "OPT of no size",
        CONVERT.replace(" --output_dir new", ""),
        "say where to write it with --output_dir",
    ),
    # The builder.
    row(
        "no graph", f"{BUILD} --onnx_dir no", "no/visual_encoder/visual_encoder.onnx does not exist"
    ),
    row("flipped graph data", BUILD, "onnx.data is not the file that its descr", flip(HALF_DATA)),
    row(
        "small files always are", f"{BUILD} --no_verify", "onnx.data is not the fi", flip(HALF_DATA)
    ),
    row(
        "float32 graph",
        f"{BUILD} --onnx_dir onnx",
        "visual_encoder.onnx is float32, .* --dtype float16",
    ),
    # Plans, as far as a machine without a GPU goes.
    row("no plan sidecar", PLAN, "fp16.json does not exist", remove(PLAN_SIDECAR)),
    row("truncated plan", PLAN, r"fp16.plan has \d+ bytes, its descr", truncate(PLAN_FILE)),
    row(
        "another TensorRT's plan",
        PLAN,
        "was built with TensorRT-RTX 9.9",
        both(*(edit(name, "tensorrt", "version", to="9.9") for name in PLAN_SIDECARS)),
    ),
    row(
        "another checkpoint's plan",
        PLAN,
        "come from different checkpoints",
        edit(PLAN_SIDECAR, "source", "fingerprint", to="x"),
    ),
    row(
        "a plan of no size",
        PLAN,
        "fp16.json does not describe visual",
        edit(PLAN_SIDECAR, "profile", "max", to="8"),
    ),
]
MACHINE = [
    row("no GPU", PLAN, "plans need an NVIDIA GPU, and torch sees none"),
    row(
        "a file as output",
        EXPORT.replace(" new", " picture.png"),
        "cannot write picture.png: File ex",
    ),
    row(
        "a file in the way",
        CONVERT.replace(" new", " picture.png/new"),
        "cannot write picture.png/new: Not a",
    ),
    row(
        "a folder in the way",
        CONVERT,
        "cannot write new/config.json: Is a directory",
        lambda: os.makedirs("new/config.json"),
    ),
    # What the programs have not written, they do not replace.
    *(
        row(
            f"somebody's {file}, {script}",
            command,
            rf"{place}{file} exists, and was not written by this program; move it away",
            write(f"{place}{file}", content),
        )
        for script, command, place, files in (
            (
                "export",
                EXPORT,
                "new/",
                {
                    "image.pt": "mine",
                    "query_tokens.json": "{}",
                    "tokenizer/tokenizer.json": "{}",
                    "onnx/Qformer/Qformer.onnx": "mine",
                    "onnx/visual_encoder/visual_encoder.onnx.data": "mine",
                },
            ),
            ("build", BUILD, "new/", {"Qformer/Qformer_fp16.plan": "mine"}),
            (
                "convert",
                CONVERT,
                "new/",
                {
                    "config.json": '{"architecture": "OPTForCausalLM", "model_type": "opt"}',
                    "rank1.safetensors": "mine",
                    "rank0.json": '{"file": "rank0.safetensors"}',
                },
            ),
            (
                "many",
                f"{MANY} --html page.html",
                "",
                {"page.html": "<!DOCTYPE html>", "new.jsonl.options": "[1]"},
            ),
        )
        for file, content in files.items()
    ),
    row(
        "into the source",
        CONVERT.replace(" new", " checkpoint"),
        "checkpoint/config.json exists, and was not written by this program; move it away",
    ),
    row(
        "into an engine",
        CONVERT,
        "new/config.json exists, and was not",
        write("new/config.json", '{"pretrained_config": {"mapping": {}}, "build_config": {}}'),
    ),
    row(
        "a long output", CONVERT.replace(" new", " " + "n" * 300), "File name too long; free space"
    ),
    row("no such device", CONVERT.replace(" new", " /proc/new"), "cannot write /proc/new: No such"),
    row(
        "read-only output",
        CONVERT,
        "cannot write new.*: Permission denied; free space there or",
        lambda: os.mkdir("new", 0o500),
    ),
    # Places that no output can have.
    row("a device as output", f"{MANY} --output /dev/full", "/dev/full is a pipe, a device or wh"),
    row(
        "a pipe as output",
        f"{MANY} --output pipe",
        "pipe is a pipe, .* print the lines with: --output -",
        lambda: os.mkfifo("pipe"),
    ),
    row("a page of no file", f"{MANY} --output - --html p", "--html needs --output FILE, which li"),
    row("a retry of none", f"{MANY} --output - --retry_errors", "--retry_errors needs --output FI"),
    row(
        "one output", f"{MANY} --html ./new.jsonl", "--output and --html are the same file; choose"
    ),
    row(
        "the options", f"{MANY} --html new.jsonl.options", "options.* and --html are the same file"
    ),
    row(
        "one output by two names",
        f"{MANY} --html page",
        "--output and --html are the same file",
        both(write("new.jsonl", ""), lambda: os.link("new.jsonl", "page")),
    ),
    row(
        "a linked folder",
        f"{MANY} --output l/new.jsonl --html opt/new.jsonl",
        "--output and --html are the same file",
        link("l", to="opt"),
    ),
    row(
        "the picture", f"{MANY} --output picture.png", "--output is picture.png, which --input_dir"
    ),
    row(
        "the tokenizer, export",
        f"{EXPORT.replace(' new', ' .')} --hf_model_location tokenizer",
        "tokenizer.json is tokenizer/tokenizer.json, which --hf_model_location reads; choose",
    ),
    row(
        "read-only report",
        f"{MANY} --output locked/new.jsonl",
        "cannot write locked/new.jsonl: Perm",
        lambda: os.mkdir("locked", 0o500),
    ),
]


@pytest.fixture(scope="module")
def whole(tiny_export, tiny_opt, tiny_plans, tmp_path_factory) -> Path:
    """A directory with everything the programs make, of a BLIP-2; half/ and plan/ are another's."""
    directory = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_export.output, directory, dirs_exist_ok=True)
    shutil.copytree(tiny_export.checkpoint, directory / "checkpoint")
    shutil.copy(tiny_export.picture, directory / "picture.png")
    shutil.copytree(tiny_opt, directory / "opt")
    shutil.copytree(tiny_plans.plan, directory / "plan")
    shutil.copytree(tiny_plans.onnx, directory / "half" / "onnx")
    for name in ("query_tokens.pt", "query_tokens.json"):
        shutil.copy(tiny_plans.output / name, directory / "plan")
    narrow = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128, "vocab_size": 320}
    for name, shape in {"narrow": narrow, "few": {"vocab_size": 96}}.items():
        source = tmp_path_factory.mktemp(name)
        opt_models.opt(**shape).save_pretrained(source)
        checkpoint = open_checkpoint(source)
        config = conversion.target_config(checkpoint, conversion.ConversionOptions(dtype="float32"))
        conversion.convert(checkpoint, config, directory / name)
    return directory


@pytest.fixture
def workspace(whole, tmp_path, monkeypatch) -> Path:
    """A copy to spoil, and the current directory."""
    directory = shutil.copytree(whole, tmp_path / "workspace")
    monkeypatch.chdir(directory)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return directory


@pytest.mark.parametrize(
    "command, says, before, code", [*OPTIONS, *PROMPTS, *PICTURES, *ARTIFACTS, *MACHINE]
)
def test_table(workspace, monkeypatch, capsys, command, says, before, code):
    before()
    disk = snapshot(workspace)
    with permissions_matter():
        done = run_here(command, monkeypatch, capsys)
    if code == 0:
        assert done.code == 0, done.err
        assert re.search(says, done.out)
    else:
        assert_one_line(done)
        assert re.search(says, done.err), done.err
    assert snapshot(workspace) == disk
    assert not Path("owned").exists()
