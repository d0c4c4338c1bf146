"""Runs `calmerge merge` in forks of one warm interpreter, and kills them on request; a program for test_kill.py.

Reads one JSON line a run, {"argv": [...], "kill": seconds or null, "log": path}, and answers {"code": ..., "seconds":
...}; the code is negative where a signal ended the run.
"""

import json
import os
import signal
import sys
import time

import calmerge._recipe_run
import calmerge.cli
import calmerge.report.card
import calmerge.report.html


def run(argv: list[str], log: str) -> None:
    """The child: the command line as a user's shell would start it, but for the imports."""
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.argv = ["calmerge", *argv]
    code = 0
    try:
        calmerge.cli.main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, kill: float | None) -> int:
    if kill is not None:
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            run(asked["argv"], asked["log"])
        code = wait(child, asked["kill"])
        sys.stdout.write(json.dumps({"code": code, "seconds": time.perf_counter() - started}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
