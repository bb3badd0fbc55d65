"""What the study of triangular inverses concludes (docs/precision.md), at small odd sizes too."""

import json
from pathlib import Path

import pytest
import torch

from studies.inputs import RESULTS, random_inputs, relative_rms
from studies.inverse import METHODS, alike, errors, solved, systems, theorem

SIZES = {"batch": 2, "hk": 3, "hv": 6, "dk": 13, "dv": 11}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_formulas_are_equal_on_paper(name: str, size: int) -> None:
    lower = (torch.randn(5, size, size, dtype=torch.float64) / size).tril(-1)
    assert relative_rms(METHODS[name](lower), solved(lower)) < 1e-13  # float64, short sums


def test_systems_are_what_the_definition_solves() -> None:
    inputs = random_inputs(70, -1.0, **SIZES)
    lower = systems(inputs, chunk=32)
    assert lower.shape == (2 * 2 * 6, 32, 32)
    row, head, i, j = 1, 4, 19, 5
    g, beta = (x[row, 32:64, head].double() for x in (inputs.g, inputs.beta))
    key = inputs.key[row, 32:64, head // 2].double()
    want = beta[i] * g[j + 1 : i + 1].sum().exp() * (key[i] @ key[j])
    got = lower.view(2, 2, 6, 32, 32)[row, 1, head, i, j]
    assert abs(got - want) < 1e-12


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
def test_doubling_keeps_what_the_product_loses(cosine: float) -> None:
    found = errors(alike(cosine, 130, **SIZES))
    assert found["condition"] < 100
    assert found["doubling"] < 1e-6 and found["forward substitution"] < 1e-6
    if cosine > 0.3:
        assert found["product"] > 1 and found["product in blocks of 32"] > 1e-5
    whole = theorem(alike(cosine, 130, **SIZES))
    assert max(whole.values()) < 5e-6  # as the primitive allows in float32


def test_recorded_numbers_are_those_of_the_page() -> None:
    found = json.loads(RESULTS.read_text())["inverse"]
    page = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    for case in ("cosine 0.5", "demo layer 4"):
        *_, row = (line for line in page.splitlines() if line.startswith(f"| {case} |"))
        told = [float(cell) for cell in row.split("|")[2:-1]]
        for number, recorded in zip(told, found[case]["inverse"].values(), strict=True):
            assert number == pytest.approx(recorded, rel=0.1)
