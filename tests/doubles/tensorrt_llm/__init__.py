"""A double of the TensorRT-LLM that runs engines: its interface, its layouts, its traps.

Written from the published source of 0.13 to 1.2, for machines where it cannot be installed. It
runs no engine: `rank{r}.engine` holds the path of a Hugging Face OPT, whose `generate` answers.
What this process is under MPI comes from two variables of the environment.
"""

import importlib.metadata
import os

from tensorrt_llm import runtime

__all__ = ["__version__", "mpi_rank", "mpi_world_size", "runtime"]

__version__ = importlib.metadata.version("tensorrt_llm")
print(f"[TensorRT-LLM] TensorRT-LLM version: {__version__}")  # it does, to standard output


def mpi_rank():
    return int(os.environ.get("DOUBLE_MPI_RANK", "0"))


def mpi_world_size():
    return int(os.environ.get("DOUBLE_MPI_SIZE", "1"))
