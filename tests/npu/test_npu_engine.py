"""The engine on the device: captured steps of several shapes, host and device side by side."""

from concurrent.futures import wait
from dataclasses import replace
from functools import cache

import pytest
import torch

import qnext as qn
from qnext.runtime.engine import Engine
from qnext.runtime.options import Options
from qnext.runtime.request import CorruptedError, Output, Request
from tests.npu.models import here, params
from tests.npu.test_texts import prompts

OPTIONS = Options(
    rows=3, capacity=300, pages=3, chunk=32, snapshot_every=100, cache_bytes=1 << 22, strict=True
)


@cache
def engine(draft: int = 0) -> Engine:
    """One for all tests: captured steps know the memory of its pools."""
    options = replace(OPTIONS, target=here(), draft=draft)
    return Engine(params("demo"), qn.tokenizer(), options)


def serve(served: Engine, requests: list[Request]) -> list[Output]:
    """The last outputs; texts are their own."""
    outputs: list[list[Output]] = [[] for _ in requests]
    for request, into in zip(requests, outputs, strict=True):
        served.submit(request, into.append)
    served.run()
    return [
        each[-1]._replace(
            tokens=tuple(t for output in each for t in output.tokens),
            text="".join(output.text for output in each),
        )
        for each in outputs
    ]


def requests(count: int, new: int = 24) -> list[Request]:
    return [Request(tokens=tuple(p), max_new_tokens=new, eos=()) for p in prompts()[:count]]


def test_texts_are_those_of_the_reference_and_of_each_alone() -> None:
    """Five requests in three rows, with more of them than the pool has pages for."""
    served = engine()
    assert served.options.overlaps and served.params.embed.device.type == "npu"
    asked = requests(5)
    together = serve(served, asked)
    weights = params("demo")
    for request, output in zip(asked, together, strict=True):
        tokens = torch.tensor([request.tokens])
        state = qn.init_state(weights.config, 1, 128)
        wanted, _ = qn.generate(weights, state, tokens, 24, eos=())
        assert output.tokens == tuple(wanted[0].tolist())
    again = [serve(served, [request])[0] for request in asked]
    assert [output.text for output in again] == [output.text for output in together]
    assert served.stats.cache_hits > 0 and served.fallbacks == 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_change_no_text(temperature: float) -> None:
    """In bfloat16 a verified line is rounded otherwise, which these prompts stand."""
    sampling = qn.Sampling(temperature=temperature, seed=3)
    asked = [replace(request, sampling=sampling) for request in requests(3)]
    plain, served = serve(engine(), asked), engine(draft=1)
    before = served.stats.acceptance.accepted
    drafted = serve(served, asked)
    assert served.stats.acceptance.accepted > before
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]
    assert all(len(o.tokens) == 24 for o in drafted)


def test_one_that_is_no_number_any_more_ends_alone() -> None:
    served, outputs = engine(), [[], []]
    asked = requests(2)
    alone = serve(engine(), asked)
    for request, into in zip(asked, outputs, strict=True):
        served.submit(request, into.append)
    while not all(outputs):
        served.step()
    wait([served._flight[1]])  # else the step under way might write over what is planted
    sequence = next(iter(served.board.running.values()))
    slot = served.worker.state.slots[sequence.row, 0]
    served.worker.state.layers[0].recurrent[slot] = float("nan")
    served.run()
    assert isinstance(outputs[0][-1].error, CorruptedError)
    assert tuple(t for o in outputs[1] for t in o.tokens) == alone[1].tokens
    (again,) = serve(served, [replace(asked[0], cache=False)])  # nothing of it is left behind
    assert again.tokens == alone[0].tokens


def test_a_worker_that_breaks_begins_anew_on_the_memory_that_steps_were_captured_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = engine()
    (asked,) = requests(1)
    (before,) = serve(served, [replace(asked, cache=False)])

    def breaks(state: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(served.worker, "_put", breaks)
        (failed,) = serve(served, [asked])
    assert failed.finish == "error" and "planted" in str(failed.error)
    made = len(served.steps.made)
    (after,) = serve(served, [asked])
    assert after.tokens == before.tokens and len(served.steps.made) == made
