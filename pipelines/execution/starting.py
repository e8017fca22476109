"""Ray's start, watched: it ends at once if one of Ray's servers dies, and after a while in any case."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines.execution.processes import dead_servers

LOOK_SECONDS = 0.5
"""How often the servers are looked at."""


class StartFailedError(BaseException):
    """Ray cannot start any more; no Exception, because Ray's own code catches those and tries again."""


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Raise StartFailedError in the block if a server that this process started dies, and after `seconds`.

    A signal raises it, and so only in the main thread; in another one, the block is not watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, over, reasons = threading.get_ident(), threading.Event(), [""]
    died_before = dead_servers().keys()

    def look() -> None:
        deadline = time.monotonic() + seconds
        while not over.wait(LOOK_SECONDS):
            died = [name for process, name in dead_servers().items() if process not in died_before]
            if died or time.monotonic() > deadline:
                reasons[0] = f"its server {died[0]} ended" if died else f"not done after {seconds:g} s"
                signal.pthread_kill(main, signal.SIGALRM)  # a real signal also interrupts a wait

    def end(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise StartFailedError(reasons[0])

    before = signal.signal(signal.SIGALRM, end)
    watch = threading.Thread(target=look, name="gross_ray start", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
