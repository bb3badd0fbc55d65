"""Trying calls: what a call raised, whether it computed anything, whether it hurt its arguments."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qnext as qn
from qnext.functional.tree import leaves, map_leaves
from tests.samples import spec


class World(NamedTuple):
    """A model of two layers and an MTP module; a state of 2 rows that has consumed 3 of 7."""

    params: qn.Params
    state: qn.State
    tokens: Tensor

    def other(self, **values: Any) -> qn.State:
        """The state of another model."""
        return qn.init_state(config(**values), 2, 7)

    def put(self, **changes: Any) -> qn.State:
        """The state with other fields."""
        return self.state._replace(**changes)

    def layer(self, i: int, **changes: Any) -> qn.State:
        """The state with leaves of a layer changed, each by a function of the leaf."""
        part = self.state.layers[i]
        part = part._replace(**{k: change(getattr(part, k)) for k, change in changes.items()})
        return self.state._replace(
            layers=(*self.state.layers[:i], part, *self.state.layers[i + 1 :])
        )

    def donated(self, find: Callable[[qn.State], Tensor]) -> qn.State:
        """The state after a leaf's memory was given away."""
        state = map_leaves(torch.clone, self.state)
        find(state).untyped_storage().resize_(0)
        return state


class Case(NamedTuple):
    """`make(world)` is the call to try; what its error must say (a regex), and its class."""

    make: Callable[[World], Callable[[], Any]]
    says: str
    error: type[Exception] = qn.InputError
    typed: bool = False  # where the hook is on, an annotation refuses it first


def config(**values: Any) -> qn.Config:
    small = {"num_hidden_layers": 2, "full_attention_interval": 2, "mtp_num_hidden_layers": 1}
    return qn.Config.from_hf(spec("base") | small | values)


@cache
def world() -> World:
    params, tokens = qn.init_params(config()), torch.arange(6).view(2, 3)
    return World(params, qn.forward(params, qn.init_state(config(), 2, 7), tokens)[1], tokens)


CASES: dict[str, Case] = {}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "forward": qn.forward,
    "prefill": qn.prefill,
    "decode": qn.decode,
    "verify": qn.verify,
    "generate": partial(qn.generate, max_new_tokens=1),
}


def case(
    name: str,
    says: str,
    only: str = "forward prefill verify generate",
    typed: bool = False,
    error: type[Exception] = qn.InputError,
    params: Callable[[qn.Params], Any] = lambda params: params,
    state: Callable[[World], Any] = lambda w: w.state,
    tokens: Callable[[Tensor], Any] = lambda tokens: tokens,
    **keywords: Any,
) -> None:
    """A case for several functions; what is bad is made from what is good."""

    def make(title: str, w: World) -> Callable[[], Any]:
        given = w.tokens[:, 0] if title == "decode" else w.tokens
        return partial(FUNCTIONS[title], params(w.params), state(w), tokens(given), **keywords)

    for title in only.split():
        hooked = typed and title == "generate"
        other(f"{title}: {name}", partial(make, title), says, error=error, typed=hooked)


def other(name: str, make: Callable[[World], Callable[[], Any]], says: str, **more: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(make, says, **more)


class Outcome(NamedTuple):
    """What a call did: its error's class and text, the floating operations, and whether it hurt."""

    error: str
    text: str
    computed: list[str]
    changed: bool


class Floats(TorchDispatchMode):
    """Notes operations that make a floating tensor: checks make integers and booleans only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves(out)):
            self.seen.append(str(func))
        return out


def attempt(make: Callable[[World], Callable[[], Any]]) -> Outcome:
    w = world()
    call, before = make(w), map_leaves(torch.clone, leaves((w.params, w.state, w.tokens)))
    error, text = "", ""
    with Floats() as floats:
        try:
            call()
        except Exception as raised:
            error, text = type(raised).__name__, str(raised)
    after = leaves((w.params, w.state, w.tokens))
    changed = not all(a.equal(b) for a, b in zip(after, before, strict=True))
    return Outcome(error, text, floats.seen, changed)


def attempts() -> dict[str, Outcome]:
    """The outcome of every case."""
    return {name: attempt(case.make) for name, case in CASES.items()}
