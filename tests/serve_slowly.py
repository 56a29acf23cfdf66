"""serve.py, whose steps take as many seconds as the file $SLOW says, as long as it is there."""

from __future__ import annotations

import contextlib
import os
import time

from blip2.serving import engine_process

_run = engine_process.run


def run_slowly(*arguments) -> None:
    from blip2.language.rows import Rows

    step = Rows.step

    def slow_step(rows):
        with contextlib.suppress(FileNotFoundError), open(os.environ["SLOW"]) as file:
            time.sleep(float(file.read()))
        return step(rows)

    Rows.step = slow_step
    _run(*arguments)


engine_process.run = run_slowly

if __name__ == "__main__":
    from blip2.programs.serve import program

    program()
