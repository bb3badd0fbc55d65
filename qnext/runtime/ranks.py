"""Several ranks as one engine: the first decides everything, the others do what it says.

The first rank has the board, the tables and the draws; every rank has its part of the weights and
of the pools. For each call of a step the first sends its arguments without the pools, so tokens,
lengths and what was accepted are decided once. Values that leave the pools are put together at the
first rank, and cut again on their way in: elsewhere nobody knows that there are ranks.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from qnext.functional.config import Config
from qnext.functional.mesh import ALL, CONTROL, TP, Mesh
from qnext.functional.params import Params
from qnext.functional.shard import divided_dim, part_of
from qnext.functional.state import State, init_state
from qnext.functional.tree import (
    default_store,
    leaves,
    map_leaves,
    place,
    process_group,
    rebuild,
)
from qnext.runtime import kept as local
from qnext.runtime.digest import weights_digest
from qnext.runtime.kept import Kept
from qnext.runtime.moves import Moves
from qnext.runtime.options import Options
from qnext.runtime.request import RankError
from qnext.runtime.rounds import Form, Rounds
from qnext.runtime.steps import Steps
from qnext.shapes import annotated_leaves

T = TypeVar("T")
BEAT = 1.0  # seconds between signs of life


class Channel:
    """What the ranks of a group tell each other; `leads` is the first of them."""

    def __init__(self, mesh: Mesh) -> None:
        from torch import distributed as dist

        self.mesh, self.leads, self._dist = mesh, mesh.index(TP) == 0, dist
        self.alone = mesh.tp == 1
        if not self.alone:
            self._control, self._data = (process_group(mesh.group(axis)) for axis in (CONTROL, TP))
        self._all = process_group(mesh.group(ALL))
        self._store = default_store()
        self._first = dist.get_rank() - mesh.rank
        self._over = threading.Event()
        threading.Thread(target=self._live, name="qnext-beat", daemon=True).start()

    def tell(self, order: str, *arguments: Any) -> None:
        """An order of the first rank to all others."""
        if self.alone:
            return
        arguments = map_leaves(_on_host, arguments)
        self._dist.broadcast_object_list([(order, arguments)], group=self._control, group_src=0)

    def told(self) -> tuple[str, tuple[Any, ...]]:
        """The next order."""
        found: list[Any] = [None]
        self._dist.broadcast_object_list(found, group=self._control, group_src=0)
        order: tuple[str, tuple[Any, ...]] = found[0]
        return order

    def gather(self, part: Tensor) -> list[Tensor]:
        """Every rank's bytes [n], at the first; elsewhere nothing."""
        if self.alone:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.mesh.tp)]
        if part.device.type != "cpu":  # torch_npu's gather knows no group_dst
            self._dist.all_gather(parts, part, group=self._data)
        else:
            self._dist.gather(part, parts if self.leads else None, group=self._data, group_dst=0)
        return parts if self.leads else []

    def scatter(self, into: Tensor, parts: list[Tensor] | None) -> None:
        """To every rank its bytes [n] of those that the first has."""
        if self.alone and parts:
            into.copy_(parts[0])
            return
        self._dist.scatter(into, parts, group=self._data, group_src=0)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of every rank's numbers, of all groups."""
        numbers = numbers.clone()
        self._dist.all_reduce(numbers, group=self._all)
        return numbers

    def failed(self, error: Exception) -> None:
        """Tell the first rank what went wrong in this one."""
        self._store.set(self._key("error", self.mesh.rank), f"{type(error).__name__}: {error}")

    def blame(self, error: Exception) -> RankError:
        """Which ranks are gone, or failed, now that a call of this one did."""
        try:
            told = list(self._accused())
        except Exception as lost:  # whoever holds the store is gone
            told = [f"the ranks cannot find each other any more: {lost}"]
        return RankError("; ".join(told) or f"a call of rank {self.mesh.rank} failed: {error}")

    def _accused(self) -> Iterator[str]:
        before = self._beats()
        self._over.wait(3 * BEAT)
        after = self._beats()
        for rank in set(range(self.mesh.ranks)) - {self.mesh.rank}:
            key = self._key("error", rank)
            if self._store.check([key]):
                yield f"rank {rank} failed: {self._store.get(key).decode()}"
            elif before[rank] == after[rank]:
                yield f"rank {rank} is gone"

    def close(self) -> None:
        """Let the others go, if this is the first rank."""
        if self.leads and not self._over.is_set():
            with suppress(Exception):  # they are gone already
                self.tell("end")
        self._over.set()

    def _key(self, what: str, rank: int) -> str:
        return f"qnext/{self._first}/{what}/{rank}"

    def _beats(self) -> list[bytes]:
        keys = [self._key("beat", rank) for rank in range(self.mesh.ranks)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _live(self) -> None:
        count = 0
        while not self._over.wait(BEAT if count else 0):
            count += 1
            try:
                self._store.set(self._key("beat", self.mesh.rank), str(count))
            except Exception:  # who holds the store is gone: the next call of this rank will tell
                return


class SharedSteps(Steps):
    """Steps of the first rank; the others run theirs with the same tables and tokens."""

    def __init__(self, channel: Channel, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.channel = channel
        self.moves = SharedMoves(channel, self.params.config)
        if channel.mesh.dp > 1:
            self.rounds = Rounds(channel.mesh)

    def __call__(self, name: str, state: State, *rest: Any) -> Any:
        with blamed(self.channel):
            return super().__call__(name, state, *rest)

    def run(self, name: str, state: State, *rest: Any) -> Any:
        self.channel.tell("call", name, _tables(state), rest)
        return super().run(name, state, *rest)

    def attend(self, state: State, over: bool = False) -> tuple[Form, State]:
        with blamed(self.channel):
            return super().attend(state, over)

    def warm(self, calls: Sequence[tuple[Any, ...]], progress: bool = False) -> None:
        with blamed(self.channel):
            self.channel.tell("warm", [(name, _tables(s), *rest) for name, s, *rest in calls])
            super().warm(calls, progress)

    def close(self) -> None:
        self.channel.close()


class SharedMoves(Moves):
    """Values that are put together at the first rank, and cut there."""

    def __init__(self, channel: Channel, config: Config) -> None:
        self.channel, self.config = channel, config

    def take(self, state: State, row: int, pages: Sequence[int]) -> Kept:
        with blamed(self.channel):
            self.channel.tell("take", _tables(state), row, list(pages))
            return self._whole(local.take(state, row, pages))

    def take_into(
        self, into: Kept, state: State, row: int, pages: Sequence[int], states: bool = True
    ) -> Kept:
        pages = pages[: local.count_of_pages(into)]
        whole = self.take(state, row, pages) if states else self._pages(state, pages)
        for target, leaf in zip(leaves(into), leaves(whole), strict=True):
            if leaf.numel():
                local.copy_alone(target, leaf)
        return into

    def completed(self, state: State, pages: Sequence[int], kept: Kept) -> Kept:
        return local.after(self._pages(state, pages), kept)

    def _pages(self, state: State, pages: Sequence[int]) -> Kept:
        with blamed(self.channel):
            self.channel.tell("pages", list(pages))
            return self._whole(local.of_pages(state, pages))

    def put(self, state: State, row: int, pages: Sequence[int], kept: Kept | None) -> None:
        with blamed(self.channel):
            specs = (
                None if kept is None else map_leaves(_spec, self._cut(kept, self.config.mesh.rank))
            )
            self.channel.tell("put", _tables(state), row, list(pages), specs)
            local.put(state, row, pages, None if kept is None else self._sent(kept))

    def wipe(self, state: State, row: int, pages: Sequence[int]) -> None:
        with blamed(self.channel):
            self.channel.tell("wipe", _tables(state), row, list(pages))
            local.wipe(state, row, pages)

    def zero(self, state: State) -> None:
        with blamed(self.channel):
            self.channel.tell("zero")
            super().zero(state)

    def specs(self, state: State) -> State:
        return whole_specs(state, self.config)

    def digest(self, params: Params) -> str:
        with blamed(self.channel):
            self.channel.tell("digest")
            return weights_digest(params, self.channel.total)

    def _whole(self, part: Kept) -> Kept:
        parts = [unpacked(each, part) for each in self.channel.gather(packed(part))]
        return joined(parts, self.config)

    def _sent(self, kept: Kept) -> Kept:
        """This rank's part of a value, once every other has its own."""
        parts = [self._cut(kept, rank) for rank in self.config.mesh.peers(TP)]
        into = torch.empty_like(packed(parts[0]))
        self.channel.scatter(into, [packed(part) for part in parts])
        return unpacked(into, parts[0])

    def _cut(self, kept: Kept, rank: int) -> Kept:
        return part_of(kept, replace(self.config, mesh=replace(self.config.mesh, rank=rank)))


def follow(channel: Channel, params: Params, options: Options) -> None:
    """Do what the first rank says, until it ends. Raises RankError where it is gone."""
    steps = Steps(params, options.target, options.strict, **options.buckets)
    like = steps.params.embed
    state = init_state(
        steps.params.config,
        options.rows,
        options.capacity,
        dtype=like.dtype,
        device=like.device,
        draft=options.draft,
        pages=options.pool,
    )
    follower = Follower(channel, steps, state)
    while True:
        with blamed(channel):
            order, arguments = channel.told()
        if order == "end":
            return
        try:
            getattr(follower, order)(*arguments)
        except Exception as error:
            channel.failed(error)
            raise


class Follower:
    """A rank that decides nothing: its methods are the orders of the first."""

    def __init__(self, channel: Channel, steps: Steps, state: State) -> None:
        self.channel, self.steps, self.state = channel, steps, state
        self._device = steps.params.embed.device

    def call(self, name: str, tables: State, rest: tuple[Any, ...]) -> None:
        """Make the same call of a step; what comes of it but the pools the first rank has, too."""
        result = self.steps(name, self._with(tables), *place(rest, self._device))
        self.state = result[-1]

    def warm(self, calls: list[tuple[Any, ...]]) -> None:
        self.steps.warm(
            [(n, self._with(tables), *place(rest, self._device)) for n, tables, *rest in calls]
        )

    def take(self, tables: State, row: int, pages: list[int]) -> None:
        self.channel.gather(packed(local.take(self._with(tables), row, pages)))

    def pages(self, pages: list[int]) -> None:
        self.channel.gather(packed(local.of_pages(self.state, pages)))

    def put(self, tables: State, row: int, pages: list[int], specs: Kept | None) -> None:
        kept = None
        if specs is not None:
            device = self._device
            kept = map_leaves(lambda s: torch.empty(s.shape, dtype=s.dtype, device=device), specs)
            into = packed(kept)
            self.channel.scatter(into, None)
            kept = unpacked(into, kept)
        local.put(self._with(tables), row, pages, kept)

    def wipe(self, tables: State, row: int, pages: list[int]) -> None:
        local.wipe(self._with(tables), row, pages)

    def zero(self) -> None:
        Moves().zero(self.state)

    def digest(self) -> None:
        weights_digest(self.steps.params, self.channel.total)

    def _with(self, tables: State) -> State:
        here = place(tables, self._device)
        return here._replace(layers=self.state.layers, mtp=self.state.mtp)


@contextmanager
def blamed(channel: Channel) -> Iterator[None]:
    """Whatever goes wrong in a call that all ranks make ends the group, and names who it was."""
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        raise channel.blame(error) from error


def whole_specs(tree: T, config: Config) -> T:
    """Specs of the tree that a rank has a part of."""
    sizes = replace(config, mesh=Mesh()).axes

    def spec(leaf: Tensor, axes: tuple[str, ...]) -> Tensor:
        named = zip(axes, leaf.shape, strict=True)
        return _spec(leaf, [sizes[axis] if axis in config.divided else n for axis, n in named])

    return rebuild(tree, [spec(leaf, hint.axes) for _, leaf, hint in annotated_leaves(tree, "")])


def joined(parts: Sequence[Kept], config: Config) -> Kept:
    """The value that ranks have these parts of, in their order."""
    meshes = [replace(config.mesh, rank=rank) for rank in config.mesh.peers(TP)]
    sizes = replace(config, mesh=Mesh()).axes
    made = []
    hints = [hint.axes for _, _, hint in annotated_leaves(parts[0], "")]
    for axes, *ours in zip(hints, *map(leaves, parts), strict=True):
        dim = divided_dim(axes, config)
        if dim is None:
            made.append(ours[0])
            continue
        shape = list(ours[0].shape)
        shape[dim] = sizes[axes[dim]]
        whole = ours[0].new_empty(shape)
        for mesh, part in zip(meshes, ours, strict=True):
            spans = mesh.spans(config.divided[axes[dim]])
            for span, piece in zip(spans, part.split([s.size for s in spans], dim), strict=True):
                whole.narrow(dim, *span).copy_(piece)
        made.append(whole)
    kept: Kept = rebuild(parts[0], made)
    return kept


def packed(kept: Kept) -> Tensor:
    """A value's bytes [n], leaf after leaf."""
    return torch.cat([leaf.contiguous().view(-1).view(torch.uint8) for leaf in leaves(kept)])


def unpacked(data: Tensor, like: Kept) -> Kept:
    """`packed` undone, for a value like another."""
    pieces = data.split([leaf.nbytes for leaf in leaves(like)])
    made = [
        # a view must begin where its numbers may, which bytes need not
        piece.clone().view(leaf.dtype).view(leaf.shape)
        for piece, leaf in zip(pieces, leaves(like), strict=True)
    ]
    kept: Kept = rebuild(like, made)
    return kept


def _tables(state: State) -> State:
    return state._replace(layers=(), mtp=())


def _on_host(leaf: Any) -> Any:
    """A leaf of an order as it is sent: numbers from the host, specs as they are."""
    return leaf.cpu() if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


def _spec(leaf: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    return torch.empty(shape or leaf.shape, dtype=leaf.dtype, device="meta")
