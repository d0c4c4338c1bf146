"""The highest private memory of this process while something runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_EVERY = 0.005  # seconds between two looks


class Peak:
    """The highest private memory seen so far, in bytes; `None` where the system does not tell."""

    bytes: int | None = None

    def _look(self) -> None:
        now = private_memory()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The peak of private (anonymous, resident) memory inside the block; mapped files do not count.

    >>> with peak_memory() as peak:
    ...     data = bytearray(1000)
    >>> peak.bytes is None or peak.bytes > 1000
    True
    """
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            peak._look()

    peak._look()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak._look()


def private_memory() -> int | None:
    """Private memory of this process now, in bytes; None outside Linux."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
