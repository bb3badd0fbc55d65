"""Run a command on the software Ascend: `python -m qnext.lowering.softnpu.device -m pytest ...`.

`--soc 9391` before the command makes the device an A3 instead of a 910B.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qnext.lowering.softnpu.build import SOCS, BuildError, build


def cache(soc: str) -> Path:
    """Where this user's libraries for a chip are kept."""
    return Path.home() / ".cache" / "qnext" / f"softnpu-{soc}"


def environment(out: Path) -> dict[str, str]:
    """The environment of a child process whose torch_npu finds the libraries in `out`."""
    paths = [str(out), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {
        "LD_LIBRARY_PATH": ":".join(paths),
        # `import torch` itself must not import torch_npu: other children have no CANN
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # a call that fails is to raise where it stands, not at a later synchronisation
        "TASK_QUEUE_ENABLE": "0",
    }


def run(argv: Sequence[str], soc: str = "910B3", out: Path | None = None) -> int:
    """Run `python argv` on the software device, built when it is stale; its exit status."""
    home = out or cache(soc)
    build(home, {"soc": SOCS[soc]})
    return subprocess.run([sys.executable, *argv], env=environment(home)).returncode


def main(arguments: list[str]) -> int:
    soc = "910B3"
    if arguments[:1] == ["--soc"]:
        soc, arguments = "".join(arguments[1:2]), arguments[2:]
    if not arguments or soc not in SOCS:
        chips = "|".join(SOCS)
        print(f"usage: python -m {__spec__.name} [--soc {chips}] ARGUMENTS OF PYTHON")
        return 2
    try:
        return run(arguments, soc)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
