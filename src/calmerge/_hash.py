"""BLAKE3 of files, also of one that is still being written; SHA-256 takes a processor three to four times as long."""

import os
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

ALGORITHM = "blake3"
"""What manifests and journals call it."""
_PIECE = 1 << 20  # bytes that are hashed at a time, while other threads run


class Growing:
    """The BLAKE3 of a file whose beginning is there already.

    Args:
        handle: the file, open for reading.
    """

    def __init__(self, handle: int) -> None:
        self._handle, self._digest, self._at = handle, blake3(), 0
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


def hash_of(file: Path) -> str:
    """The BLAKE3 of a file, in hexadecimal."""
    with file.open("rb", buffering=0) as f:
        whole = Growing(f.fileno())
        whole.upto(None)
    return whole.found()


def joined(digests: Mapping[str, str]) -> str:
    """One hash for the files of a checkpoint: the only one, or a hash of all with their names.

    >>> joined({"model.safetensors": "5f"})
    '5f'
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    return blake3("".join(f"{k}{v}" for k, v in sorted(digests.items())).encode()).hexdigest()
