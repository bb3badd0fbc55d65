"""What clients may send, as pydantic models: OpenAI's fields, and vLLM's and SGLang's beside them.

Unknown fields are let through, as routers and newer clients add their own. Types are strict where
JSON is: "7" is no integer and 1 no boolean, but 7.0 is the integer 7.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
)

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 64, 20
INT64 = 2**63


def _whole(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("must be an integer")
    if isinstance(value, float) and value != value // 1:
        raise ValueError("must be an integer")
    return value


def _expressible(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("has a lone surrogate, which UTF-8 cannot express") from None
    return value


# comes last in an annotation, so that the bounds before it reach the OpenAPI document
WHOLE = BeforeValidator(_whole)
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), AfterValidator(_expressible)]
# an empty one is refused later, in better words
Prompt = Annotated[Text, WithJsonSchema({"type": "string", "minLength": 1})]
Count = Annotated[int, Field(ge=1, le=INT64 - 1), WHOLE]
Token = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
Port = Annotated[int, Field(ge=1, le=65535), WHOLE]
Room = Annotated[int, Field(ge=0, lt=2 * INT64), WHOLE]
# a list of thousands is of one kind or of another: that is seen at the first that does not fit
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Stops = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MOST_STOPS)]


class Model(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)


def _documented(example: dict[str, Any], *, one_of: Mapping[str, str] | None = None) -> ConfigDict:
    """What the OpenAPI document tells of a body beside its fields.

    one_of: fields, and their types, of which exactly one must be given.
    """
    told: dict[str, Any] = {"examples": [example]}
    if one_of:
        told["oneOf"] = [
            {"required": [name], "properties": {name: {"type": kind}}}
            for name, kind in one_of.items()
        ]
    return ConfigDict(json_schema_extra=told)


class StreamOptions(Model):
    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class JsonSchema(Model):
    name: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Drawn(Model):
    """How tokens are drawn and what ends a text, under the names that OpenAI and SGLang share."""

    temperature: Annotated[Number, Field(ge=0, le=1e30)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64), WHOLE] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    stop: Annotated[Text, Field(min_length=1)] | Stops | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None


class Placed(Model):
    """Where a prompt is read for another server to answer; routers say so, and not clients."""

    bootstrap_host: Text | list[Text] | None = None
    bootstrap_port: Port | list[Port] | None = None
    bootstrap_room: Room | list[Room] | None = None
    kv_transfer_params: dict[str, Any] | None = None


class Sampled(Drawn, Placed):
    """What OpenAI's requests for text have in common."""

    model: Text | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64), WHOLE] | None = None
    include_stop_str_in_output: Flag | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    guided_grammar: Text | None = None
    user: Text | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    model_config = _documented({"prompt": "Mia has 12 apples.", "max_tokens": 8})
    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=INT64), WHOLE] | None = 16
    echo: Flag | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    add_special_tokens: Flag | None = None


class Part(Model):
    type: Literal["text"]
    text: Text


class FunctionCall(Model):
    name: Text
    arguments: Text | dict[str, Any] | None = None


class ToolCall(Model):
    id: Text | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    reasoning_content: Text | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None


class Function(Model):
    name: Annotated[Text, Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    name: Text


class NamedTool(Model):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    model_config = _documented(
        {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8}
    )
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    separate_reasoning: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class SamplingParams(Drawn):
    """SGLang's `sampling_params`."""

    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None  # choices, of which there is one
    max_new_tokens: Annotated[int, Field(ge=1, lt=INT64), WHOLE] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, lt=INT64), WHOLE] | None = None
    sampling_seed: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    json_schema: Text | None = None
    regex: Text | None = None


class GenerateRequest(Placed):
    """POST /generate, as SGLang has it"""

    model_config = _documented(
        {"text": "Mia has 12 apples.", "sampling_params": {"max_new_tokens": 8}},
        one_of={"text": "string", "input_ids": "array"},
    )
    text: Annotated[Text, Field(min_length=1)] | None = None
    input_ids: Tokens | None = None
    sampling_params: SamplingParams | None = None
    stream: Flag | None = None
    rid: Text | None = None


class TokenizeRequest(Model):
    """POST /tokenize"""

    model_config = _documented(
        {"prompt": "Mia has 12 apples."}, one_of={"prompt": "string", "messages": "array"}
    )
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag | None = None


class DetokenizeRequest(Model):
    """POST /detokenize"""

    model_config = _documented({"tokens": [16, 320]})
    tokens: list[Token]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refusal and failure looks like."""

    error: ErrorDetail


# answers that come whole, or streamed where the request says so
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
