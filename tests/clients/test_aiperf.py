"""AIPerf, a load generator: its requests end well, and it counts tokens as the server does."""

import json
from pathlib import Path
from typing import Any

import pytest

from qnext.embedded import MODEL
from tests.clients.served import CLIENTS, Served, needs_clients, run

pytestmark = [pytest.mark.slow, needs_clients]
PROMPT, ANSWER, REQUESTS = 60, 16, 12


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_short_run_has_no_errors(endpoint: str, server: Served, tmp_path: Path) -> None:
    run(
        *(CLIENTS / "bin/aiperf", "profile", "-m", "demo", "--url", server.url, "--ui", "none"),
        *("--endpoint-type", endpoint, "--streaming", "--tokenizer", MODEL, "--no-gpu-telemetry"),
        *("--isl", f"{PROMPT}", "--osl", f"{ANSWER}", "--request-count", f"{REQUESTS}"),
        *("--concurrency", "3", "--random-seed", "1", "--artifact-dir", tmp_path / "out"),
        *("--extra-inputs", f'{{"temperature": 0, "ignore_eos": true, "min_tokens": {ANSWER}}}'),
        cwd=tmp_path,
        timeout=900,
    )
    told = json.loads((tmp_path / "out/profile_export_aiperf.json").read_text())
    assert told["is_complete"] and not told["error_summary"] and not told["was_cancelled"]
    assert told["request_count"]["avg"] == REQUESTS and told["request_error_rate"]["avg"] == 0
    # what it counts itself, and our usage
    around = 8 if endpoint == "chat" else 0  # tokens of the template
    assert same(told, "usage_completion_tokens") == ANSWER
    assert same(told, "usage_prompt_tokens") == same(told, "input_sequence_length") + around
    # tokens that were drawn are not always those that their text is encoded as
    assert 0.9 * ANSWER < told["output_sequence_length"]["avg"] <= ANSWER
    assert told["time_to_first_token"]["avg"] > 0
    metrics = json.loads((tmp_path / "out/server_metrics_export.json").read_text())["metrics"]
    (tokens,) = metrics["vllm:generation_tokens"]["series"]
    assert tokens["stats"]["total"] == REQUESTS * ANSWER


def same(told: dict[str, Any], name: str) -> float:
    """A metric that is the same for all requests."""
    assert told[name]["min"] == told[name]["max"], (name, told[name])
    return told[name]["avg"]
