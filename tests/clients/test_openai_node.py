"""OpenAI's JavaScript client, unchanged."""

import pytest

from tests.clients.served import CLIENTS, SCRIPTS, Served, needs_clients, run

pytestmark = [pytest.mark.slow, needs_clients]
CHECKS = "chat stream completions tools response_format typed_errors"


def node(server: Served, check: str) -> None:
    run("node", SCRIPTS / "openai_client.mjs", CLIENTS / "node", server.url, check)


@pytest.mark.parametrize("check", CHECKS.split())
def test_the_client_is_served(check: str, server: Served) -> None:
    node(server, check)


@pytest.mark.parametrize("check", ["abort_stream", "abort_whole"])
def test_a_client_that_leaves_frees_its_row(check: str, server: Served) -> None:
    before = server.metric("vllm:generation_tokens_total")
    node(server, check)
    assert server.free()
    assert server.metric("vllm:generation_tokens_total") - before < 4000
