"""Engines of several ranks: their answers are those of one, whatever they go through."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.functional.shard import part_of
from qnext.functional.tree import leaves, map_leaves
from qnext.runtime.digest import weights_digest
from qnext.runtime.engine import Engine
from qnext.runtime.kept import Kept
from qnext.runtime.ranks import Channel, SharedSteps, follow
from qnext.runtime.ranks import joined as put_together
from qnext.runtime.request import Output, Start
from tests.parallel.models import Mixed, joined, whole_params
from tests.parallel.ranks import Ranks
from tests.runtime.engines import OPTIONS, ends_of, engine, is_clean, mixture, params, serve
from tests.runtime.test_handed import Gathered, asked, of_two_tokens

ODD = ("delta_heads", "vocab")  # of the engines' model, which two ranks cannot share


def led(job: Any, draft: int = 0, tp: int = 2, dp: int = 1, **options: Any) -> Any:
    """What a job makes of a group's engine; None at ranks that follow. job: is told the group."""
    mesh = joined(tp, dp, 0, ODD)
    channel, part = Channel(mesh), qn.shard(params(), mesh)
    made = replace(OPTIONS, draft=draft, **options)
    if mesh.index("tp"):
        follow(channel, part, made)
        return None
    served = Engine(part, None, made, SharedSteps(channel, part, "cpu", **made.buckets))
    try:
        return job(served) if dp == 1 else job(served, mesh.index("dp"))
    finally:
        served.close()


def texts(outputs: list[list[Output]]) -> list[Any]:
    """Tokens, ends and counts; log probabilities are sums in another order."""
    return [ends_of(each)[:3] for each in outputs]


def answers(seed: int, draft: int, overlap: bool) -> Any:
    def job(served: Engine) -> Any:
        found = texts(serve(served, mixture(seed, 10)))
        stats = served.stats
        return found, is_clean(served), stats.preempted, stats.cache_hits

    return led(job, draft, overlap=overlap)


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "overlap"), [(1, True), (0, False)])
def test_answers_are_those_of_one(ranks: Ranks, draft: int, overlap: bool) -> None:
    """Through chunks, cached prefixes and swaps; two meshes of two ranks each, side by side."""
    want = texts(serve(engine(draft), mixture(4, 10)))
    first, none, second, nobody = ranks.run(answers, 4, draft, overlap)
    assert none is nobody is None
    for found, clean, preempted, hits in (first, second):
        assert found == want and clean and preempted and hits


COUNTS = (10, 0, 4, 1)  # requests of each group


def answers_of_groups(draft: int, overlap: bool, tp: int, dp: int) -> Any:
    def job(served: Engine, group: int) -> Any:
        found = texts(serve(served, mixture(group, COUNTS[group])))
        stats = served.stats
        return group, found, is_clean(served), stats.preempted, stats.cache_hits

    return led(job, draft, tp, dp, overlap=overlap)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "overlap", "tp", "dp"), [(0, False, 1, 4), (1, True, 2, 2), (1, False, 1, 2)]
)
def test_groups_with_requests_of_their_own(
    ranks: Ranks, draft: int, overlap: bool, tp: int, dp: int
) -> None:
    """Each answers as an engine alone; one has no requests, and the rest go on."""
    told = [each for each in ranks.run(answers_of_groups, draft, overlap, tp, dp) if each]
    assert len(told) == 4 // tp
    for group, found, clean, preempted, hits in told:
        assert clean and found == texts(serve(engine(draft), mixture(group, COUNTS[group])))
        assert COUNTS[group] < COUNTS[0] or (preempted and hits)


def read(draft: int) -> Any:
    """Values of prompts that two ranks have read."""

    def job(served: Engine) -> Any:
        requests = of_two_tokens(6, seed=1)
        sinks = [Gathered(served, len(request.tokens)) for request in requests]
        told = serve(served, [asked(*pair) for pair in zip(requests, sinks, strict=True)])
        assert [each[-1].finish for each in told] == ["length"] * len(told), told
        return [map_leaves(torch.clone, sink.value) for sink in sinks]

    return led(job, draft)


def answered(draft: int, values: list[Kept]) -> Any:
    """Answers of two ranks to prompts that were read elsewhere."""

    def job(served: Engine) -> Any:
        begun = [
            replace(request, start=Start(len(request.tokens) - 1, value))
            for request, value in zip(of_two_tokens(6, seed=1), values, strict=True)
        ]
        return texts(serve(served, begun))

    return led(job, draft)


@pytest.mark.parametrize(("draft", "theirs"), [(0, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_prompt_is_handed_to_other_numbers_of_ranks(
    ranks: Ranks, draft: int, theirs: int
) -> None:
    """From two ranks to one and from one to two, with other numbers of guesses."""
    requests = of_two_tokens(6, seed=1)
    want = texts(serve(engine(), requests))
    values = ranks.run(read, draft)[0]
    begun = [
        replace(request, start=Start(len(request.tokens) - 1, value))
        for request, value in zip(requests, values, strict=True)
    ]
    assert texts(serve(engine(theirs), begun)) == want
    reader = engine(theirs)
    sinks = [Gathered(reader, len(request.tokens)) for request in requests]
    serve(reader, [asked(*pair) for pair in zip(requests, sinks, strict=True)])
    mine = [sink.value for sink in sinks if sink.value is not None]
    for value, other in zip(values, mine, strict=True):
        pairs = list(zip(leaves(value), leaves(other), strict=False))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert ranks.run(answered, draft, mine)[0] == want


def stored(directory: str) -> Any:
    """Answers of two ranks that keep states in files."""

    def job(served: Engine) -> Any:
        found = texts(serve(served, mixture(4, 6)))
        return found, served.worker.moves.digest(served.params), served.stats.cache_hits

    return led(job, cache_dir=directory, cache_bytes=1 << 16)


@pytest.mark.slow
def test_states_in_files_are_whole(ranks: Ranks, tmp_path: Any) -> None:
    """What ranks wrote one process reads, under the same name for the same weights."""
    want = texts(serve(engine(), mixture(4, 6)))
    found, digest, _ = ranks.run(stored, tmp_path)[0]
    assert found == want and digest == weights_digest(params())
    assert {path.name for path in tmp_path.iterdir()} == {digest}
    assert list((tmp_path / digest).glob("*.safetensors"))
    single = engine(cache_dir=tmp_path)
    assert single.files is not None and len(single.files)
    assert texts(serve(single, mixture(4, 6))) == want
    single.close()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_weights_have_one_name(tp: int, int8: bool) -> None:
    """Whoever holds them: parts of a sum add up; any number that differs is told."""
    whole = whole_params(Mixed(int8=int8))
    sums: list[torch.Tensor] = []
    for rank in range(tp):
        part = qn.shard(whole, qn.Mesh(tp=tp, rank=rank))
        weights_digest(part, lambda mine: sums.append(mine) or mine)
    total = torch.stack(sums).sum(0)
    assert weights_digest(part, lambda _: total) == weights_digest(whole)
    for at in range(0, len(leaves(whole)), 7):
        flat = leaves(whole)
        changed = flat[at].clone()
        changed.view(-1)[0] += 1
        other = qn.functional.tree.rebuild(whole, [*flat[:at], changed, *flat[at + 1 :]])
        assert weights_digest(other) != weights_digest(whole)


def test_parts_of_a_value_are_put_together() -> None:
    config = whole_params(Mixed()).config
    meshes = [qn.Mesh(tp=4, rank=rank) for rank in range(4)]
    generator = torch.Generator().manual_seed(0)
    specs = qn.functional.specs.specs(config, 1, 290, draft=1)[1]
    kept = Kept(
        tuple(map_leaves(lambda s: torch.randn(s.shape, generator=generator), specs.layers)),
        tuple(map_leaves(lambda s: torch.randn(s.shape, generator=generator), specs.mtp)),
    )
    parts = [part_of(kept, replace(config, mesh=mesh)) for mesh in meshes]
    again = put_together(parts, replace(config, mesh=meshes[0]))
    assert all(a.equal(b) for a, b in zip(leaves(again), leaves(kept), strict=True))
    assert sum(leaf.numel() for leaf in leaves(parts[1])) < 0.6 * sum(
        leaf.numel() for leaf in leaves(kept)
    )
