"""What every command line here shares: strict arguments, one-line errors, exit codes.

Exit codes: 0 done, 1 some items of many failed, 2 wrong usage or input, 130 interrupted.
Imports nothing heavy, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from blip2 import __version__, layout, memory
from blip2.errors import Blip2Error

# What is wrong with a path, wherever in a program it shows.
_PLACES = {
    errno.EACCES,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.ESTALE,
}


_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "skimage": "scikit-image",
}  # by the module, where it is named otherwise
_IMPORTED = time.perf_counter()


def seconds_since_start() -> float:
    """Since this process was started, its imports included.

    Where the system does not say when that was, since this module was imported, which programs do
    first.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            after_name = file.read().rpartition(")")[2].split()
        ticks = int(after_name[19])  # proc(5): starttime, since the system was booted
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, LookupError, ValueError):
        return time.perf_counter() - _IMPORTED


class _DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values; "None" and "False" would tell nobody anything."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without guessed abbreviations, whose errors are one line."""

    _names: ClassVar[set[str]] = set()  # of this program's flags, without their dashes

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=_DefaultsHelpFormatter,
        )
        super().add_argument("--version", action="version", version=f"blip2-suite {__version__}")

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        self._names.update(name.removeprefix("--") for name in names)
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    @classmethod
    def with_flags(cls, message: str) -> str:
        """The message of an error, whose parameters, in backticks, are called by their flags."""

        def flag(parameter: re.Match[str]) -> str:
            return f"--{parameter[1]}" if parameter[1] in cls._names else parameter[0]

        return re.sub(r"`(\w+)`", flag, message)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its code; a Blip2Error is one line, not a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    _open_standard_streams()
    stdout = sys.stdout = _standard_output(sys.stdout)
    try:
        code = main() or 0
        stdout.flush()
    except Blip2Error as error:
        code = _explain(ArgumentParser.with_flags(str(error)))
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        code = 130
    except OutputError as error:
        _forget_output()
        # The reader of our output went away (`| head`): stop quietly, as other tools do.
        code = 0 if error.errno == errno.EPIPE else _explain(str(error))
    except OSError as error:
        if error.filename is not None and error.errno in _PLACES:
            code = _explain(f"{error.filename}: {error.strerror}; check the path and permissions")
        else:
            code = _explain_other(error)
    except ModuleNotFoundError as error:
        missing = _missing_package(error)
        code = _explain(missing) if missing else _explain_other(error)
    except Exception as error:
        code = _explain_other(error)
    if code and _is_one_of_several():
        # MPI's own end would wait for the other processes, and they for this one, forever. They may
        # be ending this one at the same moment: then it just stops.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stderr.flush()
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    sys.exit(code)


def command(script: str, *arguments: object) -> str:
    """A command for the shell that runs a program of this package from the current directory."""
    if not (_ROOT / script).is_file():
        return shlex.join([layout.command(script), *map(str, arguments)])
    python = sys.executable if shutil.which("python") != sys.executable else "python"
    words = [_short(python), _short(str(_ROOT / script))]
    words += [_short(str(a)) if isinstance(a, Path) else str(a) for a in arguments]
    return shlex.join(words)


def _short(path: str) -> str:
    """A path as it is called from the current directory, where it lies below it."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here) if path.startswith(here) else path


def explain_missing_packages() -> None:
    """Have the imports of a program's module say what to install, too: those before its `run`."""

    def explain(kind: type, error: BaseException, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and (missing := _missing_package(error)):
            sys.exit(_explain(missing))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain


def _missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install, where it is a package of others that is not there; else None."""
    module = error.name
    # Of a package that is there, but for a part of it, there is nothing to say in a line.
    if (
        not module
        or "." in module
        or module in sys.stdlib_module_names
        or (_ROOT / module).exists()
    ):
        return None
    package = _PACKAGES.get(module, module)
    for requirement, arguments in _requirements():
        if re.match(rf"{re.escape(package)}(?![\w-])", requirement):
            return _not_installed(package, arguments)
    return _not_installed(package, [package])


def _requirements() -> Iterator[tuple[str, list[str]]]:
    """What this package needs, and what pip is given to install it."""
    files = sorted(_ROOT.glob("requirements*.txt"), key=lambda path: len(path.name))
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            requirement = line.partition("#")[0].strip()
            if path.name in ("requirements.txt", "requirements-serve.txt"):
                # The second is besides the first, which may be missing too.
                whole = dict.fromkeys((str(_ROOT / "requirements.txt"), str(path)))
                yield requirement, [word for file in whole for word in ("-r", file)]
            else:
                yield requirement, [requirement]
    if not files:  # installed by pip
        for requirement in importlib.metadata.requires("blip2-suite") or []:
            wanted = requirement.partition(";")[0].strip()
            yield wanted, [wanted]


def _not_installed(package: str, arguments: list[str]) -> str:
    environment = _ROOT / ".venv" / "bin" / "python"
    other = ""
    if environment.exists() and not sys.executable.startswith(str(environment.parent)):
        other = f"run this with {shlex.quote(str(environment))}, or "
    command = shlex.join([sys.executable, "-m", "pip", "install", *arguments])
    return f"{package} is not installed; {other}install it with: {command}"


class OutputError(OSError):
    """Standard output cannot be written: told from what happens to files and other pipes."""

    def __str__(self) -> str:
        return f"cannot write standard output: {self.strerror}; send it elsewhere"


class _Output(io.RawIOBase):
    """What is behind standard output, whose errors are its own."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream  # kept, as the descriptor would be closed with it
        self._raw = getattr(stream.buffer, "raw", stream.buffer)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, content: bytes) -> int | None:
        try:
            return self._raw.write(content)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def _standard_output(stream: io.TextIOBase) -> io.TextIOBase:
    """The stream, if it is the system's, with errors of its own and an escape for other letters."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream)),
        encoding=stream.encoding,
        errors="backslashreplace",  # what a terminal's encoding lacks is not fatal
        line_buffering=stream.line_buffering,
    )


def _open_standard_streams() -> None:
    """Let those that were closed (`2>&-`) go nowhere; else the next files opened would be they."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest, this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process


def _explain(message: str) -> int:
    """Print an error as one line, whatever the names in it contain, and return its exit code."""
    one_line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"error: {one_line}", file=sys.stderr)
    return 2


def _explain_other(error: Exception) -> int:
    """As `_explain` where memory has run out; a bug shows its traceback."""
    if kind := memory.exhausted(error):
        return _explain(f"not enough {kind} memory; free some, or ask for less at a time")
    if not _is_one_of_several():
        raise error
    traceback.print_exception(error)
    return 1


def _forget_output() -> None:
    """Let what standard output still holds go nowhere, so that the interpreter can end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_one_of_several() -> bool:
    """Whether this process was started by mpirun with others, and something here uses MPI."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.COMM_WORLD.Get_size() > 1


def _interrupt(_signum: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _number(int, text, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def int_between(low: int, high: int) -> Callable[[str], int]:
    """argparse type: an integer of at least `low` and at most `high`."""
    wanted = f"a whole number from {low} to {high}"
    return lambda text: _number(int, text, lambda value: low <= value <= high, wanted)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(float, text, lambda value: 0 < value < math.inf, "a number above 0")


def number_up_to(high: float) -> Callable[[str], float]:
    """argparse type: a number above 0, at most `high`."""
    wanted = f"a number above 0 and at most {high}"
    return lambda text: _number(float, text, lambda value: 0 < value <= high, wanted)


def finite_float(text: str) -> float:
    """argparse type: any finite number."""
    return _number(float, text, math.isfinite, "a finite number")


def _number(kind: type, text: str, valid: Callable[[float], bool], wanted: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
