"""What OpenAI's Python client sees of a server: openai_client.py URL CHECK [KEY]."""

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
from openai import OpenAI

ASKED: Any = [{"role": "user", "content": "Who are you?"}]
STORY = "Question: Mia has 12 apples. She buys 7 more. How many apples does Mia have now?\nAnswer:"
FORM = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": FORM}}]


def models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def chat(client: OpenAI) -> None:
    answers = [
        client.chat.completions.create(model="demo", messages=ASKED, temperature=0, max_tokens=8)
        for _ in range(2)
    ]
    for answer in answers:
        choice = answer.choices[0]
        assert choice.message.role == "assistant" and choice.finish_reason == "length"
        assert "qnext demo" in choice.message.content
        assert answer.usage.completion_tokens == 8
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].id != answers[1].id


def choices(client: OpenAI) -> None:
    asked = {"model": "demo", "messages": ASKED, "n": 3, "seed": 5, "temperature": 1.0}
    made = client.chat.completions.create(**asked, max_completion_tokens=6)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    again = client.chat.completions.create(**asked, max_completion_tokens=6)
    texts = [[choice.message.content for choice in each.choices] for each in (made, again)]
    assert texts[0] == texts[1]  # the same seeds
    assert made.usage.completion_tokens == 18


def stream(client: OpenAI) -> None:
    asked = {"model": "demo", "messages": ASKED, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    told = [chunk.choices[0] for chunk in chunks[:-1]]
    assert told[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for choice in told)
    assert text == whole.choices[0].message.content
    assert [choice.finish_reason for choice in told if choice.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def streaming_helper(client: OpenAI) -> None:
    """The client's own accumulator takes our chunks, tool calls included."""
    with client.chat.completions.stream(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice="required", temperature=0
    ) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "tool_calls.function.arguments.delta"} <= kinds
    (call,) = final.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert final.choices[0].finish_reason == "tool_calls"


def completions(client: OpenAI) -> None:
    asked = {"model": "demo", "temperature": 0, "max_tokens": 10}
    one = client.completions.create(prompt=STORY, **asked).choices[0].text
    two = client.completions.create(prompt=[STORY, "Tom has"], **asked)
    assert [choice.index for choice in two.choices] == [0, 1] and two.choices[0].text == one
    echoed = client.completions.create(prompt=STORY, echo=True, **asked).choices[0].text
    assert echoed == STORY + one
    pieces = client.completions.create(prompt=STORY, stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in pieces) == one
    stopped = client.completions.create(prompt=STORY, stop=one[3:6], **asked).choices[0]
    assert stopped.text == one[: one.index(one[3:6])] and stopped.finish_reason == "stop"


def tools(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice="required", temperature=0
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}


def tool_loop(client: OpenAI) -> None:
    """Calls tools twice and sends back what they say; needs a template that knows tools."""
    said: list[Any] = [*ASKED]
    sizes = []
    asked: Any = {"model": "demo", "tools": TOOLS, "temperature": 0}
    chosen: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", chosen):
        answer = client.chat.completions.create(messages=said, tool_choice=choice, **asked)
        message = answer.choices[0].message
        sizes.append(answer.usage.prompt_tokens)
        said.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            said.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    asked["max_tokens"] = 4
    last = client.chat.completions.create(messages=said, tool_choice="none", **asked)
    assert last.choices[0].message.tool_calls is None
    assert sizes[1] > sizes[0] > 0


def response_format(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": FORM}}
    form["json_schema"]["strict"] = True
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, response_format=form, temperature=0.8, seed=3
    )
    made = json.loads(answer.choices[0].message.content)
    assert made["city"] in ("Paris", "Rome") and 1 <= made["days"] <= 9
    assert answer.choices[0].finish_reason == "stop"


def logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASKED, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs.content
    text = b"".join(bytes(each.bytes) for each in told).decode()
    assert text == answer.choices[0].message.content and len(told) == 6
    for each in told:
        tops = [top.logprob for top in each.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert each.token == each.top_logprobs[0].token and each.logprob == tops[0] <= 0


def typed_errors(client: OpenAI) -> None:
    bad = refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model="demo", messages=ASKED, temperature=-1),
    )
    assert bad.param == "temperature" and bad.type == "invalid_request_error"
    long = refused(
        openai.BadRequestError,
        lambda: client.completions.create(model="demo", prompt="Tom has " * 5000),
    )
    assert long.code == "context_length_exceeded"
    absent = refused(
        openai.NotFoundError,
        lambda: client.chat.completions.create(model="gpt-x", messages=ASKED),
    )
    assert absent.code == "model_not_found" and "demo" in absent.message
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-x"))
    refused(openai.NotFoundError, lambda: client.embeddings.create(model="demo", input="Tom"))


def abort_stream(client: OpenAI) -> None:
    """Leaves after three chunks of an answer that would be long."""
    made = client.completions.create(
        model="demo", prompt=STORY, stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(3), made, strict=False):
        pass
    made.close()


def abort_whole(client: OpenAI) -> None:
    """Gives up an answer that is not streamed and would be long."""
    impatient = client.with_options(timeout=1.0, max_retries=0)
    refused(
        openai.APITimeoutError,
        lambda: impatient.completions.create(
            model="demo", prompt=STORY, max_tokens=4000, extra_body={"ignore_eos": True}
        ),
    )


def authentication(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    for key in ("wrong", client.api_key[:-1]):
        stranger = client.with_options(api_key=key)
        refused(openai.AuthenticationError, stranger.models.list)
        error = refused(
            openai.AuthenticationError,
            lambda stranger=stranger: stranger.chat.completions.create(
                model="demo", messages=ASKED
            ),
        )
        assert error.code == "invalid_api_key"


def rate_limit(client: OpenAI) -> None:
    """A full server refuses; the client waits as long as it is told to, and gets its answer."""
    asked: Any = {"model": "demo", "prompt": STORY}
    long = {**asked, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    runs = client.completions.create(stream=True, **long)
    next(iter(runs))
    waits = threading.Thread(target=lambda: client.completions.create(**asked))
    waits.start()
    beside = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    while not beside.get("/server_info", cast_to=object)["waiting"]:
        time.sleep(0.05)
    error = refused(
        openai.RateLimitError,
        lambda: client.with_options(max_retries=0).completions.create(**asked),
    )
    told = float(error.response.headers["retry-after"])
    assert told >= 1
    times: list[float] = []

    def note(request: object) -> None:
        times.append(time.monotonic())
        if len(times) == 2:
            runs.close()

    with openai.DefaultHttpxClient(event_hooks={"request": [note]}) as http:
        patient = client.with_options(http_client=http, max_retries=200)
        assert patient.completions.create(**asked, max_tokens=1).usage.completion_tokens == 1
    # without the header it would try again after half a second
    assert times[1] - times[0] >= told, times
    waits.join()


def refused(kind: type[Any], ask: Callable[[], Any]) -> Any:
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def texts(client: OpenAI) -> None:
    """Prints what it gets, for two servers to be compared."""
    for prompt in ("a", "Tom", *("Tom has 5 apples. " * count for count in (25, 26, 140, 600))):
        for how in ({"temperature": 0}, {"temperature": 0.9, "seed": 11}):
            answer = client.completions.create(
                model="demo", prompt=prompt, max_tokens=60, extra_body={"ignore_eos": True}, **how
            )
            print(json.dumps([answer.usage.prompt_tokens, answer.choices[0].text]))
    for messages in (ASKED, [*ASKED, {"role": "assistant", "content": "x"}, *ASKED]):
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=30, n=2
        )
        print(json.dumps([choice.message.content for choice in answer.choices]))


if __name__ == "__main__":
    url, check, *key = sys.argv[1:]
    with OpenAI(base_url=f"{url}/v1", api_key=key[0] if key else "none", timeout=300) as made:
        globals()[check](made)
