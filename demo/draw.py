"""Draw pictures to try the programs on: scenes that the demo checkpoint was not trained on.

python -m demo.draw photos 200
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not with -m

from blip2 import cli
from blip2.errors import Blip2Error

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = cli.ArgumentParser("Draw scenes that the demo checkpoint was not trained on.")
    parser.add_argument("directory", type=Path, help="where they go, as 0000.png, 0001.png, …")
    parser.add_argument("count", type=cli.int_between(1, 100_000), help="how many")
    args = parser.parse_args()

    from demo import scenes

    files = [args.directory / f"{number:04}.png" for number in range(args.count)]
    for file in files:
        if file.exists():
            raise Blip2Error(f"{file} exists", "name another folder")
    try:
        args.directory.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(files):
            scenes.draw(scenes.EVALUATION_SEED + number).image.save(file)
    except OSError as error:
        raise Blip2Error(
            f"cannot write {error.filename or args.directory}: {error.strerror}",
            "free space there or name another folder",
        ) from None
    print(f"{args.directory}: {args.count} {'picture' if args.count == 1 else 'pictures'}")
    print("Ask about all of them with, after make demo:")
    out = ROOT / "demo" / "out"
    print(
        " ",
        cli.command(
            "run.py",
            *("--engine_dir", out, "--opt_engine_dir", out / "opt" / "fp16"),
            *("--input_dir", args.directory, "--output", f"{args.directory}.jsonl"),
        ),
    )


if __name__ == "__main__":
    cli.run(main)
