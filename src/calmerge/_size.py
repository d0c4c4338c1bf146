"""Numbers of bytes as people write them."""

import re

from calmerge._errors import UsageError


def bytes_of(size: str | int, what: str = "shard") -> int:
    """The bytes that a size names, in powers of 1,000.

    >>> bytes_of("5GB"), bytes_of("1.5 MB"), bytes_of(100)
    (5000000000, 1500000, 100)
    >>> bytes_of("big", "out.shard")
    Traceback (most recent call last):
    calmerge._errors.UsageError: out.shard must be a size like 5GB or 500MB, got 'big'.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?)B\s*", str(size), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{what} must be a size like 5GB or 500MB, got '{size}'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def shown(size: float) -> str:
    """A number of bytes for people.

    >>> shown(2.5e9), shown(35_651_584), shown(80)
    ('2.50 GB', '36 MB', '80 B')
    """
    for unit, power, digits in (("GB", 1e9, 2), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if size >= power:
            return f"{size / power:.{digits}f} {unit}"
    return f"{size:.0f} B"
