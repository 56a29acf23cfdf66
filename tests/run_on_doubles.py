"""run.py where the CPU is the GPU of TensorRT's plans, and a double their runtime.

The plans are those of the checkpoint in $DOUBLE_CHECKPOINT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorrt_double import CpuGpu, runtime_double, stage_modules

from blip2 import cli
from blip2.programs import run
from blip2.vision import tensorrt_session
from blip2.vision.tensorrt_plans import VIT, read_plan_sidecar


def install(engine_dir: Path) -> None:
    """Have the plans of a directory run on doubles."""
    facts = read_plan_sidecar(engine_dir, VIT)
    gpu = CpuGpu(facts.compute_capabilities[-1])
    plans = {
        (engine_dir / stage.plan_file): (read_plan_sidecar(engine_dir, stage), module)
        for stage, module in stage_modules(Path(os.environ["DOUBLE_CHECKPOINT"])).items()
    }
    sys.modules[facts.flavour] = runtime_double(facts.flavour, facts.version, gpu, plans)
    tensorrt_session.Gpu = lambda: gpu


if __name__ == "__main__":
    engine_dir = Path(sys.argv[sys.argv.index("--engine_dir") + 1])
    if (engine_dir / VIT.plan_file).is_file():
        install(engine_dir)
    cli.run(run.main)
