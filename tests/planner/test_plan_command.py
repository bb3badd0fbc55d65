"""`qnext plan` as a user meets it."""

import json
from pathlib import Path

import pytest

import qnext as qn
from qnext.cli import main
from tests.planner.test_plans_on_paper import SIZES

LOAD = ["--requests", "10", "--prompt", "96", "--output", "100", "--cards", "4"]
Out = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A checkpoint's config, which is all that a plan reads."""
    values = qn.Config.from_hf(SIZES | {"num_hidden_layers": 4}).to_hf()
    (tmp_path / "config.json").write_text(json.dumps(values))
    return str(tmp_path)


def test_the_best_plans(model: str, tmp_path: Path, capsys: Out) -> None:
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    given = ["plan", "--model", model, *LOAD, "--json", str(figures), "--plot", str(picture)]
    assert main(given) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("*")]
    assert len(rows) == 1  # one is the best
    made = json.loads(figures.read_text())
    times = [plan["seconds_a_token"] for plan in made["plans"]]
    assert times == sorted(times) and len(times) > 2
    best = made["plans"][0]
    assert rows[0][1:4] == [str(best[axis]) for axis in ("tp", "dp", "ep")]
    assert best["step"]["seconds"] == pytest.approx(sum(best["step"]["parts"].values()))
    assert best["seconds_to_first"] > best["prefill"]["seconds"] > 0
    assert made["chosen"] == best
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "assumed:" in out and "44.30 ms a token on 16 cards" in out


def test_a_plan_that_is_asked_for(model: str, capsys: Out) -> None:
    assert main(["plan", "--model", model, *LOAD, "--tp", "2", "--dp", "2", "--ep", "2"]) == 0
    out = capsys.readouterr().out
    marked = next(line for line in out.splitlines() if line.startswith(">"))
    assert marked.lstrip(">*").split()[:3] == ["2", "2", "2"]
    assert "\ntp 2, dp 2, ep 2:\n" in out
    assert "--tp 2 --dp 2 --ep 2" in out


def test_groups_as_sglang_counts_them(model: str, capsys: Out) -> None:
    assert main(["plan", "--model", model, *LOAD, "--tp", "4", "--dp", "2"]) == 0
    out = capsys.readouterr().out
    assert "read as SGLang counts, 2 groups of 2 (tp 2, dp 2)" in out
    assert "\ntp 2, dp 2, ep 4:\n" in out


def test_exit_status_where_nothing_fits(model: str, capsys: Out) -> None:
    assert main(["plan", "--model", model, *LOAD, "--usable", "0.0001"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_other_assumptions(model: str, tmp_path: Path, capsys: Out) -> None:
    times = []
    for cost in ("2", "20"):
        figures = tmp_path / f"{cost}.json"
        asked = ["--tp", "4", "--dp", "1", "--launch-us", cost, "--json", str(figures)]
        assert main(["plan", "--model", model, *LOAD, *asked]) == 0
        times.append(json.loads(figures.read_text())["chosen"]["step"]["parts"]["launches"])
        assert f"a launch takes {cost} us" in capsys.readouterr().out
    assert times[1] == pytest.approx(10 * times[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tp", "3", "--dp", "2"], "tp = 3 times dp = 2 are 6 cards, --cards says 4: --cards 6"),
        (["--cards", "0"], "--cards must be an integer >= 1, got 0"),
        (["--usable", "2"], "--usable must lie in 0..1, got 2"),
        (["--link-gb", "-1"], "--link-gb must be > 0, got -1"),
        (["--requests", "0"], "requests must be an integer >= 1, got 0"),
        (["--tp", "4", "--ep", "3"], "ep = 3 must divide the 4 ranks"),
        (["--tp", "0"], "tp must be an integer >= 1, got 0"),
        (["--plot", "plan.pdf"], "the picture is a PNG, name it .png"),
        (["--json", "/nowhere/plan.json"], "must be a file in a directory that exists"),
        (["--model", "/nowhere"], "/nowhere is no checkpoint: it has no config.json"),
    ],
)
def test_bad_options(model: str, options: list[str], told: str, capsys: Out) -> None:
    assert main(["plan", "--model", model, *LOAD, *options]) == 2
    assert told in capsys.readouterr().err


def test_heads_that_cannot_be_shared(model: str, capsys: Out) -> None:
    assert main(["plan", "--model", model, *LOAD, "--cards", "3", "--tp", "3"]) == 2
    err = capsys.readouterr().err
    assert "cannot be divided over 3 ranks" in err
