"""SHA-256 of files, also of one that is still being written."""

import hashlib
import os
from pathlib import Path

_PIECE = 1 << 20  # bytes that are hashed at a time, while other threads run


class Growing:
    """The SHA-256 of a file whose beginning is there already.

    Args:
        handle: the file, open for reading.
    """

    def __init__(self, handle: int) -> None:
        self._handle, self._digest, self._at = handle, hashlib.sha256(), 0
        self._buffer = memoryview(bytearray(_PIECE))

    def upto(self, end: int | None) -> None:
        """Take in what is there now, the bytes before `end`; all of them when None."""
        while end is None or self._at < end:
            room = self._buffer if end is None else self._buffer[: min(_PIECE, end - self._at)]
            got = os.preadv(self._handle, [room], self._at)
            if not got:
                return
            self._digest.update(room[:got])
            self._at += got

    def found(self) -> str:
        """The hash of what was taken in, in hexadecimal."""
        return self._digest.hexdigest()


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb", buffering=0) as f:
        whole = Growing(f.fileno())
        whole.upto(None)
    return whole.found()
