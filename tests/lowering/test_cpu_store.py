"""Steps on disk: what is read is what was made, and what must not be read is made anew."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qnext as qn
from qnext.errors import TargetError
from qnext.functional.blocks import unembed
from qnext.functional.tree import leaves, map_leaves
from qnext.lowering import stages
from qnext.lowering.compiled import Compiled
from qnext.lowering.cpu import build, library, store
from qnext.lowering.cpu.plan import Plan
from qnext.lowering.target import resolve
from tests.sequences import BATCH, model, started, words

pytestmark = pytest.mark.skipif(build.compiler_here() is None, reason="no compiler for the kernels")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where steps lie, none at first."""
    monkeypatch.setattr(store, "user_cache_path", lambda _: tmp_path)
    return tmp_path / "steps"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions traced from here on."""
    names: list[str] = []

    def recorded(function: Callable[..., Any], arguments: Any) -> Any:
        names.append(function.__name__)
        return trace(function, arguments)

    trace = stages.trace
    monkeypatch.setattr(stages, "trace", recorded)
    return names


def step(function: Callable[..., Any], *given: Any, **how: Any) -> Compiled:
    """Compiled as another process would have it: nothing is known but what lies on disk."""
    donate = () if function is unembed else "state"
    return qn.jit(function, donate=donate, target="cpu").compile(*given, **how)


def small() -> tuple[qn.Params, Tensor]:
    """Arguments of `unembed`, which is soon traced."""
    return model(), torch.randn(BATCH, 3, 40, generator=torch.Generator().manual_seed(1))


def copied(state: qn.State) -> qn.State:
    """The same values in other memory, as a step uses its state up."""
    return map_leaves(torch.clone, state)


CASES: dict[str, tuple[Callable[..., Any], Callable[[qn.Params], qn.Params], tuple[Any, ...]]] = {
    "decode": (qn.decode, lambda params: params, (words(1)[:, 0],)),
    "prefill": (qn.prefill, lambda params: params, (words(7), torch.tensor([7, 0, 3, 1, 6]))),
    "speculate": (qn.speculate, lambda params: params, (words(1)[:, 0], 2)),
    "W8A8": (qn.decode, qn.quantize, (words(1)[:, 0],)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_computes_what_was_made(case: str, traces: list[str]) -> None:
    function, change, rest = CASES[case]
    plain = model(mtp_num_hidden_layers=1)
    params, state = change(plain), started(plain, draft=2)
    made, read = (step(function, params, state, *rest, strict=True) for _ in range(2))
    assert traces == [function.__name__]
    ours, theirs = (each(params, copied(state), *rest) for each in (made, read))
    for mine, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert torch.equal(mine, other)


def test_what_is_read_can_be_asked_what_it_was_made_of(traces: list[str]) -> None:
    given = (model(), started(model()), words(1)[:, 0])
    made, read = step(qn.decode, *given), step(qn.decode, *given)
    assert read.made == made.made._replace(arguments=read.made.arguments, result=read.made.result)
    assert traces == ["decode"]
    assert read.lowered.as_text() == made.lowered.as_text()
    assert read.lowered.memory_analysis() == made.lowered.memory_analysis()
    assert traces == ["decode"] * 2


def test_what_is_read_refuses_what_was_made_refuses() -> None:
    given = (model(), started(model()), words(1)[:, 0])
    other = (*given[:2], words(2))
    told = []
    for each in (step(qn.decode, *given), step(qn.decode, *given)):
        with pytest.raises(qn.LoweringError, match=r"tokens must be int64 \[5\]") as error:
            each(*other)
        told.append(str(error.value))
    assert told[0] == told[1]
    state = given[1]
    each(*given)
    with pytest.raises(qn.DonatedError, match="decode"):
        each(given[0], state, given[2])


@pytest.mark.parametrize(
    "other", ["shape", "dtype", "config", "number", "donated", "isa", "default", "source", "torch"]
)
def test_a_step_of_something_else_is_another_file(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = resolve("cpu")
    given = {"params": model(), "state": started(model()), "tokens": words(2), "draft": 1}
    more: dict[str, Any] = {"donate": ("state",)}
    first = store.place(qn.speculate, given, more, target)
    assert first == store.place(qn.speculate, dict(given), dict(more), resolve("cpu"))
    store._version.cache_clear()
    if other == "shape":
        given["tokens"] = words(3)
    if other == "dtype":
        given["tokens"] = words(2).int()
    if other == "config":  # of the same shapes
        given["params"] = given["params"]._replace(
            config=given["params"].config.with_precision(router=torch.bfloat16)
        )
    if other == "number":
        given["draft"] = 1.0
    if other == "donated":
        more["donate"] = ()
    if other == "isa":
        target = resolve("cpu", isa="portable")
    if other == "default":
        monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    if other == "source":
        read_bytes = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda file: read_bytes(file) + b" " * (file.name == "rules.py")
        )
    if other == "torch":
        monkeypatch.setattr(torch, "__version__", "2.9.0")
    assert first is not None and first != store.place(qn.speculate, given, more, target)
    store._version.cache_clear()


def double(params: Tensor) -> Tensor:
    return params + params


def test_functions_of_others_are_made_in_every_process(folder: Path, traces: list[str]) -> None:
    given = torch.ones(3)
    renamed = type(qn.decode)(double.__code__, {}, "decode")
    renamed.__module__ = qn.decode.__module__  # says that it is ours, and is not
    for function in (double, renamed):
        for _ in range(2):
            assert torch.equal(step_of_one(function)(given), given * 2)
    assert traces == ["double"] * 2 + ["decode"] * 2 and not folder.exists()


def step_of_one(function: Callable[..., Any]) -> Compiled:
    return qn.jit(function, target="cpu").compile(torch.ones(3))


def test_arguments_whose_repr_does_not_tell_them_are_not_kept() -> None:
    assert store.place(qn.decode, {"params": object()}) is None
    assert store.place(qn.decode, {"params": None}) is not None


@pytest.mark.parametrize("torn", ["half", "empty", "another byte"])
def test_a_file_that_is_not_whole_is_made_anew(torn: str, folder: Path, traces: list[str]) -> None:
    given = small()
    step(unembed, *given)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    broken = {"half": whole[: len(whole) // 2], "empty": b"", "another byte": whole[:-1] + b"\x00"}
    file.write_bytes(broken[torn])
    step(unembed, *given)
    assert traces == ["unembed"] * 2 and file.read_bytes() == whole
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_where_nothing_can_be_written_steps_run_all_the_same(
    folder: Path, traces: list[str]
) -> None:
    folder.write_text("a file where the folder would be")
    given = small()
    for _ in range(2):
        step(unembed, *given)(*given)
    assert traces == ["unembed"] * 2 and folder.read_text().startswith("a file")


def test_what_no_file_can_hold_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise pickle.PicklingError("no")

    monkeypatch.setattr(store._Pickler, "reducer_override", refuse)
    step(unembed, *small())
    assert not folder.exists()


def test_numbers_are_not_kept_as_a_shape(folder: Path) -> None:
    """A graph may hold tensors of its own, which no spec can stand for."""
    parts, file = step(unembed, *small()).parts, folder / "another.step"
    assert isinstance(parts.graph, Plan)
    first, *rest = parts.graph.calls
    calls = (first._replace(kwargs={"table": torch.ones(2)}), *rest)
    store.write(file, parts._replace(graph=parts.graph._replace(calls=calls)))
    assert not file.exists()
    store.write(file, parts)
    assert file.exists()


def test_reading_makes_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make one takes several times as long as to read the rest."""
    given = (model(), started(model()), words(2))
    step(qn.prefill, *given)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a graph")

    monkeypatch.setattr(torch.fx.Graph, "__init__", refuse)
    step(qn.prefill, *given)(*given)


def test_a_demand_is_held_against_what_was_left_before(traces: list[str]) -> None:
    """`decode` with its draws is not wholly in kernels: the second process hears it, too."""
    given = (model(), started(model()), words(1)[:, 0], qn.knobs([qn.Sampling()] * BATCH))
    assert step(qn.advance, *given).made.left
    with pytest.raises(qn.LoweringError, match="left on the reference"):
        step(qn.advance, *given, strict=True)
    assert [each.site for each in step(qn.advance, *given).made.left]


def test_without_kernels_what_lies_there_is_no_use(
    monkeypatch: pytest.MonkeyPatch, traces: list[str]
) -> None:
    given = small()
    step(unembed, *given)

    def refuse(isa: str) -> None:
        raise TargetError("no compiler")

    monkeypatch.setattr(library, "load", refuse)
    monkeypatch.setattr(store, "load", refuse)
    with pytest.warns(UserWarning, match="no compiler"):
        assert step(unembed, *given).made.target.name == "reference"
    with pytest.raises(TargetError, match="no compiler"):
        step(unembed, *given, strict=True)
