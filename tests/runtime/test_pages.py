"""The count of who holds which page, beside a plain dictionary of counts."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qnext.errors import InputError
from qnext.runtime.pages import Pages


def test_the_least_pages_are_handed_out_first_and_scratch_never() -> None:
    pages = Pages(5)
    assert (pages.free, pages.count) == (5, 5)
    assert pages.take(0) == []
    assert pages.take(2) == [1, 2]
    assert sorted(pages.take(3)) == [3, 4, 5]
    assert pages.free == 0 and pages.holders(0) == 0


def test_more_than_is_free_is_refused_and_nothing_is_taken() -> None:
    pages = Pages(3)
    pages.take(1)
    with pytest.raises(InputError, match=r"3 pages wanted, 2 of 3 are free"):
        pages.take(3)
    assert pages.free == 2 and [pages.holders(page) for page in range(4)] == [0, 1, 0, 0]


def test_a_page_is_free_when_its_last_holder_gives_it_back() -> None:
    pages = Pages(3)
    pages.take(2)
    pages.share([1, 2, 1])
    assert [pages.holders(page) for page in (1, 2, 3)] == [3, 2, 0]
    pages.give_back([1, 2])
    pages.give_back([1])
    assert (pages.free, pages.holders(1)) == (1, 1)
    pages.give_back([1, 2])
    assert pages.free == 3
    assert sorted(pages.take(3)) == [1, 2, 3]


def test_an_empty_pool_has_nothing() -> None:
    pages = Pages(0)
    assert pages.free == 0 and pages.take(0) == []
    with pytest.raises(InputError):
        pages.take(1)


@pytest.mark.parametrize("page", [0, 2])
def test_a_free_page_can_be_neither_shared_nor_given_back(page: int) -> None:
    pages = Pages(2)
    pages.take(1)
    with pytest.raises(InputError, match=f"page {page} is free, only a page in use can be shared"):
        pages.share([page])
    with pytest.raises(InputError, match=f"page {page} is free already"):
        pages.give_back([page])
    assert pages.free == 1 and [pages.holders(each) for each in range(3)] == [0, 1, 0]


class Counts(RuleBasedStateMachine):
    """Any order of calls; `held` has a page once for each hold of it."""

    @initialize(count=st.integers(0, 9))
    def begin(self, count: int) -> None:
        self.pages = Pages(count)
        self.count, self.held = count, list[int]()

    def free(self) -> set[int]:
        return set(range(1, self.count + 1)) - set(self.held)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        free = self.free()
        taken = self.pages.take(data.draw(st.integers(0, len(free))))
        assert len(set(taken)) == len(taken) and set(taken) <= free
        self.held += taken

    @rule(more=st.integers(1, 9))
    def take_too_many(self, more: int) -> None:
        with pytest.raises(InputError):
            self.pages.take(len(self.free()) + more)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        shared = data.draw(st.lists(st.sampled_from(self.held), max_size=4))
        self.pages.share(iter(shared))
        self.held += shared

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        ended = data.draw(st.permutations(self.held))[: data.draw(st.integers(0, 4))]
        self.pages.give_back(iter(ended))
        for page in ended:
            self.held.remove(page)

    @rule(data=st.data())
    def meddle_with_a_free_page(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([0, *sorted(self.free())]))
        with pytest.raises(InputError):
            self.pages.share([page])
        with pytest.raises(InputError):
            self.pages.give_back([page])

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.pages.free == len(self.free())
        holders = [self.pages.holders(page) for page in range(self.count + 1)]
        assert holders == [self.held.count(page) for page in range(self.count + 1)]


TestCounts = Counts.TestCase
TestCounts.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)
