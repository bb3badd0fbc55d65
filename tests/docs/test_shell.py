"""Shell blocks of the README and of docs/, each page pasted into one shell.

A laptop and minutes are what a test has. INSTEAD tells all that is changed for it: a copy of the
demo in the place of a checkpoint, two ranks for eight, fewer rounds. STAND_INS are functions of the
shell: what is installed is not installed again, targets of make are looked up, a server runs beside
the commands that follow until the next one starts.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.embedded import MODEL
from tests.clients.served import CLIENTS, needs_clients
from tests.docs.pages import PAGES, ROOT, blocks
from tests.ports import free_port

pytestmark = pytest.mark.slow
SECONDS = 1500
# pages whose blocks are run by tests of their own
ELSEWHERE = {
    "first_steps.md": "tests/newcomer/test_first_steps.py",
    "roofline.md": "tests/commands/test_bench_peers.py",  # with stand-ins for llama.cpp
}
BENCHES = {
    "eager --rounds 7": "eager --rounds 1 --new 4",
    "cpu --rounds 5": "cpu --rounds 1 --prompt 64 --batch 1",
    "bench prefill mid": "bench prefill .cache/mid",
    "--rounds 3 --length 512 1024 2048 4096 8192 16384 32768": "--rounds 1 --length 64 128",
    "serving speed": "serving speed --rounds 1",
    "--rounds 15": "--rounds 1",
    "--minutes 10 --clients 64": "--minutes 0.1 --clients 8",
    "--count 1000": "--count 8",
    "speculation --rounds 5": "speculation --rounds 1 --problems 2",
    "speculation --rounds 3": "speculation --rounds 1 --problems 6",
}
INSTEAD = {
    "README.md": {"--length 512 32768": "--length 512 1024", "--concurrency 16": "--requests 8"},
    "demo.md": {"qnext eval": "qnext eval --limit 6"},
    "handoff.md": {
        "serve MODEL": "serve",
        "10.0.0.1": "127.0.0.1",
        "10.0.0.2": "127.0.0.1",
        "--rounds 7": "--rounds 1 --tokens 256",
        "--count 500": "--count 4",
        # tests/clients/test_routers.py runs both
        "sglang-router launch": "$CLIENTS/sglang-router launch --help; :",
        "vllm-router": "$CLIENTS/vllm-router --help; :",
    },
    # torch_npu is in another environment: tests/npu/test_runtime.py runs it
    "lowering.md": {"python -m qnext.lowering.softnpu.device": ": there:"},
    "parallel.md": {
        "--nproc-per-node 4": "--nproc-per-node 2",
        "--tp 4 --draft": "--tp 2 --whole delta_heads --draft",
        "--nproc-per-node 8": "--nproc-per-node 2",
        "--tp 2 --dp 4": "--tp 1 --dp 2",
    },
    "performance.md": BENCHES,
    "serving.md": {
        "--target npu:910b --rows 32 --capacity 32768": "--rows 3 --capacity 512",
        "--requests 200": "--requests 20",
        "--duration 60": "--duration 2",
    },
    "tutorial.md": {
        "git clone <this repository> && cd qnext\n": "",
        "source /usr": ": /usr",
        ".venv/bin/": "",
        "--requests 500": "--requests 10",
        "--nproc-per-node 8": "--nproc-per-node 2",
        "--target npu:910b --tp 8": "--target cpu --tp 2 --whole delta_heads",
        "--rows 32 --capacity 32768 --strict": "--rows 3 --capacity 512",
        "python - <<": "$CLIENTS/python - <<",
    },
}
CHECKPOINTS = ("path/to/checkpoint", "Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next-80B-W8A8")
STAND_INS = """
set -eu -o pipefail
make() { command make --silent --dry-run --directory "$ROOT" "$@"; }
pip() { :; }
apt() { :; }
SERVER=
stop() { [ -z "$SERVER" ] || { kill "$SERVER"; wait "$SERVER" || true; SERVER=; }; }
trap stop EXIT
serve() {
  stop
  command "$@" --port "$PORT" &
  SERVER=$!
  curl --silent --fail --output /dev/null --retry 240 --retry-delay 1 --retry-all-errors \
    "http://127.0.0.1:$PORT/health"
}
torchrun() { serve torchrun --master-port "$MASTER" "$@"; }
qnext() {
  case "$1 ${2:-}" in
    "serve "*) serve qnext "$@" ;;
    "bench serve") command qnext "$@" --url "http://127.0.0.1:$PORT" ;;
    *) command qnext "$@" ;;
  esac
}
"""


def replaced(page: Path) -> str:
    """The page's commands, as they are run here."""
    text = "".join(blocks(page, "bash"))
    for said, instead in INSTEAD.get(page.name, {}).items():
        assert said in text, f"{page.name} no longer says {said!r}"
        text = text.replace(said, instead)
    return text


def told() -> list[Path]:
    return [p for p in PAGES if blocks(p, "bash") and p.name not in ELSEWHERE]


def test_pages_that_are_run_elsewhere() -> None:
    names = {page.name for page in PAGES}
    assert {*INSTEAD, *ELSEWHERE} <= names
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


@needs_clients
@pytest.mark.parametrize("page", told(), ids=lambda p: p.name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """In a copy of the repository, as some write figures and pages into it."""
    here = tmp_path / "qnext"
    skipped = shutil.ignore_patterns(".venv*", ".cache", "site", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, here, ignore=skipped)
    for name in CHECKPOINTS if page.name != "tutorial.md" else CHECKPOINTS[:2]:
        shutil.copytree(MODEL, here / name)
    port = free_port()
    done = subprocess.run(
        ["bash", "-c", STAND_INS + replaced(page).replace("8000", str(port))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=here,
        timeout=SECONDS,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ROOT": str(ROOT),
            "CLIENTS": str(CLIENTS / "bin"),
            "PORT": str(port),
            "MASTER": str(free_port()),
        },
    )
    assert done.returncode == 0, done.stdout[-4000:]
