"""Who holds which page of the pools: a count for each, no tensors.

Page 0 is scratch and never handed out. A page may be held by one sequence that writes it and, once
it is full, by any number of sequences and cached states that read it.
"""

from collections.abc import Iterable

from qnext.errors import InputError


class Pages:
    """The pages 1 .. count of a pool; whoever takes or shares one gives it back once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))  # the least is handed out first
        self._holders = [0] * (count + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """So many free pages, held once each. Raises InputError where there are fewer."""
        if count > len(self._free):
            raise InputError(f"{count} pages wanted, {len(self._free)} of {self.count} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that somebody holds already."""
        for page in pages:
            if not self._holders[page]:
                raise InputError(f"page {page} is free, only a page in use can be shared")
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """End one hold of each page; those nobody holds any more are free."""
        for page in pages:
            if not self._holders[page]:
                raise InputError(f"page {page} is free already, it cannot be given back")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
