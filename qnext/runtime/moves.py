"""How values get out of the pools and back, and pools empty: here, by what `kept` does.

Where several ranks have parts of the pools it is done otherwise, see `ranks`.
"""

from collections.abc import Sequence

from qnext.functional.params import Params
from qnext.functional.state import State
from qnext.functional.tree import leaves
from qnext.lowering.trace import specs_of
from qnext.runtime import kept as local
from qnext.runtime.digest import weights_digest
from qnext.runtime.kept import Kept


class Moves:
    """Values of pools that all lie in this process."""

    def take(self, state: State, row: int, pages: Sequence[int]) -> Kept:
        return local.take(state, row, pages)

    def take_into(
        self, into: Kept, state: State, row: int, pages: Sequence[int], states: bool = True
    ) -> Kept:
        return local.take_into(into, state, row, pages, states)

    def completed(self, state: State, pages: Sequence[int], kept: Kept) -> Kept:
        return local.completed(state, pages, kept)

    def put(self, state: State, row: int, pages: Sequence[int], kept: Kept | None) -> None:
        local.put(state, row, pages, kept)

    def wipe(self, state: State, row: int, pages: Sequence[int]) -> None:
        local.wipe(state, row, pages)

    def zero(self, state: State) -> None:
        """Empty all pools, in place."""
        for pool in leaves((state.layers, state.mtp)):
            pool.zero_()

    def specs(self, state: State) -> State:
        """Specs of the state that values are taken out of."""
        found: State = specs_of(state)
        return found

    def digest(self, params: Params) -> str:
        """A name for the weights of the whole model."""
        return weights_digest(params)
