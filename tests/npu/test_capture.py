"""Captured steps: what a graph remembers, what may change between replays, and what is refused."""

from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.tree import leaves
from qnext.lowering.compiled import Compiled
from qnext.lowering.softnpu import bridge
from qnext.runtime.steps import guess
from tests.npu.models import Case, case, copied, here, params, there

STEPS = 30
SETTINGS = [qn.Sampling(0.0), qn.Sampling(0.8, seed=7), qn.Sampling(1.0, top_p=0.9, seed=8)]


def compiled(given: Case, donate: Any = "state", target: Any = None, **how: Any) -> Compiled:
    step = qn.jit(given.function, donate=donate)
    return step.trace(*given.arguments).lower(target or here(), **how).compile()


@pytest.mark.parametrize("drawing", ["greedy", "temperature", "filters"])
def test_an_iteration_goes_round_without_the_host(drawing: str) -> None:
    """Decode, draw, advance: tokens and lengths stay on the device for as long as one likes."""
    given = case("decode", params("fused"))
    more: tuple[Any, ...] = () if drawing == "greedy" else (qn.knobs(SETTINGS),)
    more += (True,) if drawing == "filters" else ()
    given = Case(qn.advance, (*given.arguments, *more))
    step = compiled(given, donate=("state", "tokens"))

    weights, state, tokens, *rest = there(given.arguments)
    eager = []
    for _ in range(STEPS):
        tokens, state = step(weights, state, tokens, *rest)
        eager.append(tokens.clone())
    lengths = state.lengths.cpu()

    weights, state, tokens, *rest = there(given.arguments)
    captured = step.capture(weights, state, tokens, *rest)
    replayed = []
    before = bridge.counters()
    for _ in range(STEPS):
        tokens, state = captured(weights, state, tokens, *rest)
        replayed.append(tokens.clone())  # donated: the next step writes here
    after = bridge.counters()
    assert (after.d2h, after.h2d, after.synchronizations) == (
        before.d2h,
        before.h2d,
        before.synchronizations,
    )
    assert torch.equal(torch.stack(replayed).cpu(), torch.stack(eager).cpu())
    assert torch.equal(state.lengths.cpu(), lengths)
    assert len(captured.launches()) == step.lowered.cost_analysis()["launches"]


def test_drawing_is_that_of_the_reference() -> None:
    """The same logits and seeds give the same tokens, whatever draws them."""
    logits = torch.randn(3, 211, generator=torch.Generator().manual_seed(2))
    position = torch.tensor([5, 300, 17], dtype=torch.int32)

    def draw(logits: torch.Tensor, settings: Any, position: torch.Tensor) -> torch.Tensor:
        kept = qn.functional.sampling.restrict(logits, settings)
        return qn.functional.sampling.draw(kept, settings, position)

    arguments = (logits, qn.knobs(SETTINGS), position)
    step = qn.jit(draw).trace(*arguments).lower(here(), strict=True).compile()
    for offset in range(20):
        moved = (logits, qn.knobs(SETTINGS), position + offset)
        assert torch.equal(step(*there(moved)).cpu(), draw(*moved))


def test_other_rows_on_the_same_pools_are_copied_in() -> None:
    given = case("decode", params("fused"), sequences=5)
    step = compiled(given)
    weights, state, tokens = there(given.arguments)
    captured = step.capture(weights, state, tokens)
    order = torch.tensor([2, 0, 1]).npu()
    tables = {name: leaf[order] for name, leaf in state._asdict().items() if torch.is_tensor(leaf)}
    other = state._replace(**tables)
    want, _ = step(weights, copied(other), tokens[order])
    got, _ = captured(weights, other, tokens[order])
    assert torch.equal(got, want)


def test_results_are_values() -> None:
    given = case("decode", params("fused"))
    step = compiled(given)
    weights, state, tokens = there(given.arguments)
    captured = step.capture(weights, state, tokens)
    first, after = captured(weights, state, tokens)
    kept = first.cpu()
    captured(weights, after, tokens)
    assert torch.equal(first.cpu(), kept)
    with pytest.raises(qn.DonatedError, match="lengths was donated to decode"):
        captured(weights, after, tokens)


def test_other_memory_is_refused_by_path() -> None:
    given = case("decode", params("fused"))
    step = compiled(given)
    weights, state, tokens = there(given.arguments)
    captured = step.capture(weights, state, tokens)
    with pytest.raises(qn.LoweringError, match=r"params.embed is other memory than decode was cap"):
        captured(copied(weights), state, tokens)
    with pytest.raises(qn.LoweringError, match=r"state.layers\[0\].recurrent is other memory"):
        captured(weights, copied(state), tokens)
    with pytest.raises(qn.LoweringError, match=r"tokens must be on 'npu', got 'cpu': qn.place\(tr"):
        captured(weights, state, tokens.cpu())
    with pytest.raises(qn.LoweringError, match=r"tokens must be int64 \[3\], got int32 \[3\]"):
        captured(weights, state, tokens.int())
    captured(weights, state, tokens)  # nothing was given up by what was refused


def test_what_reads_the_host_cannot_be_captured() -> None:
    weights = params("fused")
    wide = qn.functional.tree.map_leaves(lambda leaf: leaf.float(), weights)
    wide = wide._replace(config=weights.config.with_precision(compute=torch.float32))
    state = qn.init_state(wide.config, 3, 300)
    given = Case(qn.decode, (wide, state, torch.tensor([3, 5, 7])))
    step = compiled(given)
    with pytest.raises(qn.LoweringError, match=r"decode cannot be captured: .*attention") as error:
        step.capture(*there(given.arguments))
    assert "left on their reference are" in str(error.value) and "Traceback" not in str(error.value)


def test_the_reference_has_no_graphs() -> None:
    given = case("decode", params("fused"))
    with pytest.raises(qn.LoweringError, match="target 'reference' has no graphs to capture"):
        compiled(given, target="reference").capture(*given.arguments)


# ---- lengths from the host


def test_lengths_from_the_host_are_typed_arguments() -> None:
    given = case("decode", params("fused"))
    step = compiled(given, host_lengths=True)
    assert [tuple(a) for a in step.lowered.host] == [("context", 3, 384)]
    masked = compiled(given)
    assert (  # an event is waited for and reset at each attention, and no mask is made
        step.lowered.cost_analysis()["launches"] == masked.lowered.cost_analysis()["launches"] + 1
    )
    arguments = there(given.arguments)
    captured = step.capture(*arguments)
    assert len(captured.launches()) == step.lowered.cost_analysis()["launches"]
    context = (given.arguments[1].lengths + 1).tolist()
    want, _ = step(*there(given.arguments), host={"context": context})
    wrong = [None, {}, {"lengths": context}, {"context": context[:2]}, {"context": [1, 2, 385]}]
    for host in [*wrong, {"context": torch.tensor(context)}]:
        with pytest.raises(qn.LoweringError, match=r"(host arguments|host\['context'\] must be 3)"):
            captured(*arguments, host=host)  # type: ignore[arg-type]
    got, _ = captured(*arguments, host={"context": context})
    assert torch.equal(got, want)
    with pytest.raises(qn.LoweringError, match=r"arguments \['context'\]: it takes none"):
        masked(*there(given.arguments), host={"context": context})


def test_padded_rows_keep_their_lengths_on_the_device() -> None:
    given = case("prefill", params("fused"))
    lowered = qn.jit(qn.prefill).trace(*given.arguments).lower(here(), host_lengths=True)
    assert lowered.host == ()
    assert "rows may be padded: their queries would need lengths from the host" in lowered.report()


def test_what_a_step_only_hands_on_is_neither_copied_nor_bound() -> None:
    """Guessing has no part in the layers' pools, reads the MTP module's hidden states where they
    are, and writes its keys and values."""
    weights = qn.place(params("demo"), "npu")
    state = qn.init_state(weights.config, 3, 256, device="npu", draft=1)
    tokens = torch.tensor([5, 7, 11]).npu()
    made = qn.jit(guess, donate="state").trace(weights, state, tokens, 1, None)
    captured = made.lower(here()).compile().capture(weights, state, tokens, 1, None)
    elsewhere = state._replace(layers=copied(state.layers))
    theirs = [leaf.data_ptr() for leaf in leaves((elsewhere.layers, elsewhere.mtp))]
    _, after = captured(weights, elsewhere, tokens, 1, None)
    assert [leaf.data_ptr() for leaf in leaves((after.layers, after.mtp))] == theirs


# ---- buckets


def test_buckets_share_one_memory_pool_and_are_made_largest_first() -> None:
    given = case("decode", params("fused"), sequences=8)
    weights, state, tokens = there(given.arguments)
    buckets = qn.Buckets(qn.advance, weights, state, [(tokens,)], [1, 2, 8], target=here().name)
    made = list(buckets._steps.values())
    rows = [step.trace.arguments["tokens"].shape[0] for step in made]
    assert rows == [8, 2, 1]
    assert len({step.pool for step in made}) == 1
    for count in (3, 1, 2):  # rows in use come and go
        part, first = qn.narrow(state, count), tokens[:count]
        want, _ = qn.jit(qn.advance, target=here().name)(weights, copied(part), first)
        got, state_after = buckets(copied_tables(part), first)
        assert torch.equal(got, want) and state_after.batch == count
        restore(state, there(given.arguments)[1])
    with pytest.raises(qn.LoweringError, match="9 rows fit no bucket of 1, 2, 8: make one of 9"):
        buckets(qn.widen(state, 9), tokens.new_zeros(9))


def test_buckets_of_verify_widths() -> None:
    given = case("verify", params("fused"), sequences=5)  # the call wants a slot for each token
    weights, state, tokens = there(given.arguments)
    examples = [(tokens[:, :2],), (tokens,)]
    buckets = qn.Buckets(qn.verify, weights, state, examples, [4], target=here(), strict=True)
    for width in (2, 3):
        part = tokens[:, :width].clone()
        want, _ = qn.jit(qn.verify, target=here().name)(weights, copied(state), part)
        got, _ = buckets(copied_tables(state), part)
        assert got.shape == (3, width, 211) and torch.equal(got, want)
        restore(state, there(given.arguments)[1])
    with pytest.raises(qn.LoweringError, match=r"no bucket takes rows of shapes \[\[1\]\]: thos"):
        buckets(state, tokens[:, :1])


def copied_tables(state: qn.State) -> qn.State:
    """New objects for everything, on the same memory: what a call takes may be given up."""
    return qn.functional.tree.map_leaves(lambda leaf: leaf.detach(), state)


def restore(state: qn.State, values: qn.State) -> None:
    """Write values back into a state's own memory."""
    pairs = zip(qn.functional.tree.leaves(state), qn.functional.tree.leaves(values), strict=True)
    for leaf, value in pairs:
        leaf.copy_(value)
