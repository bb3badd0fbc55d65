"""`qnext bench decode` and `prefill`: what they measure, tell and write; figures of the limits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qnext as qn
from qnext.bench.steps.measure import Runner, random_tokens
from qnext.bench.steps.roofline import decode_bytes, prefill_flops, token_bytes
from qnext.cli import main
from qnext.functional.tree import leaves

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def params() -> qn.Params:
    return qn.demo()


def run(*words: str) -> int:
    return main(["bench", *words])


@pytest.mark.slow
def test_decode_tells_a_line_and_writes_a_row_for_each_case(tmp_path: Path, capsys) -> None:
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    sizes = ("--batch", "3", "1", "--prompt", "20", "--steps", "2", "--rounds", "3")
    more = ("--chunk", "16", "--target", "cpu", "reference")
    assert run("decode", *sizes, *more, "--json", str(file), "--plot", str(picture)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the demo, float32" in lines[0] and "20 tokens" in lines[1] and "GB/s" in lines[1]
    wanted = [("cpu", 1), ("reference", 1), ("cpu", 3), ("reference", 3)]
    assert [(l.split()[0], int(l.split()[1])) for l in lines[3:]] == wanted
    told = json.loads(file.read_text())
    assert [(row["target"], row["batch"]) for row in told["figures"]] == wanted
    for row in told["figures"]:
        assert len(row["rounds"]) == 3 and sorted(row["rounds"])[1] == row["seconds"] > 0
        assert row["tokens_per_second"] == row["batch"] / row["seconds"]
        share = row["least"] / row["seconds"] / told["bytes_per_second"]
        assert row["of_limit"] == pytest.approx(share)
    assert picture.read_bytes().startswith(PNG)


def test_prefill_goes_through_lengths_in_order(tmp_path: Path, capsys) -> None:
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    sizes = ("--length", "40", "17", "--chunk", "16", "--rounds", "2")
    sizes += ("--w8a8", "--ignore", r"re:.*\.mlp\.gate$", r"re:.*\.in_proj_ba$")
    assert run("prefill", *sizes, "--json", str(file), "--plot", str(picture)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"W8A8 but re:.*\.mlp\.gate$, re:" in lines[0] and "GFLOP/s" in lines[1]
    assert [l.split()[:2] for l in lines[3:]] == [["cpu", "17"], ["cpu", "40"]]
    told = json.loads(file.read_text())
    assert [row["tokens"] for row in told["figures"]] == [17, 40]
    assert told["figures"][0]["peak_bytes"] > 1 << 20
    assert picture.read_bytes().startswith(PNG)


def test_a_prompt_read_in_chunks_leaves_the_state_of_one_call(params: qn.Params) -> None:
    tokens = random_tokens(params, 2, 41)
    runner = Runner(params, "reference", batch=2, capacity=41, chunk=16)
    state = runner.prefill(runner.start(), tokens)
    _, whole = qn.prefill(params, runner.start(), tokens)
    assert state.lengths.tolist() == whole.lengths.tolist() == [41, 41]
    for ours, theirs in zip(leaves(state.layers), leaves(whole.layers), strict=True):
        # beyond scratch, row 0; orders of sums differ with the length of a call
        torch.testing.assert_close(ours[1:], theirs[1:], atol=2e-4, rtol=2e-4)


def test_the_least_bytes_of_a_step_are_weights_states_keys_and_values(params: qn.Params) -> None:
    config = params.config
    expert = sum(leaf[0].nbytes for p in params.layers for leaf in (p.ffn.gate_up, p.ffn.down))
    read = sum(leaf.nbytes for leaf in leaves((params.layers, params.norm, params.head)))
    one = qn.init_state(config, 1, 1)
    recurrent = sum(s.recurrent[1].nbytes for s in one.layers if hasattr(s, "recurrent"))
    idle = config.num_experts - config.num_experts_per_tok
    assert decode_bytes(params, 1) == read - idle * expert + 2 * recurrent
    assert decode_bytes(params, 100) == read + 200 * recurrent
    kv = sum(s.key[0, 0].nbytes + s.value[0, 0].nbytes for s in one.layers if hasattr(s, "key"))
    assert token_bytes(params) == kv
    assert decode_bytes(params, 100, 7) == decode_bytes(params, 100) + 700 * kv


def test_the_head_that_is_read_is_the_embedding_where_they_are_tied(params: qn.Params) -> None:
    tied = params._replace(head=())
    assert decode_bytes(tied, 3) == decode_bytes(params, 3)


def test_a_model_without_experts_has_limits_too(params: qn.Params) -> None:
    config = replace(params.config, num_experts=0, mtp_layers=0)
    dense = qn.init_params(config, seed=3)
    assert not any(config.is_moe)
    read = sum(leaf.nbytes for leaf in leaves((dense.layers, dense.norm, dense.head)))
    assert decode_bytes(dense, 2) - decode_bytes(dense, 1) == decode_bytes(dense, 1) - read
    assert prefill_flops(dense, 2) > prefill_flops(dense, 1) > 0


def test_the_operations_of_a_prompt_are_those_of_its_sites(params: qn.Params) -> None:
    """All products with weights, as the trace has them; of the head one token's."""
    seq, config = 24, params.config
    specs = qn.specs(config, batch=1, capacity=seq, seq=seq)
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    sites = qn.jit(qn.prefill).trace(*specs, lengths).lower().cost_analysis()["by_site"]
    products = sum(site["flops"] for site in sites if site["site"] in ("linear", "experts"))
    attention = config.layer_types.count("full_attention")
    scores = 4 * attention * config.num_attention_heads * config.head_dim * seq * (seq + 1) // 2
    delta = config.num_hidden_layers - attention
    numbers = config.linear_num_value_heads * config.linear_key_head_dim
    state = 7 * delta * seq * numbers * config.linear_value_head_dim
    taps = sum(p.mixer.conv.numel() for p in params.layers if hasattr(p.mixer, "conv"))
    assert prefill_flops(params, seq) == products + scores + state + 2 * seq * taps


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("decode", "--plot", "a.txt"), "the picture is a PNG"),
        (("prefill", "--json", "nowhere/a.json"), "must be a file in a directory that exists"),
        (("decode", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_at_once(words, says, capsys) -> None:
    assert run(*words) == 2
    assert says in capsys.readouterr().err


def test_what_would_run_on_the_definitions_is_not_told_as_kernels(capsys) -> None:
    assert run("decode", "--dtype", "float64", "--prompt", "3", "--chunk", "4") == 2
    out, err = capsys.readouterr()
    assert "left on the reference" in err and "float64" in err and not out


@pytest.mark.parametrize(
    "words", [("decode", "--batch", "0"), ("prefill", "--length", "-4"), ("decode", "--steps", "a")]
)
def test_counts_are_positive(words, capsys) -> None:
    with pytest.raises(SystemExit):
        run(*words)
    assert "must be an integer >= 1" in capsys.readouterr().err


def test_what_w8a8_leaves_is_said_of_w8a8_alone(capsys) -> None:
    assert run("decode", "--ignore", "lm_head") == 2
    assert "give --w8a8 as well" in capsys.readouterr().err
