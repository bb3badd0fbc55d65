"""From what a client sent to what the engine is asked."""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qnext.errors import InputError
from qnext.functional.sampling import Sampling
from qnext.runtime.request import ContextError, Guide, Request
from qnext.server.errors import bad
from qnext.server.guide import Grammars
from qnext.server.parse import opens_reasoning
from qnext.server.parse_tools import functions
from qnext.server.schema import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Message,
    NamedTool,
    Sampled,
    SamplingParams,
    Tool,
)
from qnext.text import Tokenizer, TokenizerError

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
LEAST_TOP_P = 1e-9  # OpenAI's clients may send 0, which leaves the likeliest token


@dataclass(frozen=True)
class Reader:
    """Reads requests for one model, in any thread: long prompts and grammars take seconds.

    `seconds` is how long a request may take, None for ever.
    """

    tokenizer: Tokenizer
    grammars: Grammars
    capacity: int
    vocab: int
    seconds: float | None = None

    # ---- /v1/completions

    def completion(self, asked: CompletionRequest) -> list[list[Request]]:
        """For each prompt, a request for each choice."""
        if asked.best_of is not None and asked.best_of != (asked.n or 1):
            raise bad("best_of must be left out or equal to n: choices are not ranked", "best_of")
        echo = bool(asked.echo)
        room = 16 if asked.max_tokens is None else asked.max_tokens
        if not room and not echo:
            raise bad("max_tokens must be at least 1, unless echo is true", "max_tokens")
        each = []
        for tokens in self._prompts(asked):
            base = self._sampled(asked, tokens, room, "prompt")
            base = replace(
                base,
                logprobs=asked.logprobs,
                prompt_logprobs=(asked.logprobs or 0) if echo and _scores(asked, room) else None,
            )
            each.append(self._choices(base, asked, lambda: self._guide(asked)))
        return each

    def _prompts(self, asked: CompletionRequest) -> list[list[int]]:
        prompt: Any = asked.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        special = bool(asked.add_special_tokens)
        return [
            self._encoded(p, "prompt", special) if isinstance(p, str) else list(p) for p in prompt
        ]

    def _encoded(self, text: str, field: str, special: bool = False) -> list[int]:
        with blaming(field):
            tokens = self.tokenizer.encode(text, add_special_tokens=special)
        if not tokens:
            raise bad(f"{field}: is empty; give at least one character", field)
        return tokens

    # ---- /v1/chat/completions

    def chat(self, asked: ChatRequest) -> tuple[str, list[Request]]:
        """The rendered prompt, and a request for each choice."""
        text, tokens = self.rendered(asked)
        room = asked.max_completion_tokens or asked.max_tokens
        if room is None:
            room = max(self.capacity - len(tokens), 1)
        base = self._sampled(asked, tokens, room, "messages")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        if asked.logprobs:
            base = replace(base, logprobs=asked.top_logprobs or 0)
        return text, self._choices(
            base, asked, lambda: self._tool_guide(asked, text) or self._guide(asked, text)
        )

    def rendered(self, asked: ChatRequest, begun: bool = True) -> tuple[str, list[int]]:
        """A conversation as the model's template writes it, and its tokens.

        begun: with the opening of the assistant's next message.
        """
        tools = shown_tools(asked)
        with blaming("tools"):
            functions(tools or ())
        variables = dict(asked.chat_template_kwargs or {})
        for name in ("messages", "tools", "add_generation_prompt", "self"):
            if name in variables:
                raise bad(
                    f"chat_template_kwargs: {name} is not the client's to set here",
                    "chat_template_kwargs",
                )
        with blaming("messages"):
            text = self.tokenizer.render_chat(
                [plain_message(message) for message in asked.messages],
                tools=tools,
                add_generation_prompt=begun,
                **variables,
            )
        return text, self._encoded(text, "messages")

    def _tool_guide(self, asked: ChatRequest, prompt: str) -> Guide | None:
        """What forces a call of a tool, where the request does."""
        choice = asked.tool_choice
        if choice in (None, "none", "auto"):
            return None
        if not asked.tools:
            raise bad("tool_choice needs tools", "tool_choice")
        # a response_format is that of content, of which there is none
        for name in GUIDED:
            if getattr(asked, name) is not None:
                raise bad(f"{name} and tool_choice prescribe the answer's form: give one", name)
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
        named = choice.function.name if isinstance(choice, NamedTool) else None
        if named is not None and named not in [tool.function.name for tool in asked.tools]:
            raise bad(f"tool_choice: tools has no function {named!r}", "tool_choice")
        parallel = asked.parallel_tool_calls is not False
        after = "</think>" if opens_reasoning(prompt) else None
        with blaming("tools"):
            return self.grammars.tool_calls(tools, named=named, parallel=parallel, after=after)

    # ---- /generate

    def native(self, asked: GenerateRequest) -> Request:
        if (asked.text is None) == (asked.input_ids is None):
            raise bad("give text or input_ids, one of them", "text")
        field = "text" if asked.input_ids is None else "input_ids"
        tokens = list(asked.input_ids or ()) or self._encoded(asked.text or "", field)
        params = asked.sampling_params or SamplingParams()
        given = params.model_dump(exclude_none=True, include=set(SamplingParams.model_fields))
        names = {"min_new_tokens": "min_tokens", "sampling_seed": "seed", "regex": "guided_regex"}
        names["json_schema"] = "guided_json"
        room = given.pop("max_new_tokens", 128)
        sampled = Sampled(**{names.get(name, name): value for name, value in given.items()})
        base = self._sampled(sampled, tokens, room, field)
        return self._choices(base, sampled, lambda: self._guide(sampled))[0]

    # ---- what all have

    def _sampled(self, asked: Sampled, tokens: Sequence[int], room: int, field: str) -> Request:
        """The request for `room` tokens after these, which came in a field of this name."""
        self._check(tokens, field)
        self._check(asked.stop_token_ids or (), "stop_token_ids")
        least = asked.min_tokens or 0
        if least > room:
            raise bad(
                f"min_tokens = {least} must not exceed the {room} tokens asked for", "min_tokens"
            )
        if len(tokens) + room > self.capacity:
            error = ContextError(len(tokens), room, self.capacity)
            raise bad(str(error), field, "context_length_exceeded") from error
        eos = () if asked.ignore_eos else self.tokenizer.eos_ids
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        ends = {*self.tokenizer.eos_ids}
        return Request(
            tokens=tuple(tokens),
            max_new_tokens=room,
            sampling=_sampling(asked),
            eos=(*eos, *(asked.stop_token_ids or ())),
            stops=tuple(stops),
            min_new_tokens=least,
            keep_stop=bool(asked.include_stop_str_in_output),
            skip_special_tokens=asked.skip_special_tokens is not False,
            bias=self._bias(asked.logit_bias or {}),
            marks=tuple(i + 1 for i, token in enumerate(tokens) if token in ends),
            priority=asked.priority or 0,
            deadline=None if self.seconds is None else time.monotonic() + self.seconds,
        )

    def _check(self, tokens: Sequence[int], field: str) -> None:
        for token in tokens:
            if token >= self.vocab:
                raise bad(f"{field}: {token} is no token id within 0..{self.vocab - 1}", field)

    def _bias(self, asked: Mapping[str, float]) -> dict[int, float]:
        bias = {}
        for key, value in asked.items():
            if not re.fullmatch("[0-9]{1,19}", key) or int(key) >= self.vocab:
                raise bad(
                    f"logit_bias: {key!r} is no token id within 0..{self.vocab - 1}", "logit_bias"
                )
            bias[int(key)] = value
        return bias

    def _choices(
        self, base: Request, asked: Sampled, guide: Callable[[], Guide | None]
    ) -> list[Request]:
        """A request for each of n choices, with seeds that follow one another."""
        seed = base.sampling.seed
        return [
            replace(
                base,
                id=f"{base.id}-{i}",
                sampling=replace(base.sampling, seed=_wrapped(seed + i)),
                guide=guide(),
            )
            for i in range(asked.n or 1)
        ]

    def _guide(self, asked: Sampled, prompt: str = "") -> Guide | None:
        """What the answer must look like; at most one of the ways to say so.

        Where the prompt leaves reasoning open, the form is that of what follows it.
        """
        after = "</think>" if opens_reasoning(prompt) else None
        ways: dict[str, Any] = {
            name: value for name in GUIDED if (value := getattr(asked, name)) is not None
        }
        form = asked.response_format
        if form is not None and form.type != "text":
            ways["response_format"] = form
        if len(ways) > 1:
            raise bad(f"{' and '.join(ways)} prescribe the answer's form: give one", list(ways)[1])
        for name, value in ways.items():
            with blaming(name):
                return self._grammar(name, value, after)
        return None

    def _grammar(self, name: str, value: Any, after: str | None) -> Guide:
        grammars = self.grammars
        match name:
            case "guided_regex":
                return grammars.regex(value, after=after, field=name)
            case "guided_choice":
                return grammars.choice(value, after=after, field=name)
            case "guided_grammar":
                return grammars.lark(value, after=after, field=name)
            case "guided_json":
                schema = _json(value, name) if isinstance(value, str) else value
                return grammars.json_schema(schema, after=after, field=name)
        if value.type == "json_object":
            return grammars.json_object(after=after)
        if value.json_schema is None or value.json_schema.schema_ is None:
            raise bad("response_format: json_schema needs {schema: {...}}", "response_format")
        return grammars.json_schema(value.json_schema.schema_, after=after)


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """Tell which field an error comes from."""
    try:
        yield
    except (InputError, TokenizerError) as error:
        raise bad(str(error), field) from error


def _scores(asked: CompletionRequest, room: int) -> bool:
    return asked.logprobs is not None or not room


def _json(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise bad(f"{param}: is no JSON: {error}", param) from error


def _wrapped(seed: int) -> int:
    """A seed as the 64-bit integer that it is, going round at the end."""
    return (seed + 2**63) % 2**64 - 2**63


def _sampling(asked: Sampled) -> Sampling:
    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Sampling(
        temperature=given(asked.temperature, 1.0),
        top_k=max(given(asked.top_k, 0), 0),
        top_p=max(given(asked.top_p, 1.0), LEAST_TOP_P),
        min_p=given(asked.min_p, 0.0),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        repetition_penalty=given(asked.repetition_penalty, 1.0),
        presence_penalty=given(asked.presence_penalty, 0.0),
        frequency_penalty=given(asked.frequency_penalty, 0.0),
    )


def shown_tools(asked: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the template shows, as it reads them; none where none may be called."""
    tools: Sequence[Tool] = asked.tools or ()
    if not tools or asked.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in tools]


def plain_message(message: Message) -> dict[str, Any]:
    """A message as templates read it: parts joined, arguments as objects."""
    given = message.model_dump(exclude_none=True)
    if message.role == "developer":
        given["role"] = "system"
    if isinstance(message.content, list):
        given["content"] = "".join(part.text for part in message.content)
    given.setdefault("content", "")
    for call in given.get("tool_calls", ()):
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            call["function"]["arguments"] = _json(arguments or "{}", "messages")
    return given
