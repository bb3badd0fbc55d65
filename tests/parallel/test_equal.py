"""Two and four ranks compute what one does."""

import pytest

from tests.parallel.models import Mixed, on_ranks
from tests.parallel.ranks import Ranks
from tests.samples import relative_rms

MESHES = {
    "tp2": Mixed(tp=2),
    "tp4": Mixed(tp=4),
    "tp2, experts whole": Mixed(tp=2, ep=1),
    "tp4 ep2": Mixed(tp=4, ep=2),
    "dp2": Mixed(dp=2),
    "dp2 ep1": Mixed(dp=2, ep=1),
    "dp4": Mixed(dp=4),
    "tp2 dp2": Mixed(tp=2, dp=2),
    "tp2 dp2 ep2": Mixed(tp=2, dp=2, ep=2),
    "tp2 dp2 ep1": Mixed(tp=2, dp=2, ep=1),
}


@pytest.mark.parametrize("name", MESHES)
def test_ranks_compute_what_one_does(ranks: Ranks, name: str) -> None:
    results = ranks.run(on_ranks, MESHES[name])
    assert sum(bool(found) for found in results) >= 3
    for found in results:
        for what, (got, want) in found.items():
            assert relative_rms(got, want) < 1e-5, what
