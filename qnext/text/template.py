"""Chat templates: Jinja text that a checkpoint brings, run in a sandbox.

A template is foreign code, so it sees only the values passed to it, cannot change them, and any
error it raises comes out as a TokenizerError that tells the line.
"""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from qnext.errors import QnextError

ROLES = ("system", "user", "assistant", "tool")


class TokenizerError(QnextError):
    """A tokenizer file, id, text or conversation breaks a rule; the message says which one."""


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """The compiled templates of one checkpoint.

    origin: the file they come from, named in errors.
    default: used for every conversation, unless tools are given and `tool_use` is there.
    source: its text.
    """

    origin: Path
    default: Template
    tool_use: Template | None = None
    source: str = ""

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Returns the text of a conversation.

        messages: at least one, each with a "role" of ROLES. A key whose value is None counts as
            absent, as templates would write the word None.
        tools: JSON schemas; the template's own rules decide how they are shown.
        variables: more names for the template. `strftime_now` here replaces the system's clock.
        Raises TokenizerError for a broken message or tool and for every error in the template.
        """
        template = self.default if tools is None or self.tool_use is None else self.tool_use
        names = {
            "documents": None,
            **(variables or {}),
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(names)
        except Exception as error:  # a template can raise anything
            raise TokenizerError(
                # the name alone: clients of a server read it, too
                f"{self.origin.name}, line {_template_line(error)}: {_what_happened(error)}"
            ) from error


def find_template(directory: Path, tokenizer_config: Mapping[str, object]) -> ChatTemplate | None:
    """Returns the chat template of a checkpoint, or None where it has none.

    The first of these that exists counts: `chat_template.jinja`, then "chat_template" in
    `chat_template.json`, then "chat_template" in `tokenizer_config`. In the last two it is one
    text or a list of {"name", "template"}, of which "default" and "tool_use" are read.
    Raises TokenizerError for a source that is neither, or whose Jinja cannot be parsed.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        return _compiled(_read_text(path), path)
    path = directory / "chat_template.json"
    content = read_json(path)
    if content is not None:
        if content.get("chat_template") is None:
            raise TokenizerError(
                f'{path}: has no "chat_template"; give it there, or remove the file'
            )
        return _compiled(content["chat_template"], path)
    if tokenizer_config.get("chat_template") is None:
        return None
    return _compiled(tokenizer_config["chat_template"], directory / "tokenizer_config.json")


def read_json(path: Path) -> dict[str, object] | None:
    """Returns the JSON object in a file, or None where there is no such file.

    Raises TokenizerError for anything but one JSON object in UTF-8.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(
            f"{path}: must hold a JSON object {{...}}, but holds a {type(content).__name__}"
        )
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: must be a readable file in UTF-8: {error}") from error


def _compiled(source: object, origin: Path) -> ChatTemplate:
    sources = {"default": source} if isinstance(source, str) else _named_sources(source, origin)
    if "default" not in sources:
        raise TokenizerError(
            f'{origin}: the chat templates are named {sorted(sources)}; one must be "default"'
        )
    environment = _environment()
    compiled = {}
    for name in ("default", "tool_use"):
        if name not in sources:
            continue
        try:
            compiled[name] = environment.from_string(sources[name])
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"{origin}, line {error.lineno}: the chat template {name!r} "
                f"is not valid Jinja: {error.message}"
            ) from error
    return ChatTemplate(origin, **compiled, source=sources["default"])


def _named_sources(source: object, origin: Path) -> dict[str, str]:
    sources = {}
    for entry in source if isinstance(source, list) else [source]:
        match entry:
            case {"name": str(name), "template": str(text)} if isinstance(source, list):
                sources[name] = text
            case _:
                raise TokenizerError(
                    f'{origin}: "chat_template" must be a string or a list of '
                    f'{{"name": string, "template": string}}, not {str(source)[:80]!r}'
                )
    return sources


def _environment() -> ImmutableSandboxedEnvironment:
    # The settings of transformers, which templates are written against.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < > & ' for HTML, which a model was never trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _template_line(error: BaseException) -> int | str:
    # Jinja rewrites tracebacks so that frames of a template carry its own line numbers.
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == "<template>"
    ]
    return lines[-1] if lines else "unknown"


def _what_happened(error: Exception) -> str:
    if isinstance(error, SecurityError):
        return f"the chat template does what the sandbox forbids: {error}; mend the template"
    if type(error) is TemplateError:
        return f"the chat template refuses this conversation: {error}"
    return (
        f"the chat template failed with {type(error).__name__}: {error}; "
        "messages, tools and variables must have what it reads"
    )


def _checked_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    if not messages:
        raise TokenizerError("messages: is empty; a conversation has at least one message")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(
                f"messages[{position}]: must be a mapping with a role, "
                f"not a {type(message).__name__}"
            )
        if message.get("role") not in ROLES:
            raise TokenizerError(
                f"messages[{position}]: role {message.get('role')!r} is unknown; "
                f"use one of {', '.join(ROLES)}"
            )
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _checked_tools(tools: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    for position, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TokenizerError(
                f"tools[{position}]: must be a JSON schema as a mapping, "
                f"not a {type(tool).__name__}"
            )
    return list(tools)
