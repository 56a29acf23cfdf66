"""Start blip2/programs/convert_checkpoint.py: convert OPT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blip2.programs.convert_checkpoint import program

if __name__ == "__main__":
    program()
