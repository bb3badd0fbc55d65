"""Templates: the leaves of trees that come with every call, and what does not fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.functional.quantize import quantize
from qnext.functional.tree import (
    Template,
    is_frozen,
    leaves,
    map_leaves,
    rebuild,
    same_structure,
)
from tests.calls import config


class Pair(NamedTuple):
    """A node, as params have them."""

    left: Any
    right: Any


class Other(NamedTuple):
    """A node of the same fields that is another."""

    left: Any
    right: Any


def of_type(want: Any) -> Callable[[Any], bool]:
    """Fits: another leaf of the same type and shape."""

    def fits(got: Any) -> bool:
        return type(got) is type(want) and getattr(got, "shape", 0) == getattr(want, "shape", 0)

    return fits


def template(tree: Any) -> Template:
    return Template(tree, of_type)


def fitting(made: Template, tree: object) -> list[Any] | None:
    """The leaves of a tree, if it is of the structure and they fit."""
    found = made.take(tree)
    return found if found is not None and made.fits(found) else None


def vector(size: int) -> Tensor:
    return torch.arange(float(size))


def same(mine: list[Any] | None, other: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return mine is not None and list(map(id, mine)) == list(map(id, other))


def params(**changes: Any) -> qn.Params:
    return qn.init_params(config(**changes))


TREES: dict[str, Callable[[], Any]] = {
    "leaf": lambda: vector(2),
    "no tensor": lambda: 2.5,
    "nothing": lambda: (),
    "tuple": lambda: (vector(2), (vector(3), ()), vector(5)),
    "named": lambda: Pair(vector(2), Pair(7, vector(3))),
    "list": lambda: [vector(2), [vector(3)], vector(5)],
    "dict": lambda: {"b": vector(2), "a": {"c": vector(3)}},
    "both": lambda: Pair([vector(2), {"a": vector(3)}], ({"b": [vector(5), 7]}, vector(4))),
    "constant": lambda: Pair(config(), vector(2)),
    "a constant in a dict": lambda: {"config": config(), "x": vector(2)},
    "params": params,
    "int8 params": lambda: quantize(params()),
    "state": lambda: qn.init_state(config(), 2, 7, draft=1),
}


@pytest.mark.parametrize("name", TREES)
def test_leaves_are_those_of_a_tree_in_order(name: str) -> None:
    """Of the tree itself, and of another object of its structure."""
    tree, other = TREES[name](), TREES[name]()
    made = template(tree)
    assert same(fitting(made, tree), leaves(tree)) and same(fitting(made, other), leaves(other))
    assert same(fitting(made, other), leaves(other))  # nothing is kept from call to call


@pytest.mark.parametrize("name", TREES)
def test_rebuilding_is_the_inverse(name: str) -> None:
    tree, other = TREES[name](), TREES[name]()
    made, new = template(tree), leaves(other)
    again = made.rebuild(new)
    assert type(again) is type(tree) and same_structure(again, tree)
    assert same(leaves(again), new) and same(fitting(made, again), new)
    assert same(leaves(made.rebuild(leaves(tree))), leaves(tree))


MISFITS: dict[str, tuple[Any, Any]] = {
    "longer": ((vector(2), vector(3)), (vector(2), vector(3), vector(3))),
    "shorter": ((vector(2), vector(3)), (vector(2),)),
    "tuple for a leaf": ((vector(2), vector(3)), (vector(2), (vector(3),))),
    "leaf for a tuple": ((vector(2), (vector(3),)), (vector(2), vector(3))),
    "another node": (Pair(vector(2), vector(3)), Other(vector(2), vector(3))),
    "a tuple for a node": (Pair(vector(2), vector(3)), (vector(2), vector(3))),
    "a list for a tuple": ((vector(2), vector(3)), [vector(2), vector(3)]),
    "a tuple for a list": ([vector(2), vector(3)], (vector(2), vector(3))),
    "a longer list": ([vector(2)], [vector(2), vector(2)]),
    "a shorter list": ({"x": [vector(2), vector(2)]}, {"x": [vector(2)]}),
    "another key": ({"a": vector(2)}, {"b": vector(2)}),
    "a key more": ({"a": vector(2)}, {"a": vector(2), "b": vector(2)}),
    "a dict for a leaf": (vector(2), {"a": vector(2)}),
    "a list for a leaf": (Pair(vector(2), 1), Pair([vector(2)], 1)),
    "another constant": (Pair(config(), vector(2)), Pair(config(head_dim=32), vector(2))),
    "a leaf for a constant": (Pair(config(), vector(2)), Pair(vector(1), vector(2))),
    "a constant for a leaf": (Pair(vector(1), vector(2)), Pair(config(), vector(2))),
    "another leaf": ((vector(2), vector(3)), (vector(2), vector(4))),
    "another leaf in a list": ((7, [vector(2), vector(3)]), (7, [vector(2), vector(4)])),
    "another kind of leaf": (Pair(1, 2.0), Pair(1, 2)),
    "None for a leaf": (Pair(vector(2), 1), Pair(None, 1)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_none(name: str) -> None:
    tree, other = MISFITS[name]
    assert fitting(template(tree), tree) is not None and fitting(template(tree), other) is None


def test_every_leaf_of_a_model_is_looked_at() -> None:
    """A model with any one leaf another is refused, and so is one in int8 or of other layers."""
    tree = params()
    made, mine = template(tree), leaves(tree)
    for place in range(len(mine)):
        wrong = [leaf[None] if at == place else leaf for at, leaf in enumerate(mine)]
        assert fitting(made, rebuild(tree, wrong)) is None
    assert fitting(made, quantize(tree)) is None and fitting(template(quantize(tree)), tree) is None
    assert fitting(made, params(num_hidden_layers=4)) is None
    precise = tree._replace(config=tree.config.with_precision(router=torch.float64))
    assert fitting(made, precise) is None  # the constant alone differs
    assert fitting(made, map_leaves(torch.clone, tree)) is not None


def test_what_fits_is_asked_once_of_the_template() -> None:
    """And of others nothing but whether they fit."""
    asked = []

    def fits(want: Any) -> Callable[[Any], bool]:
        asked.append(want)
        return lambda got: True

    tree = Pair(vector(2), [vector(3), 7])
    made = Template(tree, fits)
    for _ in range(2):
        assert fitting(made, Pair(vector(9), ["any", None])) is not None
    assert same(asked, leaves(tree))


def test_a_dict_in_another_order_gives_leaves_by_name() -> None:
    """Whatever order the keys come in, leaves stand where the template has them."""
    made = template({"a": vector(2), "b": vector(3)})
    found = fitting(made, {"b": vector(3), "a": vector(2)})
    assert found is None or [len(leaf) for leaf in found] == [2, 3]


def test_frozen_trees() -> None:
    """Tuples, their kinds and constants cannot change; a list or a dict anywhere can."""
    for tree in ((), vector(2), 7, None, config(), Pair((vector(2),), config()), params()):
        assert is_frozen(tree)
    assert is_frozen(quantize(params())) and is_frozen(TREES["state"]())
    for tree in ([], {}, [vector(2)], Pair(vector(2), [1]), (1, (2, Pair(3, {})))):
        assert not is_frozen(tree)
