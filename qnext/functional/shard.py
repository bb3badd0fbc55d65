"""What a rank holds of a whole model or state: the same trees with smaller leaves."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from qnext.errors import InputError
from qnext.functional.config import Config
from qnext.functional.mesh import Mesh
from qnext.functional.params import Params
from qnext.functional.state import State
from qnext.functional.tree import rebuild
from qnext.shapes import annotated_leaves

T = TypeVar("T")


def shard(params: Params, mesh: Mesh) -> Params:
    """The params of one rank of a mesh, for the same functions.

    What is divided is copied, the rest shared. `load(path, mesh=mesh)` reads no more than that in
    the first place. Raises InputError for params that are a rank's already, and where heads or the
    vocabulary cannot be divided so.
    """
    config = _of_mesh(params.config, mesh)
    return part_of(params, config)._replace(config=config)


def shard_state(state: State, config: Config, mesh: Mesh) -> State:
    """What a rank of a mesh holds of a whole state of this (whole) config's model."""
    return part_of(state, _of_mesh(config, mesh))


def _of_mesh(config: Config, mesh: Mesh) -> Config:
    if config.mesh != Mesh():
        raise InputError("params are one rank's already: shard those of the whole model")
    return replace(config, mesh=mesh)


def part_of(tree: T, config: Config) -> T:
    """Of a whole annotated tree what a rank holds, by the mesh of its config."""
    leaves = annotated_leaves(tree, "")
    return rebuild(tree, [_part(leaf, hint.axes, config) for _, leaf, hint in leaves])


def _part(leaf: Tensor, axes: tuple[str, ...], config: Config) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis in config.divided:
            spans = config.mesh.spans(config.divided[axis])
            if sum(span.size for span in spans) != leaf.shape[dim]:
                leaf = torch.cat([leaf.narrow(dim, *span) for span in spans], dim)
    return leaf
