"""What a rank holds of a whole model, state or value: the same trees with smaller leaves."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.config import Config
from qnext.functional.mesh import Mesh
from qnext.functional.params import Params
from qnext.functional.tree import rebuild
from qnext.shapes import annotated_leaves

T = TypeVar("T")


def shard(params: Params, mesh: Mesh) -> Params:
    """The params of one rank of a mesh, for the same functions.

    What is divided is copied, the rest shared. `load(path, mesh=mesh)` reads no more than that in
    the first place. Raises InputError for params that are a rank's already, and where heads or the
    vocabulary cannot be divided so.
    """
    if params.config.mesh != Mesh():
        raise InputError("params are one rank's already: shard those of the whole model")
    config = replace(params.config, mesh=mesh)
    return part_of(params, config)._replace(config=config)


def part_of(tree: T, config: Config) -> T:
    """Of a whole annotated tree what a rank holds, by the mesh of its config."""
    leaves = annotated_leaves(tree, "")
    return rebuild(tree, [_part(leaf, hint.axes, config) for _, leaf, hint in leaves])


def divided_dim(axes: tuple[str, ...], config: Config) -> int | None:
    """The one of a leaf's axes that a mesh divides; None: the leaf is whole on every rank."""
    return next((dim for dim, axis in enumerate(axes) if axis in config.divided), None)


def _part(leaf: Tensor, axes: tuple[str, ...], config: Config) -> Tensor:
    dim = divided_dim(axes, config)
    if dim is None:
        return leaf
    spans = config.mesh.spans(config.divided[axes[dim]])
    if sum(span.size for span in spans) == leaf.shape[dim]:
        return leaf
    return torch.cat([leaf.narrow(dim, *span) for span in spans], dim)
