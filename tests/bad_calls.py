"""The table of bad calls and what their errors must say.

Nothing here needs pytest, so that the table can be tried without jaxtyping's import hook as well.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qnext as qn
import tests.bad_calls_speculation  # noqa: F401  (fills CASES)
from tests.calls import World, case, config, other, world

ALL = "forward prefill decode verify generate"


def readable(says: str) -> str:
    """A regex as a test's name."""
    return says.replace("\\n ", ";").replace("\\", "")


def at(row: int, column: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(value))


# --- tokens ----------------------------------------------------------------------------------

NO_ID = r" is no token id: the vocabulary is 0\.\.210"
INTEGER = r"tokens must be int32 or int64, got torch\.{}; write tokens\.long\(\)"
TENSOR = r"tokens must be an integer tensor \[batch{}\], got {}; write torch\.tensor"
SHAPE = r"tokens must be \[batch{}\], got shape \[{}\]"
FEW = "tokens has {0} rows, the state has 2 sequences; .*batch={0}"
for name, says, change in (
    ("beyond the vocabulary", r"tokens\[0, 2\] = 211" + NO_ID, at(0, 2, 211)),
    ("negative", r"tokens\[0, 0\] = -1" + NO_ID, at(0, 0, -1)),
    ("far off in the second row", r"tokens\[1, 1\] = 1099511627776" + NO_ID, at(1, 1, 2**40)),
    ("of no column", "empty prompt: tokens must have at least one", lambda t: t[:, :0]),
    ("float", INTEGER.format("float32"), Tensor.float),
    ("bool", INTEGER.format("bool"), Tensor.bool),
    ("uint8", INTEGER.format("uint8"), lambda t: t.to(torch.uint8)),
    ("of rank 1", SHAPE.format(", seq", "3"), lambda t: t[0]),
    ("of rank 3", SHAPE.format(", seq", "1, 2, 3"), lambda t: t[None]),
    ("of another batch", FEW.format(1), lambda t: t[:1]),
):
    case(f"tokens {name}", says, tokens=change)
for change in (Tensor.tolist, Tensor.numpy, lambda t: "Hello", lambda t: None):
    kind = type(change(torch.zeros(1))).__name__
    case(f"tokens {kind}", TENSOR.format(", seq", kind), typed=True, tokens=change)
for name, says, change in (
    ("beyond the vocabulary", r"tokens\[1, 0\] = 213" + NO_ID, lambda t: t + 210),
    ("negative", r"tokens\[0, 0\] = -2" + NO_ID, lambda t: t - 2),
    ("of rank 2", SHAPE.format("", "2, 1"), lambda t: t[:, None]),
    ("of rank 0", SHAPE.format("", ""), lambda t: t[0]),
    ("of another batch", FEW.format(4), lambda t: t.repeat(2)),
    ("float", INTEGER.format("float64"), Tensor.double),
    ("list", TENSOR.format("", "list"), Tensor.tolist),
    ("integer", TENSOR.format("", "int"), lambda t: 3),
):
    case(f"tokens {name}", says, "decode", tokens=change)

# --- lengths -----------------------------------------------------------------------------------

WHOLE = r"lengths must be int32 or int64 \[batch=2\], got torch\.{} \[{}\]"
COLUMNS = r" must lie in {}\.\.3.* tokens has 3 columns"
for name, says, value in (
    ("beyond seq", r"lengths\[1\] = 4" + COLUMNS.format("[01]"), [3, 4]),
    ("negative", r"lengths\[0\] = -1" + COLUMNS.format("[01]"), [-1, 3]),
    ("beyond int32", r"lengths\[1\] = 4294967297" + COLUMNS.format("[01]"), [1, 2**32 + 1]),
    ("float", WHOLE.format("float32", "2"), [1.0, 2.0]),
    ("bool", WHOLE.format("bool", "2"), [True, True]),
    ("of another batch", WHOLE.format("int64", "3"), [1, 2, 3]),
    ("of rank 2", WHOLE.format("int64", "2, 1"), [[1], [2]]),
    ("of rank 0", WHOLE.format("int64", ""), 2),
):
    case(f"lengths {name}", says, lengths=torch.tensor(value))
ZERO = r"empty prompt: lengths\[1\] = 0" + COLUMNS.format("1")
case("lengths zero", ZERO, "prefill generate", lengths=torch.tensor([2, 0]))
for value in ([1, 2], 2, np.array([1, 2])):
    kind = type(value).__name__
    says = rf"lengths must be an integer tensor \[batch\], got {kind}"
    case(f"lengths {kind}", says, typed=True, lengths=value)

# --- trees -------------------------------------------------------------------------------------

FIT = r"params and state do not fit the model:\n  "
HINT = r"\nmake the state with init_state\(params\.config, batch, capacity\)"
STATE = r"state must be a qnext State \(qn\.init_state\), got "
PARAMS = r"params must be a qnext Params \(qn\.load, qn\.demo\), got "
DONATED = r"{} was donated to a call and its memory reused\. Use the state that"
SWAPPED: dict[str, Any] = {"params": lambda p: world().state, "state": lambda w: w.params}
case("params and state swapped", PARAMS + "State", typed=True, **SWAPPED)
for kind, change in (
    ("dict", lambda x: x._asdict()),
    ("NoneType", lambda x: None),
    ("tuple", lambda x: tuple(x)),
):
    case(f"params {kind}", PARAMS + kind, ALL, True, params=change)
    case(f"state {kind}", STATE + kind, ALL, True, state=lambda w, f=change: f(w.state))
for says, change in (
    ("params.config must be a Config, got NoneType", lambda p: p._replace(config=None)),
    ("params.layers has 1 parts, the model has 2", lambda p: p._replace(layers=p.layers[:1])),
    ("params.layers must be a tuple, got NoneType", lambda p: p._replace(layers=None)),
    (r"params.layers\[0\] must be LayerParams, got N", lambda p: p._replace(layers=(None,) * 2)),
    (
        r"params.layers\[0\].mixer must be DeltaNetParams, got AttentionParams\n",
        lambda p: p._replace(layers=p.layers[::-1]),
    ),
    ("params.head has 0 parts, the model has 1", lambda p: p._replace(head=())),
    ("params.mtp has 0 parts, the model has 1", lambda p: p._replace(mtp=())),
    ("params.embed must be a tensor, got ndarray", lambda p: p._replace(embed=p.embed.numpy())),
    (
        r"params.embed must be \[vocab=211, d=40\], got \[40, 211\]",
        lambda p: p._replace(embed=p.embed.T),
    ),
    (
        "params.norm must be floating point, got torch.int32",
        lambda p: p._replace(norm=p.norm.int()),
    ),
):
    case(readable(says), FIT + says, ALL, params=change)
for says, change in (
    (
        r"state.layers\[1\].key must be \[pages=3, page=128, hkv=2, hd=24\], got \[3, 128, 4, 24\]",
        lambda w: w.other(num_key_value_heads=4),
    ),
    (
        r"state.layers\[0\].window must be \[rows=3, window=3, conv=144\], got \[3, 4, 144\]",
        lambda w: w.other(linear_conv_kernel_dim=5),
    ),
    (
        r"state.layers\[0\].window must be \[rows=3, window=4, conv=144\], got \[3, 3, 144\]",
        lambda w: w.put(slots=w.state.slots.repeat(1, 2)),
    ),
    (
        r"state.layers\[0\] must be Delta, got KV\n  state.layers\[1\] must be KV, got Delta",
        lambda w: w.other(layer_types=["full_attention", "linear_attention"]),
    ),
    ("state.layers has 4 parts, the model has 2", lambda w: w.other(num_hidden_layers=4)),
    ("state.mtp has 0 parts, the model has 1", lambda w: w.other(mtp_num_hidden_layers=0)),
    ("state.layers must be a tuple, got NoneType", lambda w: w.put(layers=None)),
    ("state.layers must be a tuple, got list", lambda w: w.put(layers=[])),
    (
        r"state.layers\[0\] must be Delta, got NoneType",
        lambda w: w.put(layers=(None,) * 2),
    ),
    ("state.lengths must be a tensor, got NoneType", lambda w: w.put(lengths=None)),
    ("state.slots must be a tensor, got NoneType", lambda w: w.put(slots=None)),
    (
        "state.lengths must be torch.int32, got torch.int64",
        lambda w: w.put(lengths=w.state.lengths.long()),
    ),
    (
        r"state.block_table must be \[batch=2, max_pages\], got \[1, 1\]",
        lambda w: w.put(block_table=w.state.block_table[:1]),
    ),
    (
        r"state.layers\[0\].window must be a tensor, got ndarray",
        lambda w: w.layer(0, window=Tensor.numpy),
    ),
    (
        r"state.layers\[1\].key must be floating point, got torch.int32",
        lambda w: w.layer(1, key=Tensor.int),
    ),
    (
        r"state.layers\[1\].value must be \[pages=3, page=128, hkv=2, hd=24\], got \[2, 128",
        lambda w: w.layer(1, value=lambda t: t[1:]),
    ),
    (
        r"state.layers\[0\].recurrent must be \[slots, hv=6, dv=14, dk=10\], got \[6, 14, 10\]",
        lambda w: w.layer(0, recurrent=lambda t: t[0]),
    ),
):
    case(readable(says), f"{FIT}{says}(.|\n)*{HINT}", ALL, state=change)
for path, find in (
    ("layers[0].recurrent", lambda s: s.layers[0].recurrent),
    ("layers[1].value", lambda s: s.layers[1].value),
    ("mtp[0].key", lambda s: s.mtp[0].key),
    ("lengths", lambda s: s.lengths),
):
    says = DONATED.format(re.escape(f"state.{path}"))
    gone = {"error": qn.DonatedError, "state": lambda w, f=find: w.donated(f)}
    case(f"state: {path} donated", says, ALL, **gone)

# --- capacity, numbers, sampling -----------------------------------------------------------------

FULL = "row {} holds 3 tokens and would hold {}, but its capacity is 7; .*batch=2, capacity={}"
for name, says, lengths in (
    ("beyond capacity", FULL.format(0, 9, 9), None),
    ("beyond capacity in the second row", FULL.format(1, 8, 8), torch.tensor([4, 5])),
):
    case(
        name,
        says,
        "forward prefill verify",
        error=qn.CapacityError,
        tokens=lambda t: t.repeat(1, 2),
        lengths=lengths,
    )
other(
    "generate: beyond capacity by what is new",
    lambda w: partial(qn.generate, *w, 2),
    FULL.format(0, 8, 8),
    error=qn.CapacityError,
)


def integer(name: str, make: Callable[[World, Any], Callable[[], Any]], least: int = 1) -> None:
    """Cases of a number that must be an integer, and of one too small."""
    for value in (least - 1, -7, True, 2.5, "3"):
        says = rf"{name.split()[1]} must be an integer >= {least}, got {value!r}"
        typed = isinstance(value, float | str)
        other(f"{name} {value!r}", lambda w, v=value: make(w, v), says, typed=typed)


integer("generate: max_new_tokens", lambda w, v: partial(qn.generate, *w, v))
integer("init_state: batch", lambda w, v: partial(qn.init_state, config(), v, 7))
integer("init_state: capacity", lambda w, v: partial(qn.init_state, config(), 2, v))
integer("init_state: draft", lambda w, v: partial(qn.init_state, config(), 2, 7, draft=v), least=0)
integer("generate: draft", lambda w, v: partial(qn.generate, *w, 1, draft=v), least=0)

for field, rule, values in (
    ("temperature", "a float32 number >= 0", (-0.5, 1e300, torch.nan, torch.inf)),
    ("top_k", r"an integer >= 0 \(0 is off\)", (-1,)),
    ("top_p", r"a number in \(0, 1\]", (0.0, 1.01, -1.0, torch.nan)),
    ("min_p", r"a number in \[0, 1\]", (-0.1, 1.1, torch.nan)),
    ("seed", "a 64-bit integer", (2**63, -(2**63) - 1)),
    ("repetition_penalty", "a finite number > 0", (0.0, -1.0, torch.inf, torch.nan)),
    ("presence_penalty", "a finite number", (torch.inf, torch.nan)),
    ("frequency_penalty", "a finite number", (-torch.inf, torch.nan)),
):
    for value in values:
        other(
            f"Sampling: {field} {value}",
            lambda w, f=field, v=value: partial(qn.Sampling, **{f: v}),
            rf"{field} must be {rule}, got {re.escape(repr(value))}",
        )
EACH = "sampling must be one Sampling or one for each of the 2 rows, got "
for name, records in {
    "of one": [qn.Sampling()],
    "of three": [qn.Sampling()] * 3,
    "empty": [],
}.items():
    other(
        f"generate: sampling {name}",
        lambda w, r=records: partial(qn.generate, *w, 1, sampling=r),
        EACH + r"\[",
    )
other(
    "generate: sampling of other things",
    lambda w: partial(qn.generate, *w, 1, sampling=[None, None]),  # beartype looks at one of them
    EACH + r"\[None, None\]",
    typed=True,
)

for rows in ([], [2], [0, -1], [[0, 1]]):
    other(
        f"select: rows {rows}",
        lambda w, r=rows: partial(qn.select, w.state, torch.tensor(r, dtype=torch.int64)),
        rf"rows must list indices within 0\.\.1, got {re.escape(str(rows))}",
    )

# --- advance ----------------------------------------------------------------------------------

other(
    "advance: tokens beyond the vocabulary",
    lambda w: partial(qn.advance, w.params, w.state, w.tokens[:, 0] + 210),
    r"tokens\[1, 0\] = 213" + NO_ID,
)

# --- the MTP module ----------------------------------------------------------------------------


def hidden(*shape: int) -> Tensor:
    return torch.zeros(*shape)


for value in (1, -1):
    other(
        f"mtp: module {value}",
        lambda w, v=value: partial(qn.mtp, w.params, w.state, hidden(2, 3, 40), w.tokens, None, v),
        f"this model has 1 MTP modules, module {value} is not one of them; load a checkpoint",
    )
for kind, trees in (("params", (None, "state")), ("state", ("params", {}))):
    other(
        f"mtp: {kind} of another kind",
        lambda w, t=trees: partial(
            qn.mtp,
            *(getattr(w, x) if isinstance(x, str) else x for x in t),
            hidden(2, 3, 40),
            w.tokens,
        ),
        f"{kind} must be a qnext",
        typed=True,
    )
other(
    "mtp: hidden of another width",
    lambda w: partial(qn.mtp, w.params, w.state, hidden(2, 3, 39), w.tokens),
    r"hidden must be a tensor \[2, 3, 40\] to go with tokens, got \[2, 3, 39\]",
)
other(
    "mtp: beyond capacity",
    lambda w: partial(qn.mtp, w.params, w.state, hidden(2, 9, 40), w.tokens.repeat(1, 3)),
    "row 0 holds 0 tokens and would hold 9, but its capacity is 7",
    error=qn.CapacityError,
)

# --- kinds of values ------------------------------------------------------------------------------

for field, value in (("top_k", 2.5), ("top_k", True), ("seed", 1.5), ("temperature", "hot")):
    other(
        f"Sampling: {field} {value}",
        lambda w, f=field, v=value: partial(qn.Sampling, **{f: v}),
        f"{field} must be",
        typed=value is not True,
    )
for name, keywords, says in (
    ("sampling None", {"sampling": None}, EACH),
    ("eos 2.5", {"eos": 2.5}, "eos must be"),
    ("eos beyond the vocabulary", {"eos": 211}, "eos .*211"),
):
    other(
        f"generate: {name}",
        lambda w, k=keywords: partial(qn.generate, *w, 1, **k),
        says,
        typed="beyond" not in name,
    )
other(
    "generate: tokens list, with eos",
    lambda w: partial(qn.generate, w.params, w.state, w.tokens.tolist(), 1, eos=1),
    TENSOR.format(", seq", "list"),
    typed=True,
)
for rows in (None, [0.7], torch.tensor([True, False])):
    other(
        f"select: rows {rows}",
        lambda w, r=rows: partial(qn.select, w.state, r),
        "rows must list indices",
        typed=not isinstance(rows, torch.Tensor),
    )
other(
    "mtp: hidden list",
    lambda w: partial(qn.mtp, w.params, w.state, [1.0], w.tokens),
    "hidden must be",
    typed=True,
)
