"""Compiled steps on disk: what one process traced, lowered and fused, the next one only reads.

They lie in the user's cache directory beside the kernels, each named by a digest of all it was made
from: this package's sources, torch's and Python's versions, the function, its arguments' trees and
the target. Only functions of this package are kept, as another's meaning is not in its name.
Delete them at will.
"""

import hashlib
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from qnext.errors import TargetError
from qnext.lowering.compiled import Made, Parts
from qnext.lowering.cpu.library import load
from qnext.lowering.target import Target

PACKAGE = "qnext"
DIGEST = 32  # bytes of the digest that a file begins with


def place(function: Callable[..., Any], arguments: Any, *rest: Any) -> Path | None:
    """The file of a function's step; None for somebody else's function, or strange arguments.

    `rest` is what else the step depends on.
    """
    module = sys.modules.get(function.__module__)
    ours = function.__module__.partition(".")[0] == PACKAGE
    if not ours or getattr(module, function.__name__, None) is not function:
        return None
    try:
        told = (_described(arguments), *map(_described, rest), torch.get_default_dtype())
    except TypeError:
        return None
    named = (_version(), function.__module__, function.__name__, told)
    digest = hashlib.sha256(repr(named).encode()).hexdigest()[:DIGEST]
    return user_cache_path(PACKAGE) / "steps" / f"{function.__name__}-{digest}.step"


@cache
def _version() -> str:
    """A digest of all that decides what lowering makes of a function."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    home = Path(sys.modules[PACKAGE].__file__ or "").parent
    for source in sorted(home.rglob("*.py")):
        digest.update(str(source.relative_to(home)).encode() + source.read_bytes())
    return digest.hexdigest()


def _described(tree: Any) -> Any:
    """A tree in words: its nodes, its constants, and the shapes and dtypes of its tensors."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    kind = f"{type(tree).__module__}.{type(tree).__qualname__}"
    if isinstance(tree, tuple | list):
        return kind, [_described(part) for part in tree]
    if isinstance(tree, dict):
        return kind, [(key, _described(part)) for key, part in tree.items()]
    if tree is None or isinstance(tree, str | int | float) or is_dataclass(tree):
        return kind, tree  # whose `repr` tells all
    raise TypeError(f"what {kind} means is not in its name")


def read(file: Path, function: Callable[..., Any], target: Target) -> Parts | None:
    """A step that was written before; None where there is none, or no kernels to run it with."""
    try:
        content = file.read_bytes()
        load(target.facts.isa)
    except (OSError, TargetError):  # lowering says what is wrong with the kernels
        return None
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:  # the disk's fault
        return None
    made, graph, prepare = pickle.loads(content[DIGEST:])
    return Parts(Made(function, *made), graph, prepare)


def write(file: Path, parts: Parts) -> None:
    """Keep a step. One that holds what no file can hold, or a full disk, leaves nothing behind."""
    made, graph, prepare = parts
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump((made[1:], graph, prepare))
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch, file.name)
            whole.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
            whole.replace(file)
    except (OSError, pickle.PicklingError):
        return


class _Pickler(pickle.Pickler):
    """Operations by name, specs by shape; programs tell themselves what they are."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return _operation, (value._schema.name, value._overloadname)
        if isinstance(value, Tensor):
            if not value.is_meta:
                raise pickle.PicklingError(f"a tensor of the graph's own, {list(value.shape)}")
            return _spec, (tuple(value.shape), value.dtype)
        return NotImplemented


def _operation(name: str, overload: str) -> Any:
    namespace, _, short = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), short), overload)


def _spec(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
