"""Tool calls in a model's text: Qwen3's form, and Qwen3-Coder's."""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from qnext.errors import InputError
from qnext.server.parse_text import SPACES, Arguments, CallBegun, Event, Json, Source, Wait, is_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
# how Qwen3-Coder's template writes these of earlier calls, so how the model does
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_LABEL_END = re.compile(r"[<>\n]")


def functions(tools: Sequence[Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    """Parameters, a JSON schema, of each function by its name; a tool is as in OpenAI's requests.

    Raises InputError for a tool without a name, a name given twice, parameters of another type.
    """
    found: dict[str, Mapping[str, object]] = {}
    for at, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InputError(f"tools[{at}].function.name: must be a string that is not empty")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InputError(
                f"tools[{at}].function.parameters: must be a JSON schema, an object, "
                f"not {type(parameters).__name__}"
            )
        if name in found:
            raise InputError(f"tools[{at}].function.name: {name!r} was given before")
        found[name] = parameters or {}
    return found


class CallReader:
    """Reads one tool call after another from a source, and tells of them by `emit`.

    tools: parameters by function, as `functions` gives them. make_id: a new call's id.
    """

    def __init__(
        self,
        source: Source,
        tools: Mapping[str, Mapping[str, object]],
        emit: Callable[[Event], None],
        make_id: Callable[[], str],
    ) -> None:
        self.source, self.tools, self.emit, self.make_id = source, tools, emit, make_id
        self.count = 0
        self._begun = False
        self._before: Callable[[], None] = lambda: None

    def read(self, before: Callable[[], None]) -> Wait[bool]:
        """Read what follows the opening tag; whether it is a call, which `before` then precedes.

        If it is none, the source is as it was. A call that breaks off once it was told of
        stands as it is, and the source goes on where it broke.
        """
        self._begun, self._before = False, before
        self.source.remember()
        if (yield from self.source.comes("{")):
            yield from self._hermes()
        elif (yield from self.source.try_take(FUNCTION)):
            yield from self._coder()
        if self._begun:
            self.count += 1
        else:
            self.source.give_back()
        return self._begun

    def _begin(self, name: str) -> None:
        self.source.forget()
        self._begun = True
        self._before()
        self.emit(CallBegun(self.count, self.make_id(), name))

    def _argue(self, text: str) -> None:
        if text:
            self.emit(Arguments(self.count, text))

    def _close(self) -> Wait[None]:
        """The closing tag, which may be missing, or cut short where the text ends."""
        closed = yield from self.source.try_take(CLOSE)
        if not closed and self.source.ended and CLOSE.startswith(self.source.rest.strip(SPACES)):
            self.source.take(len(self.source.rest))

    # ---- {"name": "f", "arguments": {...}}

    def _hermes(self) -> Wait[None]:
        name, arguments = None, None
        more = yield from self.source.try_take("{")
        while more:
            key = yield from self._string()
            if key is None or not (yield from self.source.try_take(":")):
                return
            if key == "name" and name is None:
                name = yield from self._string()
                if name not in self.tools:
                    return
            elif key == "arguments" and arguments is None:
                if not (yield from self.source.comes("{")):
                    return
                yield from self.source.skip(SPACES)
                if name is not None:
                    self._begin(name)
                arguments = yield from self._value(self._argue if self._begun else None)
                if arguments is None:
                    return
            elif (yield from self._value()) is None:
                return
            more = yield from self.source.try_take(",")
        # an outermost brace that was forgotten does no harm to a call that has its arguments
        whole = yield from self.source.try_take("}")
        if name is not None and whole and not self._begun:
            self._begin(name)
            self._argue(arguments or "{}")
        if self._begun:
            yield from self._close()

    def _string(self) -> Wait[str | None]:
        if not (yield from self.source.comes('"')):
            return None
        text = yield from self._value()
        return None if text is None else str(json.loads(text))

    def _value(self, emit: Callable[[str], None] | None = None) -> Wait[str | None]:
        """A JSON value, passed on as it comes; None where it is none or breaks off."""
        value, pieces = Json(), []
        while True:
            piece = self.source.take(value.feed(self.source.rest))
            pieces.append(piece)
            if emit:
                emit(piece)
            if value.failed:
                return None
            if value.done:
                return "".join(pieces)
            if not (yield from self.source.more()):
                return None

    # ---- <function=f><parameter=key>value</parameter></function>

    def _coder(self) -> Wait[None]:
        name = yield from self._label()
        if name is None or name not in self.tools:
            return
        before = "{"
        while (yield from self.source.try_take(PARAMETER)):
            key = yield from self._label()
            if key is None:
                return
            if not self._begun:
                self._begin(name)
            self._argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._parameter(parameter_types(self.tools[name], key))):
                return
        if not (yield from self.source.try_take(FUNCTION_END)):
            return
        if not self._begun:
            self._begin(name)
            self._argue("{")
        self._argue("}")
        yield from self._close()

    def _label(self) -> Wait[str | None]:
        """The rest of an opening tag, which stays on its line; None where it is none."""
        while not (end := _LABEL_END.search(self.source.rest)):
            if not (yield from self.source.more()):
                return None
        return self.source.take(end.end())[:-1] if end.group() == ">" else None

    def _parameter(self, types: frozenset[str]) -> Wait[bool]:
        """Pass a value on as JSON, strings as they come; whether it was closed."""
        if (yield from self.source.peek()) == "\n":
            self.source.take(1)
        if types == {"string"}:
            self._argue('"')
            gap = yield from self.source.flow(PARAMETER_END, "\n", self._argue_escaped)
            if gap is None:
                return False
            self._argue_escaped(gap[:-1])
            self._argue('"')
        else:
            while (at := self.source.rest.find(PARAMETER_END)) < 0:
                if not (yield from self.source.more()):
                    return False
            self._argue(as_json(self.source.take(at).removesuffix("\n"), types))
        self.source.take(len(PARAMETER_END))
        return True

    def _argue_escaped(self, text: str) -> None:
        self._argue(json.dumps(text, ensure_ascii=False)[1:-1])


def as_json(text: str, types: frozenset[str]) -> str:
    """A parameter's value as JSON: what is no value of its types, or unclear, is a string."""
    plain = text.strip(SPACES)
    value = _PYTHON.get(plain, plain) if types else plain
    meant = value == "null" and "null" in types if "string" in types else is_json(value)
    return value if meant else json.dumps(text, ensure_ascii=False)


def parameter_types(parameters: Mapping[str, object], key: str) -> frozenset[str]:
    """JSON types that a function's parameter may have; none where its schema tells none."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(schema, parameters, 8))


def _types(schema: object, root: Mapping[str, object], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or not depth:  # references may go in circles
        return set()
    stated = schema.get("type")
    if stated is not None:
        return {str(t) for t in (stated if isinstance(stated, list) else [stated])}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if isinstance(values, list) and values:
        return {"string" if isinstance(value, str) else "other" for value in values}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: object = root
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return _types(found, root, depth - 1)
    parts = [p for name in ("anyOf", "oneOf", "allOf") for p in _listed(schema.get(name))]
    return {t for part in parts for t in _types(part, root, depth - 1)}


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []
