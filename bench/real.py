"""The published checkpoint in one command: downloaded, run by the guide's steps, compared, reported.

    python -m bench.real                                  # Salesforce/blip2-opt-2.7b; make real
    python -m bench.real --model_dir DIRECTORY --image photo.jpg           # without a network
    python -m bench.real --precision int4 --pictures 3                     # less of it

Says first what it needs, and refuses in a line where there is not enough. A run that was ended goes
on with the same command. Ends with one Markdown file, and exit code 1 where a claim does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.published import PRECISIONS
from blip2 import cli
from blip2.errors import Blip2Error

if TYPE_CHECKING:
    from bench.published.needs import Machine, Needs
    from bench.published.pictures import Item
    from bench.published.steps import Steps

MODEL = "Salesforce/blip2-opt-2.7b"
CITY = "singapore"  # whose Merlion is the guide's picture
MOST_PICTURES = 12


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser("Try the published BLIP-2, and report what holds.")
    add = parser.add_argument
    add("--model_dir", default=MODEL, help="a BLIP-2 checkpoint: hub id or directory")
    add("--image", help="the guide's picture, file or URL (default: the guide's, from the web)")
    add("--directory", type=Path, default=Path("real"), help="for what is made, and the report")
    add("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of OPT")
    add(
        "--pictures",
        type=cli.int_between(0, MOST_PICTURES),
        default=MOST_PICTURES,
        help="besides the guide's, of scikit-image's",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()

    # Imported after the arguments are parsed, so that --help does not wait for torch.
    import transformers  # noqa: F401 - before anything is downloaded
    from huggingface_hub import constants

    from bench.published import claims, pictures, report, source
    from bench.published.asking import MAX_OUTPUT_LEN
    from bench.published.needs import Machine, Needs, Sizes
    from bench.published.steps import Steps
    from blip2.checkpoints import open_checkpoint
    from blip2.programs.onnx_export import MERLION

    args.directory = args.directory.absolute()
    found = source.find(args.model_dir)
    machine = Machine.here()
    sizes = Sizes.of(found.config, Path(found.name))
    asked = 2 * (1 + args.pictures)
    needs = Needs.of(sizes, machine, found.missing_bytes, asked, MAX_OUTPUT_LEN)
    said = needs.table(machine)
    print(said, flush=True)
    needs.check(machine, args.directory, Path(constants.HF_HUB_CACHE))
    try:  # before hours of download
        items = pictures.collect(args.image or MERLION, args.pictures, args.directory / "pictures")
    except Blip2Error as error:
        raise Blip2Error(error.problem, "give `image` a picture of your own") from None
    checkpoint = found.fetch()
    files = found.verify(checkpoint, args.directory / "verified.json")
    options = made_with(open_checkpoint(checkpoint).fingerprint, items, report.versions())
    with Steps(args.directory / "steps.jsonl", options) as steps:
        try:
            run(args, checkpoint, machine, needs, steps)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where this one stopped") from None
        done = {step.name: step for step in steps.all}
    city = CITY if (args.model_dir, args.image) == (MODEL, None) else None
    judged = claims.judge(done, args.precision, city, machine.gpu_memory is not None)
    text = report.markdown(args.model_dir, files, said, judged, done, items)
    path = args.directory / "report.md"
    path.write_text(text, encoding="utf-8")
    print()
    for claim in judged:
        print(f"{claim.outcome:<10}{claim.text}: {claim.detail}")
    print(f"\n{path}: {text.partition(chr(10))[0].removeprefix('# ')}")
    return 1 if any(claim.outcome == claims.FAIL for claim in judged) else 0


def made_with(fingerprint: str, items: list[Item], versions: dict[str, str]) -> dict[str, Any]:
    """What must be the same for a run to go on with another's steps, by flag."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.prompt}\n".encode() + Path(item.file).read_bytes())
    return {
        "--model_dir": fingerprint,
        "--image or --pictures": digest.hexdigest(),
        "version of a package": versions,
    }


def run(
    args: argparse.Namespace, checkpoint: Path, machine: Machine, needs: Needs, steps: Steps
) -> None:
    """Every step, in the order in which they need one another."""
    from bench.published.pictures import GUIDE

    export, features = args.directory / "export", args.directory / "features.pt"
    guide = args.directory / "pictures" / f"{GUIDE}.png"
    reference(args, checkpoint, machine, needs, steps, features)
    source = ["--model_dir", checkpoint, "--image", guide]
    command = [sys.executable, "onnx_export.py", *source, "--output_dir", export]
    exported = steps.command("export", command, made=export / "onnx")
    for precision in PRECISIONS:
        lack = exported.failed and "the export failed"
        lack = lack or needs.lacks(precision, machine)
        if precision not in args.precision:
            lack = "not asked for"
        answer(args, checkpoint, precision, lack, steps, features)
    ask = [sys.executable, "run.py", "--engine_dir", checkpoint, "--opt_engine_dir", checkpoint]
    lack = needs.lacks("float16", machine)
    if lack:
        steps.skip("checkpoint: run", lack)
    else:
        steps.command("checkpoint: run", [*ask, *guide_question(guide)], result=guide_answer)
    eight_bits(args, source, machine, steps)


def reference(
    args: argparse.Namespace,
    checkpoint: Path,
    machine: Machine,
    needs: Needs,
    steps: Steps,
    features: Path,
) -> None:
    """transformers: in float32, and where this suite runs on a GPU in float16 too, for the times."""

    def ask(name: str, *flags: object, made: Path | None = None) -> None:
        out = args.directory / "answers.json"
        words = [checkpoint, args.directory / "pictures", out, *flags]
        command = [sys.executable, "-m", "bench.published.reference", *words]
        steps.command(name, command, made, lambda _: json.loads(out.read_text()))

    device = needs.reference_device(machine)
    if device:
        ask("transformers", "--device", device, "--features", features, made=features)
    else:
        steps.skip("transformers", f"in float32 it {needs.lacks('transformers', machine)}")
    if machine.gpu_memory is not None:
        ask("transformers, float16", "--device", "cuda", "--dtype", "float16")


def answer(
    args: argparse.Namespace,
    checkpoint: Path,
    precision: str,
    lack: str | None,
    steps: Steps,
    features: Path,
) -> None:
    """Convert OPT, ask the guide's question, then all others; the converted OPT is removed."""
    from bench.published.pictures import GUIDE

    export, opt = args.directory / "export", args.directory / "opt" / precision
    names = [f"{precision}: {name}" for name in ("convert", "run", "answers")]
    if lack:
        for name in names:
            steps.skip(name, lack)
        return
    convert, ask, answers = names
    rounding = [] if precision == "float16" else ["--weight_only_precision", precision]
    command = [sys.executable, "opt/convert_checkpoint.py", "--model_dir", checkpoint]
    all_done = all(map(steps.is_done, names))
    converted = steps.command(
        convert, [*command, "--output_dir", opt, *rounding], made=None if all_done else opt
    )
    if converted.failed:
        for name in (ask, answers):
            steps.skip(name, "OPT was not converted")
        return
    guide = args.directory / "pictures" / f"{GUIDE}.png"
    engines = ["--engine_dir", export, "--opt_engine_dir", opt]
    steps.command(
        ask, [sys.executable, "run.py", *engines, *guide_question(guide)], result=guide_answer
    )
    out = args.directory / "answers.json"
    words = [export, opt, args.directory / "pictures", out]
    if features.exists():
        words += ["--features", features]
    command = [sys.executable, "-m", "bench.published.answers", *words]
    steps.command(answers, command, result=lambda _: json.loads(out.read_text()))
    if all(map(steps.is_done, names)):
        shutil.rmtree(opt, ignore_errors=True)


def eight_bits(
    args: argparse.Namespace, source: list[object], machine: Machine, steps: Steps
) -> None:
    """The export in INT8 for a CPU, in FP8 for a GPU that has it; its files are removed."""
    import torch

    from blip2.devices import has_float8

    kind, name = "int8", "ViT in INT8"
    if machine.gpu_memory is not None:
        kind, name = "float8", "ViT in FP8"
        if not has_float8(torch.device("cuda")):
            steps.skip(name, "this GPU has no FP8")
            return
    place = args.directory / "export_8_bits"
    command = [sys.executable, "onnx_export.py", *source, "--dtype", kind, "--output_dir", place]
    steps.command(name, command)
    shutil.rmtree(place, ignore_errors=True)


def guide_question(guide: Path) -> list[object]:
    """The guide's last step, as run.py is asked."""
    from bench.published.pictures import GUIDE_QUESTION

    return ["--input_dir", guide, "--input_text", GUIDE_QUESTION, "--json"]


def guide_answer(printed: str) -> dict[str, Any]:
    """What run.py said to it."""
    try:
        said = json.loads(printed.splitlines()[-1])
        return {"text": said["answers"][0][0]["text"], "seconds_by_stage": said["seconds"]}
    except (ValueError, LookupError, TypeError) as error:
        raise Blip2Error(f"run.py printed no answer ({error})") from None


if __name__ == "__main__":
    cli.run(main)
