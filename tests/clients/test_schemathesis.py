"""schemathesis reads our OpenAPI document and looks for requests that get wrong answers."""

from pathlib import Path

import pytest

from tests.clients.served import CLIENTS, needs_clients, run, serving

pytestmark = [pytest.mark.slow, needs_clients]
CONFIG = Path(__file__).with_name("schemathesis.toml")
OPTIONS = "--seed 1 --max-examples 15 --generation-database none --checks all --no-color"


def test_no_request_breaks_the_document(tmp_path: Path) -> None:
    # a short context keeps answers short
    with serving(tmp_path / "log.txt", "--capacity", "128") as served:
        told = run(
            *(CLIENTS / "bin/schemathesis", "--config-file", CONFIG, "run"),
            *(f"{served.url}/openapi.json", *OPTIONS.split(), "--request-timeout", "300"),
            *("--continue-on-failure", "--output-sanitize", "false"),
            cwd=tmp_path,
            timeout=1800,
        )
        assert served.free()
    assert "13 selected" in told and "0 passed" not in told, told
