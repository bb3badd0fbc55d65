"""A tree's tensors are held to each other's sizes, and to those of the arguments beside it."""

from typing import NamedTuple

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Float32, Int64, TypeCheckError, jaxtyped
from torch import Tensor

from qnext.functional.params import Quantized
from qnext.shapes import Shaped


class Leaves(NamedTuple):
    wide: Float[Tensor, "rows columns"]
    narrow: Float32[Tensor, " columns"]
    fixed: Int64[Tensor, "rows 3"]
    weight: Float[Tensor, "rows columns"] | Quantized


class Tree(NamedTuple):
    layers: tuple[Leaves, ...]


@jaxtyped(typechecker=beartype)
def call(tree: Shaped[Tree], beside: Float[Tensor, " columns"]) -> None:
    """Fits, or raises."""


def leaves(rows: int = 5, columns: int = 7) -> Leaves:
    return Leaves(
        torch.zeros(rows, columns),
        torch.zeros(columns),
        torch.zeros(rows, 3, dtype=torch.int64),
        torch.zeros(rows, columns),
    )


def int8(rows: int, columns: int) -> Quantized:
    return Quantized(torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows))


def test_what_fits() -> None:
    call(Tree((leaves(), leaves()._replace(weight=int8(5, 7)))), torch.zeros(7))
    call(Tree((leaves()._replace(narrow=torch.zeros(7, dtype=torch.float64)),)), torch.zeros(7))


@pytest.mark.parametrize(
    "wrong",
    [
        {"wide": torch.zeros(5, 8)},
        {"wide": torch.zeros(5)},
        {"wide": torch.zeros(5, 7, dtype=torch.int64)},
        {"narrow": torch.zeros(8)},
        {"narrow": torch.zeros(7, dtype=torch.bfloat16)},
        {"fixed": torch.zeros(5, 4, dtype=torch.int64)},
        {"fixed": torch.zeros(5, 3)},
        {"weight": int8(6, 7)},
        {"weight": int8(5, 6)},
        {"weight": None},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.parametrize("where", [0, 1])
def test_what_does_not(wrong: dict[str, Tensor], where: int) -> None:
    """In the first layer, which shows the sizes, as in the second, which has to have them."""
    layers = [leaves(), leaves()]
    layers[where] = layers[where]._replace(**wrong)
    with pytest.raises(TypeCheckError):
        call(Tree(tuple(layers)), torch.zeros(7))


def test_layers_of_other_sizes() -> None:
    with pytest.raises(TypeCheckError):
        call(Tree((leaves(), leaves(rows=6))), torch.zeros(7))


def test_an_argument_of_another_size() -> None:
    with pytest.raises(TypeCheckError):
        call(Tree((leaves(),)), torch.zeros(8))
