"""Files that a thread keeps open while it works on a stretch of tensors: tiny ones take longer to open than to read."""

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

_MOST = 64  # files that one thread keeps open
_local = threading.local()


@contextmanager
def kept_open() -> Iterator[None]:
    """In it this thread opens a file once, however often it asks for it; at the end all of them are closed."""
    if getattr(_local, "files", None) is not None:
        yield
        return
    _local.files = {}
    try:
        yield
    finally:
        files, _local.files = _local.files, None
        for handle in files.values():
            os.close(handle)


@contextmanager
def handle_of(key: Hashable, opened: Callable[[], int]) -> Iterator[int]:
    """An open file, from `opened` if this thread has not kept it.

    Args:
        key: tells it from others.
        opened: opens it.
    """
    files: dict[Hashable, int] | None = getattr(_local, "files", None)
    if files is not None and key in files:
        yield files[key]
        return
    handle = opened()
    if files is not None and len(files) < _MOST:
        files[key] = handle
        yield handle
        return
    try:
        yield handle
    finally:
        os.close(handle)
