"""What parsing text in pieces stands on: its events, its source, and JSON checked as it comes."""

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
# a reader that yields wherever it needs more text, and returns what it read
Wait = Generator[None, None, T]
SPACES = " \t\r\n"


@dataclass(frozen=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what precedes the answer."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A tool call, the index-th of its message; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a tool call's arguments: joined, they are JSON."""

    index: int
    text: str


Event = Content | Reasoning | CallBegun | Arguments


class Source:
    """Text that comes in pieces; readers take it from the front and wait where it is short."""

    def __init__(self) -> None:
        self.rest, self.ended = "", False
        self._taken: list[str] | None = None

    def take(self, count: int) -> str:
        """The next characters, which are there."""
        piece, self.rest = self.rest[:count], self.rest[count:]
        if self._taken is not None:
            self._taken.append(piece)
        return piece

    def remember(self) -> None:
        """From here on, text may be given back."""
        self._taken = []

    def forget(self) -> None:
        """What was taken stays so."""
        self._taken = None

    def give_back(self) -> None:
        """Undo what was taken since `remember`."""
        self.rest = "".join([*(self._taken or []), self.rest])
        self._taken = None

    def more(self) -> Wait[bool]:
        """Wait for another piece; False where none will come."""
        if not self.ended:
            yield
        return not self.ended

    def peek(self) -> Wait[str]:
        """The next character, "" at the end."""
        while not self.rest and (yield from self.more()):
            pass
        return self.rest[:1]

    def skip(self, characters: str) -> Wait[None]:
        """Take all of these characters that come next."""
        while (character := (yield from self.peek())) and character in characters:
            self.take(len(self.rest) - len(self.rest.lstrip(characters)))

    def comes(self, word: str) -> Wait[bool]:
        """Whether a word comes next, whatever the whitespace before; nothing is taken."""
        while True:
            seen = self.rest.lstrip(SPACES)
            if len(seen) >= len(word) or not word.startswith(seen):
                return seen.startswith(word)
            if not (yield from self.more()):
                return False

    def try_take(self, word: str) -> Wait[bool]:
        """Take a word and the whitespace before it if it comes next, else nothing."""
        if not (yield from self.comes(word)):
            return False
        self.take(self.rest.index(word) + len(word))
        return True

    def flow(self, tag: str, trim: str, emit: Callable[[str], None]) -> Wait[str | None]:
        """Pass text on up to a tag, which stays, and characters of `trim` before it, returned.

        Holds back what may become either. None where the text ends without the tag: then all of
        it was passed on.
        """
        while (at := self.rest.find(tag)) < 0:
            certain = self.rest[: len(self.rest) - _overlap(self.rest, tag)].rstrip(trim)
            emit(self.take(len(certain)))
            if not (yield from self.more()):
                emit(self.take(len(self.rest)))
                return None
        certain = self.rest[:at].rstrip(trim)
        emit(self.take(len(certain)))
        return self.take(at - len(certain))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


# a number's states; every digit but 0 is written 1, E and - are written e and +
_NUMBER: dict[str, dict[str, str]] = {
    "sign": {"0": "zero", "1": "whole"},
    "zero": {".": "point", "e": "e"},
    "whole": {"0": "whole", "1": "whole", ".": "point", "e": "e"},
    "point": {"0": "part", "1": "part"},
    "part": {"0": "part", "1": "part", "e": "e"},
    "e": {"+": "signed", "0": "power", "1": "power"},
    "signed": {"0": "power", "1": "power"},
    "power": {"0": "power", "1": "power"},
}
_NUMBER_ENDS = {"zero", "whole", "part", "power"}
_CLASSES = str.maketrans("23456789E-", "11111111e+")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = frozenset("0123456789abcdefABCDEF")


class Json:
    """One JSON value as RFC 8259 has it, checked as it comes: whatever was fed begins a value.

    `done` once it is complete, `failed` where a character cannot follow. Needs no recursion, so
    nothing that a model writes is too deep.
    """

    def __init__(self) -> None:
        self.done = self.failed = False
        self._within: list[str] = []
        self._state: Callable[[str, int], int] = self._value
        self._is_key = False
        self._left = ""  # of a literal
        self._hex = 0  # digits of an escape still to come
        self._number = ""

    def feed(self, text: str) -> int:
        """Take more of the value; how many characters belong to it."""
        at = 0
        while at < len(text) and not (self.done or self.failed):
            at = self._state(text, at)
        return at

    def _fail(self, at: int) -> int:
        self.failed = True
        return at

    def _value(self, text: str, at: int) -> int:
        character = text[at]
        if character in SPACES:
            return at + 1
        if character == '"':
            self._is_key, self._state = False, self._string
        elif character == "{":
            self._within.append("}")
            self._state = self._first_key
        elif character == "[":
            self._within.append("]")
            self._state = self._first_item
        elif character in _LITERALS:
            self._left, self._state = _LITERALS[character], self._literal
        elif character == "-":
            self._number, self._state = "sign", self._digits
        elif character in "0123456789":
            self._number, self._state = "zero" if character == "0" else "whole", self._digits
        else:
            return self._fail(at)
        return at + 1

    def _ended(self) -> None:
        self.done = not self._within
        self._state = self._after

    def _first_item(self, text: str, at: int) -> int:
        return self._after(text, at) if text[at] == "]" else self._value(text, at)

    def _first_key(self, text: str, at: int) -> int:
        return self._after(text, at) if text[at] == "}" else self._key(text, at)

    def _key(self, text: str, at: int) -> int:
        if text[at] == '"':
            self._is_key, self._state = True, self._string
        elif text[at] not in SPACES:
            return self._fail(at)
        return at + 1

    def _colon(self, text: str, at: int) -> int:
        if text[at] == ":":
            self._state = self._value
        elif text[at] not in SPACES:
            return self._fail(at)
        return at + 1

    def _after(self, text: str, at: int) -> int:
        """What may follow a value in an object or array."""
        character = text[at]
        if character == self._within[-1]:
            self._within.pop()
            self._ended()
        elif character == ",":
            self._state = self._key if self._within[-1] == "}" else self._value
        elif character not in SPACES:
            return self._fail(at)
        return at + 1

    def _string(self, text: str, at: int) -> int:
        plain = _PLAIN.match(text, at)
        at = plain.end() if plain else at
        if at == len(text):
            return at
        if text[at] == "\\":
            self._state = self._escape
        elif text[at] != '"':  # a control character
            return self._fail(at)
        elif self._is_key:
            self._state = self._colon
        else:
            self._ended()
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        character = text[at]
        if self._hex:
            if character not in _HEX:
                return self._fail(at)
            self._hex -= 1
        elif character == "u":
            self._hex = 4
        elif character not in '"\\/bfnrt':
            return self._fail(at)
        if not self._hex:
            self._state = self._string
        return at + 1

    def _literal(self, text: str, at: int) -> int:
        if text[at] != self._left[0]:
            return self._fail(at)
        self._left = self._left[1:]
        if not self._left:
            self._ended()
        return at + 1

    def _digits(self, text: str, at: int) -> int:
        follow = _NUMBER[self._number].get(text[at].translate(_CLASSES))
        if follow:
            self._number = follow
            return at + 1
        if self._number not in _NUMBER_ENDS:
            return self._fail(at)
        self._ended()  # only the character after a number tells that it is over
        return at


def is_json(text: str) -> bool:
    """Whether a text is one JSON value, whitespace around it aside."""
    value = Json()
    padded = text.strip(SPACES) + " "  # the space ends a number
    return value.feed(padded) == len(padded) - 1 and value.done
