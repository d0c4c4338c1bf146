"""Machine code that is kept on disk, beside what numba keeps: to compile a tape takes thirty times as long as this."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

_HASH = 32  # bytes in front of the code, which tell whether it is whole


def kept(folder: Path | None, key: str, make: Callable[[], bytes]) -> bytes:
    """The code that `make` compiles, or that was made for the same key before.

    Args:
        folder: where it is kept; nowhere when None, or where nothing can be written.
        key: all that the code depends on.
        make: compiles.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     kept(Path(folder), "loop", lambda: b"code"), kept(Path(folder), "loop", lambda: b"not called")
    (b'code', b'code')
    """
    if folder is None:
        return make()
    file = folder / f"calmerge-{_digest(key.encode()).hex()}.o"
    with suppress(OSError):
        found = file.read_bytes()
        if found[:_HASH] == _digest(found[_HASH:]):
            return found[_HASH:]
    code = make()
    with suppress(OSError), NamedTemporaryFile(dir=folder, prefix="calmerge-", delete=False) as f:
        try:
            f.write(_digest(code) + code)
            f.flush()
            os.replace(f.name, file)
        except OSError:
            os.unlink(f.name)
    return code


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH).digest()
