"""Options of mergekit's command line: which of them `calmerge merge` has too, and what became of the others."""

import re
from collections.abc import Sequence

from calmerge._errors import UsageError

_NEEDLESS = {
    "--allow-crimes": 0, "--no-allow-crimes": 0, "--trust-remote-code": 0,
    "--no-trust-remote-code": 0, "--copy-tokenizer": 0,
    "--clone-tensors": 0, "--no-clone-tensors": 0, "--write-model-card": 0, "--safe-serialization": 0,
    "--lazy-unpickle": 0, "--no-lazy-unpickle": 0, "--low-cpu-memory": 0, "--no-low-cpu-memory": 0, "--read-to-gpu": 0,
    "--no-read-to-gpu": 0, "--async-write": 0, "--no-async-write": 0, "--no-quiet": 0, "--no-cuda": 0,
    "--multi-gpu": 0, "--no-multi-gpu": 0, "--write-threads": 1, "--num-threads": 1, "-j": 1, "--lora-merge-cache": 1,
    "-v": 0,
}  # fmt: skip
"""Options that change no result, with how many values they take: here they would say what happens anyway."""
_ADVICE = {
    "--cuda": "Merging runs on the processor, at the speed of the disk; leave it out.",
    "--device": "Merging runs on the processor, at the speed of the disk; leave it out.",
    "--gpu-rich": "Merging runs on the processor, at the speed of the disk; leave it out.",
    "--transformers-cache": "Set the environment variable HF_HOME.",
    "--lora-merge-dtype": "Adapters are added in the type of their base and rounded once; leave it out.",
    "--unsafe-truncate-embeddings": "Write 'tokenizer: {source: base}' into the file: rows are then aligned by token.",
    "--no-copy-tokenizer": "The files around the weights are always copied; delete those you do not want.",
    "--no-write-model-card": "A card is always written; delete README.md.",
    "--no-safe-serialization": "Results are safetensors only.",
    "--intermediate-dir": "Documents with a name are not written in between; leave it out.",
}


def translated(arguments: Sequence[str]) -> list[str]:
    """The arguments of a call, with mergekit's options as `calmerge merge` has them.

    Raises:
        UsageError: an option that is not had; the message says what to do instead.

    >>> translated(["c.yml", "out", "--out-shard-size", "1B", "--lazy-unpickle", "-j", "4", "--random-seed=3"])
    ['c.yml', 'out', '--shard', '1GB', '--seed', '3']
    """
    result: list[str] = []
    waiting = list(arguments)
    while waiting:
        text = waiting.pop(0)
        option, equals, value = text.partition("=")
        if option in _ADVICE:
            raise UsageError(f"{option} is an option of mergekit's that is not had here. {_ADVICE[option]}")
        if option in _NEEDLESS:
            del waiting[: _NEEDLESS[option] if not equals else 0]
        elif option in ("--out-shard-size", "--random-seed", "--out-path"):
            value = value if equals else (waiting.pop(0) if waiting else "")
            result += {
                "--out-shard-size": ["--shard", _bytes(value)],
                "--random-seed": ["--seed", value],
                "--out-path": ["--out", value],
            }[option]
        else:
            result.append(text)
    return result


def _bytes(size: str) -> str:
    """mergekit's `5B` (a thousand million) as `5GB`; anything else as it stands."""
    found = re.fullmatch(r"([\d.]+)([KMBT])", size, re.IGNORECASE)
    return f"{found[1]}{'G' if found[2] in 'bB' else found[2].upper()}B" if found else size
