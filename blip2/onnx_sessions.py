"""ONNX Runtime's sessions on the CPU: the threads that they compute on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from blip2 import cpu

if TYPE_CHECKING:
    import onnxruntime

_process_is_ours = False


def own_process() -> None:
    """Say that all sessions of this process are of this suite, before the first: they share threads.

    ONNX Runtime has one pool of threads for a whole process, and with it refuses sessions that ask
    for a pool of their own. Who uses this suite as a library may have such sessions, so there each
    session has its own threads.
    """
    global _process_is_ours
    _process_is_ours = True


@functools.cache
def share_threads() -> bool:
    """Whether all sessions compute on the same threads, as many as PyTorch has; made at first."""
    import onnxruntime

    if not _process_is_ours or not hasattr(onnxruntime, "set_global_thread_pool_sizes"):
        return False
    onnxruntime.set_global_thread_pool_sizes(cpu.threads(), 1)
    return True


def session_options(between_runs: str) -> onnxruntime.SessionOptions:
    """Options of a session that says nothing but errors and uses the threads that it may.

    Args:
        between_runs: "wait" has its own threads sleep whenever they have nothing to do; "work"
            lets them look for it within a run, for microseconds without a pause, and sleep after it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if share_threads():
        options.use_per_session_threads = False
    else:
        # Its own number would be that of the machine's cores, whatever this process may use.
        options.intra_op_num_threads = cpu.threads()
    if between_runs == "wait":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
