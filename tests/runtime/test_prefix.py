"""The prefix cache at every length about two pages: what is found, shared, kept and given up."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qnext.functional.config import PAGE
from qnext.functional.state import KV, pages_of
from qnext.runtime.kept import Kept
from qnext.runtime.pages import Pages
from qnext.runtime.prefix import Hit, PrefixCache, Snapshot, Tokens, shared_pages

MUCH = 1 << 20
NEW = 7  # a token that no base sequence holds at any place that matters


def kept(size: int = 5) -> Kept:
    """A value of so many bytes."""
    parts = torch.zeros(size - 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    return Kept((KV(*parts),), ())


def base(length: int) -> Tokens:
    return tuple(100 + at for at in range(length))


def changed(tokens: Tokens, at: int) -> Tokens:
    """The tokens with another one at a place."""
    return (*tokens[:at], NEW, *tokens[at + 1 :])


def add(cache: PrefixCache, tokens: Tokens, size: int = 5) -> list[int] | None:
    """Keep what a sequence with pages of its own ends with; the pages, or None if it was not."""
    own = cache.pages.take(pages_of(len(tokens)))
    added = cache.add(tokens, own, kept(size))
    cache.pages.give_back(own)
    return own if added else None


def length_of(hit: Hit | None) -> int | None:
    return hit and hit.length


def test_shared_pages_end_before_the_last_token() -> None:
    lengths = (0, 1, 127, 128, 129, 255, 256, 257, 384, 385)
    assert [shared_pages(n) for n in lengths] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_a_snapshot_of_every_length_is_found_by_what_goes_on_from_it() -> None:
    for length in range(1, 2 * PAGE + 3):
        cache = PrefixCache(Pages(4), MUCH)
        tokens = base(length)
        own = add(cache, tokens)
        assert own is not None
        for more in ((), (NEW,), (NEW,) * 3, (NEW,) * PAGE, (NEW,) * (PAGE + 2)):
            hit = cache.find(tokens + more, length + len(more))
            assert hit and hit.length == length
            assert hit.pages == own[: (length - 1) // PAGE], length
        assert cache.held == 4 - cache.pages.free == (length - 1) // PAGE
        assert length_of(cache.find([*tokens, NEW], length)) == length
        assert cache.find((*tokens, NEW), length - 1) is None
        assert cache.find(tokens[:-1], length) is None
        for at in {0, length // 2, max(length - 2, 0), length - 1}:
            assert cache.find((*changed(tokens, at), NEW), length + 1) is None, (length, at)
        assert cache.knows(tokens) and not cache.knows(tokens[:-1])
        assert not cache.knows((*tokens, NEW)) and not cache.knows(changed(tokens, length - 1))


def test_the_longest_of_many_is_found_whatever_the_prompt_and_the_bound() -> None:
    """Snapshots of one long sequence, prompts that leave it at any token."""
    whole, lengths = base(3 * PAGE), (1, 60, 127, 128, 129, 130, 255, 256, 257, 258, 300)
    cache = PrefixCache(Pages(3), MUCH)
    own = cache.pages.take(3)
    for length in lengths[::2] + lengths[1::2]:
        assert cache.add(whole[:length], own, kept())
    for same in range(1, 2 * PAGE + 3):
        for most in (same + 5, same, same - 1, 128):
            want = max((n for n in lengths if n <= min(same, most)), default=None)
            hit = cache.find([*whole[:same], *[NEW] * 5], most)
            assert length_of(hit) == want, (same, most)
            if hit:
                assert hit.pages == own[: shared_pages(hit.length)]


def test_a_page_is_shared_by_those_alike_to_the_token_after_it() -> None:
    cache = PrefixCache(Pages(9), MUCH)
    one = base(PAGE + 1)
    first, alike = add(cache, one), add(cache, (*one, NEW))
    assert first and alike
    assert (cache.held, cache.pages.free) == (1, 8)
    for tokens in (one, (*one, NEW)):
        hit = cache.find(tokens, 999)
        assert hit and hit.length == len(tokens) and hit.pages == first[:1]


def test_a_page_is_not_shared_if_the_token_after_it_differs() -> None:
    """The 128 tokens are the same; the MTP module has looked at the 129th."""
    cache = PrefixCache(Pages(9), MUCH)
    one, other = base(PAGE + 1), changed(base(PAGE + 1), PAGE)
    mine = cache.pages.take(2)
    theirs = cache.pages.take(2)
    assert cache.add(one, mine, kept()) and cache.add(other, theirs, kept())
    assert cache.held == 2
    for tokens, own in ((one, mine), (other, theirs)):
        for more in ((), (3,)):
            hit = cache.find(tokens + more, 999)
            assert hit and hit.length == PAGE + 1 and hit.pages == own[:1]
    assert cache.find((*base(PAGE), NEW + 1), 999) is None
    assert cache.add(base(PAGE), mine, kept())  # a copy of its page: fit for both
    for token in (one[-1], NEW, NEW + 1):
        hit = cache.find((*base(PAGE), token), PAGE)
        assert hit and (hit.length, hit.pages) == (PAGE, [])


def test_pages_that_the_cache_has_are_not_held_again() -> None:
    """Whoever read a page anew keeps its own copy, which is free when it ends."""
    cache = PrefixCache(Pages(8), MUCH)
    first = add(cache, base(2 * PAGE + 1))
    again = cache.pages.take(3)
    assert first and cache.add(base(3 * PAGE), again, kept())
    assert [cache.holds(page) for page in again] == [False, False, False]
    cache.pages.give_back(again)
    assert cache.held == 2 == 8 - cache.pages.free
    hit = cache.find(base(3 * PAGE), 999)
    assert hit and hit.length == 3 * PAGE and hit.pages == first[:2]


def test_what_is_known_or_too_large_or_nothing_is_not_added() -> None:
    told: list[int] = []
    cache = PrefixCache(Pages(6), 20, lambda tokens, pages, snapshot: told.append(len(tokens)))
    assert add(cache, base(300), 12)
    assert add(cache, base(300), 3) is None
    assert add(cache, base(200), 21) is None
    assert add(cache, (), 1) is None
    assert (len(cache), cache.bytes, cache.held, cache.pages.free, told) == (1, 12, 2, 4, [])
    assert add(cache, base(200), 20)  # all that it may hold
    assert (len(cache), cache.bytes, cache.held, cache.pages.free, told) == (1, 20, 1, 5, [300])
    assert PrefixCache(Pages(1), 0).add((1,), [], kept(2)) is False


def test_the_least_recently_used_are_given_up_beyond_the_bytes() -> None:
    told: list[tuple[Tokens, list[int], int]] = []

    def tell(tokens: Tokens, pages: list[int], snapshot: Snapshot) -> None:
        assert all(cache.pages.holders(page) for page in pages)  # still there
        told.append((tokens, pages, snapshot.kept.nbytes))

    cache = PrefixCache(Pages(9), 30, tell)
    long = base(2 * PAGE + 9)
    own = {n: add(cache, long[:n], n // 25) or [] for n in (100, 150, 265)}
    assert (cache.bytes, cache.held) == (4 + 6 + 10, 2)
    assert length_of(cache.find(long, 120)) == 100
    assert [s.length for s in cache.snapshots()] == [150, 265, 100]

    assert add(cache, (1, 2, 3), 16)  # 150 must go; its page stays, as 265 goes through it
    assert told == [(long[:150], own[150][:1], 6)]
    assert (cache.bytes, cache.held) == (30, 2)
    assert [s.length for s in cache.snapshots()] == [265, 100, 3]

    assert add(cache, (1, 2), 2)
    assert told[1:] == [(long[:265], [own[150][0], own[265][1]], 10)]
    assert (cache.bytes, cache.held, cache.pages.free) == (22, 0, 9)

    assert add(cache, (3, 4, 5, 6), 28)
    assert [len(tokens) for tokens, _, _ in told[2:]] == [100, 3]  # as many as must
    cache.clear()
    assert [len(tokens) for tokens, _, _ in told[4:]] == [2, 4]
    assert (len(cache), cache.bytes, cache.held, cache.pages.free) == (0, 0, 0, 9)


def test_room_is_made_as_far_as_needed_and_never_in_vain() -> None:
    told: list[int] = []
    cache = PrefixCache(Pages(8), MUCH, lambda tokens, pages, snapshot: told.append(len(tokens)))
    for number, length in enumerate((300, 5, 200, 400)):  # 2, 0, 1 and 3 pages
        assert add(cache, tuple(number * 1000 + at for at in range(length)))
    assert (cache.pages.free, cache.evictable) == (2, 6)
    hit = cache.find(tuple(2000 + at for at in range(201)), 999)
    assert hit and len(hit.pages) == 1
    cache.pages.share(hit.pages)  # somebody goes on from there
    assert cache.evictable == 5
    assert not cache.make_room(8) and told == []
    assert cache.make_room(2) and told == []
    assert cache.make_room(3) and told == [300]
    assert cache.pages.free == 4
    assert cache.make_room(7) and told == [300, 5, 400]
    assert (cache.pages.free, cache.evictable, cache.held) == (7, 0, 1)
    cache.evict()
    assert (cache.held, cache.pages.free, told[3:]) == (0, 7, [200])
    cache.pages.give_back(hit.pages)
    assert cache.pages.free == 8


# --- any order of calls, beside a dictionary of all that is known --------------------------------

ROOM, MOST = 8, 25  # pages, bytes
EDGES = st.sampled_from([0, 1, 126, 127, 128, 129, 255, 256, 257])  # where sequences part
LENGTHS = st.sampled_from([1, 2, 70, 127, 128, 129, 130, 200, 255, 256, 257, 258, 384, 385])
SEQUENCES = st.builds(
    lambda length, ones: tuple(int(at in ones) for at in range(length)),
    LENGTHS,
    st.sets(EDGES, max_size=2),
)


def keys(tokens: Tokens) -> list[Tokens]:
    """Of each shared page all that its content depends on."""
    return [tokens[: n * PAGE + 1] for n in range(1, (len(tokens) - 1) // PAGE + 1)]


class Running(NamedTuple):
    tokens: Tokens
    pages: list[int]


class Served(RuleBasedStateMachine):
    """Sequences that begin where the cache leads them, write pages, are kept, end.

    `known` has the snapshots, the least recently used first, `cached` the pages that they share,
    `written` what the last writer of a page put there: the tokens up to the one after the page.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(ROOM)
        self.cache = PrefixCache(self.pages, MOST, self.tell)
        self.known: OrderedDict[Tokens, Kept] = OrderedDict()
        self.cached: dict[Tokens, int] = {}
        self.written: dict[int, Tokens] = {}
        self.running: list[Running] = []
        self.told: list[tuple[Tokens, list[int], Kept]] = []
        self.evicted: list[tuple[Tokens, list[int], Kept]] = []

    def tell(self, tokens: Tokens, pages: list[int], snapshot: Snapshot) -> None:
        assert [self.written[page] for page in pages] == keys(tokens)
        assert all(self.pages.holders(page) for page in pages)
        self.told.append((tokens, pages, snapshot.kept))

    def give_up(self) -> None:
        """What evicting does to the model."""
        tokens, value = self.known.popitem(last=False)
        self.evicted.append((tokens, [self.cached[key] for key in keys(tokens)], value))
        needed = {key for tokens in self.known for key in keys(tokens)}
        self.cached = {key: page for key, page in self.cached.items() if key in needed}

    def in_use(self) -> set[int]:
        return {page for each in self.running for page in each.pages}

    def free(self) -> int:
        return ROOM - len(self.in_use() | {*self.cached.values()})

    def look(self, tokens: Tokens, most: int) -> list[int]:
        """Shared pages of the longest known prefix."""
        fits = [t for t in self.known if len(t) <= most and t == tokens[: len(t)]]
        hit = self.cache.find(tokens, most)
        assert (hit is None) == (not fits)
        if hit is None:
            return []
        longest = max(fits, key=len)
        assert hit.length == len(longest) and hit.snapshot.kept is self.known[longest]
        assert [self.written[page] for page in hit.pages] == keys(tokens[: hit.length])
        self.known.move_to_end(longest)
        return hit.pages

    def room(self, count: int) -> bool:
        vain = self.free() + len({*self.cached.values()} - self.in_use()) < count
        while not vain and self.free() < count:
            self.give_up()
        assert self.cache.make_room(count) is not vain
        return not vain

    @rule(tokens=SEQUENCES, most=LENGTHS)
    def find(self, tokens: Tokens, most: int) -> None:
        self.look(tokens, most)

    @rule(tokens=SEQUENCES)
    def start(self, tokens: Tokens) -> None:
        shared = self.look(tokens, len(tokens) - 1)
        self.pages.share(shared)
        self.running.append(Running(tokens, shared))
        need = pages_of(len(tokens)) - len(shared)
        if not self.room(need):
            self.pages.give_back(self.running.pop().pages)
            return
        own = self.pages.take(need)
        self.running[-1] = Running(tokens, [*shared, *own])
        for number, page in enumerate(own, start=1 + len(shared)):
            self.written[page] = tokens[: number * PAGE + 1]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), length=LENGTHS, size=st.integers(2, MOST + 1))
    def keep(self, data: st.DataObject, length: int, size: int) -> None:
        tokens, pages = data.draw(st.sampled_from(self.running))
        tokens, value = tokens[:length], kept(size)
        new = tokens not in self.known and size <= MOST
        if new:
            self.known[tokens] = value
            for key, page in zip(keys(tokens), pages, strict=False):
                self.cached.setdefault(key, page)
            while sum(each.nbytes for each in self.known.values()) > MOST:
                self.give_up()
        assert self.cache.add(tokens, pages, value) is new

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.running) - 1))
        self.pages.give_back(self.running.pop(number).pages)

    @rule(count=st.integers(0, ROOM + 1))
    def make_room(self, count: int) -> None:
        if self.room(count):
            assert self.pages.free >= count

    @precondition(lambda self: self.known)
    @rule()
    def evict(self) -> None:
        self.give_up()
        self.cache.evict()

    @precondition(lambda self: len(self.known) > 2)
    @rule()
    def clear(self) -> None:
        while self.known:
            self.give_up()
        self.cache.clear()
        assert not self.cache.held

    @invariant()
    def books_agree(self) -> None:
        cache, cached = self.cache, {*self.cached.values()}
        assert self.told == self.evicted
        sizes = [value.nbytes for value in self.known.values()]
        assert (len(cache), cache.bytes) == (len(sizes), sum(sizes)) and cache.bytes <= MOST
        paths = [cache.path(snapshot) for snapshot in cache.snapshots()]
        want = [(tokens, [self.cached[key] for key in keys(tokens)]) for tokens in self.known]
        assert paths == want and all(map(cache.knows, self.known))
        assert (cache.held, self.pages.free) == (len(cached), self.free())
        assert cache.evictable == len(cached - self.in_use())
        for page in range(ROOM + 1):
            assert cache.holds(page) == (page in cached)
            holders = sum(each.pages.count(page) for each in self.running) + (page in cached)
            assert self.pages.holders(page) == holders

    def teardown(self) -> None:
        for each in self.running:
            self.pages.give_back(each.pages)
        self.cache.clear()
        assert self.pages.free == ROOM


TestServed = Served.TestCase
TestServed.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
