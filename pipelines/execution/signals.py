"""SIGINT and SIGTERM end a run in order: what is stored stays, Ray's processes end, the exit status says which."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

# Tune's own handler makes `fit` return as if all were done; here the interrupt goes on to who started it.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
_half_started = False
_blocks = 0
"""How many blocks of `orderly` are under way."""


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
    """Install the handlers of `orderly`, in such a block, again: Ray puts its own in their place as it starts."""
    if _blocks:
        _set(dict.fromkeys(SIGNALS, _raise))


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Only note the first signal while the block runs, and raise KeyboardInterrupt at its end; raise at the second.

    Gives the block a function that tells whether one came: it has to ask. For code of others that an exception between
    any two of its instructions may leave with a lock that nobody holds.
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
    """Let the block, a cleaning up, end whatever arrives."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _set(dict.fromkeys(SIGNALS, signal.SIG_IGN))
    try:
        yield
    finally:
        _set(before)


@contextmanager
def closed_in_peace(manager: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context, and let its end run to its end whatever arrives."""
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
    """Return the status of a command that a signal ended: 128 and its number."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


def terminated() -> KeyboardInterrupt:
    """Return the error to raise for a SIGTERM that another handler has taken."""
    _received.append(signal.SIGTERM)
    return KeyboardInterrupt()


def start_interrupted() -> None:
    """Note that Ray was interrupted as it started."""
    global _half_started
    _half_started = True


def leave(status: int) -> NoReturn:
    """End this process: at once where Ray was interrupted as it started, for it may crash as Python then closes."""
    if _half_started:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)  # asked for at the end: within its own waits Ray raises an error of its own making
    raise KeyboardInterrupt


def _set(handlers: Mapping[signal.Signals, signal._HANDLER]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
