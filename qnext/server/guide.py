"""What restricts a request's tokens: JSON, schemas, regular expressions, grammars, tool calls.

llguidance tells which tokens may follow. Its own shortcut for text that is certain (forcing) is
off: it allows one spelling in tokens alone, and for text like `<think>` one it then refuses.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from qnext.errors import InputError
from qnext.server.parse_tools import CLOSE, OPEN, functions
from qnext.text import Tokenizer

# between tokens of JSON: enough to indent, but a model that is lost in whitespace gets out of it
WHITESPACE = r"[ \n\r\t]{1,40}"
# compiled grammars that wait for the next request that gives the same
KEPT = 64


class GrammarGuide:
    """A `qnext.runtime.request.Guide` that follows one compiled grammar.

    `complete`: nothing may follow but a token that ends texts. `error`: what went wrong, None as
    long as nothing did; a grammar may turn out too complex on the way. The text then ends there,
    as raising would end the requests that share its step.
    """

    def __init__(self, matcher: LLMatcher, ends: Tensor, others: Sequence[int], size: int) -> None:
        """ends [vocab], bool: eos ids. others: what llguidance takes for such. size: its ids."""
        self._matcher, self._ends, self._others, self._size = matcher, ends, list(others), size
        self._eos = set(ends.nonzero().flatten().tolist())
        self._next: Tensor | None = None  # the mask of the present text, if it is known
        self.complete = False
        self.error: str | None = None

    def allowed(self, ahead: Sequence[int]) -> Tensor | None:
        """Which tokens [vocab], bool, may follow the text so far and then `ahead`.

        None where `ahead` does not fit, or ends the text. The state stays as it is.
        """
        if not ahead:
            mask, self._next = self._next, None
            return self._mask() if mask is None else mask
        if self.complete or not all(self._is_text(token) for token in ahead):
            return None
        taken = self._matcher.try_consume_tokens(list(ahead))
        mask = self._mask() if taken == len(ahead) else None
        if taken:
            self._matcher.rollback(taken)
        return mask

    def advance(self, tokens: Sequence[int]) -> bool:
        """Take tokens that were drawn, in order; whether the text is complete with them."""
        self._next = None
        for token in tokens:
            if self.complete:
                break
            self._take(token)
        if not self.complete and self._matcher.is_accepting():
            # whether more may follow shows in the mask, which is needed next in any case
            self._next = self._mask()
            self.complete = not (self._next & ~self._ends).any()
        return self.complete

    def _is_text(self, token: int) -> bool:
        return 0 <= token < self._size and token not in self._eos

    def _take(self, token: int) -> None:
        if token in self._eos:
            self.complete = True
            if not self._matcher.is_accepting():
                self._break(f"the text ended early, with token {token}")
        elif not self._is_text(token) or not self._matcher.consume_token(token):
            self._break(self._matcher.get_error() or f"token {token} does not fit")

    def _break(self, error: str) -> None:
        self.complete, self.error = True, self.error or error

    def _mask(self) -> Tensor:
        if self.complete:
            return self._ends.clone()
        bytes_ = bytearray(self._matcher.compute_logit_bias())  # one a token, 0 or 200
        if self._matcher.is_error():
            self._break(self._matcher.get_error())
            return self._ends.clone()
        mask = torch.frombuffer(bytes_, dtype=torch.uint8)[: len(self._ends)].bool()
        mask[self._others] = False
        return mask


class Grammars:
    """Makes guides for one tokenizer and a model of `vocab` tokens; any thread may ask.

    Ids that the model has and the tokenizer does not are never allowed. Every method raises
    InputError, with the name `field` of what the client gave, for what llguidance refuses.
    `after`: the text that must come first, such as `</think>` where the prompt opened `<think>`;
    anything may stand before it, and the guide begins after it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._ends = torch.zeros(vocab, dtype=torch.bool)
        self._ends[[token for token in tokenizer.eos_ids if token < vocab]] = True

    def json_object(
        self, *, after: str | None = None, field: str = "response_format"
    ) -> GrammarGuide:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, after=after, field=field)

    def json_schema(
        self,
        schema: Mapping[str, object],
        *,
        after: str | None = None,
        field: str = "response_format",
    ) -> GrammarGuide:
        """JSON that fits a schema, properties in its order; what is not supported is refused."""
        return self._guide(field, [_json_body("body", schema, field)], after)

    def regex(
        self, pattern: str, *, after: str | None = None, field: str = "regex"
    ) -> GrammarGuide:
        """Text that a regular expression matches as a whole; without lookaround."""
        lark = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
        return self._guide(field, [{"name": "body", "lark_grammar": lark}], after)

    def choice(
        self, choices: Sequence[str], *, after: str | None = None, field: str = "choice"
    ) -> GrammarGuide:
        """One of some texts."""
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise InputError(f"{field}: must be a list of strings, at least one")
        lark = "start: " + " | ".join(map(json.dumps, choices))
        return self._guide(field, [{"name": "body", "lark_grammar": lark}], after)

    def lark(self, text: str, *, after: str | None = None, field: str = "grammar") -> GrammarGuide:
        """Text of a grammar in llguidance's variant of Lark's syntax; its rule is `start`."""
        return self._guide(field, [{"name": "body", "lark_grammar": text}], after)

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, object]],
        *,
        required: bool = True,
        named: str | None = None,
        parallel: bool = True,
        after: str | None = None,
        field: str = "tools",
    ) -> GrammarGuide:
        """Calls of tools, in Qwen3's form, with arguments that fit.

        tools: as in OpenAI's requests. named: exactly one call, of this one. Else one or more, or
        exactly one without `parallel`; unless `required` text may come first, or alone.
        """
        parameters = functions(tools)
        if not parameters:
            raise InputError(f"{field}: must not be empty where a tool must be called")
        if named is not None and named not in parameters:
            raise InputError(f"tool_choice: {field} has no function {named!r}")
        names = list(parameters) if named is None else [named]
        schemas = [
            _arguments_body(f"arguments{i}", parameters[name], f"{field}: parameters of {name!r}")
            for i, name in enumerate(names)
        ]
        lark = self._calls(names, required or named is not None, parallel and named is None)
        try:
            return self._guide(field, [{"name": "body", "lark_grammar": lark}, *schemas], after)
        except InputError:
            for name, schema in zip(names, schemas, strict=True):  # the one that is to blame
                self._guide(f"{field}: parameters of {name!r}", [{**schema, "name": "body"}], None)
            raise

    # ---- texts of grammars

    def _tag(self, text: str) -> str | None:
        """How a grammar names a text that is one token, which has no other spelling then."""
        token = self.tokenizer.token_id(text)
        is_special = token is not None and self._backend().is_special_token(token)
        return f"<[{token}]>" if is_special else None

    def _until(self, rule: str, text: str) -> str:
        """Rules for anything up to the first occurrence of a text, and that."""
        tag = self._tag(text)
        if tag is None:
            return f"{rule}[suffix={json.dumps(text)}]: /(?s:.*)/"
        return f"{rule}: {rule.upper()} {tag}\n{_without(rule.upper(), text)}"

    def _calls(self, names: Sequence[str], required: bool, parallel: bool) -> str:
        opening = self._tag(OPEN) or json.dumps(OPEN)
        closing = self._tag(CLOSE) or json.dumps(CLOSE)
        more = f'("\\n" {opening} rest)*' if parallel else ""
        rules = [
            f'rest: "\\n" ({" | ".join(f"call{i}" for i in range(len(names)))}) "\\n" {closing}'
        ]
        for i, name in enumerate(names):
            head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
            rules.append(f'call{i}: {json.dumps(head)} @arguments{i} "}}"')
        if required:
            return "\n".join([f"start: {opening} rest {more}", *rules])
        texts = [self._until("lead", OPEN), _without("SAID", OPEN)]
        return "\n".join([f"start: SAID | lead rest {more}", *texts, *rules])

    # ---- compiled grammars

    def _guide(
        self, field: str, grammars: Sequence[Mapping[str, object]], after: str | None
    ) -> GrammarGuide:
        """A guide for the grammar called body."""
        head = '%llguidance {"no_forcing": true}\nstart: @body'
        if after is not None:  # templates put two newlines between reasoning and answer
            head = head.replace("@body", r"before /\n{0,2}/ @body")
            head += f"\n{self._until('before', after)}"
        try:
            text = json.dumps({"grammars": [{"lark_grammar": head}, *grammars]})
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{field}: must be JSON: {error}") from error
        backend, matcher = self._backend(), self._matcher(text, field)
        others = {*backend.eos_tokens} - {*self.tokenizer.eos_ids}
        others = {token for token in others if token < self.vocab}
        return GrammarGuide(matcher, self._ends, sorted(others), backend.vocab_size)

    def _matcher(self, grammar: str, field: str) -> LLMatcher:
        backend = self._backend()
        with self._lock:
            matcher = self._matchers.get(grammar)
        if matcher is None:  # takes up to a second, so others need not wait
            matcher = LLMatcher(backend, grammar, log_level=0)
            if matcher.is_error():
                raise InputError(f"{field}: {matcher.get_error().strip()}")
        with self._lock:
            self._matchers[grammar] = matcher
            self._matchers.move_to_end(grammar)
            if len(self._matchers) > KEPT:
                self._matchers.popitem(last=False)
            return matcher.deep_copy()

    def _backend(self) -> LLTokenizer:
        """llguidance's tokenizer, which takes a second to build, once."""
        with self._lock:
            if self._made is None:
                ids = self.tokenizer.backend.get_vocab(with_added_tokens=True).values()
                self._made = LLTokenizer(
                    self.tokenizer.backend.to_str(),
                    n_vocab=max(self.vocab, *(token + 1 for token in ids)),
                    eos_token=list(self.tokenizer.eos_ids) or None,
                )
            return self._made


def _without(terminal: str, text: str) -> str:
    """A terminal for anything that has no such text in it."""
    return f"{terminal}: /(?s:.*)/ & ~(/(?s:.*)/ {json.dumps(text)} /(?s:.*)/)"


def _json_body(name: str, schema: Mapping[str, object], field: str) -> dict[str, object]:
    if not isinstance(schema, Mapping):
        raise InputError(f"{field}: must be a JSON schema, an object, not {type(schema).__name__}")
    options = {"whitespace_pattern": WHITESPACE}
    return {"name": name, "json_schema": {**schema, "x-guidance": options}}


def _arguments_body(name: str, schema: Mapping[str, object], field: str) -> dict[str, object]:
    if schema.get("type", "object") != "object":
        raise InputError(f'{field}: type must be "object", as arguments have names')
    return _json_body(name, {**schema, "type": "object"}, field)
