"""What litellm sees of a server: litellm_client.py URL CHECK [KEY]."""

import json
import sys
from typing import Any

import litellm

ASKED = [{"role": "user", "content": "Who are you?"}]
FORM = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": FORM}}]
Target = dict[str, Any]


def chat(target: Target, prefix: str = "hosted_vllm") -> None:
    asked = {"model": f"{prefix}/demo", "messages": ASKED, "temperature": 0, "max_tokens": 8}
    answer = litellm.completion(**asked, **target)
    text = answer.choices[0].message.content
    assert "qnext demo" in text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**asked, **options, **target))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [8]


def openai_chat(target: Target) -> None:
    chat(target, "openai")


def completions(target: Target) -> None:
    asked = {"model": "text-completion-openai/demo", "temperature": 0, "max_tokens": 10}
    answer = litellm.text_completion(prompt="Tom has", **asked, **target)
    text = answer.choices[0].text
    assert text and answer.usage.completion_tokens == 10
    chunks = litellm.text_completion(prompt="Tom has", stream=True, **asked, **target)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices) == text
    # asked as for a chat
    said = [{"role": "user", "content": "Tom has"}]
    answer = litellm.completion(messages=said, **asked, **target)
    assert answer.choices[0].message.content == text


def tools(target: Target) -> None:
    # under hosted_vllm it leaves out additionalProperties: the demo then never comes to an end
    asked = {"model": "openai/demo", "messages": ASKED, "temperature": 0}
    answer = litellm.completion(tools=TOOLS, tool_choice="required", **asked, **target)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert answer.choices[0].finish_reason == "tool_calls"


def response_format(target: Target) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": FORM}}
    asked = {"model": "hosted_vllm/demo", "messages": ASKED, "temperature": 0}
    answer = litellm.completion(response_format=form, **asked, **target)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def typed_errors(target: Target) -> None:
    long = [{"role": "user", "content": "Tom has " * 5000}]
    cases: list[tuple[type[Exception], Target]] = [
        (litellm.BadRequestError, {"messages": ASKED, "temperature": -1}),
        (litellm.ContextWindowExceededError, {"messages": long}),
        (litellm.NotFoundError, {"messages": ASKED, "model": "hosted_vllm/gpt-x"}),
    ]
    for kind, asked in cases:
        try:
            litellm.completion(**{"model": "hosted_vllm/demo", **asked}, **target)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    url, check = sys.argv[1:]
    globals()[check]({"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 300})
