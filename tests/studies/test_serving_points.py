"""docs/serving_points.md says what the study computes, and the study what its words say."""

import itertools
import json
import math
from pathlib import Path

import pytest

import qnext as qn
from qnext.functional.tree import leaves_with_paths
from qnext.lowering.target import LAUNCH_SECONDS
from studies.inputs import RESULTS, record
from studies.serving_costs import (
    BLOCK,
    CAPACITY,
    CARDS,
    CUT,
    DEALT,
    FIRST,
    OUTPUT,
    SITES,
    THEIR_LAUNCHES,
    TOKEN,
    WHOLE,
    Card,
    collectives,
    config_of,
    counted,
    distinct,
    expert_bytes,
    lowered,
    moving,
    step,
    study,
    waiting,
)
from studies.serving_points import BEGIN, END, PAGE, main, put, tables

WHOLE_CARD = Card("whole", rows=24, group=1, holders=1, sizes={})
SHARED = ("embed", "head", "out_proj", "conv", "A_log", "dt_bias", "gate_proj")


@pytest.mark.slow
def test_the_page_holds_what_the_study_makes(tmp_path: Path) -> None:
    """Stale? Run `python -m studies.serving_points`."""
    held = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert held == tables(study())
    record("serving_points", study(), tmp_path / "results.json")
    fresh, kept = (json.loads(p.read_text()) for p in (tmp_path / "results.json", RESULTS))
    assert kept["serving_points"] == fresh["serving_points"]


@pytest.mark.slow
def test_what_the_page_says_in_words() -> None:
    values = study()
    after, dear, before = values["accounts"].values()
    for account in (after, dear, before):
        assert account["roofline"] < 0.12 * TOKEN["fused rule on"]
    assert after["rest"] > 0.6 * TOKEN["fused rule on"]
    assert 0 < dear["rest"] < 0.25 * TOKEN["fused rule on"]
    dealt, cut = values["cards"].values()
    assert cut["predicted"]["sum"] < 0.85 * dealt["predicted"]["sum"]
    assert dealt["predicted"]["sum"] < TOKEN["fused rule on"] / 3
    assert dealt["costs"]["total"]["launches"] < 0.7 * THEIR_LAUNCHES
    rule = dealt["costs"]["npu_recurrent_gated_delta_rule"]
    assert round(1e6 * rule["seconds"] / rule["launches"]) == 2
    assert round(1e6 * (TOKEN["fused rule off"] - TOKEN["fused rule on"]) / 36) == 243
    assert 15 < FIRST["fused rule on"] / values["first token"]["mean"] < 30
    assert round(1e3 * values["first token"]["their round"] / 48) == 38
    assert round(values["fullest card"]) == 17
    keys = [card["costs"]["npu_fused_attention"]["bytes"] for card in (dealt, cut)]
    assert round(keys[1] / keys[0]) == 4
    assert 1e6 * LAUNCH_SECONDS == 2


def test_no_site_of_the_step_waits_for_arithmetic_on_either_chip() -> None:
    a3 = lowered(DEALT, BLOCK, CAPACITY, None)
    a2 = lowered(DEALT, BLOCK, CAPACITY, None, target="npu:910b")
    assert a2 == a3
    assert math.isclose(a3["total"]["seconds"], a3["total"]["bytes"] / 1.6e12)


@pytest.mark.parametrize("layers", [12, pytest.param(48, marks=pytest.mark.slow)])
def test_further_blocks_cost_what_the_second_does(layers: int) -> None:
    want = lowered(CUT, layers, CAPACITY, None)
    got = step(CUT, layers=layers)
    assert got.keys() == want.keys()
    for site, costs in want.items():
        for what, cost in costs.items():
            assert math.isclose(got[site][what], cost, rel_tol=1e-9), (site, what)


@pytest.mark.parametrize("card", [DEALT, CUT], ids=lambda card: card.name)
def test_experts_are_counted_as_said(card: Card) -> None:
    """The products read the counted experts, and the rows that go in and come out."""
    config = config_of(card)
    rows = card.rows * (config.num_experts_per_tok + 1)
    moved = rows * 2 * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
    costs = step(card)["npu_grouped_matmul"]
    assert costs["bytes"] == 48 * (counted(card) * expert_bytes(card) + moved)
    assert costs["launches"] == 48 * 2


@pytest.mark.slow
def test_expected_experts_are_those_of_all_draws() -> None:
    draws = list(itertools.product(itertools.combinations(range(5), 2), repeat=3))
    mean = sum(len(set(itertools.chain(*draw))) for draw in draws) / len(draws)
    assert math.isclose(distinct(rows=3, topk=2, experts=5), mean)
    most = study()["fullest card"]  # of 32: more than the mean card has, far from all
    assert distinct(24, 10, 512) / CARDS + 3 < most < 22


@pytest.mark.parametrize("card", [DEALT, CUT], ids=lambda card: card.name)
def test_shares_make_up_the_whole(card: Card) -> None:
    """A card's weights, times the cards that share them, are the whole model's."""
    part, whole = (
        dict(leaves_with_paths(qn.specs(config, 1, 1)[0]))
        for config in (config_of(card, BLOCK), config_of(WHOLE_CARD, BLOCK))
    )
    dealt = CARDS if card.holders > 1 else 1
    for path, leaf in whole.items():
        times = leaf.numel() / part[path].numel()
        if any(
            name in path for name in ("embed", "head", "out_proj", "conv", "A_log", "gate_proj")
        ):
            assert times == card.group, path
        elif path.endswith((".ffn.gate_up", ".ffn.down")):
            assert times == CARDS, path
        elif path.endswith(".router"):
            assert times == dealt, path
        elif path.endswith(("norm", ".shared_gate")):
            assert times == 1, path
    attention = ".layers[3].mixer.in_proj"  # a key and a value head stand on several cards
    assert 1 < whole[attention].numel() / part[attention].numel() < card.group
    delta = ".layers[0].mixer.in_proj"
    assert whole[delta].numel() == card.group * part[delta].numel()


def test_collectives_move_what_a_hand_count_says() -> None:
    found = collectives(DEALT, tokens=6)
    assert {name: count for name, (count, _) in found.items() if count > 1} == {
        "reduce-scatter": 48,
        "dispatch": 48,
        "combine": 48,
        "all-gather": 48,
    }
    row = WHOLE.hidden_size * 2
    assert found["reduce-scatter"][1] == 6 * row * 3 / 4
    assert found["dispatch"][1] == 1.5 * 10 * row * 15 / 16
    assert collectives(CUT, tokens=24)["all-reduce"] == (96, 2 * 24 * row * 15 / 16)
    size = sum(n * s for n, s in found.values())
    assert math.isclose(moving(DEALT, 6, 7e-6), 194 * 7e-6 + size / 100e9)
    assert math.isclose(moving(DEALT, 6, 7e-6, dear=True) - moving(DEALT, 6, 7e-6), 48 * 260e-6)


def test_waiting_is_what_a_simulated_queue_waits() -> None:
    """Six prompts of a group, one after another, and all decode when the last is done."""
    firsts = [1.82 * n for n in range(1, 7)]
    mean = sum(firsts) / 6
    waits = [firsts[-1] - first for first in firsts]
    assert math.isclose(waiting(mean), sum(waits) / 6 / (OUTPUT - 1))


def test_the_command_writes_page_figure_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{BEGIN}stale{END}after\n")
    names = ["--page", page, "--images", tmp_path, "--results", results]
    monkeypatch.setattr("sys.argv", ["serving_points", *map(str, names)])
    main()
    assert page.read_text() == f"before\n{BEGIN}{tables(study())}{END}after\n"
    assert capsys.readouterr().out == tables(study()) + "\n"
    assert list(json.loads(results.read_text())) == ["serving_points"]
    assert (tmp_path / "serving_points.png").stat().st_size > 10_000
    assert set(SITES) < set(step(DEALT))


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"words\n{BEGIN}tables\n")
    with pytest.raises(SystemExit, match="lacks the line"):
        put(page, "new")
    assert page.read_text() == f"words\n{BEGIN}tables\n"
