"""The noise is Gumbel's and nobody's neighbour; `sample` draws what its settings say it draws.

The noise is a hash, so every statistic here is one fixed number: a p-value below 0.001 would be a
defect of the hash, not bad luck tomorrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import InputError, Sampling, sample
from qnext.functional import ops
from qnext.functional.sampling import Counts, count_output, count_prompt, knobs, penalise, restrict

F64 = torch.float64
UNLIKELY = 1e-3
VOCAB = 29
DRAWS = 200_000


def noise(seed: int | Tensor, position: int | Tensor, vocab: int) -> Tensor:
    """Noise of a range of seeds or positions; a number stands for all rows."""
    seed, position = torch.broadcast_tensors(torch.as_tensor(seed), torch.as_tensor(position))
    return ops.gumbel(seed=seed.clone().view(-1), position=position.clone().view(-1), vocab=vocab)


def uniform(gumbel: Tensor) -> Tensor:
    """What the noise was made of: u in (0, 1)."""
    return -torch.expm1(-(-gumbel.double()).exp())


def chi_square(observed: Tensor, expected: Tensor, fitted: int = 1) -> float:
    """The p-value of counts; bins that expect fewer than 5 count as one."""
    rare = expected < 5
    observed, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum().double()
    freedom = torch.tensor(len(expected) - fitted, dtype=F64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def kolmogorov(u: Tensor) -> float:
    """sqrt(n) times the greatest distance from the uniform distribution; above 1.95 in 0.1%."""
    n = u.numel()
    ordered = u.flatten().double().sort().values
    steps = torch.arange(n + 1, dtype=F64) / n
    distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()
    return float(distance) * math.sqrt(n)


# Noise: its distribution.


def test_ten_million_draws_are_finite_with_the_moments_of_gumbel() -> None:
    count = total = square = 0.0
    for seed in range(100):
        drawn = noise(seed, 3 * seed, 100_003)
        assert drawn.dtype == torch.float32
        assert drawn.isfinite().all()
        centred = drawn.double() - 0.5772156649015329
        count, total = count + drawn.numel(), total + float(centred.sum())
        square += float(centred.square().sum())
    assert count > 10**7
    # five standard errors: of a mean 1.28 / sqrt(n), of a variance sqrt(4.4) * 1.64 / sqrt(n)
    assert abs(total / count) < 5 * 1.29 / math.sqrt(count)
    assert abs(square / count - math.pi**2 / 6) < 5 * 3.46 / math.sqrt(count)


@pytest.mark.parametrize("seed", [0, -1, 2**62])
def test_noise_is_gumbel_distributed(seed: int) -> None:
    u = uniform(noise(seed, torch.arange(500), 2003))
    assert kolmogorov(u) < 1.95
    bins = (u * 256).long().flatten().bincount(minlength=256)
    assert chi_square(bins, torch.full((256,), u.numel() / 256)) > UNLIKELY


def test_the_greatest_of_many_is_gumbel_distributed() -> None:
    """Winners come from the far tail, where a coarse u would show as steps."""
    vocab = 2003
    greatest = noise(11, torch.arange(2000), vocab).double().amax(-1) - math.log(vocab)
    assert kolmogorov(uniform(greatest)) < 1.95
    assert greatest.unique().numel() > 1990  # two million values of u are that small


def mix(x: Tensor) -> Tensor:
    """lowbias32, with torch's integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x


def unmix(x: Tensor) -> Tensor:
    """Its inverse: the same steps undone from last to first."""
    for shift, factor in ((16, 1), (15, 0x846CA68B), (16, 0x7FEB352D)):
        x = x * pow(factor, -1, 2**32) % 2**32
        x = x ^ (x >> shift) ^ (x >> 2 * shift)
    return x


@pytest.mark.parametrize(("bits", "value"), [(0, 33 * math.log(2)), (2**32 - 1, -2.81154)])
def test_the_extreme_bits_are_finite(bits: int, value: float) -> None:
    """Found by running the hash backwards, as no test would draw them.

    u is 2^-33 at least, and at most 1 - 2^-24, float32's last number below 1: -log(24 log 2).
    """
    position = torch.arange(300_000)
    stream = mix(mix(mix(torch.tensor(0))) ^ mix(position))  # of seed 0
    token = unmix(unmix(torch.tensor(bits)) ^ stream) - stream
    token = token * pow(0x9E3779B9, -1, 2**32) % 2**32
    reached = (token < 262_144).nonzero().flatten()
    assert reached.numel() > 0
    for where in reached[:3]:
        drawn = noise(0, int(position[where]), int(token[where]) + 1)[0]
        assert drawn[-1].item() == pytest.approx(value, rel=1e-5)
        assert drawn[-1] == (drawn.max() if bits == 0 else drawn.min())


# Noise: independence, and what it may depend on.

PAIRS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "positions": lambda n: (noise(5, n, 1009), noise(5, n + 1, 1009)),
    "positions a page apart": lambda n: (noise(5, n, 1009), noise(5, n + 128, 1009)),
    "seeds": lambda n: (noise(n, 5, 1009), noise(n + 1, 5, 1009)),
    "seeds in bit 31": lambda n: (noise(n, 5, 1009), noise(n + 2**31, 5, 1009)),
    "seeds in bit 32": lambda n: (noise(n, 5, 1009), noise(n + 2**32, 5, 1009)),
    "seeds of 63 bits": lambda n: (noise(n, 5, 1009), noise(n + 2**62, 5, 1009)),
    "negative seeds": lambda n: (noise(n, 5, 1009), noise(-n - 1, 5, 1009)),
    "seeds of other sign": lambda n: (noise(n, 5, 1009), noise(n - 2**63, 5, 1009)),
    "seed and position": lambda n: (noise(n, n + 1000, 1009), noise(n + 1000, n, 1009)),
    "tokens": lambda n: (noise(5, n, 1009), noise(5, n, 1010)[:, 1:]),
    "tokens 64 apart": lambda n: (noise(5, n, 1009), noise(5, n, 1073)[:, 64:]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_neighbours_are_independent(name: str) -> None:
    """Where x falls among 16 equal bins does not foretell where y does."""
    x, y = (uniform(drawn) for drawn in PAIRS[name](torch.arange(1000)))
    cells = ((x * 16).long() * 16 + (y * 16).long()).flatten().bincount(minlength=256).view(16, 16)
    expected = cells.sum(1, keepdim=True) * cells.sum(0) / x.numel()
    assert chi_square(cells.flatten(), expected.flatten(), fitted=31) > UNLIKELY
    correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(x.numel())
    assert (x == y).double().mean() < 1e-5


def test_noise_knows_only_seed_position_and_token() -> None:
    seed = torch.tensor([3, -9, 2**62, 3, 0])
    position = torch.tensor([4, 0, 262_143, 5, 4])
    whole = ops.gumbel(seed=seed, position=position, vocab=211)
    order = torch.tensor([4, 2, 2, 0])
    others = ops.gumbel(seed=seed[order], position=position[order].int(), vocab=211)
    assert torch.equal(others, whole[order])
    for vocab in (1, 7, 64, 210):
        part = ops.gumbel(seed=seed, position=position, vocab=vocab)
        assert torch.equal(part, whole[:, :vocab])
    for b in range(5):
        assert torch.equal(noise(int(seed[b]), int(position[b]), 211)[0], whole[b])


# sample: what is drawn.

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 1.9, "seed": -7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "cold top_p": {"temperature": 0.7, "top_p": 0.9, "seed": 2**63 - 1},
    "all": {"temperature": 1.4, "top_k": 12, "top_p": 0.85, "min_p": 0.07},
}
MORE = ("cold", "hot", "top_p", "min_p")  # others are of the same kinds
ASKED = [pytest.param(n, marks=pytest.mark.slow) if n in MORE else n for n in SETTINGS]


def shares(logits: Tensor, s: Sampling) -> Tensor:
    """The distribution that one row's settings ask for, by the book, in float64."""
    p = (logits.double() / s.temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()[: s.top_k or None]
    total, kept, so_far = float(p[order].sum()), [], 0.0
    for token in order:
        if so_far < s.top_p * total and p[token] >= s.min_p * p[order[0]]:
            kept.append(token)
        so_far += float(p[token])
    restricted = torch.zeros_like(p)
    restricted[kept] = p[kept]
    return restricted / restricted.sum()


@pytest.mark.parametrize("name", ASKED)
def test_draws_have_the_distribution_asked_for(name: str) -> None:
    sampling = Sampling(**SETTINGS[name])
    logits = torch.randn(VOCAB) * 1.5
    drawn = sample(logits.expand(DRAWS, VOCAB), sampling, torch.arange(DRAWS))
    counts = drawn.bincount(minlength=VOCAB)
    want = shares(logits, sampling)
    assert not counts[want == 0].any()
    assert chi_square(counts, want * DRAWS) > UNLIKELY
    # the test can tell: a temperature 10% off would not pass
    wrong = shares(logits, replace(sampling, temperature=1.1 * sampling.temperature))
    assert chi_square(counts, wrong * DRAWS) < UNLIKELY


def test_all_off_is_softmax_by_the_gumbel_max_rule() -> None:
    logits = torch.randn(13, VOCAB)
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    drawn = sample(logits, Sampling(**off, seed=3), torch.arange(13))
    assert torch.equal(drawn, (logits + noise(3, torch.arange(13), VOCAB)).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64], ids=str)
def test_logits_are_read_as_float32(dtype: torch.dtype) -> None:
    logits, sampling = torch.randn(13, VOCAB).to(dtype), Sampling(top_p=0.9)
    assert torch.equal(sample(logits, sampling, 7), sample(logits.float(), sampling, 7))


ROWS = (
    Sampling(seed=1),
    Sampling(temperature=0.0, top_k=3),
    Sampling(top_p=0.5, seed=-1),
    Sampling(top_k=2, temperature=1.7),
    Sampling(min_p=0.3, presence_penalty=1.5),
    Sampling(repetition_penalty=1.8, frequency_penalty=-0.5, seed=2**62),
)


def counts_of(batch: int) -> Counts:
    output = torch.randint(0, 3, (batch, VOCAB), dtype=torch.int32)
    return Counts(torch.rand(batch, VOCAB) < 0.3, output)


def test_a_row_alone_draws_as_in_its_batch() -> None:
    each = ROWS * 20
    logits = torch.randn(len(each), VOCAB) * 3
    logits[:, 3] = -30  # a tail that rounding could cut
    counts, position = counts_of(len(each)), torch.arange(len(each)) // 7
    drawn = sample(logits, each, position, counts)
    for i, sampling in enumerate(each):
        row = slice(i, i + 1)
        alone = sample(logits[row], sampling, position[row], Counts(*(c[row] for c in counts)))
        assert alone == drawn[i]


def test_one_record_stands_for_all_rows_and_a_number_for_all_positions() -> None:
    logits, sampling = torch.randn(5, VOCAB), Sampling(seed=4)
    drawn = sample(logits, [sampling] * 5, torch.full((5,), 9))
    for position in (9, torch.tensor(9), torch.tensor([9]), torch.full((5,), 9).int()):
        assert torch.equal(sample(logits, sampling, position), drawn)
    assert len({tuple(sample(logits, sampling, p).tolist()) for p in range(20)}) > 10


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 1e-30, 1e-10])
def test_no_heat_is_the_likeliest(temperature: float, filters: dict[str, Any]) -> None:
    logits = torch.randn(13, VOCAB) * 4
    logits[:5, ::3] = -torch.inf
    logits[5:7] = 1e9 * logits[5:7]
    drawn = sample(logits, Sampling(temperature=temperature, **filters), torch.arange(13))
    assert torch.equal(drawn, logits.argmax(-1))


# sample: filters and penalties against transformers'.


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 20, 400])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 1.0])
def test_the_survivors_are_those_of_transformers(
    min_p: float, top_p: float, top_k: int, temperature: float
) -> None:
    from transformers.generation import logits_process as hf

    logits = torch.randn(17, 211) * 2.5
    want = hf.TemperatureLogitsWarper(temperature)(None, logits)
    want = hf.TopKLogitsWarper(top_k)(None, want) if top_k else want
    exact = want.double().softmax(-1)
    want = hf.TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    want = hf.MinPLogitsWarper(min_p)(None, want) if min_p else want
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = restrict(logits, knobs([sampling] * 17))
    # on the border, where the rounding of float32 sums decides, either may be right
    before = (exact[:, None] * (exact[:, None] > exact[..., None])).sum(-1)
    border = (before - top_p).abs() < (1e-6 if top_p < 1 else 0)
    border |= (exact - min_p * exact.amax(-1, keepdim=True)).abs() < 1e-6 * min_p
    border &= exact < exact.amax(-1, keepdim=True)  # the likeliest always stays
    assert border.double().mean() < 0.01
    assert torch.equal(got.isfinite()[~border], want.isfinite()[~border])
    kept = got.isfinite()
    assert kept.any(-1).all()
    assert torch.equal(got[kept], logits[kept])


def test_a_filter_that_is_off_cuts_no_tail() -> None:
    """In float32 these probabilities add up to 1 at the second, and the others still count."""
    logits = torch.tensor([[9.0, 9, -12, -16, -51]]).expand(4, 5)
    cold = Sampling(temperature=1e-38, top_p=0.9)  # logits over it overflow
    each = [Sampling(), Sampling(top_k=3), Sampling(min_p=1e-10), cold]
    assert restrict(logits, knobs(each)).isfinite().sum(-1).tolist() == [5, 3, 3, 2]


def test_the_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, output = torch.randint(0, VOCAB, (5, 7)), torch.randint(0, VOCAB, (5, 4))
    counts = count_prompt(prompt, torch.ones_like(prompt, dtype=torch.bool), VOCAB)
    for tokens in output.T:
        counts = count_output(counts, tokens)
    logits = torch.randn(5, VOCAB)
    for penalty in (0.7, 1.3):
        got = penalise(logits, knobs([Sampling(repetition_penalty=penalty)] * 5), counts)
        seen = torch.cat([prompt, output], dim=1)
        torch.testing.assert_close(got, RepetitionPenaltyLogitsProcessor(penalty)(seen, logits))


def test_presence_and_frequency_penalties_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts generated tokens alone."""
    each = [
        Sampling(presence_penalty=p, frequency_penalty=f) for p, f in ((0.5, 0.0), (-1.0, 0.25))
    ]
    logits, counts = torch.randn(2, VOCAB), counts_of(2)
    got = penalise(logits, knobs(each), counts)
    for b, s in enumerate(each):
        for j, c in enumerate(counts.output[b].tolist()):
            want = float(logits[b, j]) - c * s.frequency_penalty - (c > 0) * s.presence_penalty
            assert float(got[b, j]) == pytest.approx(want, abs=1e-6)  # two float32 roundings


def test_penalties_change_what_is_drawn() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    counts = Counts(torch.tensor([[True, False, False]]), torch.zeros(1, 3, dtype=torch.int32))
    greedy = Sampling(temperature=0.0, repetition_penalty=1.5)
    assert sample(logits, greedy, 0, counts).tolist() == [1]
    presence = Sampling(temperature=0.0, presence_penalty=1.0)
    assert sample(logits, presence, 0, counts).tolist() == [0]  # a prompt is no presence
    counts = count_output(counts, torch.tensor([0]))
    assert sample(logits, presence, 0, counts).tolist() == [1]


# Counts and errors.


def test_counts_of_a_prompt_skip_padding_whatever_it_holds() -> None:
    tokens = torch.tensor([[3, 1, 3, 5, -1], [2, 6, 99, -7, 6]], dtype=torch.int32)
    valid = torch.arange(5) < torch.tensor([[4], [1]])
    counts = count_prompt(tokens, valid, 7)
    assert counts.prompt.long().tolist() == [[0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0]]
    assert counts.output.dtype == torch.int32
    assert not counts.output.any()


def test_counts_of_output_skip_minus_one() -> None:
    prompt = torch.rand(2, 7) < 0.5
    before = counts = Counts(prompt, torch.zeros(2, 7, dtype=torch.int32))
    for tokens in ([4, -1], [0, 0], [4, 6], [-1, -1]):
        counts = count_output(counts, torch.tensor(tokens))
    assert counts.output.tolist() == [[1, 0, 0, 0, 2, 0, 0], [1, 0, 0, 0, 0, 0, 1]]
    assert torch.equal(counts.prompt, prompt)
    assert not before.output.any()


WRONG: dict[str, Sequence[Any]] = {
    "temperature": (-0.1, math.inf, math.nan),
    "top_k": (-1,),
    "top_p": (0.0, 1.1, math.nan),
    "min_p": (-0.1, 1.1, math.nan),
    "seed": (2**63, -(2**63) - 1),
    "repetition_penalty": (0.0, -1.0, math.inf),
    "presence_penalty": (math.inf, math.nan),
    "frequency_penalty": (-math.inf,),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG.items() for v in vs])
def test_a_setting_out_of_range_is_an_error(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} must be .*, got {value!r}$"):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(VOCAB)}, "logits must be floating point"),
        ({"logits": torch.zeros(3, VOCAB, dtype=torch.int64)}, "got torch.int64"),
        ({"sampling": [Sampling()] * 2}, "one for each of the 3 rows"),
        ({"sampling": Sampling(presence_penalty=1.0)}, "pass counts"),
        ({"position": torch.arange(2)}, r"position must be .* got torch.int64 \[2\]"),
        ({"position": torch.zeros(3)}, r"position must be .* got torch.float32 \[3\]"),
        ({"position": torch.zeros(3, 1).long()}, r"position must be .* \[3, 1\]"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_errors(change: dict[str, Any], message: str) -> None:
    fitting = {"logits": torch.zeros(3, VOCAB), "sampling": Sampling(), "position": 0}
    with pytest.raises(InputError, match=message):
        sample(**(fitting | change))
