"""Token ids from text and text from token ids, by the `tokenizers` library."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers.decoders import ByteLevel

from qnext.text.template import ChatTemplate, find_template, read_json
from qnext.text.template import TokenizerError as TokenizerError

# What a byte-level decoder writes in place of bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# An unfinished character has at most 3 bytes, and a token that has text has at least one.
_MOST_PENDING = 3

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """The tokenizer of one checkpoint; build it with `from_directory`.

    backend: the byte-level tokenizer that does the work.
    template: the checkpoint's chat template, or None where it has none.
    eos_ids: the ids that end a generation, without repeats; empty where no file names one.
    special_tokens: texts such as "eos_token", which templates may use by these names.
    """

    backend: tokenizers.Tokenizer
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    # what `text_of` has told: a server asks for every token it draws, of which few are new
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Reads a checkpoint's directory; only `tokenizer.json` must be there.

        The eos ids are "eos_token_id" (an int or a list) of `generation_config.json`, or of
        `config.json` where the former states none; the id of "eos_token" in
        `tokenizer_config.json` follows if it is not among them.
        Raises TokenizerError for a missing or broken file, a decoder that is not byte-level, or
        an eos that is not in the vocabulary.
        """
        directory = Path(path)
        backend = _read_backend(directory / "tokenizer.json")
        config = read_json(directory / "tokenizer_config.json") or {}
        special_tokens = _special_tokens(config, directory / "tokenizer_config.json")
        return cls(
            backend=backend,
            template=find_template(directory, config),
            eos_ids=_eos_ids(directory, backend, special_tokens.get("eos_token")),
            special_tokens=special_tokens,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token as it is written in the vocabulary, or None."""
        return self.backend.token_to_id(token)

    def knows(self, token: int) -> bool:
        """Whether the vocabulary has this id; a model may draw ids beyond it."""
        return (token, True) in self._texts or _is_known(self.backend, token)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text.

        The text of a special token inside `text` becomes that token.
        add_special_tokens: also add what the tokenizer's post-processor puts around a text.
        Raises TokenizerError for text that UTF-8 cannot express.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library raises for a lone surrogate, too
            raise TokenizerError(
                f"text: must be a str without lone surrogates, not {ascii(text)[:80]}"
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of the ids, with U+FFFD for bytes that are no character.

        Raises TokenizerError for an id that is not in the vocabulary.
        """
        ids = list(ids)
        for token in ids:
            self._check(token)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def text_of(self, token: int, skip_special_tokens: bool = True) -> str:
        """`decode` of one token, which is looked up once. Raises TokenizerError."""
        text = self._texts.get((token, skip_special_tokens))
        if text is None:
            text = self.decode([token], skip_special_tokens=skip_special_tokens)
            self._texts[token, skip_special_tokens] = text
        return text

    def stream(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> "DecodeStream":
        """Returns a stream that decodes ids one by one, as if `prompt_ids` had been pushed.

        So a character begun at the end of the prompt is completed by the ids that follow.
        """
        return DecodeStream(self, prompt_ids, skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """Returns the text of a conversation as the checkpoint's chat template writes it.

        messages: mappings with "role" (system, user, assistant or tool), "content", and what
            else the template reads, such as "tool_calls" or "reasoning_content".
        tools: JSON schemas of the functions that the model may call.
        add_generation_prompt: end with the opening of the assistant's next message.
        variables: passed to the template, such as `enable_thinking=False`.
        Raises TokenizerError without a template, for an unknown role, or where the template
        stops.
        """
        if self.template is None:
            raise TokenizerError(
                "chat template: this checkpoint has none; add chat_template.jinja to its "
                "directory, or encode a text that is laid out already"
            )
        return self.template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens, **variables},
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> list[int]:
        """Returns the ids of `render_chat`; the template itself writes every special token."""
        return self.encode(
            self.render_chat(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        )

    def _check(self, token: int) -> None:
        # The library's decode drops an unknown id without a word.
        if not self.knows(token):
            raise TokenizerError(
                f"id {token}: is not in this vocabulary of {self.vocab_size} tokens; pass ids "
                "that it has, without padding such as -1"
            )


class DecodeStream:
    """Text of ids that arrive one by one; the pieces joined are exactly what `decode` gives.

    It keeps at most three ids, so a push costs the same however long the text is.
    """

    # The library's own DecodeStream has no way to hand out what it still holds, and over bytes
    # that never form a character its buffer grows without bound.

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # the last ids, as long as they end in U+FFFD
        self._sent = 0  # how many characters of the window's text have been returned
        # One id more than can be pending: with its lead byte a whole last character shows as such.
        tail: list[int] = []
        for token in reversed(prompt_ids):
            if self._text_of(token):
                tail.append(token)
            if len(tail) > _MOST_PENDING:
                break
        for token in reversed(tail):
            self.push(token)

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that no later id can change, maybe "".

        Raises TokenizerError for an id that is not in the vocabulary; the stream is unchanged.
        """
        text = self._text_of(token)
        if not text:
            return ""  # a skipped special token has no bytes, so it may stand inside a character
        if not self._window and not text.endswith(_REPLACEMENT):
            return text  # as nearly always: whole characters, and nothing before them
        window = [*self._window, token]
        if self._window:
            text = self._decode(window)
        # Decoding goes left to right, and bytes that may still become a character show as one
        # U+FFFD at the very end: all before it is certain.
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._sent : certain]
        if certain == len(text):
            self._window, self._sent = [], 0
        else:
            # A lead byte always starts a new character, so however the window is cut, ids that
            # hold the last three bytes leave the same bytes pending.
            self._window = window[-_MOST_PENDING:]
            self._sent = len(self._decode(self._window)) - 1
        return piece

    def finish(self) -> str:
        """Returns what was held back, as `decode` gives it; the stream is then as new."""
        piece = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return piece

    def _text_of(self, token: int) -> str:
        return self._tokenizer.text_of(token, self._skip_special_tokens)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(
            f"{path}: is missing; a checkpoint's directory must hold the tokenizer.json "
            "that the tokenizers library reads"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise TokenizerError(
            f"{path}: is not a tokenizer that the tokenizers library reads: {error}"
        ) from error
    if not isinstance(backend.decoder, ByteLevel):
        raise TokenizerError(
            f"{path}: the decoder must be ByteLevel, whose text is its tokens' bytes in a row, "
            f"not {type(backend.decoder).__name__}"
        )
    # Lengths are the caller's business: a limit stored in the file would cut texts unseen.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _is_known(backend: tokenizers.Tokenizer, token: int) -> bool:
    # The library's ids are unsigned, of 32 bits.
    return 0 <= token < 2**32 and backend.id_to_token(token) is not None


def _special_tokens(config: Mapping[str, object], path: Path) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
        elif config.get(name) is not None:
            raise TokenizerError(
                f'{path}: "{name}" must be a string or {{"content": string}}, not {config[name]!r}'
            )
    return tokens


def _eos_ids(
    directory: Path, backend: tokenizers.Tokenizer, eos_token: str | None
) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        stated = (read_json(path) or {}).get("eos_token_id")
        if stated is None:
            continue
        for token in stated if isinstance(stated, list) else [stated]:
            if type(token) is not int:
                raise TokenizerError(
                    f'{path}: "eos_token_id" must be an int or a list of ints, not {stated!r}'
                )
            ids.append(token)
            if not _is_known(backend, token):
                raise TokenizerError(
                    f'{path}: "eos_token_id" {token} is not in the vocabulary of tokenizer.json'
                )
        break
    if eos_token is not None:
        named = backend.token_to_id(eos_token)
        if named is None:
            raise TokenizerError(
                f'{directory / "tokenizer_config.json"}: "eos_token" {eos_token!r} '
                "is not in the vocabulary of tokenizer.json"
            )
        ids = [*ids, named]
    return tuple(dict.fromkeys(ids))
