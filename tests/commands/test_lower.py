"""`qnext lower`: a step on a target that is not here, as text, as figures, as a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import qnext as qn
from qnext.cli import main
from tests.samples import FUSED

Out = pytest.CaptureFixture[str]
SMALL = ["--batch", "3", "--capacity", "300"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(qn.Config.from_hf(FUSED).to_hf()))
    return str(tmp_path)


class Page(HTMLParser):
    """What a page holds: its tags, of which each is closed, and the text of its rows."""

    ALONE = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[str] = []
        self.left = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not {"src", "href"} & given.keys()  # nothing is loaded
        if tag == "tr" and (given.get("class") or "").startswith("site"):
            self.rows.append("")
            self.left += "left" in (given["class"] or "")
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self.open and self.rows:
            self.rows[-1] += f" {data}"


def test_a_summary(model: str, capsys: Out) -> None:
    assert main(["lower", model, *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.startswith("decode on npu:910b, Ascend 910B (A2)\n")
    assert re.search(r"^[\d,]+ launches, ", out, re.M) and "ms at the roofline" in out
    assert "delta_rule: delta_step" in out and "reference" not in out


def test_a_page_that_stands_alone(model: str, tmp_path: Path, capsys: Out) -> None:
    page, figures = tmp_path / "step.html", tmp_path / "step.json"
    given = ["lower", model, *SMALL, "--text", "--html", str(page), "--json", str(figures)]
    assert main(given) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    sites = json.loads(figures.read_text())["by_site"]
    found = Page(page.read_text())
    assert len(lines) == len(sites) == len(found.rows)
    for number, (line, row) in enumerate(zip(lines, found.rows, strict=True)):
        assert row.split()[0] == line.split()[0] == str(number)
        assert row.split()[1] == line.split()[1]
    assert any("npu_recurrent_gated_delta_rule" in row for row in found.rows)
    assert found.left == 0
    assert "http" not in page.read_text()
    assert found.tags.count("details") == sum(line.startswith("#") for line in out.splitlines())


def test_what_is_left_is_red(model: str, tmp_path: Path, capsys: Out) -> None:
    page = tmp_path / "step.html"
    given = ["lower", model, *SMALL, "--dtype", "float32", "--html", str(page)]
    assert main(given) == 1
    out = capsys.readouterr().out
    assert "delta_rule: reference (delta_step: value is float32" in out
    found = Page(page.read_text())
    told = sum(int(n) for n in re.findall(r"^ +(\d+)  \w+: reference", out, re.M))
    assert found.left == told > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--step", "prefill", "--seq", "70"], "prefill on npu:910b"),
        (["--step", "verify", "--draft", "2"], "verify on npu:910b"),
        (["--step", "speculate"], "speculate on npu:910b"),
        (["--step", "advance", "--target", "npu:a3"], "advance on npu:a3"),
        (["--w8a8"], "npu:910b"),
        (["--fact", "custom_conv=sgl"], "short_conv: conv_sgl"),
        (["--tp", "2", "--dp", "2", "--target", "npu:a3"], "gathered"),
        (["--target", "cpu", "--dtype", "float32"], "decode on cpu"),
        (["--target", "reference"], "decode on reference"),
    ],
)
def test_steps_and_targets(options: list[str], told: str, tmp_path: Path, capsys: Out) -> None:
    sizes = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_attention_heads": 4}
    config = qn.Config.from_hf(FUSED | sizes | {"num_key_value_heads": 2, "vocab_size": 212})
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    main(["lower", str(tmp_path), *SMALL, *options])
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "0"], "--batch must be an integer >= 1, got 0"),
        (["--step", "prefill", "--seq", "301"], "do not fit a capacity of 300: --capacity 301"),
        (["--fact", "custom_conv"], "write a name and a value, as --fact custom_conv=sgl"),
        (["--fact", "custom_conv=other"], "fact custom_conv is 'other', must be one of"),
        (["--fact", "nothing=1"], "unknown fact 'nothing'"),
        (["--tp", "5"], "cannot be divided over 5 ranks"),
        (["--html", "/nowhere/step.html"], "must be a file in a directory that exists"),
    ],
)
def test_bad_options(model: str, options: list[str], told: str, capsys: Out) -> None:
    assert main(["lower", model, *SMALL, *options]) == 2
    assert told in capsys.readouterr().err


def test_no_such_model(capsys: Out) -> None:
    assert main(["lower", "/nowhere"]) == 2
    assert "/nowhere is no checkpoint" in capsys.readouterr().err
