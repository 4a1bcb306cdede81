"""How a command ends: done, a mistake in one line, interrupted, or a bug that says that it is one."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType

from rpb_retrofit.cli import standard_streams
from rpb_retrofit.cli.standard_streams import say
from rpb_retrofit.files.printable import reason_of

TRACEBACK = "RPB_TRACEBACK"
"""The environment variable that shows where an error comes from."""

MISTAKE, INTERRUPTED, UNREAD, TERMINATED = 2, 130, 141, 143


class _Interrupt:
    """Ctrl-C. Libraries turn the exception into others (a failed import), so that it is also noted."""

    noted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        raise KeyboardInterrupt

    @staticmethod
    def at_once(number: int, frame: FrameType | None) -> None:
        """While the program is being read there is nothing to clear up, and nothing that could catch an exception."""
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)


def main() -> None:
    """Run ``rpb``. Exit status 0: done; 1: a regression found (``diagnose --fail-on-regression``); 2: a mistake of
    the user's, named in one line, or a bug, which says so; 130: interrupted; 143: stopped by SIGTERM after saving."""
    standard_streams.open_all()
    interrupt = None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # else whoever started it ignores the signal (nohup), or has a handler of their own
        interrupt = _Interrupt()
        _on_interrupt(_Interrupt.at_once)
        atexit.register(_on_interrupt, signal.SIG_DFL)
    try:
        status = _run(interrupt)
    finally:
        if interrupt is not None:
            _on_interrupt(signal.default_int_handler)
    if (why := standard_streams.end(sys.stdout)) is not None and status == 0:
        status = _unread(why)
    standard_streams.end(sys.stderr)
    sys.exit(status)


def _on_interrupt(handler: object) -> None:
    with contextlib.suppress(ValueError):  # only the main thread of a process may
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


def _run(interrupt: _Interrupt | None) -> int:
    """Run the command and say what went wrong; the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from rpb_retrofit.cli.app import app

        if interrupt is not None:
            _on_interrupt(interrupt)
        return int(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        if stop.code != 1:
            raise
        return UNREAD  # click's answer to a reader that is gone; but 1 is what a regression says
    except Exception as error:
        return _interrupted() if interrupt is not None and interrupt.noted else _failed(error)


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def _failed(error: Exception) -> int:
    """Say in one line what went wrong, and with `TRACEBACK` where; the exit status."""
    import typer

    from rpb_retrofit.errors import InterruptedRunError, RetrofitError

    if isinstance(error, typer.Abort):
        if not isinstance(error.__cause__, EOFError):
            return _interrupted()
        error = error.__cause__  # click takes a file that ends early for Ctrl-D
    if isinstance(error, BrokenPipeError):
        return _unread(error)
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, RetrofitError):
        say(str(error))
        return TERMINATED if isinstance(error, InterruptedRunError) else MISTAKE
    # Typer carries its own copy of click and exports of its errors only this one: BadParameter, a UsageError.
    if isinstance(error, typer.BadParameter.__base__):  # type: ignore[arg-type]
        say(error.format_message())  # type: ignore[attr-defined]
        return MISTAKE
    say(_unforeseen(error))
    return MISTAKE


def _unread(error: Exception) -> int:
    """Say why the result could not be printed; the exit status."""
    if isinstance(error, BrokenPipeError):
        return UNREAD  # whoever read it (head, say) has seen enough
    say(f"the result could not be written to the standard output: {reason_of(error)}")
    return MISTAKE


def _unforeseen(error: Exception) -> str:
    """An exception that is none of ours: the machine's, or a bug."""
    from rpb_retrofit.version import __version__

    try:
        what = f"{type(error).__name__}: {error}"
    except Exception:  # its own words can fail too: a number of more digits than Python writes
        what = type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({what}): give less text, shorter windows or a smaller model"
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        from rpb_retrofit.files.temporary import REMEDY

        return f"no temporary files can be written: {REMEDY}"  # PyTorch looks for a folder when it is imported
    if isinstance(error, OSError) and error.strerror:
        where = f": '{error.filename}'" if error.filename else ""
        return f"the system refused: {error.strerror}{where}; {TRACEBACK}=1 shows where"
    return (
        f"a bug of rpb_retrofit {__version__}, in answer to an input that it does not foresee: {what}; "
        f"{TRACEBACK}=1 shows where; please report it"
    )
