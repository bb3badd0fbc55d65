"""The C++ kernels against their definitions, for each set of instructions they are compiled for.

A kernel runs in a lowered step, or by itself where many sizes are tried. Memory that nobody wrote
holds NaN meanwhile, a workspace's as well: what a kernel leaves out shows.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import qnext as qn
from qnext.functional.ops import PRIMITIVES
from qnext.functional.ops.tolerance import EXACT, NORMS, SUMS
from qnext.lowering.cpu import build, calls
from qnext.lowering.cpu.calls import BETWEEN, KERNELS
from qnext.lowering.cpu.library import load
from qnext.lowering.cpu.small import SMALL_RULES
from qnext.lowering.cpu.table import RULES
from qnext.lowering.stages import Lowered
from qnext.lowering.target import resolve

Arguments = dict[str, Any]
BF16, F32 = torch.bfloat16, torch.float32
DTYPES = (F32, BF16)
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
lacks = pytest.mark.skipif(not HAS_AVX2, reason="this machine has no AVX2")
pytestmark = pytest.mark.skipif(not build.compiler_here(), reason="no compiler for the kernels")
ISAS = ("native", pytest.param("avx2", marks=lacks), "portable")
each_isa = pytest.mark.parametrize("isa", ISAS)
# kernels of integers and copies have tests of their own, test_cpu_small.py
SMALL = {*(rule.name for rule in SMALL_RULES), "write_back"}
LAYERS = [name for name in KERNELS if name not in SMALL]
each_name = pytest.mark.parametrize("name", LAYERS)
TOLERANCES = {name: PRIMITIVES[name].tolerance for name in LAYERS if name in PRIMITIVES} | {
    "linear": SUMS,
    "swiglu": NORMS,  # torch rounds silu to bfloat16 before the product, the kernel does not
    "gate": NORMS,  # and so with the sigmoid
    "add": EXACT,
    "cast": EXACT,
}
# what becomes the kernels that are no primitives
FUNCTIONS: dict[str, Callable[[Arguments], Tensor]] = {
    "linear": lambda t: linear(t["x"], t["weight"]),
    "swiglu": lambda t: silu(t["gate"]) * t["up"],
    "gate": lambda t: t["x"] * t["gate"].sigmoid(),
    "add": lambda t: t["a"] + t["b"],
    "cast": lambda t: t["x"].to(BF16 if t["x"].dtype == F32 else F32),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def asked_once() -> Iterator[None]:
    """Whether the compiled kernels are up to date is asked of the compiler, 20 ms each time."""
    with mock.patch.object(build, "library", cache(build.library)):
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def samples(name: str) -> list[Arguments]:
    """Samples of a primitive, or of what lies between them."""
    if name in PRIMITIVES:
        return list(PRIMITIVES[name].samples(generator()))
    x, y = 3 * randn(2, 5, 3, 7), randn(2, 5, 3, 7, seed=1)
    return {
        "linear": [{"x": x, "weight": randn(11, 7)}, {"x": x[0, 0, 0], "weight": randn(11, 7)}],
        "swiglu": [{"gate": x, "up": y}],
        "gate": [{"x": y, "gate": x}, {"x": y, "gate": x[..., :1]}],
        "add": [{"a": x, "b": y}],
        "cast": [{"x": x, "narrow": narrow} for narrow in (True, False)],
    }[name]


def cast(name: str, arguments: Arguments, dtypes: dict[str, torch.dtype]) -> Arguments:
    """With the dtypes of a kernel's letters; what is float32 by definition stays so."""
    types = KERNELS[name].types
    return {
        k: v.to(dtypes[types[k]]) if types.get(k) in dtypes else v for k, v in arguments.items()
    }


def letters(name: str) -> list[str]:
    return sorted({wanted for wanted in KERNELS[name].types.values() if len(wanted) == 1})


def same(name: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys(letters(name), dtype)


@contextmanager
def poison() -> Iterator[None]:
    """All memory that torch hands out holds NaN, or an integer's greatest value."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def kernel(isa: str, name: str, **arguments: Any) -> tuple[Tensor, ...]:
    """A kernel by itself; what it writes are copies."""
    given = {k: v.clone() if k in KERNELS[name].writes else v for k, v in arguments.items()}
    with mock.patch.object(calls, "load", lambda _: load(isa)), poison():
        return results(calls.OPS[name](**given))


def reference(name: str, arguments: Arguments) -> tuple[Tensor, ...]:
    known: Any = PRIMITIVES.get(name) or BETWEEN[name]
    return results(known.reference(**arguments))


def precise(name: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """The definition in float64."""
    wide = {k: v.double() if is_real(v) else v for k, v in arguments.items()}
    return reference(name, wide)


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Integers are equal, numbers within the tolerance of the dtype they are in."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        if ours.is_floating_point():
            tolerance = TOLERANCES[name][ours.dtype].relative_rms
            error = (ours.double() - theirs.double()).square().mean().sqrt()
            assert error <= tolerance * theirs.double().square().mean().sqrt(), name
        else:
            assert torch.equal(ours, theirs), name


def lowered(
    name: str, given: Arguments, isa: str = "native", view: Any = None, strict: bool = True
) -> tuple[Lowered, tuple[Tensor, ...]]:
    """A step of one kernel, of views of what is given, and what it computes."""
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in given.items() if k not in tensors}

    def step(tensors: Arguments) -> Any:
        seen = view(tensors) if view else tensors
        return FUNCTIONS[name](seen) if name in BETWEEN else getattr(OPS, name)(**seen, **rest)

    made = qn.jit(step).trace(tensors).lower(resolve("cpu", isa=isa), strict=strict)
    compiled = made.compile()
    with poison():
        return made, results(compiled(tensors))


OPS = torch.ops.qnext


def fired(step: Lowered) -> set[str | None]:
    return {verdict.rule for verdict in step.verdicts.values()}


# --- samples -------------------------------------------------------------------------------------


def test_all_kernels_are_here() -> None:
    """Those of the sources are those of Python; a primitive without one is drawn by torch."""
    sources = [path.read_text() for path in build.KERNELS.glob("*.cpp")]
    compiled = [name for text in sources for name in re.findall(r'^    \{"(\w+)", ', text, re.M)]
    assert sorted(compiled) == sorted(KERNELS) and sorted(LAYERS) == sorted(TOLERANCES)
    assert {rule.name for rule in RULES} == KERNELS.keys() - {"write_back"}
    here = {name for name, primitive in PRIMITIVES.items() if not primitive.collective}
    assert here - KERNELS.keys() == {"gumbel"}
    assert KERNELS.keys() - PRIMITIVES.keys() == BETWEEN.keys() == FUNCTIONS.keys() | SMALL


@each_isa
@each_name
def test_samples_in_a_step(name: str, isa: str) -> None:
    for sample, dtype in product(samples(name), DTYPES if letters(name) else (F32,)):
        arguments = cast(name, sample, same(name, dtype))
        if name == "cast" and arguments["narrow"] == (dtype == BF16):
            continue  # nothing to do
        step, got = lowered(name, arguments, isa)
        want = reference(name, arguments)
        assert fired(step) == {name} and [t.dtype for t in got] == [t.dtype for t in want]
        check(name, got, want)


@each_isa
@each_name
def test_samples_in_mixed_dtypes(name: str, isa: str) -> None:
    """Each letter by itself: a bfloat16 model with float32 states, pools, norms."""
    dtypes = product(DTYPES, repeat=len(letters(name)))
    for sample, chosen in product(samples(name), list(dtypes)):
        arguments = cast(name, sample, dict(zip(letters(name), chosen, strict=True)))
        check(name, kernel(isa, name, **arguments), reference(name, arguments))


# --- sizes that cross tiles, tasks, pages --------------------------------------------------------


def experts(tokens: int, d: int, ffn: int, topk: int = 2) -> Arguments:
    return {
        "x": randn(tokens, d),
        "expert": torch.rand(tokens, 5, generator=generator()).argsort(-1)[:, :topk],
        "weight": torch.rand(tokens, topk, generator=generator()),
        "gate_up": randn(5, 2 * ffn, d, seed=1) * d**-0.5,
        "down": randn(5, d, ffn, seed=2) * ffn**-0.5,
    }


def int8(*shape: int, seed: int = 0, least: int = -127) -> Tensor:
    return torch.randint(least, 128, shape, generator=generator(seed), dtype=torch.int8)


def quantised(mixture: Arguments) -> Arguments:
    """A mixture with int8 weights of its shapes, in the order of the primitive's arguments."""
    x, expert, weight, gate_up, down = mixture.values()
    made = {"x": x, "expert": expert, "weight": weight}
    for name, like in {"gate_up": gate_up, "down": down}.items():
        made[name] = int8(*like.shape, seed=1)
        scale = torch.rand(like.shape[:2], generator=generator(2))
        made[f"{name}_scale"] = scale * like.shape[2] ** -0.5 / 64
    return made


def attention(contexts: list[int], seq: int, page: int, hkv: int, group: int, hd: int) -> Arguments:
    """The last `seq` tokens of each context, or padding; NaN wherever nobody may look."""
    context, batch = torch.tensor(contexts), len(contexts)
    pages = max(contexts) // page + 1
    table = (torch.randperm(batch * pages, generator=generator()) + 1).view(batch, pages)
    pools = torch.full((2, batch * pages + 1, page, hkv, hd), torch.nan)
    for row, length in enumerate(contexts):
        for at in range(length):
            pools[:, table[row, at // page], at % page] = randn(2, hkv, hd, seed=97 * row + at)
    return {
        "query": 2 * randn(batch, seq, hkv * group, hd),
        "key_pool": pools[0],
        "value_pool": pools[1],
        "block_table": table.int(),
        "position": (context - seq).clamp(min=0)[:, None] + torch.arange(seq),
        "context": context,
        "scale": hd**-0.5,
    }


def conv(batch: int, seq: int, channels: int, width: int, drafts: int) -> Arguments:
    some = generator()
    return {
        "x": randn(batch, seq, channels),
        "weight": randn(channels, width),
        "window": randn(batch + 4, width - 1 + drafts, channels),
        "rows": torch.randperm(batch + 4, generator=some)[:batch],
        "offset": torch.randint(0, drafts + 1, (batch,), generator=some),
        "start": torch.arange(batch) % (seq + 1),  # all the way to where zeros begin
    }


def rule(batch: int, seq: int, writes: int, group: int, dv: int, dk: int) -> Arguments:
    some, key = generator(), randn(batch, seq, 3, dk)
    slots = torch.randperm(batch * writes + 2, generator=some)[: batch * writes]
    return {
        "query": randn(batch, seq, 3, dk, seed=1),
        "key": key / key.norm(dim=-1, keepdim=True),
        "value": randn(batch, seq, 3 * group, dv),
        "g": -3 * torch.rand(batch, seq, 3 * group, generator=some),
        "beta": torch.rand(batch, seq, 3 * group, generator=some),
        "state": randn(batch * writes + 2, 3 * group, dv, dk),
        "slots": slots.view(batch, writes),
        "scale": dk**-0.5,
    }


TOKENS = (1, 2, 3, 4, 5, 9, 65, 131)
# columns and rows: 1 to 4 rows of a tile, blocks of 64, a task's share of a few rows or of 64
MATRICES = [(1, 129), (7, 1), (15, 3), (33, 66), (64, 63), (130, 5), (64, 1100)]
SIZES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "linear": lambda: (
        {"x": randn(tokens, columns), "weight": randn(rows, columns, seed=1)}
        for tokens, (columns, rows) in product(TOKENS, MATRICES)
    ),
    "experts": lambda: (
        experts(tokens, *sizes)
        for tokens, sizes in product(TOKENS, [(7, 3), (64, 33), (130, 66), (15, 31), (33, 1)])
    ),
    "attention": lambda: (
        attention(*sizes)
        for sizes in [
            ([1, 0, 9, 17], 1, 4, 2, 3, 5),
            ([6, 18, 0], 9, 4, 2, 1, 16),  # nine queries: a second block; a row is padding from 6
            ([0, 41], 17, 8, 1, 4, 40),
            ([150, 71], 5, 70, 3, 2, 33),  # a page of more than a tile's rows
            ([300, 128, 129], 2, 128, 1, 5, 130),
            ([0, 0, 0], 2, 4, 1, 5, 6),
        ]
    ),
    "short_conv": lambda: (
        conv(batch, seq, channels, width, drafts)
        for width, drafts in [(2, 0), (3, 2), (4, 0), (4, 3), (6, 1)]
        for batch, seq, channels in [(5, 1, 11), (7, 3, 257), (13, 9, 530)]
    ),
    "delta_rule": lambda: (
        rule(2, seq, writes, group, *sizes)
        for seq, writes in [(1, 1), (5, 1), (5, 5), (70, 1), (70, 70)]
        for group, sizes in [(1, (11, 7)), (2, (40, 33)), (1, (130, 16)), (4, (17, 5))]
    ),
    "rotary": lambda: (
        {
            "query": randn(2, seq, 6, hd),
            "key": randn(2, seq, 3, hd, seed=1),
            "position": 7 * torch.arange(2 * seq).view(2, seq),
            "frequency": torch.rand(pairs, generator=generator()),
            "factor": 1.3,  # YaRN's
        }
        for seq, hd, pairs in [(1, 14, 7), (5, 36, 4), (9, 40, 16)]
    ),
    "rms_norm": lambda: (
        {"x": randn(rows, n), "weight": 0.1 * randn(n), "eps": 1e-6}
        for rows, n in [(1, 1), (3, 15), (300, 33), (2, 9001)]
    ),
}


@each_isa
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, isa: str) -> None:
    """In float64 the definition has no error to speak of, and the kernel no allowance for it."""
    for arguments, dtype in product(SIZES[name](), DTYPES):
        given = cast(name, arguments, same(name, dtype))
        check(name, kernel(isa, name, **given), precise(name, given))
