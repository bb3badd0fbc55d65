"""What every primitive owes, generated from the registry: a new one is tested the day it is added.

Whether a primitive computes the right thing is the business of test_definitions.py.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qnext.functional.ops import PRIMITIVES
from qnext.functional.ops.tolerance import NORMS, ROUNDS_ONCE
from tests.samples import relative_rms

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Axes that may be of equal size in one sample, and why.
EQUAL_AXES = {("delta_rule", "seq", "writes"): "by contract there is one write, or one a token"}
EQUAL_AXES |= {
    ("all_gather", "part", "whole"): "of one rank the part is the whole",
    ("reduce_scatter", "part", "tokens"): "of one rank the part is the whole",
}
# What computes nothing, on one rank.
MOVES = {"kv_write", "dispatch", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
# Arguments that a comparison with a wider dtype leaves in float32, and why.
ANGLE = "the float32 angle is part of the definition: at position 1000 it is off by 3e-5 radians"
SCALE = "scales are float32 by definition: their error would be that of every product"
GATE = "params keep it in float32 in a bfloat16 model, because an exponential would amplify it"
STAYS_FLOAT32 = {
    torch.float32: {("rotary", "frequency"): ANGLE},
    torch.bfloat16: {
        ("rotary", "frequency"): ANGLE,
        ("delta_gates", "A_log"): GATE,
        ("delta_gates", "dt_bias"): GATE,
        ("int8_linear", "scale"): SCALE,
        ("int8_linear", "x_scale"): SCALE,
        ("int8_experts", "gate_up_scale"): SCALE,
        ("int8_experts", "down_scale"): SCALE,
    },
}
# These read lengths on the host, which a trace through their body cannot know.
READS_VALUES = {
    "attention": "the longest context",
    "experts": "the tokens of each expert",
    "int8_experts": "the tokens of each expert",
}


def samples(name: str) -> list[dict[str, Any]]:
    return list(PRIMITIVES[name].samples(torch.Generator().manual_seed(0)))


CASES = [(name, i) for name in PRIMITIVES for i in range(len(samples(name)))]
FLOATING = [
    (name, i)
    for name, i in CASES
    if any(isinstance(v, Tensor) and v.is_floating_point() for v in samples(name)[i].values())
]
# the references of norms round once as well; it is their fused calls that may round more often
ONCE = [name for name, p in PRIMITIVES.items() if p.tolerance in (ROUNDS_ONCE, NORMS)]
ROUNDED = [case for case in FLOATING if case[0] in ONCE]


def case_id(value: Any) -> str:
    return str(value).removeprefix("torch.")


each_name = pytest.mark.parametrize("name", PRIMITIVES)
each_case = pytest.mark.parametrize(("name", "i"), CASES, ids=case_id)
each_floating_case = pytest.mark.parametrize(("name", "i"), FLOATING, ids=case_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


def map_tensors(change: Callable[[Tensor], Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def cast(
    arguments: dict[str, Any], dtype: torch.dtype, but: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments with floating tensors in `dtype`, except those named in `but`."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and k not in but else v
        for k, v in arguments.items()
    }


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def hints(name: str) -> tuple[dict[str, Any], list[Any]]:
    """The jaxtyping annotations of a primitive's tensor arguments, and of its results."""
    signature = inspect.signature(PRIMITIVES[name].reference)
    arguments = {n: p.annotation for n, p in signature.parameters.items()}
    made = signature.return_annotation
    results = list(made.__args__) if getattr(made, "__origin__", None) is tuple else [made]
    return {n: hint for n, hint in arguments.items() if hasattr(hint, "dim_str")}, results


def named_sizes(hint: Any, tensor: Tensor) -> Iterator[tuple[str, int]]:
    """The axis names of an annotation with their sizes; `*batch` becomes batch.0, batch.1, ..."""
    names = hint.dim_str.split()
    if names[0].startswith("*"):
        many = tensor.ndim - len(names) + 1
        names = [f"{names[0][1:]}.{i}" for i in range(many)] + names[1:]
    return zip(names, tensor.shape, strict=True)


def positional(name: str, arguments: dict[str, Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The primitive as a function of its tensors alone, and those tensors."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    op = PRIMITIVES[name].op
    return lambda *given: op(**(arguments | dict(zip(tensors, given, strict=True)))), [
        *tensors.values()
    ]


# The record.


@each_case
def test_a_sample_has_no_two_equal_axes(name: str, i: int) -> None:
    arguments = samples(name)[i]
    inputs, results = hints(name)
    assert set(inputs) == {k for k, v in arguments.items() if isinstance(v, Tensor)}
    made = outputs(PRIMITIVES[name].op(**arguments))
    pairs = [(hint, arguments[k]) for k, hint in inputs.items()]
    sizes: dict[str, int] = {}
    for hint, tensor in [*pairs, *zip(results, made, strict=True)]:
        for axis, size in named_sizes(hint, tensor):
            assert sizes.setdefault(axis, size) == size, axis
    of_size = defaultdict(list)
    for axis, size in sorted(sizes.items()):
        of_size[size].append(axis)
    equal = {(name, *axes) for axes in of_size.values() if len(axes) > 1}
    assert equal <= set(EQUAL_AXES)


@each_name
def test_samples_are_a_function_of_their_generator(name: str) -> None:
    torch.manual_seed(1)
    first = samples(name)
    torch.manual_seed(2)  # the global generator has no say
    for one, other in zip(first, samples(name), strict=True):
        for k in one:
            assert _same(one[k], other[k]), k


@each_name
def test_a_tolerance_has_a_reason(name: str) -> None:
    tolerance = PRIMITIVES[name].tolerance
    assert set(tolerance) == set(DTYPES)
    assert all(len(t.why.split()) > 3 for t in tolerance.values())
    fine, middle, coarse = (tolerance[dtype].relative_rms for dtype in DTYPES)
    assert 0 <= fine <= middle <= coarse < 0.1


@each_name
def test_every_argument_is_a_keyword(name: str) -> None:
    primitive = PRIMITIVES[name]
    schema, signature = primitive.op._schema, inspect.signature(primitive.reference)
    assert [a.name for a in schema.arguments] == list(signature.parameters)
    assert all(a.kwarg_only for a in schema.arguments)
    assert all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())
    assert not any(a.has_default_value() for a in schema.arguments)
    with pytest.raises(RuntimeError, match="positional argument"):
        primitive.op(*samples(name)[0].values())


@each_name
def test_the_schema_promises_fresh_results(name: str) -> None:
    schema = PRIMITIVES[name].op._schema
    assert not schema.is_mutable
    assert not any(value.alias_info for value in (*schema.arguments, *schema.returns))
    assert len(schema.returns) == len(hints(name)[1])


@each_name
def test_the_docstring_is_at_hand(name: str) -> None:
    packet = getattr(torch.ops.qnext, name)
    assert packet.__doc__ == PRIMITIVES[name].reference.__doc__
    assert packet.__doc__.strip()


# The contract: annotations, shapes, costs.


@each_case
def test_annotations_are_enforced(name: str, i: int) -> None:
    """The hook checks references too; without it, tests elsewhere would prove less."""
    arguments = samples(name)[i]
    for k in hints(name)[0]:
        tensor = arguments[k]
        wrong = tensor.int() if tensor.is_floating_point() else tensor.float()
        with pytest.raises(jaxtyping.TypeCheckError):
            PRIMITIVES[name].op(**(arguments | {k: wrong}))


@pytest.mark.parametrize("wide", [False, True], ids=["", "but what a model keeps in float32"])
@each_dtype
@each_case
def test_shapes_are_those_of_the_reference(
    name: str, i: int, dtype: torch.dtype, wide: bool
) -> None:
    but = {k for of, k in (*STAYS_FLOAT32[torch.bfloat16], ("delta_rule", "state")) if of == name}
    primitive, arguments = PRIMITIVES[name], cast(samples(name)[i], dtype, but if wide else ())
    want = outputs(primitive.reference(**arguments))
    specs = map_tensors(lambda t: t.to("meta"), arguments)
    told = outputs(primitive.shapes(**arguments))
    called = outputs(primitive.op(**specs))
    assert all(t.is_meta for t in called)
    for shapes in (told, called):
        assert [(t.shape, t.dtype) for t in shapes] == [(t.shape, t.dtype) for t in want]


@each_case
def test_costs_are_counts_that_shapes_decide(name: str, i: int) -> None:
    primitive, arguments = PRIMITIVES[name], samples(name)[i]
    specs = map_tensors(lambda t: t.to("meta"), arguments)
    mode = FakeTensorMode()
    fakes = map_tensors(mode.from_tensor, arguments)
    for count in (primitive.flops, primitive.bytes):
        number = count(**arguments)
        assert type(number) is int
        assert number >= 0
        assert count(**specs) == number
        with mode:
            assert count(**fakes) == number
    assert primitive.bytes(**arguments) > 0
    assert primitive.flops(**arguments) > 0 or name in MOVES


@each_case
def test_twice_the_tokens_cost_twice_the_flops(name: str, i: int) -> None:
    primitive, arguments = PRIMITIVES[name], samples(name)[i]
    inputs, _ = hints(name)
    batch = next(hint for hint in inputs.values() if "pages" not in hint.dim_str).dim_str.split()[0]
    assert batch in {"batch", "*batch", "tokens"}
    twice = dict(arguments)
    for k, hint in inputs.items():
        if hint.dim_str.split()[0] == batch:
            twice[k] = torch.cat([arguments[k], arguments[k]])
    assert primitive.flops(**twice) == 2 * primitive.flops(**arguments)
    # weights and pools are read once, whatever the tokens
    assert (
        primitive.bytes(**arguments) < primitive.bytes(**twice) <= 2 * primitive.bytes(**arguments)
    )


# Tracing.


@each_case
def test_a_fake_call_gives_fakes(name: str, i: int) -> None:
    arguments = samples(name)[i]
    want = outputs(PRIMITIVES[name].op(**arguments))
    mode = FakeTensorMode()
    with mode:
        got = outputs(PRIMITIVES[name].op(**map_tensors(mode.from_tensor, arguments)))
    assert all(isinstance(t, FakeTensor) for t in got)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]


@pytest.mark.parametrize("given", ["real tensors, real trace", "real tensors", "fake tensors"])
@each_case
def test_a_trace_holds_one_node_a_call(name: str, i: int, given: str) -> None:
    call, tensors = positional(name, samples(name)[i])
    if given == "fake tensors":
        mode = FakeTensorMode()
        with mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            graph = make_fx(call, pre_dispatch=True, tracing_mode="fake")(*fakes)
    else:
        kind = "real" if given.endswith("real trace") else "fake"
        graph = make_fx(call, pre_dispatch=True, tracing_mode=kind)(*tensors)
    calls = [n.target for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    calls = [target for target in calls if getattr(target, "__name__", "") != "getitem"]
    assert calls == [PRIMITIVES[name].op]
    for got, want in zip(outputs(graph(*tensors)), outputs(call(*tensors)), strict=True):
        assert torch.equal(got, want)


@each_name
def test_a_trace_that_opens_a_primitive_finds_its_body(name: str) -> None:
    """Not the empty results that stand in for a call on fakes: such a graph would run, to noise."""
    call, tensors = positional(name, samples(name)[0])
    trace = make_fx(call, tracing_mode="fake")
    if name in READS_VALUES:
        with pytest.raises(GuardOnDataDependentSymNode):
            trace(*tensors)
        return
    for got, want in zip(outputs(trace(*tensors)(*tensors)), outputs(call(*tensors)), strict=True):
        assert torch.equal(got, want)


@each_name
def test_opcheck(name: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # opcheck adds the sums of results onto the first one's, which must not be an integer then
    if name not in READS_VALUES and name != "quantize_tokens":
        checks.append("test_aot_dispatch_dynamic")

    def leaf(t: Tensor) -> Tensor:
        return t.requires_grad_() if t.is_floating_point() else t

    arguments = map_tensors(leaf, samples(name)[0])
    torch.library.opcheck(PRIMITIVES[name].op, (), arguments, test_utils=checks)


# Values.


@each_case
def test_arguments_are_left_alone(name: str, i: int) -> None:
    arguments = samples(name)[i]
    before = map_tensors(Tensor.clone, arguments)
    made = outputs(PRIMITIVES[name].op(**arguments))
    for k, tensor in before.items():
        assert _same(arguments[k], tensor), k
    for result in made:
        result.zero_()  # nor do results share memory with them
    for k, tensor in before.items():
        assert _same(arguments[k], tensor), k


@each_case
def test_a_call_repeats_to_the_bit(name: str, i: int) -> None:
    first = outputs(PRIMITIVES[name].op(**samples(name)[i]))
    for one, other in zip(first, outputs(PRIMITIVES[name].op(**samples(name)[i])), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@each_floating_case
def test_a_dtype_keeps_to_its_tolerance(name: str, i: int, dtype: torch.dtype) -> None:
    """Against the next wider dtype, on the same rounded arguments."""
    primitive = PRIMITIVES[name]
    stays = {argument for of, argument in STAYS_FLOAT32[dtype] if of == name}
    narrow = cast(samples(name)[i], dtype, stays)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    want = outputs(primitive.op(**cast(narrow, wider, stays)))
    for got, exact in zip(outputs(primitive.op(**narrow)), want, strict=True):
        if exact.is_floating_point():
            assert relative_rms(got, exact) <= primitive.tolerance[dtype].relative_rms
        else:
            assert torch.equal(got, exact)


@pytest.mark.parametrize(("name", "i"), ROUNDED, ids=case_id)
def test_what_rounds_once_rounds_nothing_else(name: str, i: int) -> None:
    primitive = PRIMITIVES[name]
    stays = {argument for of, argument in STAYS_FLOAT32[torch.bfloat16] if of == name}
    narrow = cast(samples(name)[i], torch.bfloat16, stays)
    want = outputs(primitive.op(**cast(narrow, torch.float32)))
    for got, exact in zip(outputs(primitive.op(**narrow)), want, strict=True):
        assert torch.equal(got, exact.to(got.dtype))


@each_floating_case
def test_gradients_are_those_of_finite_differences(name: str, i: int) -> None:
    call, tensors = positional(name, cast(samples(name)[i], torch.float64))
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    # one random direction: a pool has too many elements to try one by one
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@each_floating_case
def test_every_floating_argument_gets_a_gradient(name: str, i: int) -> None:
    call, tensors = positional(name, cast(samples(name)[i], torch.float64))
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    made = [t for t in outputs(call(*tensors)) if t.is_floating_point()]
    torch.autograd.backward(made, [torch.randn_like(t) for t in made])
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
