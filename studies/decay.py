"""How strong decay gets, and what formulas of the chunked delta rule make of it.

`python -m studies.decay` writes docs/images/decay_*.png and its part of studies/results.json.
`documented` is a software model of the formula that a fused call documents, not of a chip.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from qnext.functional.ops.delta_rule import delta_chunked, delta_scan
from studies.inputs import (
    IMAGES,
    RESULTS,
    Inputs,
    demo_inputs,
    demo_tokens,
    random_inputs,
    record,
    relative_rms,
)

DOCUMENTED = -1.0  # the least log decay that the fused call documents
SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0)
LENGTHS = (64, 256, 1024)
Result = tuple[Tensor, Tensor]


def to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def unrounded(x: Tensor) -> Tensor:
    return x


def by_difference(c: Tensor, since: Tensor) -> Tensor:
    """exp(c - since) where c is the later sum, masked before the exponential."""
    return (c - since).clamp(max=0).exp()


def by_division(c: Tensor, since: Tensor) -> Tensor:
    """exp(c) / exp(since): equal on paper, 0 / 0 once both underflow."""
    return c.exp() / since.exp()


def documented(
    inputs: Inputs,
    *,
    decay: Callable[[Tensor, Tensor], Tensor] = by_difference,
    rounded: Callable[[Tensor], Tensor] = to_bfloat16,
    dtype: torch.dtype = torch.float32,
    chunk: int = 64,
    block: int = 32,
) -> Result:
    """(outputs, last state) by the documented formula of the fused chunked call.

    `rounded` stands at each of its roundings, `decay` forms exp(c_i - c_j) from cumulative sums.
    """
    r, (q, k, v, g, beta) = rounded, inputs.scaled(dtype)
    scale = q.shape[-1] ** -0.5
    group = v.shape[2] // k.shape[2]
    q = inputs.query.to(dtype)
    q, k = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (q, k))
    v, g, beta = (x.transpose(1, 2) for x in (v, g, beta))
    state, outputs = inputs.zero_state(dtype), []
    for at in range(0, v.shape[2], chunk):
        qc, kc, vc, gc, bc = (x[:, :, at : at + chunk] for x in (q, k, v, g, beta))
        bc, c = bc[..., None], gc.cumsum(-1)
        size = c.shape[-1]
        lower = torch.ones(size, size, dtype=torch.bool).tril()
        between = decay(c[..., :, None], c[..., None, :]).where(lower, 0)
        since, to_end = c.exp()[..., None], decay(c[..., -1:], c)[..., None]
        kept = since[..., -1:, :]
        a = (-bc * r(kc @ kc.mT) * between).tril(-1)
        m = _inverse(a, r, block)
        w, u = r(m @ r(-bc * since * kc)), r(m @ r(bc * vc))
        inter = r(r(qc * scale * since) @ state.mT)
        writes = r(u + r(w @ state.mT))
        scores = r(r(qc @ kc.mT) * scale * between)
        outputs.append(r(r(scores @ writes) + inter))
        state = r(r(state * kept) + writes.mT @ r(kc * to_end))
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _inverse(a: Tensor, r: Callable[[Tensor], Tensor], block: int) -> Tensor:
    """(I - a)^-1 of a strictly lower a: blocks of the diagonal, then products below it."""
    size = a.shape[-1]
    eye = torch.eye(size, dtype=a.dtype)
    if size <= block:
        return r(torch.linalg.solve_triangular(eye - a, eye, upper=False, unitriangular=True))
    upper = _inverse(a[..., :block, :block], r, block)
    lower = _inverse(a[..., block:, block:], r, block)
    m = torch.zeros_like(a)
    m[..., :block, :block], m[..., block:, block:] = upper, lower
    m[..., block:, :block] = r(r(lower @ r(a[..., block:, :block])) @ upper)
    return m


def theorem(inputs: Inputs) -> Result:
    """This project's chunked form in float32."""
    return delta_chunked(*inputs.scaled(torch.float32), inputs.zero_state(torch.float32))


def clamped(inputs: Inputs) -> Result:
    """The definition with g cut to the documented range: what a clamp as guard would compute."""
    return definition(inputs._replace(g=inputs.g.clamp(min=DOCUMENTED)))


def definition(inputs: Inputs) -> Result:
    """The scan over tokens in float64."""
    wide = torch.float64
    return delta_scan(*inputs.scaled(wide), inputs.zero_state(wide), each=False)


METHODS: dict[str, Callable[[Inputs], Result]] = {
    "documented, differences": documented,
    "documented, divided": lambda x: documented(x, decay=by_division),
    "differences, not rounded": lambda x: documented(x, rounded=unrounded),
    "chunked theorem": theorem,
    "definition, g clamped": clamped,
}


def compare(inputs: Inputs) -> dict[str, dict[str, float | None]]:
    """Relative RMS of each method's outputs and last state; None where not finite."""
    inputs = inputs.as_fused()
    want = definition(inputs)
    rows: dict[str, dict[str, float | None]] = {}
    for name, method in METHODS.items():
        errors = [relative_rms(got, right) for got, right in zip(method(inputs), want, strict=True)]
        out, state = (e if e == e and e < float("inf") else None for e in errors)
        rows[name] = {"output": out, "state": state}
    return rows


def spikes(seq: int, scale: float, *, every: int = 16, **sizes: int) -> Inputs:
    """Slow decay, g in [-0.05, 0], with g = -scale at every 16th token."""
    inputs = random_inputs(seq, -0.05, **sizes)
    g = inputs.g.clone()
    g[:, ::every] = -scale
    return inputs._replace(g=g)


def sweep(
    scales: tuple[float, ...] = SCALES, lengths: tuple[int, ...] = LENGTHS, **sizes: int
) -> list[dict[str, Any]]:
    """`compare` over decay scales and lengths, for uniform and for spiky decay."""
    kinds: dict[str, Callable[[int, float], Inputs]] = {
        "uniform": lambda seq, scale: random_inputs(seq, -scale, **sizes),
        "spikes": lambda seq, scale: spikes(seq, scale, **sizes),
    }
    cases = [(kind, s, n) for kind in kinds for s in scales for n in lengths]
    return [
        {"kind": kind, "scale": scale, "seq": seq, "errors": compare(kinds[kind](seq, scale))}
        for kind, scale, seq in tqdm(cases, desc="formula", unit="case")
    ]


def reached(g: Tensor) -> dict[str, float]:
    """What log decays [..., heads] cover.

    `tokens_if_spread` is by how much a sequence grows if each token becomes as many identity
    updates as keep every head's g within the documented range.
    """
    spread = (-g / -DOCUMENTED).ceil().clamp(min=1).amax(-1).mean().item()
    g = g.flatten().double()
    return {
        "tokens_if_spread": spread,
        "values": g.numel(),
        "minimum": g.min().item(),
        "median": g.median().item(),
        "below_documented": (g < DOCUMENTED).double().mean().item(),
        "above_-0.002": (g > -0.002).double().mean().item(),
    }


def initial_decays(heads: int, tokens: int, spread: float = 0.9, seed: int = 0) -> Tensor:
    """g [tokens, heads] of a model as initialised: A uniform in (0.01, 16), dt_bias 1.

    a is a projection of a normalised vector of 2048 by weights of deviation 0.02: 0.9 wide.
    """
    generator = torch.Generator().manual_seed(seed)
    rate = 0.01 + 15.99 * torch.rand(heads, generator=generator)
    a = spread * torch.randn(tokens, heads, generator=generator)
    return -rate * softplus(a + 1)


def plot_reached(layers: dict[int, Tensor], start: Tensor, path: Path) -> None:
    """Histogram of -g per layer of the demo and of the initialisation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    bins = torch.logspace(-5, 2.2, 73).tolist()
    series = {f"demo layer {n}": g for n, g in layers.items()} | {"initialisation": start}
    for name, g in series.items():
        weights = torch.full((g.numel(),), 100 / g.numel()).numpy()
        axes.hist(
            (-g).clamp(min=1e-5).flatten().numpy(),
            bins=bins,
            weights=weights,
            histtype="step",
            label=name,
        )
    axes.axvline(1, color="black", linestyle=":", label="documented limit")
    axes.set(xscale="log", xlabel="-g, decay per token [nat]", ylabel="share of values [%]")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """Output error over the decay scale: uniform and spiky decay, the longest length."""
    import matplotlib.pyplot as plt

    longest = max(row["seq"] for row in rows)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for panel, kind in zip(panels, ("uniform", "spikes"), strict=True):
        shown = [row for row in rows if row["kind"] == kind and row["seq"] == longest]
        for (name, marker), style in zip(
            zip(METHODS, "osv^x", strict=True), ("-", "--", "-", "-", ":"), strict=True
        ):
            errors = [row["errors"][name]["output"] for row in shown]
            points = [(r["scale"], e) for r, e in zip(shown, errors, strict=True) if e]
            line = panel.plot(*zip(*points, strict=True), style, marker=marker, ms=4, label=name)
            lost = [r["scale"] for r, e in zip(shown, errors, strict=True) if e is None]
            if lost:
                color = line[0].get_color()
                height = [3.0] * len(lost)
                panel.plot(lost, height, "*", ms=9, color=color, label=f"{name}: NaN")
        panel.axvline(1, color="black", linestyle=":", linewidth=1)
        panel.set(xscale="log", yscale="log", ylim=(3e-8, 8), xlabel="decay scale, -min g [nat]")
        panel.set_title({"uniform": "g uniform", "spikes": "g spikes every 16 tokens"}[kind])
    panels[0].set_ylabel(f"relative RMS of outputs, {longest} tokens")
    panels[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(0, 0.42))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=16, help="rows of demo text")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where figures go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where numbers go")
    options = parser.parse_args()
    layers, on_demo = {}, {}
    tokens = demo_tokens(options.rows, options.seq)
    for number, inputs in tqdm(demo_inputs(tokens), desc="demo", unit="layer"):
        layers[number] = inputs.g
        on_demo[str(number)] = compare(Inputs(*(x[:2] for x in inputs)))
    start = initial_decays(32, 8192)
    rows = sweep()
    options.images.mkdir(parents=True, exist_ok=True)
    plot_reached(layers, start, options.images / "decay_reached.png")
    plot_sweep(rows, options.images / "decay_formula.png")
    values = {
        "demo": {str(n): reached(g) for n, g in layers.items()},
        "demo_errors": on_demo,
        "initialisation": reached(start),
        "formula": rows,
    }
    record("decay", values, options.results)


if __name__ == "__main__":
    main()
