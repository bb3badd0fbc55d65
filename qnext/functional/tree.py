"""Trees of NamedTuples and tensors. The one file that imports torch's private modules."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from qnext.errors import QnextError

Tree = TypeVar("Tree")


def register_constant(cls: type) -> None:
    """Make instances of a frozen class a node without leaves: carried along, never traversed."""
    pytree.register_constant(cls)


def leaves(tree: object) -> list[Any]:
    """The leaves of a tree, in order."""
    return pytree.tree_leaves(tree)


def leaves_with_paths(tree: object) -> list[tuple[str, Any]]:
    """The leaves with their paths, written as in Python: `.layers[3].mixer.conv`."""
    flat, _ = pytree.tree_flatten_with_path(tree)
    return [(pytree.keystr(path), leaf) for path, leaf in flat]


def map_leaves(function: Callable[..., Any], tree: Tree, *rest: object) -> Tree:
    """The same tree with `function` applied to each leaf (and the like leaves of `rest`)."""
    return pytree.tree_map(function, tree, *rest)


def map_with_paths(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """The same tree with `function(path, leaf)`, a leaf or a tree, in place of each leaf."""
    return pytree.tree_map_with_path(lambda path, leaf: function(pytree.keystr(path), leaf), tree)


def rebuild(tree: Tree, new_leaves: list[Any]) -> Tree:
    """A tree of the same structure with other leaves."""
    _, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten(new_leaves, spec)


def place(tree: Tree, device: torch.device | str) -> Tree:
    """The same tree with its tensors on a device; those that are there already are not copied."""
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def nbytes(tree: object) -> int:
    """Bytes of all tensors of a tree, shared storage counted once."""
    sizes = {leaf.data_ptr(): leaf.nbytes for leaf in leaves(tree) if isinstance(leaf, Tensor)}
    return sum(sizes.values())


def process_group(name: str) -> Any:
    """The process group of a name. Raises QnextError where this process has none."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (KeyError, RuntimeError, ValueError) as error:
        raise QnextError(
            f"there is no process group {name!r} here: make the mesh with qn.join in each rank"
        ) from error


def default_store() -> Any:
    """The store by which the processes of a job have found each other."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def is_fake(tensor: object) -> bool:
    """Whether the tensor has a shape and a dtype but no values: a spec, or a trace's stand-in."""
    return isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_concrete(tensor: Tensor) -> bool:
    """Whether the tensor's values may be read on the host now: neither fake nor being traced."""
    return not is_fake(tensor) and not is_tracing()


def is_tracing() -> bool:
    """Whether operations are being recorded, so that what runs now is what a graph will hold."""
    return get_proxy_mode() is not None


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage is still there; torch.func's wrappers do not show theirs."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or tensor.untyped_storage().nbytes() > 0


def same_structure(tree: object, other: object) -> bool:
    """Whether two trees have the same nodes, constants (configs) included."""
    return bool(pytree.tree_structure(tree) == pytree.tree_structure(other))


def fake_mode() -> FakeTensorMode:
    """A context in which new tensors have shapes and no memory."""
    return FakeTensorMode()


def record(function: Callable[..., Any], inputs: list[Tensor]) -> GraphModule:
    """The graph of a function of tensors, primitives kept whole; inputs are fake tensors."""
    return make_fx(function, pre_dispatch=True)(*inputs)


class Template:
    """The structure of a tree, for trees like it that come with every call.

    Plain recursion over tuples: the library's own walk, which must know every kind of node, takes
    milliseconds for a model, as long as a step of it.
    """

    def __init__(self, tree: object, fits: Callable[[Any], Callable[[Any], bool]]) -> None:
        """`fits(leaf)` is asked once, and tells of others whether they may be in its place."""
        self._take, self._make = _template(tree)
        self._checks = [fits(leaf) for leaf in leaves(tree)]

    def take(self, tree: object) -> list[Any] | None:
        """The leaves of a tree of this structure; None where it is another."""
        found: list[Any] = []
        return found if self._take(tree, found) else None

    def fits(self, given: list[Any]) -> bool:
        """Whether all leaves of such a tree may be where they are."""
        return all(check(leaf) for check, leaf in zip(self._checks, given, strict=True))

    def rebuild(self, new_leaves: list[Any]) -> Any:
        """A tree of this structure with other leaves."""
        return self._make(iter(new_leaves))


def _template(tree: Any) -> tuple[Callable[[Any, list[Any]], bool], Callable[[Any], Any]]:
    """How to take the leaves of a tree like this one, and how to make one of leaves."""
    if isinstance(tree, tuple):
        kind, parts = type(tree), [_template(part) for part in tree]
        takes, makes = [take for take, _ in parts], [make for _, make in parts]

        def take_tuple(other: Any, found: list[Any]) -> bool:
            if type(other) is not kind or len(other) != len(takes):
                return False
            # a list, as many fewer calls than a generator
            return all([take(part, found) for take, part in zip(takes, other, strict=True)])  # noqa: C419

        def make_tuple(new: Any) -> Any:
            made = [make(new) for make in makes]
            return tuple(made) if kind is tuple else kind(*made)

        return take_tuple, make_tuple
    mine = leaves(tree)
    if len(mine) == 1 and mine[0] is tree:

        def take_leaf(other: Any, found: list[Any]) -> bool:
            found.append(other)
            return True

        return take_leaf, next

    def take_other(other: Any, found: list[Any]) -> bool:  # a constant, a list, a dict
        found += leaves(other)
        return other is tree or same_structure(tree, other)

    return take_other, lambda new: rebuild(tree, [next(new) for _ in mine])


def is_frozen(tree: object) -> bool:
    """Whether a tree's nodes are tuples and constants: the same object then has the same leaves."""
    if isinstance(tree, tuple):
        return all(map(is_frozen, tree))
    return not isinstance(tree, list | dict)


def give_up(tensor: Tensor, to: str) -> None:
    """Mark a tensor object as donated to the named function; see `given_up_to`."""
    tensor.donated_to = to  # type: ignore[attr-defined]


def given_up_to(tensor: object) -> str | None:
    """The function that a tensor was donated to, if it was."""
    return getattr(tensor, "donated_to", None)


def is_any_given_up(tensors: Iterable[object]) -> bool:
    """Whether `given_up_to` tells of one; for many tensors at every step."""
    return any([getattr(tensor, "donated_to", None) for tensor in tensors])  # noqa: C419


def fake_mode_of(tensors: list[Tensor]) -> FakeTensorMode:
    """The mode that made some fake tensors; another's cannot be mixed with them."""
    return next(t.fake_mode for t in tensors if isinstance(t, FakeTensor))


def record_call(
    function: Callable[..., Any], given: dict[str, Tensor], fixed: dict[str, Any]
) -> GraphModule:
    """The graph of `function(**given, **fixed)`, a tensor or a tuple of them, on fake tensors."""

    def flat(*values: Tensor) -> Any:
        return function(**dict(zip(given, values, strict=True)), **fixed)

    with fake_mode_of(list(given.values())), torch.no_grad():
        return record(flat, list(given.values()))
