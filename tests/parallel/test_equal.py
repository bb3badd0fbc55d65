"""Two and four ranks compute what one does."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.models import Mixed, long_prompts, on_ranks, texts
from tests.parallel.ranks import Ranks
from tests.samples import relative_rms

MESHES = {
    "tp2": Mixed(tp=2),
    "tp4": Mixed(tp=4),
    "tp2 ep1": Mixed(tp=2, ep=1),
    "tp4 ep2": Mixed(tp=4, ep=2),
    "dp2": Mixed(dp=2),
    "dp2 ep1": Mixed(dp=2, ep=1),
    "dp4": Mixed(dp=4),
    "tp2 dp2": Mixed(tp=2, dp=2),
    "tp2 dp2 ep2": Mixed(tp=2, dp=2, ep=2),
    "tp2 dp2 ep1": Mixed(tp=2, dp=2, ep=1),
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 0},
    "some dense": {"mlp_only_layers": (0, 2)},
    "tied": {"tie_word_embeddings": True},
    "two experts": {"num_experts": 2, "num_experts_per_tok": 1},
    "one kv head": {"num_attention_heads": 12, "num_key_value_heads": 1},
    "kv heads enough": {"num_attention_heads": 12, "num_key_value_heads": 4},
}
FLOAT32 = 1e-5  # sums in another order


def slow_but(*quick: str, of: Iterable[str]) -> list[Any]:
    """Cases of which the default suite has some."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]


def compared(ranks: Ranks, mixed: Mixed) -> list[tuple[str, tuple[Tensor, ...]]]:
    results = ranks.run(on_ranks, mixed)
    assert sum(bool(found) for found in results) >= 3  # a rank may have no sequence
    return [pair for found in results for pair in found.items()]


@pytest.mark.parametrize("name", slow_but("dp4", "tp2 dp2", "tp4 ep2", of=MESHES))
def test_ranks_compute_what_one_does(ranks: Ranks, name: str) -> None:
    for what, (got, want) in compared(ranks, MESHES[name]):
        assert relative_rms(got, want) < FLOAT32, what


@pytest.mark.parametrize("seq", [257, pytest.param(256, marks=pytest.mark.slow)])
def test_long_prompts_are_shared_out(ranks: Ranks, seq: int) -> None:
    """Of 512 tokens and more in a group each of its ranks sends its run."""
    for got, want in ranks.run(long_prompts, MESHES["tp2 dp2"], seq):
        assert relative_rms(got, want) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2", "tp4", "tp2 dp2"])
@pytest.mark.parametrize("name", MODELS)
def test_other_models(ranks: Ranks, mesh: str, name: str) -> None:
    mixed = MESHES[mesh]._replace(changes=tuple(MODELS[name].items()))
    for what, (got, want) in compared(ranks, mixed):
        assert relative_rms(got, want) < FLOAT32, what


@pytest.mark.parametrize(
    "heads", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 8))]
)
def test_heads_of_a_rank(ranks: Ranks, heads: int) -> None:
    sizes = {
        "num_attention_heads": 4 * heads,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4 * heads,
    }
    for what, (got, want) in compared(ranks, Mixed(tp=4, changes=tuple(sizes.items()))):
        assert relative_rms(got, want) < FLOAT32, what


@pytest.mark.parametrize("name", slow_but("tp2", of=MESHES))
def test_int8(ranks: Ranks, name: str) -> None:
    """Sums in another order move a number that is rounded to int8 by one, here and there."""
    for what, (got, want) in compared(ranks, MESHES[name]._replace(int8=True)):
        assert relative_rms(got, want) < 5e-3, what


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", MESHES)
def test_bfloat16_is_as_exact_as_on_one_rank(ranks: Ranks, name: str, int8: bool) -> None:
    """Against the same weights in float32; what is rounded to bfloat16 differs by shapes alone."""
    mixed = MESHES[name]._replace(dtype=torch.bfloat16, int8=int8)
    found = [values for _, values in compared(ranks, mixed)]
    got, want, exact = (
        torch.cat([each.flatten() for each in side]) for side in zip(*found, strict=True)
    )
    assert relative_rms(got, exact) < 1.5 * relative_rms(want, exact)


def test_bfloat16_is_the_same_to_the_bit_where_no_sum_is_split(ranks: Ranks) -> None:
    for what, (got, want, _) in compared(ranks, Mixed(tp=4, ep=1, dtype=torch.bfloat16)):
        assert got.equal(want), what


@pytest.mark.slow
@pytest.mark.parametrize("draft", [0, 1])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("tp", "dp", "whole"),
    [
        (2, 1, ("delta_heads",)),
        (1, 4, ()),
        (2, 2, ("delta_heads",)),
    ],
)
def test_the_demo_writes_the_same(
    ranks: Ranks, tp: int, dp: int, whole: tuple[str, ...], int8: bool, draft: int
) -> None:
    for got, want in ranks.run(texts, int8, tp, dp, whole, draft):
        assert got == want
