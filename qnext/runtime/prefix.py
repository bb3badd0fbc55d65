"""The prefix cache: a map from token prefixes to states.

A hybrid model can go on only from where its recurrent states were kept, so that is what the cache
is made of: snapshots, each at one length of one token sequence. The keys and values before it lie
in pages that running sequences and snapshots share, never copied and never written again.

What a page holds depends on its 128 tokens, on all before, and, for the MTP module that looks a
token ahead, on the one token after. So a page is known by 129 tokens, and a snapshot of `length`
tokens shares the pages that end before its last token and keeps a copy of the page that does not.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qnext.functional.config import PAGE
from qnext.runtime.kept import Kept
from qnext.runtime.pages import Pages

log = logging.getLogger("qnext")
Tokens = tuple[int, ...]


def shared_pages(length: int) -> int:
    """Pages of a sequence of so many tokens that others may read; its last token's is its own."""
    return max(length - 1, 0) // PAGE


@dataclass(eq=False)
class _Node:
    """A full page, known by its tokens, the one after, and those before: its parents'."""

    key: Tokens
    page: int
    parent: "_Node | None"
    children: dict[Tokens, "_Node"] = field(default_factory=dict)
    # by the tokens after this page, and first by how many those are
    snapshots: dict[int, dict[Tokens, "Snapshot"]] = field(default_factory=dict)

    def best(self, tokens: Sequence[int], at: int, most: int) -> "Snapshot | None":
        """The longest snapshot here that goes on as tokens do from `at`, of at most `most`."""
        for count in sorted(self.snapshots, reverse=True):
            if at + count <= most:
                found = self.snapshots[count].get(tuple(tokens[at : at + count]))
                if found is not None:
                    return found
        return None


@dataclass(eq=False)
class Snapshot:
    """What a sequence of `length` tokens needs to go on, beside the shared pages before it."""

    length: int
    kept: Kept  # with one page of keys and values, the last token's
    node: _Node
    tail: Tokens


class Hit(NamedTuple):
    """The longest known prefix of some tokens; `pages` are its shared ones, in order."""

    snapshot: Snapshot
    pages: list[int]

    @property
    def length(self) -> int:
        return self.snapshot.length


Evicted = Callable[[Tokens, list[int], Snapshot], None]


class PrefixCache:
    """Snapshots by token prefix, the least recently used given up beyond `most_bytes`.

    `pages` counts who holds a page; `on_evict(tokens, pages, snapshot)` is told what is given up
    while its pages are still there, say to write it to a file.
    """

    def __init__(self, pages: Pages, most_bytes: int, on_evict: Evicted | None = None) -> None:
        self.pages, self.most_bytes, self.on_evict = pages, most_bytes, on_evict
        self.bytes = 0
        self._root = _Node((), 0, None)
        self._used: OrderedDict[Snapshot, None] = OrderedDict()  # the least recent first
        self._held: set[int] = set()
        self._warned = False

    def __len__(self) -> int:
        return len(self._used)

    @property
    def held(self) -> int:
        """Pages that the cache holds."""
        return len(self._held)

    def holds(self, page: int) -> bool:
        return page in self._held

    @property
    def evictable(self) -> int:
        """Pages that nobody but the cache holds."""
        return sum(self.pages.holders(page) == 1 for page in self._held)

    def find(self, tokens: Sequence[int], most: int) -> Hit | None:
        """The longest snapshot that `tokens` begin with, of at most `most` tokens."""
        best: Snapshot | None = None
        node, best_pages = self._root, 0
        pages: list[int] = []
        while True:
            at = len(pages) * PAGE
            longer = node.best(tokens, at, most)
            if longer is not None:
                best, best_pages = longer, len(pages)
            child = node.children.get(tuple(tokens[at : at + PAGE + 1]))
            if child is None:
                break
            node = child
            pages.append(node.page)
        if best is None:
            return None
        self._used.move_to_end(best)
        return Hit(best, pages[:best_pages])

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether there is a snapshot of exactly these tokens."""
        node: _Node | None = self._root
        for number in range(shared_pages(len(tokens))):
            node = node and node.children.get(_key(tokens, number))
        tail = _tail(tokens)
        return node is not None and tail in node.snapshots.get(len(tail), {})

    def add(self, tokens: Sequence[int], pages: Sequence[int], kept: Kept) -> bool:
        """Keep a snapshot of exactly these tokens, whose sequence holds these pages.

        The shared ones among them are held by the cache as well, unless it has equal ones. False
        where it is known already or larger than all the cache may hold.
        """
        size = kept.nbytes
        if size > self.most_bytes:
            self._warn_of(size, len(tokens))
            return False
        if not tokens or self.knows(tokens):
            return False
        node = self._root
        for number in range(shared_pages(len(tokens))):
            key = _key(tokens, number)
            child = node.children.get(key)
            if child is None:
                self.pages.share([pages[number]])
                child = node.children[key] = _Node(key, pages[number], node)
                self._held.add(pages[number])
            node = child
        tail = _tail(tokens)
        snapshot = Snapshot(len(tokens), kept, node, tail)
        node.snapshots.setdefault(len(tail), {})[tail] = snapshot
        self._used[snapshot] = None
        self.bytes += size
        while self.bytes > self.most_bytes:
            self.evict()
        return True

    def _warn_of(self, size: int, length: int) -> None:
        """Once: a cache that keeps nothing would look like one that is never hit."""
        if not self._warned:
            self._warned = True
            log.warning(
                "the state of %d tokens takes %d bytes and cache_bytes is %d: such prefixes are "
                "not kept; give the cache more, or 0 for none",
                *(length, size, self.most_bytes),
            )

    def evict(self) -> None:
        """Give up the least recently used snapshot, and the pages that led to it alone."""
        snapshot, _ = self._used.popitem(last=False)
        if self.on_evict:
            self.on_evict(*self.path(snapshot), snapshot)
        self.bytes -= snapshot.kept.nbytes
        node, alike = snapshot.node, snapshot.node.snapshots[len(snapshot.tail)]
        del alike[snapshot.tail]
        if not alike:
            del node.snapshots[len(snapshot.tail)]
        while node.parent is not None and not node.children and not node.snapshots:
            del node.parent.children[node.key]
            self.pages.give_back([node.page])
            self._held.remove(node.page)
            node = node.parent

    def make_room(self, count: int) -> bool:
        """Evict until so many pages are free; False, and nothing given up, where that is vain."""
        if self.pages.free < count and self.pages.free + self.evictable < count:
            return False
        while self.pages.free < count:
            self.evict()
        return True

    def clear(self) -> None:
        """Give up everything."""
        while self._used:
            self.evict()

    def snapshots(self) -> Iterator[Snapshot]:
        """All snapshots, the least recently used first."""
        yield from self._used

    def path(self, snapshot: Snapshot) -> tuple[Tokens, list[int]]:
        """All tokens of a snapshot, and its shared pages."""
        tokens: Tokens = snapshot.tail
        pages: list[int] = []
        node = snapshot.node
        while node.parent is not None:
            tokens = node.key[:PAGE] + tokens
            pages.append(node.page)
            node = node.parent
        return tokens, pages[::-1]


def _tail(tokens: Sequence[int]) -> Tokens:
    return tuple(tokens[shared_pages(len(tokens)) * PAGE :])


def _key(tokens: Sequence[int], number: int) -> Tokens:
    return tuple(tokens[number * PAGE : (number + 1) * PAGE + 1])
