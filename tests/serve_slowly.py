"""serve.py, whose steps take 50 ms as long as the file $SLOW is there."""

from __future__ import annotations

import os
import time

from blip2.serving import engine_process

_run = engine_process.run


def run_slowly(*arguments) -> None:
    from blip2.language.rows import Rows

    step = Rows.step

    def slow_step(rows):
        if os.path.exists(os.environ["SLOW"]):
            time.sleep(0.05)
        return step(rows)

    Rows.step = slow_step
    _run(*arguments)


engine_process.run = run_slowly

if __name__ == "__main__":
    from blip2.programs.serve import program

    program()
