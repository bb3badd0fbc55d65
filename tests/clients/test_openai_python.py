"""OpenAI's Python client, unchanged."""

import pytest

from tests.clients.conftest import KEY
from tests.clients.served import Served, needs_clients, python

pytestmark = [pytest.mark.slow, needs_clients]
SCRIPT = "openai_client.py"
CHECKS = (
    "models chat choices stream streaming_helper completions tools response_format logprobs "
    "typed_errors"
)


@pytest.mark.parametrize("check", CHECKS.split())
def test_the_client_is_served(check: str, server: Served) -> None:
    python(SCRIPT, server.url, check)


@pytest.mark.parametrize("check", ["abort_stream", "abort_whole"])
def test_a_client_that_leaves_frees_its_row(check: str, server: Served) -> None:
    before = server.metric("vllm:generation_tokens_total")
    python(SCRIPT, server.url, check)
    assert server.free()
    assert server.metric("vllm:generation_tokens_total") - before < 4000


@pytest.mark.parametrize("check", ["tool_loop", "authentication", "rate_limit"])
def test_a_client_with_a_key(check: str, guarded: Served) -> None:
    python(SCRIPT, guarded.url, check, KEY)
