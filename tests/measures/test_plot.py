"""Figures: axes that say what they are, values that are those given, and PNGs for notebooks."""

import builtins
from typing import Any

import pytest
import torch

from qnext import measure, plot
from qnext.errors import InputError
from tests.sequences import model, words

FIGURES: dict[str, Any] = {
    "reading": lambda: plot.reading(measure.reading(model(), words(7, seed=4)[0]), list("abcdefg")),
    "matrices": lambda: plot.matrices({"one": torch.randn(5, 3), "two": torch.randn(5, 3)}, "s"),
    "bars": lambda: plot.bars({"a": 0.25, "b": 3.0}, "two bars", "metres"),
    "acceptance": lambda: plot.acceptance(
        {"draft 1": [0.9], "draft 2": [0.9, 0.5]},
        {"draft 1": 1.2, "draft 2": 1.5},
        {"draft 1": 1.9, "draft 2": 2.4},
    ),
    "launches": lambda: plot.launches({"one": {"a": 3, "b": 2}, "two": {"a": 1, "c": 9}}),
    "layer_errors": lambda: plot.layer_errors({"int8": [0.1, 0.2]}, ["delta", "attn"]),
    "losses": lambda: plot.losses({"task": [3.0, 2.0, 1.0]}, every=10),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure(name: str) -> None:
    figure = FIGURES[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel(), name
        drawn = axes.has_data()
        assert drawn, name


def test_bars_are_the_values() -> None:
    axes = FIGURES["bars"]().axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.25, 3.0]
    assert (axes.get_title(), axes.get_ylabel()) == ("two bars", "metres")


def test_launches_add_up() -> None:
    axes = FIGURES["launches"]().axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == 15
    assert {text.get_text().strip() for text in axes.texts} == {"5", "10"}


def test_half_lives() -> None:
    decay = torch.tensor([0.5, 0.25, 0.5**0.1, 1.0])
    want = torch.tensor([1.0, 0.5, 10.0, torch.inf])
    torch.testing.assert_close(plot.half_life(decay), want, rtol=1e-5, atol=0)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **more)

    plot._class.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'qnext\[plot\]'"):
        plot.losses({"task": [1.0]})
