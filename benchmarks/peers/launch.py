"""Run a command and tell what it took: seconds, its peak memory, what it read from the disk.

    python -S -m benchmarks.peers.launch REPORT.json COMMAND [ARGUMENT ...]

A process is told to have had at least as much memory as the one that started it, so this one is
small: it imports nothing but the standard library.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SECTOR = 512  # bytes of a block that was read


def launch(report: Path, command: Sequence[str]) -> int:
    """The command's exit status; its output goes where ours does."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    told = {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "read_bytes": usage.ru_inblock * SECTOR,
    }
    report.write_text(json.dumps(told), encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1]), sys.argv[2:]))
