"""litellm, which many gateways and agents are built on."""

import pytest

from tests.clients.served import Served, needs_clients, python

pytestmark = [pytest.mark.slow, needs_clients]
CHECKS = "chat openai_chat completions tools response_format typed_errors"
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.mark.parametrize("check", CHECKS.split())
def test_the_client_is_served(check: str, server: Served) -> None:
    python("litellm_client.py", server.url, check, env=OFFLINE)
