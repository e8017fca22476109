"""SIGINT and SIGTERM end a run in order: results are kept, Ray's processes end, the exit status tells the signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

# Tune's own handler would make `fit` return as if all trials were done; here it is interrupted like all other code.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
_half_started = False
_blocks = 0
"""Number of `orderly` blocks that are running."""


@contextmanager
def orderly() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM while the block runs, in the main thread."""
    global _blocks
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _blocks += 1
    raise_on_signals()
    try:
        yield
    finally:
        _blocks -= 1
        _set(before)


def raise_on_signals() -> None:
    """Within an `orderly` block, install its handlers again, which Ray replaces when it starts."""
    if _blocks:
        _set(dict.fromkeys(SIGNALS, _raise))


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Record the first signal while the block runs, and raise KeyboardInterrupt at its end; a second raises at once.

    The block gets a function that returns whether a signal came, and must call it. This is for other people's code, in
    which an exception at any moment may leave a lock locked forever.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            _raise(number, frame)
        _received.append(number)
        came.set()

    if _blocks:
        _set(dict.fromkeys(SIGNALS, note))
    try:
        yield came.is_set
    finally:
        _set(before)
    if came.is_set():
        raise KeyboardInterrupt


@contextmanager
def ignored() -> Iterator[None]:
    """Ignore all signals while the block, which cleans up, runs."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _set(dict.fromkeys(SIGNALS, signal.SIG_IGN))
    try:
        yield
    finally:
        _set(before)


@contextmanager
def closed_in_peace(manager: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context, and ignore signals while it exits."""
    manager.__enter__()
    try:
        yield
    except BaseException as error:
        with ignored():
            handled = manager.__exit__(type(error), error, error.__traceback__)
        if not handled:
            raise
    else:
        with ignored():
            manager.__exit__(None, None, None)


def exit_status() -> int:
    """Return the exit status of a command that a signal ended: 128 plus the signal's number."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


def terminated() -> KeyboardInterrupt:
    """Return the error to raise for a SIGTERM that another handler received."""
    _received.append(signal.SIGTERM)
    return KeyboardInterrupt()


def start_interrupted() -> None:
    """Record that Ray was interrupted while it started."""
    global _half_started
    _half_started = True


def leave(status: int) -> NoReturn:
    """End this process; at once if Ray was interrupted while it started, because it may then crash as Python exits."""
    if _half_started:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)  # `exit_status` reads it: inside its own waits, Ray turns the interrupt into another error
    raise KeyboardInterrupt


def _set(handlers: Mapping[signal.Signals, signal._HANDLER]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
