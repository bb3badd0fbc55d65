"""Tokens of one continuation as text: decoded as they come, watched for what ends it."""

from collections.abc import Sequence

from qnext.text.tokenizer import Tokenizer

EOS, STOP = "eos", "stop"


class Continuation:
    """The text after a prompt; holds back what may become a stop string.

    Ends with a token of `ends` (default: the tokenizer's eos ids), or before the string of `stops`
    that is complete first, both only after `least` tokens; `finish` then says why. With
    `keep_stop` the stop string that ended it is part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        ends: Sequence[int] | None = None,
        least: int = 0,
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ) -> None:
        self.tokenizer, self.stops, self.least = tokenizer, stops, least
        self.ends = tokenizer.eos_ids if ends is None else ends
        self.keep_stop = keep_stop
        self.decoder = tokenizer.stream(prompt, skip_special_tokens)
        self.held, self.ready, self.tokens = "", "", 0
        self.finish: str | None = None
        self.stopped_by: str | int | None = None

    def push(self, token: int) -> None:
        """Take the next token."""
        self.tokens += 1
        if token in self.ends and self.tokens > self.least:
            self.end(EOS)
            self.stopped_by = token if self.finish == EOS else self.stopped_by
        elif self.tokenizer.knows(token):  # models' vocabularies are padded: the rest has no text
            self._take(self.decoder.push(token))

    def end(self, reason: str) -> None:
        """Release what is held; a stop string may still hide in the last characters."""
        if self.finish is not None:
            return
        self._take(self.decoder.finish())
        if self.finish is None:
            self.ready, self.held, self.finish = self.ready + self.held, "", reason

    def release(self) -> str:
        """The text that became certain since the last call."""
        text, self.ready = self.ready, ""
        return text

    def _take(self, text: str) -> None:
        if not self.stops:
            self.ready += text
            return
        known = len(self.held)  # what was complete in there did not end it
        self.held += text
        found = [
            (at, stop)
            for stop in self.stops
            if (at := self.held.find(stop, max(known - len(stop) + 1, 0))) >= 0
        ]
        if found and self.tokens >= self.least:  # before, stop strings are text like any other
            # the one that a character at a time would show first, however tokens split the text
            at, stop = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            self.ready += self.held[: at + len(stop) if self.keep_stop else at]
            self.held, self.finish, self.stopped_by = "", STOP, stop
            return
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        self.ready, self.held = self.ready + self.held[:cut], self.held[cut:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
