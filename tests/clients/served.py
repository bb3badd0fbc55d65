"""A real `qnext serve` process, and public clients in an environment of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients"
SCRIPTS = Path(__file__).parent / "scripts"
LONG = 300.0  # seconds that nothing takes, on a busy machine


@dataclass
class Served:
    """A server process that answers at `url`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """A metric's samples, added up."""
        found = 0.0
        with urlopen(f"{self.url}/metrics", timeout=LONG) as answer:
            for line in answer.read().decode().splitlines():
                if line.partition("{")[0].partition(" ")[0] == name:
                    found += float(line.rsplit(" ", 1)[1])
        return found

    def free(self, seconds: float = 60.0) -> bool:
        """Whether no request runs or waits any more, within some seconds."""
        end = time.monotonic() + seconds
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while any(self.metric(name) for name in names):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


class serving:
    """Run `qnext serve` while the block runs; SIGTERM must then end it with status 0."""

    def __init__(self, log: Path, *options: str) -> None:
        port = free_port()
        program = [sys.executable, "-m", "qnext.cli", "serve", "--no-warm", "--port", str(port)]
        self.command, self.log, self.url = [*program, *options], log, f"http://127.0.0.1:{port}"

    def __enter__(self) -> Served:
        self.file: IO[bytes] = self.log.open("wb")
        self.process = subprocess.Popen(self.command, stdout=self.file, stderr=self.file, cwd=ROOT)
        try:
            self._await_health()
        except BaseException:
            self.process.kill()
            self.process.wait()
            self.file.close()
            raise
        return Served(self.url, self.process, self.log)

    def __exit__(self, *failure: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(LONG)
        finally:
            self.process.kill()
            self.process.wait()
            self.file.close()
        assert status == 0, f"exit status {status}\n{self.log.read_text()[-3000:]}"

    def _await_health(self) -> None:
        end = time.monotonic() + LONG
        while True:
            try:
                with urlopen(f"{self.url}/health", timeout=LONG) as answer:
                    assert answer.status == 200
                    return
            except (URLError, ConnectionError):  # not listening yet, or 503: loading
                running = self.process.poll() is None and time.monotonic() < end
                assert running, f"no server\n{self.log.read_text()[-3000:]}"
                time.sleep(0.2)


def run(
    *command: str | Path,
    timeout: float = LONG,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """What a client prints. It must end well; no proxy stands between it and the server."""
    plain = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    ran = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**plain, "NO_PROXY": "*", **(env or {})},
    )
    told = f"{ran.stdout[-8000:]}\n{ran.stderr[-4000:]}"
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}\n{told}"
    return ran.stdout


def python(script: str, *words: str, **how: object) -> str:
    """Run one of tests/clients/scripts with the clients' own interpreter."""
    return run(CLIENTS / "bin/python", SCRIPTS / script, *words, **how)  # type: ignore[arg-type]


needs_clients = pytest.mark.skipif(
    not (CLIENTS / "dev").exists(), reason="no clients; make .venv-clients/dev installs them"
)
